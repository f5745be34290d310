"""Output head and cross-entropy in chunks of tokens, so that all logits never exist at once.

When differentiated, each chunk's gradient is computed beside its loss, so the logits are computed only once.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax.ops.chunk import chunk_tokens
from dsv3_jax.ops.products import matmul_f32, transposed_matmul_f32
from dsv3_jax.ops.weights import MixedWeight, Weight


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CrossEntropy:
    """Sums over the weighted tokens: of the loss in nats, and of the tokens whose label has the largest logit."""

    loss: Float[Array, ""]
    correct: Float[Array, ""]


def chunked_cross_entropy(
    hidden: Float[Array, "tokens d_model"],
    head: Weight,
    labels: Int[Array, " tokens"],
    token_weights: Float[Array, " tokens"],
    chunk: int | None = None,
) -> CrossEntropy:
    """Weighted sum of -log softmax(hidden @ head)[label], float32; head is [d_model, vocab].

    Logits of at most `chunk` tokens exist at a time; None takes `chunk_tokens`. The gradient of a `MixedWeight` head is
    float32.
    """
    tokens = hidden.shape[0]
    value, slot = (head.value, head.slot) if isinstance(head, MixedWeight) else (head.astype(hidden.dtype), head)
    most = min(chunk or chunk_tokens(value.shape[1]), tokens)
    chunks = -(-tokens // most)
    # As even as tiles of 128 allow: padding is computed too.
    chunk = min(most, -(-tokens // (chunks * 128)) * 128)
    pad = chunks * chunk - tokens

    def split(x: Array) -> Array:
        padded = jnp.pad(x, ((0, pad), *[(0, 0)] * (x.ndim - 1)))
        return padded.reshape(chunks, chunk, *x.shape[1:])

    loss, correct = _cross_entropy(split(hidden), value, slot, split(labels), split(token_weights))
    return CrossEntropy(loss, correct)


def _chunk_loss(h: Array, head: Array, labels: Array, weights: Array) -> tuple[Array, Array, Array]:
    """Loss and correct sums of a chunk, and the gradient of the loss with respect to its logits."""
    logits = matmul_f32(h, head)
    # XLA's CPU compiler does not vectorize a reduction of pairs.
    top, total = jax.lax.platform_dependent(logits, cpu=top_and_total, default=online_top_and_total)
    top, total = top[:, None], total[:, None]
    exps = jnp.exp(logits - top)
    label_logit = jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
    loss = (top + jnp.log(total))[:, 0] - label_logit
    correct = label_logit >= top[:, 0]
    # Compared rather than added at the labels: a scatter would write the logits once more.
    at_label = jnp.arange(logits.shape[1]) == labels[:, None]
    d_logits = exps * (weights[:, None] / total) - jnp.where(at_label, weights[:, None], 0)
    return (loss * weights).sum(), (correct * weights).sum(), d_logits


Sums = tuple[Float[Array, " tokens"], Float[Array, " tokens"]]


def top_and_total(logits: Float[Array, "tokens vocab"]) -> Sums:
    """The largest logit of each token, and the sum of all exp(logit - largest)."""
    top = logits.max(axis=-1)
    return top, jnp.exp(logits - top[:, None]).sum(axis=-1)


def online_top_and_total(logits: Float[Array, "tokens vocab"]) -> Sums:
    """`top_and_total` from one reading of the logits."""

    def combine(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
        top = jnp.maximum(a[0], b[0])
        return top, a[1] * jnp.exp(a[0] - top) + b[1] * jnp.exp(b[0] - top)

    least = jnp.finfo(logits.dtype).min  # not -inf, whose difference with itself is no number
    return jax.lax.reduce((logits, jnp.ones_like(logits)), (least, jnp.zeros((), logits.dtype)), combine, (1,))


@jax.custom_vjp
def _cross_entropy(h: Array, head: Array, slot: Array, labels: Array, weights: Array) -> tuple[Array, Array]:
    losses, corrects = jax.lax.map(lambda c: _chunk_loss(c[0], head, c[1], c[2])[:2], (h, labels, weights))
    return losses.sum(), corrects.sum()


def _cross_entropy_fwd(h: Array, head: Array, slot: Array, labels: Array, weights: Array) -> tuple:
    def step(d_head: Array, chunk: tuple[Array, Array, Array]) -> tuple[Array, tuple[Array, Array, Array]]:
        loss, correct, d_logits = _chunk_loss(chunk[0], head, chunk[1], chunk[2])
        d_logits = d_logits.astype(h.dtype)
        d_head += transposed_matmul_f32(chunk[0], d_logits)
        return d_head, (loss, correct, jnp.einsum("tv,dv->td", d_logits, head))

    zeros = jnp.zeros_like(slot, jnp.float32)
    d_head, (losses, corrects, d_h) = jax.lax.scan(step, zeros, (h, labels, weights))
    return (losses.sum(), corrects.sum()), (d_h, d_head.astype(slot.dtype))


def _cross_entropy_bwd(residuals: tuple[Array, Array], cotangents: tuple[Array, Array]) -> tuple:
    d_h, d_head = residuals
    d_loss = cotangents[0]
    return (d_h * d_loss).astype(d_h.dtype), None, (d_head * d_loss).astype(d_head.dtype), None, None


_cross_entropy.defvjp(_cross_entropy_fwd, _cross_entropy_bwd)
