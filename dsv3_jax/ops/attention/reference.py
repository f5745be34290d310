"""Causal attention in blocks of queries, whose memory grows with seq, not seq^2.

Queries and keys may be wider than values (report 2.1.1). The backward pass computes each block's probabilities again
from the log-sum-exp.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from dsv3_jax.ops.products import matmul_f32, transposed_matmul_f32

_BLOCK = 512
_SHORTEST_BLOCK = 64

Inputs = tuple[Array, Array, Array]


def _blocks(seq: int) -> list[tuple[int, int]]:
    """Query ranges; short sequences are still cut, since a block skips the keys that come after it."""
    size = min(_BLOCK, max(_SHORTEST_BLOCK, seq // 4))
    return [(start, min(start + size, seq)) for start in range(0, seq, size)]


def _scores(
    q: Array, k: Array, segment_ids: Array | None, start: int, end: int, scale: float
) -> Float[Array, "batch heads keys block"]:
    """Of a block of queries, keys first: so that the backward pass, whose products contract over the queries of
    probabilities and their gradients, transposes neither."""
    scores = matmul_f32(k[:, :, :end], jnp.swapaxes(q[:, :, start:end], -1, -2))
    hidden = jnp.arange(end)[:, None] > jnp.arange(start, end)
    if segment_ids is not None:
        hidden |= segment_ids[:, None, :end, None] != segment_ids[:, None, None, start:end]
    return jnp.where(hidden, -jnp.inf, scores * scale)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def blockwise_attention(
    q: Float[Array, "batch heads seq qk"],
    k: Float[Array, "batch heads seq qk"],
    v: Float[Array, "batch heads seq v"],
    segment_ids: Int[Array, "batch seq"] | None,
    scale: float,
) -> Float[Array, "batch heads seq v"]:
    """softmax(scale * q k^T) v over the keys at or before each query, and of its segment where there are ids; softmax
    in float32."""
    return _forward(q, k, v, segment_ids, scale)[0]


def _forward(
    q: Array, k: Array, v: Array, segment_ids: Array | None, scale: float
) -> tuple[Array, tuple[Inputs, Array | None, Array, Array]]:
    outputs, sums = [], []
    # A column of ones beside the values makes the weights' sum a part of their product: one pass less over all scores.
    summed = jnp.concatenate([v, jnp.ones_like(v[..., :1])], axis=-1)
    for start, end in _blocks(q.shape[2]):
        scores = _scores(q, k, segment_ids, start, end, scale)
        largest = scores.max(axis=-2, keepdims=True)
        weights = jnp.exp(scores - largest).astype(v.dtype)
        weighted, total = jnp.split(transposed_matmul_f32(summed[:, :, :end], weights), [v.shape[-1]], axis=-2)
        outputs.append(jnp.swapaxes((weighted / total).astype(v.dtype), -1, -2))
        sums.append(largest + jnp.log(total))
    out = checkpoint_name(jnp.concatenate(outputs, axis=2), "attention")
    log_sum_exp = checkpoint_name(jnp.concatenate(sums, axis=3), "attention")
    return out, ((q, k, v), segment_ids, out, log_sum_exp)


def _backward(
    scale: float, residuals: tuple[Inputs, Array | None, Array, Array], d_out: Float[Array, "batch heads seq v"]
) -> tuple[Array, Array, Array, None]:
    (q, k, v), segment_ids, out, log_sum_exp = residuals
    # Where forward and backward are one piece of code, XLA would find the scores equal, and keep them all.
    q = jax.lax.optimization_barrier(q)
    delta = (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(axis=-1)[:, :, None]
    dq, dk, dv = [], jnp.zeros_like(k, jnp.float32), jnp.zeros_like(v, jnp.float32)
    for start, end in _blocks(q.shape[2]):
        block = slice(start, end)
        probs = jnp.exp(_scores(q, k, segment_ids, start, end, scale) - log_sum_exp[..., block]).astype(v.dtype)
        d_probs = matmul_f32(v[:, :, :end], jnp.swapaxes(d_out[:, :, block], -1, -2))
        d_scores = (probs * (d_probs - delta[..., block]) * scale).astype(v.dtype)
        # Padded rather than added to a slice: a scatter over the whole array has an index without elements, which
        # crashes XLA's partitioner where it is hoisted out of a shard_map.
        after = ((0, 0), (0, 0), (0, q.shape[2] - end), (0, 0))
        dv += jnp.pad(matmul_f32(probs, d_out[:, :, block]), after)
        dk += jnp.pad(matmul_f32(d_scores, q[:, :, block]), after)
        dq.append(jnp.swapaxes(transposed_matmul_f32(k[:, :, :end], d_scores).astype(q.dtype), -1, -2))
    return jnp.concatenate(dq, axis=2), dk.astype(k.dtype), dv.astype(v.dtype), None


blockwise_attention.defvjp(_forward, _backward)
