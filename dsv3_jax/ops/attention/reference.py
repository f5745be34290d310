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
_SHORTEST_BLOCK = 128

Inputs = tuple[Array, Array, Array]


def _blocks(seq: int) -> list[tuple[int, int]]:
    """Query ranges; short sequences are still cut, since a block skips the keys that come after it."""
    size = min(_BLOCK, max(_SHORTEST_BLOCK, seq // 4))
    return [(start, min(start + size, seq)) for start in range(0, seq, size)]


def _scores(
    q: Array, k: Array, segment_ids: Array | None, start: int, end: int, scale: float
) -> Float[Array, "batch heads block keys"]:
    scores = matmul_f32(q[:, :, start:end], jnp.swapaxes(k[:, :, :end], -1, -2))
    hidden = jnp.arange(end) > jnp.arange(start, end)[:, None]
    if segment_ids is not None:
        hidden |= segment_ids[:, None, start:end, None] != segment_ids[:, None, None, :end]
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
    for start, end in _blocks(q.shape[2]):
        scores = _scores(q, k, segment_ids, start, end, scale)
        largest = scores.max(axis=-1, keepdims=True)
        weights = jnp.exp(scores - largest)
        total = weights.sum(axis=-1, keepdims=True)
        outputs.append((matmul_f32(weights.astype(v.dtype), v[:, :, :end]) / total).astype(v.dtype))
        sums.append(largest + jnp.log(total))
    out = checkpoint_name(jnp.concatenate(outputs, axis=2), "attention")
    log_sum_exp = checkpoint_name(jnp.concatenate(sums, axis=2), "attention")
    return out, ((q, k, v), segment_ids, out, log_sum_exp)


def _backward(
    scale: float, residuals: tuple[Inputs, Array | None, Array, Array], d_out: Float[Array, "batch heads seq v"]
) -> tuple[Array, Array, Array, None]:
    (q, k, v), segment_ids, out, log_sum_exp = residuals
    delta = (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(axis=-1, keepdims=True)
    dq, dk, dv = [], jnp.zeros_like(k, jnp.float32), jnp.zeros_like(v, jnp.float32)
    for start, end in _blocks(q.shape[2]):
        block = slice(start, end)
        probs = jnp.exp(_scores(q, k, segment_ids, start, end, scale) - log_sum_exp[:, :, block])
        d_probs = matmul_f32(d_out[:, :, block], jnp.swapaxes(v[:, :, :end], -1, -2))
        d_scores = (probs * (d_probs - delta[:, :, block]) * scale).astype(v.dtype)
        # Padded rather than added to a slice: a scatter over the whole array has an index without elements, which
        # crashes XLA's partitioner where it is hoisted out of a shard_map.
        after = ((0, 0), (0, 0), (0, q.shape[2] - end), (0, 0))
        dv += jnp.pad(transposed_matmul_f32(probs.astype(v.dtype), d_out[:, :, block]), after)
        dk += jnp.pad(transposed_matmul_f32(d_scores, q[:, :, block]), after)
        dq.append(matmul_f32(d_scores, k[:, :, :end]))
    return jnp.concatenate(dq, axis=2).astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


blockwise_attention.defvjp(_forward, _backward)
