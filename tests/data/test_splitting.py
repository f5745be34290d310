import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.data.splitting import find_splits, split_tokens

PIECES = st.sampled_from(["):\n", ")\n\n", "((", "])\n", "add", " ", "é", "\n", '"', "::", ", [", "\r\n", "x", "0"])


@given(st.lists(PIECES).map("".join), st.floats(0, 1), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=100)
def test_splitting_keeps_the_text_and_every_other_token(tokenizer, text, rate, seed):
    splits = find_splits(tokenizer)
    ids = np.asarray(tokenizer.encode(text), np.int32)
    after = split_tokens(ids, splits, rate, np.random.default_rng(seed))
    assert after.dtype == np.int32
    assert tokenizer.decode(after) == text
    rest, merged = [i for i in ids if int(i) not in splits], [i for i in ids if int(i) in splits]
    assert len(rest) + len(merged) <= len(after)
    if rate == 0:
        np.testing.assert_array_equal(after, ids)


def test_the_merged_tokens_are_those_of_punctuation_with_punctuation_or_newlines(tokenizer):
    merged = {tokenizer.decode([i]) for i in find_splits(tokenizer)}
    assert {"):\n", ")\n"} <= merged
    assert not merged & {"   ", "add", "\n\n\n", "(", " (", "(x"}
    for text in merged:
        assert not any(c.isalnum() for c in text)


def test_the_rate_is_what_was_asked(tokenizer):
    splits = find_splits(tokenizer)
    merged = next(i for i in splits if tokenizer.decode([i]) == "):\n")
    after = split_tokens(np.full(10_000, merged, np.int32), splits, 0.1, np.random.default_rng(0))
    assert 800 < 10_000 - (after == merged).sum() < 1200
    every = split_tokens(np.full(100, merged, np.int32), splits, 1.0, np.random.default_rng(0))
    assert merged not in every
    assert {tokenizer.decode([i]) for i in every} >= {"\n", ")"}  # cut at either place
