from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.evaluate.bigram import fit_bigram


def _brute_force(rows, vocab):
    """Interpolated modified Kneser-Ney by its definition, as a dense table P[context, token]."""

    def discounts(counts):
        n = [sum(c == k for c in counts) for k in (1, 2, 3, 4)]
        if 0 in n[:3]:
            return [0.0, 0.75, 0.75, 0.75]
        y = n[0] / (n[0] + 2 * n[1])
        d = [0.0] + [k - (k + 1) * y * n[k] / n[k - 1] for k in (1, 2, 3)]
        return [0.0] + [max(x, 0.75 * d[1]) for x in d[1:]]

    def interpolate(counts, lower, d):
        total = sum(counts)
        if total == 0:
            return lower
        left = sum(d[min(c, 3)] for c in counts) / total
        return [(c - d[min(c, 3)]) / total + left * p for c, p in zip(counts, lower, strict=True)]

    counts = [[0] * vocab for _ in range(vocab)]
    for row in rows.tolist():
        for a, b in pairwise(row):
            counts[a][b] += 1
    continuation = [sum(counts[a][b] > 0 for a in range(vocab)) for b in range(vocab)]
    unigram = interpolate(continuation, [1 / vocab] * vocab, discounts([c for c in continuation if c]))
    d = discounts([c for row in counts for c in row if c])
    return np.array([interpolate(row, unigram, d) for row in counts])


@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(2, 40), st.integers(2, 12))
@settings(deadline=None, max_examples=40)
def test_equals_the_definition_and_sums_to_one_for_every_context(seed, num_rows, seq, vocab):
    rng = np.random.default_rng(seed)
    rows = np.minimum(rng.geometric(0.3, (num_rows, seq)) - 1, vocab - 1).astype(np.int32)
    bigram, expected = fit_bigram(rows, vocab + 1), _brute_force(rows, vocab + 1)  # one token is never seen
    contexts, tokens = np.meshgrid(np.arange(vocab + 1), np.arange(vocab + 1), indexing="ij")
    found = bigram.probability(contexts, tokens)
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-9)
    assert (found > 0).all()
    assert bigram.loss(rows) == pytest.approx(-np.log(expected[rows[:, :-1], rows[:, 1:]]).mean())


def test_beats_the_unigram_and_comes_near_the_entropy_of_a_markov_chain():
    rng = np.random.default_rng(0)
    vocab = 50
    chain = rng.dirichlet(np.full(vocab, 0.1), vocab)
    tokens = np.zeros((300, 200), np.int64)
    for t in range(1, 200):
        tokens[:, t] = (rng.random((300, 1)) > chain[tokens[:, t - 1]].cumsum(1)).sum(1).clip(max=vocab - 1)
    train, test = tokens[:250], tokens[250:]
    loss = fit_bigram(train, vocab).loss(test)
    unigram = np.bincount(train[:, 1:].ravel(), minlength=vocab) + 1
    unigram_loss = -np.log(unigram[test[:, 1:]] / unigram.sum()).mean()
    entropy = -np.log(chain[test[:, :-1], test[:, 1:]]).mean()
    assert loss < unigram_loss - 1
    assert entropy < loss < entropy + 0.05


def test_what_cannot_be_counted_is_refused():
    with pytest.raises(ValueError, match="vocab_size=3"):
        fit_bigram(np.array([[0, 3]]), 3)
    with pytest.raises(ValueError, match="no pair"):
        fit_bigram(np.array([[0], [1]]), 3)
