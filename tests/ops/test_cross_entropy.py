"""Chunked cross-entropy against log_softmax of all logits, which it never forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.ops.chunk import chunk_tokens
from dsv3_jax.ops.cross_entropy import chunked_cross_entropy
from dsv3_jax.ops.cross_entropy.api import online_top_and_total, top_and_total
from dsv3_jax.ops.weights import MixedWeight

TOKENS, WIDTH, VOCAB = 60, 8, 50


def naive(hidden, head, labels, weights):
    log_probs = jax.nn.log_softmax(hidden @ head, axis=-1)
    loss = -(jnp.take_along_axis(log_probs, labels[:, None], axis=-1)[:, 0] * weights).sum()
    return loss, ((log_probs.argmax(axis=-1) == labels) * weights).sum()


@pytest.fixture(scope="module")
def operands():
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (TOKENS, WIDTH))
    head = jax.random.normal(keys[1], (WIDTH, VOCAB))
    # Half of the labels are the likeliest token, so that accuracy is neither 0 nor 1.
    random = jax.random.randint(keys[2], (TOKENS,), 0, VOCAB)
    labels = jnp.where(jnp.arange(TOKENS) % 2, (hidden @ head).argmax(axis=-1), random)
    weights = jax.random.uniform(keys[3], (TOKENS,)).at[::7].set(0)
    return hidden, head, labels, weights


@pytest.fixture(scope="module")
def full_softmax(operands):
    """(loss, correct), and the gradients of 0.7 of the loss."""
    hidden, head, labels, weights = operands

    @jax.jit
    def run(hidden, head):
        sums, pullback = jax.vjp(lambda *x: naive(*x, labels, weights), hidden, head)
        return sums, pullback((0.7, 0.0))

    return run(hidden, head)


@pytest.mark.parametrize("chunk", [1, 16, 20, 59, 60, 1024])
def test_loss_accuracy_and_gradients_are_those_of_the_full_softmax(operands, full_softmax, chunk):
    hidden, head, labels, weights = operands

    def ours(hidden, head):
        sums = chunked_cross_entropy(hidden, head, labels, weights, chunk)
        return 0.7 * sums.loss, sums

    @jax.jit
    def run(hidden, head):
        return jax.value_and_grad(ours, argnums=(0, 1), has_aux=True)(hidden, head), ours(hidden, head)[1]

    ((_, sums), grads), undifferentiated = run(hidden, head)
    (loss, correct), expected_grads = full_softmax
    for s in (sums, undifferentiated):
        np.testing.assert_allclose(s.loss, loss, rtol=1e-5)
        np.testing.assert_allclose(s.correct, correct, rtol=1e-5)
    for a, b in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_tokens_of_weight_zero_have_neither_loss_nor_gradient(operands):
    hidden, head, labels, weights = operands
    masked = np.asarray(weights) == 0
    assert masked.any()
    loss, d_hidden = jax.value_and_grad(lambda h: chunked_cross_entropy(h, head, labels, weights, 16).loss)(hidden)
    assert not np.asarray(d_hidden)[masked].any()
    elsewhere = jnp.where(masked[:, None], 9.0, hidden)
    np.testing.assert_allclose(chunked_cross_entropy(elsewhere, head, labels, weights, 16).loss, loss, rtol=1e-6)
    none = chunked_cross_entropy(hidden, head, labels, jnp.zeros(TOKENS), 16)
    assert float(none.loss) == float(none.correct) == 0


def test_loss_is_finite_for_huge_logits(operands):
    _, _, labels, weights = operands
    hidden = jnp.full((TOKENS, WIDTH), 1e3)
    head = jnp.zeros((WIDTH, VOCAB)).at[:, 0].set(1e3)
    loss, grads = jax.value_and_grad(lambda h: chunked_cross_entropy(h, head, labels, weights, 16).loss)(hidden)
    assert jnp.isfinite(loss)
    assert jnp.isfinite(grads).all()


def test_all_logits_never_exist_at_once(operands, computed_shapes):
    hidden, head, labels, weights = operands

    def gradient(hidden, head):
        return jax.value_and_grad(lambda *x: chunked_cross_entropy(*x, labels, weights, 16).loss, argnums=(0, 1))(
            hidden, head
        )

    def largest_logits(function) -> int:
        shapes = computed_shapes(function, hidden, head)
        return max(int(np.prod(shape)) for shape in shapes if shape[-1:] == (VOCAB,))

    forward = lambda h, w: chunked_cross_entropy(h, w, labels, weights, 16).loss  # noqa: E731
    assert largest_logits(forward) == 16 * VOCAB
    assert largest_logits(gradient) == 16 * VOCAB
    assert largest_logits(lambda h, w: naive(h, w, labels, weights)) == TOKENS * VOCAB


def test_chunks_are_as_even_as_tiles_allow(computed_shapes):
    hidden, head = jnp.zeros((520, WIDTH)), jnp.zeros((WIDTH, VOCAB))
    run = lambda h, w: chunked_cross_entropy(h, w, jnp.zeros(520, jnp.int32), jnp.ones(520), 512).loss  # noqa: E731
    rows = {shape[0] for shape in computed_shapes(run, hidden, head) if len(shape) == 2 and shape[1] == VOCAB}
    assert max(rows) == 384  # two of these hold 520; of 512, 504 tokens would be padding


@pytest.mark.parametrize("vocab", [300, 32000, 129280, 10**9])
def test_a_chunks_logits_take_at_most_half_a_gib(vocab):
    chunk = chunk_tokens(vocab)
    assert chunk == 1 or chunk * vocab * 4 <= 2**29 < (chunk + 128) * vocab * 4


def test_bf16_head_gets_the_float32_gradient(operands):
    hidden, head, labels, _ = operands
    hidden, value = hidden.astype(jnp.bfloat16), head.astype(jnp.bfloat16)
    # Tokens of one kind, whose small gradients add up to more than bfloat16 resolves.
    hidden, labels = jnp.tile(hidden[:1], (1001, 1)), jnp.tile(labels[:1], 1001)
    weights = jnp.ones(1001)

    def loss(weight):
        return chunked_cross_entropy(hidden, weight, labels, weights, 128).loss

    grad = jax.grad(loss, allow_int=True)(MixedWeight(value, jnp.zeros(value.shape, jnp.float32))).slot
    assert grad.dtype == jnp.float32
    # The products read bf16 operands, and the gradient of the logits is one of them.
    one, label = np.float32(hidden[0]), int(labels[0])
    d_logits = jax.nn.softmax(hidden[0].astype(jnp.float32) @ value.astype(jnp.float32)).at[label].add(-1)
    expected = 1001 * np.outer(one, np.float32(d_logits.astype(jnp.bfloat16)))
    np.testing.assert_allclose(grad, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())


def test_one_reading_of_the_logits_finds_what_two_find():
    rng = np.random.default_rng(0)
    logits = (100 * rng.standard_normal((7, 300))).astype(np.float32)
    logits[0], logits[1, 3], logits[2, 5] = -3e38, np.inf, np.nan
    top, total = jax.jit(online_top_and_total)(logits)
    expected_top, expected_total = jax.jit(top_and_total)(logits)
    np.testing.assert_array_equal(top, expected_top)
    # Sums of up to 300 numbers, in another order.
    np.testing.assert_allclose(total, expected_total, rtol=1e-5)
