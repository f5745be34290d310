import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.config import ConfigError
from dsv3_jax.data.sources import Source
from dsv3_jax.data.tokenizer import SPECIAL_TOKENS, load_or_train, load_tokenizer, train_bpe

SPECIALS = [spelling for spellings in SPECIAL_TOKENS.values() for spelling in spellings]


@given(st.lists(st.one_of(st.text(max_size=20), st.sampled_from(SPECIALS))).map("".join))
@settings(deadline=None, max_examples=100)
def test_every_text_round_trips_and_its_bytes_are_counted(tokenizer, text):
    ids = np.asarray(tokenizer.encode(text), np.int32)
    assert tokenizer.decode(ids) == text
    assert tokenizer.num_bytes(ids) == len(text.encode())
    assert not np.isin(ids, [tokenizer.eos, tokenizer.fim_begin, tokenizer.fim_hole, tokenizer.fim_end]).any()


def test_punctuation_merges_with_the_newlines_after_it_and_indentation_is_one_token(tokenizer):
    tokens = [tokenizer.decode([i]) for i in tokenizer.encode("def add_1(x, y):\n    return x")]
    assert "):\n" in tokens
    assert "   " in tokens


def test_a_trained_tokenizer_is_kept_by_content_and_a_corrupt_one_is_trained_again(data, source, tmp_path):
    data = dataclasses.replace(data, cache_dir=str(tmp_path))
    first = load_or_train(data, source, 400)
    (path,) = tmp_path.iterdir()
    written = path.read_bytes()
    assert load_or_train(data, source, 400).bpe.to_str() == first.bpe.to_str()
    path.write_bytes(written[: len(written) // 2])
    assert load_or_train(data, source, 400).bpe.to_str() == first.bpe.to_str()
    assert path.read_bytes() == written
    load_or_train(data, source, 350)
    load_or_train(dataclasses.replace(data, validation_share=0.5), source, 400)
    assert len(list(tmp_path.iterdir())) == 3


def test_training_goes_on_where_the_cache_cannot_be_written(data, source, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    load_or_train(dataclasses.replace(data, cache_dir=str(tmp_path / "file")), source, 300)
    assert "set data.cache_dir" in caplog.text


def _deepseek_like(path: Path, documents: list[str], without: str = "") -> str:
    """A tokenizer.json with DeepSeek's spellings, its FIM tokens marked as ordinary as in DeepSeek's own file."""
    content = train_bpe(documents, 400).to_str()
    for ours, theirs in SPECIAL_TOKENS.values():
        content = content.replace(ours, "missing" if theirs == without else theirs)
    tokenizer = json.loads(content)
    for token in tokenizer["added_tokens"]:
        token["special"] = "fim" not in token["content"]
    path.write_text(json.dumps(tokenizer))
    return str(path)


def test_deepseek_spellings_are_understood_and_a_missing_one_is_named(tmp_path, documents, tokenizer):
    theirs = load_tokenizer(_deepseek_like(tmp_path / "t.json", documents), 400)
    roles = ("eos", "fim_begin", "fim_hole", "fim_end")
    assert [getattr(theirs, role) for role in roles] == [getattr(tokenizer, role) for role in roles]
    test_every_text_round_trips_and_its_bytes_are_counted.hypothesis.inner_test(theirs, "".join(SPECIALS))
    hole = SPECIAL_TOKENS["fim_hole"][1]
    with pytest.raises(ConfigError, match="fim_hole"):
        load_tokenizer(_deepseek_like(tmp_path / "u.json", documents, without=hole), 400)


def test_a_tokenizer_that_cannot_be_used_says_what_to_change(tmp_path, data, source, tokenizer):
    (tmp_path / "full.json").write_text(tokenizer.bpe.to_str())
    with pytest.raises(ConfigError, match=rf"raise model\.vocab_size to at least {tokenizer.vocab_size}"):
        load_or_train(dataclasses.replace(data, tokenizer=str(tmp_path / "full.json")), source, 300)
    with pytest.raises(ConfigError, match=r"nowhere\.json.*does not read"):
        load_or_train(dataclasses.replace(data, tokenizer=str(tmp_path / "nowhere.json")), source, 300)
    with pytest.raises(ConfigError, match="at least 260"):
        load_or_train(data, source, 259)
    with pytest.raises(ConfigError, match="can be trained on"):
        load_or_train(data, Source([]), 400)
