"""Causal attention for MLA's training form: picks an implementation."""

from typing import Literal, get_args

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax.ops import hopper
from dsv3_jax.ops.attention import cudnn, mosaic_gpu
from dsv3_jax.ops.attention.reference import blockwise_attention
from dsv3_jax.ops.rotary import Rotations, rotate_heads

Implementation = Literal["reference", "cudnn", "mosaic_gpu"]


def causal_attention(
    q: Float[Array, "batch seq heads nope+rope"],
    kv: Float[Array, "batch seq heads nope+v"],
    k_rope: Float[Array, "batch seq rope"],
    rotations: Rotations,
    scale: float,
    implementation: Implementation | None = None,
    segment_ids: Int[Array, "batch seq"] | None = None,
) -> Float[Array, "batch seq heads v"]:
    """softmax(scale * q k^T) v, causal, of queries, keys and values as their projections write them (report 2.1.1).

    The last columns of q, as many as k_rope has, are rotated here by `rotations`, cos and sin of the positions, [seq,
    pairs]; k_rope, which all heads share, is rotated already. kv holds a head's keys without position, then its values.

    With `segment_ids`, of packed samples, a query sees only keys with its own id. None takes the Hopper kernels where
    they can run (bfloat16, the 671B model's widths), else cuDNN where it can (16-bit operands on a GPU, values no wider
    than keys, no segments), else the blockwise reference. A named implementation that cannot run raises
    NotImplementedError, an unknown name ValueError.
    """
    rope = k_rope.shape[-1]
    nope = q.shape[-1] - rope
    width = kv.shape[-1] - nope
    refusals = {
        "mosaic_gpu": mosaic_gpu.unsupported(q.dtype, (nope, rope, width)) or hopper.device_refusal(),
        "cudnn": cudnn.unsupported(q.dtype, nope + rope, width, segment_ids is not None),
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
        return mosaic_gpu.kernel_attention(q, kv, k_rope, rotations, segment_ids, scale, kernels)
    operands = queries_keys_values(q, kv, k_rope, rotations)
    if chosen == "cudnn":
        return cudnn.cudnn_attention(*operands, scale)
    heads_first = (jnp.swapaxes(x, 1, 2) for x in operands)
    return jnp.swapaxes(blockwise_attention(*heads_first, segment_ids, scale), 1, 2)


def queries_keys_values(
    q: Float[Array, "batch seq heads nope+rope"],
    kv: Float[Array, "batch seq heads nope+v"],
    k_rope: Float[Array, "batch seq rope"],
    rotations: Rotations,
) -> tuple[
    Float[Array, "batch seq heads nope+rope"],
    Float[Array, "batch seq heads nope+rope"],
    Float[Array, "batch seq heads v"],
]:
    """Rotated queries, whole keys and values, of the operands of `causal_attention`, as other attentions take them."""
    q_nope, q_rope = jnp.split(q, [q.shape[-1] - k_rope.shape[-1]], axis=-1)
    k_nope, v = jnp.split(kv, [q_nope.shape[-1]], axis=-1)
    shared = jnp.broadcast_to(k_rope[:, :, None], q_rope.shape)
    q = jnp.concatenate([q_nope, rotate_heads(q_rope, rotations)], axis=-1)
    return q, jnp.concatenate([k_nope, shared], axis=-1), v
