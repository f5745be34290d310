"""Causal attention for MLA's training form: picks an implementation."""

from typing import Literal, get_args

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax.ops import hopper
from dsv3_jax.ops.attention import cudnn, mosaic_gpu
from dsv3_jax.ops.attention.reference import blockwise_attention

Implementation = Literal["reference", "cudnn", "mosaic_gpu"]


def causal_attention(
    q_nope: Float[Array, "batch seq heads nope"],
    q_rope: Float[Array, "batch seq heads rope"],
    k_nope: Float[Array, "batch seq heads nope"],
    k_rope: Float[Array, "batch seq rope"],
    v: Float[Array, "batch seq heads v"],
    scale: float,
    implementation: Implementation | None = None,
    segment_ids: Int[Array, "batch seq"] | None = None,
) -> Float[Array, "batch seq heads v"]:
    """softmax(scale * q k^T) v with q = [q_nope | q_rope], k = [k_nope | k_rope], causal (report 2.1.1).

    With `segment_ids`, of packed samples, a query sees only keys with its own id. None takes the Hopper kernels where
    they can run (bfloat16, the 671B model's widths), else cuDNN where it can (16-bit operands on a GPU, values no wider
    than keys, no segments), else the blockwise reference. A named implementation that cannot run raises
    NotImplementedError, an unknown name ValueError.
    """
    refusals = {
        "mosaic_gpu": mosaic_gpu.unsupported(q_nope, q_rope, v) or hopper.device_refusal(),
        "cudnn": cudnn.unsupported(q_nope, q_rope, v, segment_ids is not None),
        "reference": None,
    }
    if implementation not in (None, *refusals):
        choices = ", ".join(map(repr, get_args(Implementation)))
        raise ValueError(f"implementation={implementation!r}: choose one of {choices}, or None")
    if implementation and refusals[implementation]:
        raise NotImplementedError(
            f"{implementation} attention {refusals[implementation]}: use implementation='reference'"
        )
    chosen = implementation or next(name for name, refusal in refusals.items() if refusal is None)
    if chosen == "mosaic_gpu":
        kernels = mosaic_gpu.Kernels(hopper.multiprocessors())
        return mosaic_gpu.kernel_attention(q_nope, q_rope, k_nope, k_rope, v, segment_ids, scale, kernels)
    shared = jnp.broadcast_to(k_rope[:, :, None], (*k_nope.shape[:3], k_rope.shape[-1]))
    q = jnp.concatenate([q_nope, q_rope], axis=-1)
    k = jnp.concatenate([k_nope, shared], axis=-1)
    if chosen == "cudnn":
        return cudnn.cudnn_attention(q, k, v, scale)
    heads_first = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    return jnp.swapaxes(blockwise_attention(*heads_first, segment_ids, scale), 1, 2)
