"""Causal attention by the Hopper kernels, forward and backward."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from dsv3_jax.ops.attention import mosaic_gpu_backward as backward
from dsv3_jax.ops.attention.kernel_parts import first_of_segment, last_of_segment
from dsv3_jax.ops.attention.mosaic_gpu_backward import BackwardConfig, attention_backward
from dsv3_jax.ops.attention.mosaic_gpu_forward import ForwardConfig, attention_forward
from dsv3_jax.ops.hopper import MULTIPROCESSORS
from dsv3_jax.ops.rotary import Rotations, rotate_heads

WIDTHS = (128, 64, 128)
"""Of keys without and with position, and of values, in the 671B model: all that the kernels know."""

Residuals = tuple[Array, Array, Array, Rotations, Array | None, Array, Array]


@dataclass(frozen=True)
class Kernels:
    """How both passes run."""

    num_sms: int = MULTIPROCESSORS
    """Multiprocessors of the GPU."""
    forward: ForwardConfig = field(default_factory=ForwardConfig)
    backward: BackwardConfig = field(default_factory=BackwardConfig)
    interpret: Any = None
    """Parameters of the interpreter, off GPU."""


def unsupported(dtype: jnp.dtype, widths: tuple[int, int, int]) -> str | None:
    """Why the kernels cannot take operands of these widths (nope, rope, v); None where they can."""
    if dtype != jnp.bfloat16:
        return f"takes bfloat16, not {dtype}"
    return None if widths == WIDTHS else f"takes widths of {WIDTHS} (nope, rope, v), not {widths}"


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def kernel_attention(
    q: Float[Array, "batch seq heads nope+rope"],
    kv: Float[Array, "batch seq heads nope+v"],
    k_rope: Float[Array, "batch seq rope"],
    rotations: Rotations,
    segment_ids: Int[Array, "batch seq"] | None,
    scale: float,
    kernels: Kernels,
) -> Float[Array, "batch seq heads v"]:
    """`causal_attention` by the kernels; rotations and segment ids get no gradient."""
    return _forward(q, kv, k_rope, rotations, segment_ids, scale, kernels)[0]


def _forward(
    q: Array,
    kv: Array,
    k_rope: Array,
    rotations: Rotations,
    segment_ids: Array | None,
    scale: float,
    kernels: Kernels,
) -> tuple[Array, Residuals]:
    config = kernels.forward
    segments = None if segment_ids is None else first_of_segment(segment_ids, config.queries, config.keys)
    run = {"config": config, "num_sms": kernels.num_sms, "interpret": kernels.interpret}
    results = attention_forward(q, _rotated(q, k_rope, rotations), kv, k_rope, segments, scale=scale, **run)
    out, log_sum_exp = (checkpoint_name(x, "attention") for x in results)
    return out, (q, kv, k_rope, rotations, segment_ids, out, log_sum_exp)


def _backward(
    scale: float, kernels: Kernels, residuals: Residuals, d_out: Float[Array, "batch seq heads v"]
) -> tuple[Array | None, ...]:
    q, kv, k_rope, rotations, segment_ids, out, log_sum_exp = residuals
    config = kernels.backward
    segments = None if segment_ids is None else last_of_segment(segment_ids, config.keys, backward.QUERIES)
    run = {"config": config, "interpret": kernels.interpret}
    # Rotated again, not kept: a layer computed again then rotates once, here, and no other keeps the columns twice.
    operands = (q, _rotated(q, k_rope, rotations), kv, k_rope)
    dq, d_kv, dk_rope = attention_backward(*operands, segments, out, log_sum_exp, d_out, scale=scale, **run)
    cos, sin = rotations
    dq_nope, dq_rope = jnp.split(dq * scale, [q.shape[-1] - k_rope.shape[-1]], axis=-1)
    dq = jnp.concatenate([dq_nope, rotate_heads(dq_rope, (cos, -sin))], axis=-1).astype(q.dtype)
    return dq, d_kv, dk_rope, None, None


def _rotated(q: Array, k_rope: Array, rotations: Rotations) -> Float[Array, "batch seq heads rope"]:
    return rotate_heads(q[..., -k_rope.shape[-1] :], rotations)


kernel_attention.defvjp(_forward, _backward)
