import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.data.fim import apply_fim, invert_fim, split_middle


@given(st.text(max_size=40), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=100)
def test_fim_is_invertible_and_in_prefix_suffix_middle_order(tokenizer, text, seed):
    ids = apply_fim(text, tokenizer, np.random.default_rng(seed))
    prefix, middle, suffix = split_middle(text, np.random.default_rng(seed))
    expected = f"<|fim_begin|>{prefix}<|fim_hole|>{suffix}<|fim_end|>{middle}"
    assert tokenizer.bpe.decode(ids, skip_special_tokens=False) == expected
    assert invert_fim([*ids, tokenizer.eos], tokenizer) == text
    assert invert_fim([*tokenizer.encode(text), tokenizer.eos], tokenizer) == text


def test_cuts_reach_every_place_of_the_text():
    rng = np.random.default_rng(0)
    seen = {split_middle("abc", rng) for _ in range(500)}
    assert len(seen) == 10  # two ordered cuts among four places


def test_two_documents_at_once_are_refused(tokenizer):
    ids = apply_fim("some text", tokenizer, np.random.default_rng(0))
    with pytest.raises(ValueError, match="exactly one document"):
        invert_fim(ids + ids, tokenizer)
