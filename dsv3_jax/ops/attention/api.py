"""Causal attention for MLA's training form: picks an implementation."""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from dsv3_jax.ops.attention.reference import blockwise_attention

Implementation = Literal["reference", "cudnn"]


def causal_attention(
    q_nope: Float[Array, "batch seq heads nope"],
    q_rope: Float[Array, "batch seq heads rope"],
    k_nope: Float[Array, "batch seq heads nope"],
    k_rope: Float[Array, "batch seq rope"],
    v: Float[Array, "batch seq heads v"],
    scale: float,
    implementation: Implementation | None = None,
) -> Float[Array, "batch seq heads v"]:
    """softmax(scale * q k^T) v with q = [q_nope | q_rope], k = [k_nope | k_rope], causal (report 2.1.1).

    None takes cuDNN where it can run (16-bit operands on a GPU, values no wider than keys) and the blockwise reference
    elsewhere. A named implementation that cannot run raises NotImplementedError, an unknown name ValueError.
    """
    if implementation not in (None, *get_args(Implementation)):
        choices = ", ".join(map(repr, get_args(Implementation)))
        raise ValueError(f"implementation={implementation!r}: choose one of {choices}, or None")
    refusal = _cudnn_refusal(q_nope, q_rope, v)
    if implementation == "cudnn" and refusal:
        raise NotImplementedError(f"cudnn attention {refusal}: use implementation='reference'")
    shared = jnp.broadcast_to(k_rope[:, :, None], (*k_nope.shape[:3], k_rope.shape[-1]))
    q = jnp.concatenate([q_nope, q_rope], axis=-1)
    k = jnp.concatenate([k_nope, shared], axis=-1)
    if implementation == "reference" or (implementation is None and refusal):
        heads_first = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
        return jnp.swapaxes(blockwise_attention(*heads_first, scale), 1, 2)
    return _cudnn_attention(q, k, v, scale)


def _cudnn_refusal(q_nope: Array, q_rope: Array, v: Array) -> str | None:
    if jax.default_backend() != "gpu":
        return f"needs a GPU, the backend is {jax.default_backend()}"
    if q_nope.dtype not in (jnp.bfloat16, jnp.float16):
        return f"takes 16-bit operands, not {q_nope.dtype}"
    keys, values = q_nope.shape[-1] + q_rope.shape[-1], v.shape[-1]
    if values > keys:
        return f"needs values no wider than keys, not {values} against {keys}"
    return None


def _cudnn_attention(q: Array, k: Array, v: Array, scale: float) -> Float[Array, "batch seq heads v"]:
    """jax's public entry wants values as wide as keys, so they are padded."""
    extra = q.shape[-1] - v.shape[-1]
    padded = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, extra)))
    out = jax.nn.dot_product_attention(q, k, padded, scale=scale, is_causal=True, implementation="cudnn")
    return checkpoint_name(out[..., : v.shape[-1]], "attention")
