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

WIDTHS = (128, 64, 128)
"""Of keys without and with position, and of values, in the 671B model: all that the kernels know."""

Inputs = tuple[Array, Array, Array, Array, Array]


@dataclass(frozen=True)
class Kernels:
    """How both passes run."""

    num_sms: int = 132
    """Multiprocessors of the GPU."""
    forward: ForwardConfig = field(default_factory=ForwardConfig)
    backward: BackwardConfig = field(default_factory=BackwardConfig)
    interpret: Any = None
    """Parameters of the interpreter, off GPU."""


def unsupported(q_nope: Array, q_rope: Array, v: Array) -> str | None:
    """Why the kernels cannot take these operands; None where they can."""
    if q_nope.dtype != jnp.bfloat16:
        return f"takes bfloat16, not {q_nope.dtype}"
    widths = tuple(x.shape[-1] for x in (q_nope, q_rope, v))
    return None if widths == WIDTHS else f"takes widths of {WIDTHS} (nope, rope, v), not {widths}"


@partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def kernel_attention(
    q_nope: Float[Array, "batch seq heads nope"],
    q_rope: Float[Array, "batch seq heads rope"],
    k_nope: Float[Array, "batch seq heads nope"],
    k_rope: Float[Array, "batch seq rope"],
    v: Float[Array, "batch seq heads v"],
    segment_ids: Int[Array, "batch seq"] | None,
    scale: float,
    kernels: Kernels,
) -> Float[Array, "batch seq heads v"]:
    """softmax(scale * q k^T) v over the keys at or before each query, and of its segment where there are ids."""
    return _forward(q_nope, q_rope, k_nope, k_rope, v, segment_ids, scale, kernels)[0]


def _forward(*arguments: Any) -> tuple[Array, tuple[Inputs, Array | None, Array, Array]]:
    *inputs, segment_ids, scale, kernels = arguments
    config = kernels.forward
    segments = None if segment_ids is None else first_of_segment(segment_ids, config.queries, config.keys)
    run = {"config": config, "num_sms": kernels.num_sms, "interpret": kernels.interpret}
    results = attention_forward(*inputs, segments, scale=scale, **run)
    out, log_sum_exp = (checkpoint_name(x, "attention") for x in results)
    return out, (tuple(inputs), segment_ids, out, log_sum_exp)


def _backward(
    scale: float,
    kernels: Kernels,
    residuals: tuple[Inputs, Array | None, Array, Array],
    d_out: Float[Array, "batch seq heads v"],
) -> tuple[Array | None, ...]:
    inputs, segment_ids, out, log_sum_exp = residuals
    config = kernels.backward
    segments = None if segment_ids is None else last_of_segment(segment_ids, config.keys, backward.QUERIES)
    run = {"config": config, "interpret": kernels.interpret}
    gradients = attention_backward(*inputs, segments, out, log_sum_exp, d_out, scale=scale, **run)
    return *gradients, None


kernel_attention.defvjp(_forward, _backward)
