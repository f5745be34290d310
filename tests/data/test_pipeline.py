import dataclasses
import json
import subprocess
import sys
from collections import Counter
from itertools import chain, islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.config import ConfigError, DataConfig
from dsv3_jax.data.fim import invert_fim
from dsv3_jax.data.pipeline import train_rows, validation_rows
from dsv3_jax.data.sources import Source, is_held_out, open_source


def _documents(rows, tokenizer, count):
    """The first `count` documents in a stream of rows: their tokens, without the end."""
    found, current = [], []
    for row in rows:
        for token in row:
            if token != tokenizer.eos:
                current.append(int(token))
                continue
            found.append(current)
            current = []
            if len(found) == count:
                return found


def _training(documents, data):
    return [text for text in documents if not is_held_out(text, data.validation_share)]


def test_every_training_document_comes_exactly_once_an_epoch_in_a_new_order(data, source, tokenizer, documents):
    expected = _training(documents, data)
    assert 0 < len(expected) < len(documents)
    rows = train_rows(data, source, tokenizer, seq_len=32, seed=3)
    found = _documents(rows, tokenizer, 3 * len(expected))
    texts = [invert_fim(ids, tokenizer) for ids in found]
    epochs = [texts[i : i + len(expected)] for i in range(0, len(texts), len(expected))]
    for epoch in epochs:
        assert Counter(epoch) == Counter(expected)
    assert epochs[0] != epochs[1] != epochs[2]
    rearranged = np.reshape([ids[0] == tokenizer.fim_begin for ids in found], (3, -1))
    assert 0.3 < rearranged.mean() < 0.7
    fim_texts = [
        {text for text, fim in zip(epoch, row, strict=True) if fim}
        for epoch, row in zip(epochs, rearranged, strict=True)
    ]
    assert fim_texts[0] != fim_texts[1]


def test_without_fim_and_splitting_a_document_is_its_tokens(data, source, tokenizer, documents):
    plain = dataclasses.replace(data, fim_rate=0.0, split_rate=0.0)
    expected = _training(documents, data)
    found = _documents(train_rows(plain, source, tokenizer, seq_len=50, seed=0), tokenizer, len(expected))
    assert sorted(found) == sorted(map(tokenizer.encode, expected))


@pytest.mark.parametrize("process_count", [2, 7])
def test_processes_share_an_epoch_and_treat_a_document_as_one_process_would(data, source, tokenizer, process_count):
    data = dataclasses.replace(data, validation_share=1e-9)  # holds out none, so the size of a share is known

    def epoch(index, count):
        rows = train_rows(data, source, tokenizer, seq_len=32, seed=1, stream=index, streams=count)
        return [tuple(ids) for ids in _documents(rows, tokenizer, len(range(index, len(source), count)))]

    shares = [epoch(index, process_count) for index in range(process_count)]
    assert Counter(chain(*shares)) == Counter(epoch(0, 1))
    assert len({invert_fim(ids, tokenizer) for ids in chain(*shares)}) == len(source)


def test_rows_are_shuffled_within_windows_and_none_is_lost(data, source, tokenizer):
    def rows(window):
        settings = dataclasses.replace(data, shuffle_rows=window)
        return [tuple(row) for row in islice(train_rows(settings, source, tokenizer, seq_len=16, seed=0), 60)]

    in_order, shuffled = rows(1), rows(20)
    assert shuffled != in_order
    for start in (0, 20, 40):
        assert sorted(shuffled[start : start + 20]) == sorted(in_order[start : start + 20])


@given(st.integers(0, 150), st.integers(2, 70), st.integers(0, 3), st.sampled_from([1, 20, 50]))
@settings(deadline=None, max_examples=20)
def test_a_restored_iterator_continues_exactly(data, source, tokenizer, position, seq_len, seed, window):
    data = dataclasses.replace(data, shuffle_rows=window)

    def rows():
        return train_rows(data, source, tokenizer, seq_len=seq_len, seed=seed)

    saved = rows()
    for _ in islice(saved, position):
        pass
    state = json.loads(json.dumps(saved.get_state()))
    restored = rows()
    restored.set_state(state)
    np.testing.assert_array_equal(list(islice(restored, 60)), list(islice(saved, 60)))
    assert restored.get_state() == saved.get_state()
    assert len(json.dumps(state)) < 500


def test_a_state_of_another_stream_is_refused_by_name(data, source, tokenizer):
    saved = train_rows(data, source, tokenizer, seq_len=32, seed=0).get_state()
    with pytest.raises(ValueError, match=r"'data.streams': 1.*'data.streams': 2"):
        train_rows(data, source, tokenizer, seq_len=32, seed=0, streams=2).set_state(saved)


def test_bad_documents_are_counted_and_the_rest_trained_on(tmp_path, tokenizer):
    good = [f"document number {i}" for i in range(20)]
    lines = [line for text in good for line in (json.dumps({"text": text}), "{broken")]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    data = DataConfig(source=str(tmp_path / "a.jsonl"), fim_rate=0.0, validation_share=0.01, shuffle_rows=1)
    source, expected = open_source(data), _training(good, data)
    found = _documents(train_rows(data, source, tokenizer, seq_len=16, seed=0), tokenizer, len(expected))
    assert sorted(tokenizer.decode(ids) for ids in found) == sorted(expected)
    assert len(source.bad_documents) == 20


def test_nothing_to_train_on_is_an_error_instead_of_an_endless_search(tmp_path, data, source, tokenizer):
    (tmp_path / "a.jsonl").write_text("{broken\n" * 5)
    bad = open_source(DataConfig(source=str(tmp_path / "a.jsonl")))
    for empty in (bad, Source([])):
        with pytest.raises(ConfigError, match="nothing to train on"):
            train_rows(data, empty, tokenizer, seq_len=16, seed=0)
    with pytest.raises(ConfigError, match="stream 70 of 80"):
        train_rows(data, source, tokenizer, seq_len=16, seed=0, stream=70, streams=80)
    with pytest.raises(ConfigError, match="seed=-1"):
        train_rows(data, source, tokenizer, seq_len=16, seed=-1)


def test_validation_rows_are_the_held_out_documents_and_nothing_else(data, source, tokenizer, documents):
    held = [text for text in documents if is_held_out(text, data.validation_share)]
    rows, num_bytes = validation_rows(data, source, tokenizer, seq_len=8, count=10_000)
    total = sum(len(tokenizer.encode(text)) + 1 for text in held)
    assert rows.shape == (total // 8, 8)
    assert rows.dtype == np.int32
    found = tokenizer.bpe.decode(rows.ravel().tolist(), skip_special_tokens=False).split("<|eos|>")
    assert set(found[:-1]) <= set(held)
    assert len(found) in (len(held), len(held) + 1)  # the last one may be cut
    assert num_bytes == sum(len(tokenizer.bpe.id_to_token(i)) for i in rows[:, 1:].ravel() if i != tokenizer.eos)
    few, _ = validation_rows(data, source, tokenizer, seq_len=8, count=3)
    np.testing.assert_array_equal(few, rows[:3])
    with pytest.raises(ConfigError, match=r"raise data\.validation_share"):
        validation_rows(data, source, tokenizer, seq_len=total + 1, count=1)


def test_documents_added_at_the_end_change_no_held_out_document(data, tokenizer, documents):
    def held(texts):
        rows, _ = validation_rows(data, texts, tokenizer, seq_len=1, count=10**6)
        text = tokenizer.bpe.decode(rows.ravel().tolist(), skip_special_tokens=False)
        return set(text.split("<|eos|>")) - {""}

    assert held(documents[:40]) < held(documents)


def test_the_data_room_brings_in_neither_flax_nor_pyarrow():
    code = "import sys; import dsv3_jax.data.pipeline; print([m for m in ('flax', 'pyarrow') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
