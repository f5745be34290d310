"""Causal attention for MLA's training form: picks an implementation."""

from typing import Literal

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

    None takes cuDNN for 16-bit operands on a GPU and the blockwise reference elsewhere. A named implementation that
    cannot run raises NotImplementedError.
    """
    refusal = _cudnn_refusal(q_nope)
    if implementation == "cudnn" and refusal:
        raise NotImplementedError(f"cudnn attention {refusal}: use implementation='reference'")
    if implementation == "reference" or (implementation is None and refusal):
        return blockwise_attention(q_nope, q_rope, k_nope, k_rope, v, scale)
    return _cudnn_attention(q_nope, q_rope, k_nope, k_rope, v, scale)


def _cudnn_refusal(q: Array) -> str | None:
    if jax.default_backend() != "gpu":
        return f"needs a GPU, the backend is {jax.default_backend()}"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"takes 16-bit operands, not {q.dtype}"
    return None


def _cudnn_attention(q_nope: Array, q_rope: Array, k_nope: Array, k_rope: Array, v: Array, scale: float) -> Array:
    """jax's public entry wants values as wide as keys, so they are padded."""
    heads = k_nope.shape[2]
    q = jnp.concatenate([q_nope, q_rope], axis=-1)
    shared = jnp.broadcast_to(k_rope[:, :, None], (*k_rope.shape[:2], heads, k_rope.shape[-1]))
    k = jnp.concatenate([k_nope, shared], axis=-1)
    width = q.shape[-1]
    if width < v.shape[-1]:
        raise NotImplementedError(f"values ({v.shape[-1]}) wider than keys ({width}): use implementation='reference'")
    padded = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, width - v.shape[-1])))
    out = jax.nn.dot_product_attention(q, k, padded, scale=scale, is_causal=True, implementation="cudnn")
    return checkpoint_name(out[..., : v.shape[-1]], "attention")
