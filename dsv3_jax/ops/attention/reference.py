"""Causal attention in blocks of queries, whose memory grows with seq, not seq^2.

Queries and keys are wider than values, and the rotary part of the keys is shared by all heads (report 2.1.1): it is
never copied per head. The backward pass computes each block's probabilities again from the log-sum-exp.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from dsv3_jax.ops.products import einsum_f32

_BLOCK = 512
_SHORTEST_BLOCK = 128

Inputs = tuple[Array, Array, Array, Array, Array]


def _blocks(seq: int) -> list[tuple[int, int]]:
    """Query ranges; short sequences are still cut, since a block skips the keys that come after it."""
    size = min(_BLOCK, max(_SHORTEST_BLOCK, seq // 4))
    return [(start, min(start + size, seq)) for start in range(0, seq, size)]


def _scores(inputs: Inputs, start: int, end: int, scale: float) -> Float[Array, "batch heads block keys"]:
    q_nope, q_rope, k_nope, k_rope, _ = inputs
    scores = einsum_f32("bqhd,bkhd->bhqk", q_nope[:, start:end], k_nope[:, :end]) + einsum_f32(
        "bqhd,bkd->bhqk", q_rope[:, start:end], k_rope[:, :end]
    )
    hidden = jnp.arange(end) > jnp.arange(start, end)[:, None]
    return jnp.where(hidden, -jnp.inf, scores * scale)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def blockwise_attention(
    q_nope: Float[Array, "batch seq heads nope"],
    q_rope: Float[Array, "batch seq heads rope"],
    k_nope: Float[Array, "batch seq heads nope"],
    k_rope: Float[Array, "batch seq rope"],
    v: Float[Array, "batch seq heads v"],
    scale: float,
) -> Float[Array, "batch seq heads v"]:
    """softmax(scale * (q_nope k_nope + q_rope k_rope)) v over the keys at or before each query."""
    return _forward(q_nope, q_rope, k_nope, k_rope, v, scale)[0]


def _forward(q_nope: Array, q_rope: Array, k_nope: Array, k_rope: Array, v: Array, scale: float) -> tuple:
    inputs = (q_nope, q_rope, k_nope, k_rope, v)
    outputs, sums = [], []
    for start, end in _blocks(q_nope.shape[1]):
        scores = _scores(inputs, start, end, scale)
        largest = scores.max(axis=-1, keepdims=True)
        weights = jnp.exp(scores - largest)
        total = weights.sum(axis=-1, keepdims=True)
        block = einsum_f32("bhqk,bkhd->bqhd", weights.astype(v.dtype), v[:, :end])
        outputs.append((block / jnp.swapaxes(total, 1, 2)).astype(v.dtype))
        sums.append((largest + jnp.log(total))[..., 0])
    out = checkpoint_name(jnp.concatenate(outputs, axis=1), "attention")
    log_sum_exp = checkpoint_name(jnp.concatenate(sums, axis=-1), "attention")
    return out, (inputs, out, log_sum_exp)


def _backward(scale: float, residuals: tuple, d_out: Float[Array, "batch seq heads v"]) -> Inputs:
    inputs, out, log_sum_exp = residuals
    q_nope, q_rope, k_nope, k_rope, v = inputs
    delta = einsum_f32("bqhd,bqhd->bhq", out, d_out)
    dq_nope, dq_rope = [], []
    dk_nope, dk_rope, dv = (jnp.zeros_like(x, jnp.float32) for x in (k_nope, k_rope, v))
    for start, end in _blocks(q_nope.shape[1]):
        probs = jnp.exp(_scores(inputs, start, end, scale) - log_sum_exp[:, :, start:end, None])
        d_block = d_out[:, start:end]
        d_probs = einsum_f32("bqhd,bkhd->bhqk", d_block, v[:, :end])
        d_scores = (probs * (d_probs - delta[:, :, start:end, None]) * scale).astype(v.dtype)
        dv = dv.at[:, :end].add(einsum_f32("bhqk,bqhd->bkhd", probs.astype(v.dtype), d_block))
        dk_nope = dk_nope.at[:, :end].add(einsum_f32("bhqk,bqhd->bkhd", d_scores, q_nope[:, start:end]))
        dk_rope = dk_rope.at[:, :end].add(einsum_f32("bhqk,bqhd->bkd", d_scores, q_rope[:, start:end]))
        dq_nope.append(einsum_f32("bhqk,bkhd->bqhd", d_scores, k_nope[:, :end]))
        dq_rope.append(einsum_f32("bhqk,bkd->bqhd", d_scores, k_rope[:, :end]))
    grads = (jnp.concatenate(dq_nope, 1), jnp.concatenate(dq_rope, 1), dk_nope, dk_rope, dv)
    return tuple(grad.astype(x.dtype) for grad, x in zip(grads, inputs, strict=True))


blockwise_attention.defvjp(_forward, _backward)
