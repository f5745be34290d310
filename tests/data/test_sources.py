import json
import logging

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.config import ConfigError, DataConfig
from dsv3_jax.data.sources import is_held_out, open_source, spread


def _write_array_record(path, records):
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


def _read(path, **settings):
    source = open_source(DataConfig(source=str(path), **settings))
    return [source[i] for i in range(len(source))], source


def test_every_kind_of_file_gives_its_documents_and_a_folder_gives_them_all(tmp_path):
    (tmp_path / "a" / ".hidden").mkdir(parents=True)
    (tmp_path / "a" / ".hidden" / "x.txt").write_text("hidden")
    (tmp_path / "ignored.bin").write_bytes(b"\xff")
    for name in ("one.txt", "a/two.md", "a/three.py"):
        (tmp_path / name).write_text(name)
    (tmp_path / "b.jsonl").write_text('{"body": "four"}\r\n\n{"body": "f\\nive", "other": 1}')
    pq.write_table(
        pa.table({"n": [1, 2, 3], "body": ["six", "seven", "eight"]}), tmp_path / "c.parquet", row_group_size=2
    )
    _write_array_record(tmp_path / "d.arrayrecord", [b'{"body": "nine"}', "tén".encode(), b"{not json}"])
    expected = [
        "one.txt",
        "a/two.md",
        "a/three.py",
        "four",
        "f\nive",
        "six",
        "seven",
        "eight",
        "nine",
        "tén",
        "{not json}",
    ]
    texts, source = _read(tmp_path, text_field="body")
    assert sorted(t for t in texts if t is not None) == sorted(expected)
    assert source.bad_documents == {}
    assert sorted(spread(source, lambda text: True)) == sorted(expected)
    assert _read(tmp_path / "c.parquet", text_field="body")[0] == ["six", "seven", "eight"]


def test_bad_documents_are_counted_and_named_once_and_the_good_ones_kept(tmp_path, caplog):
    lines = [b'{"text": "good"}', b"{broken", b'{"other": 1}', b'{"text": 3}', b'{"text": " "}', b'{"text": "\xff"}',
             b'{"text": "\\ud800"}', b'["text"]', b'{"text": null}', b'{"text": "fine"}']  # fmt: skip
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    (tmp_path / "latin.txt").write_bytes(b"\xe9")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "corrupt.parquet").write_bytes(b"PAR1 not really")
    (tmp_path / "corrupt.arrayrecord").write_bytes(b"not a record file" * 10)
    pq.write_table(pa.table({"text": ["kept", None]}), tmp_path / "b.parquet")
    pq.write_table(pa.table({"words": ["x"]}), tmp_path / "c.parquet")
    _write_array_record(tmp_path / "d.arrayrecord", [b'{"words": "x"}', b"\xff"])
    with caplog.at_level(logging.WARNING):
        texts, source = _read(tmp_path)
        for i in range(len(source)):
            source[i]
    assert sorted(t for t in texts if t is not None) == ["fine", "good", "kept"]
    bad = [f"a.jsonl:{line}" for line in range(2, 10)] + ["latin.txt:1", "gone.txt:1", "corrupt.parquet", "c.parquet"]
    bad += ["corrupt.arrayrecord", "b.parquet:2", "d.arrayrecord:1", "d.arrayrecord:2"]
    assert set(source.bad_documents) == {str(tmp_path / name) for name in bad}
    for name in bad:
        assert sum(str(tmp_path / name) + ": " in message for message in caplog.messages) == 1


def test_a_source_that_cannot_be_used_says_what_to_change(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "words.csv").write_text("a,b")
    (tmp_path / "broken.parquet").write_text("no")
    cases = {"nowhere": "no such file", "empty.jsonl": "holds no document", "words.csv": "found .csv"}
    cases |= {"broken.parquet": "holds no document"}
    for name, message in cases.items():
        with pytest.raises(ConfigError, match=message):
            open_source(DataConfig(source=str(tmp_path / name)))


def test_the_standard_library_is_a_source_of_at_least_8_megabytes_in_a_fixed_order():
    texts, source = _read("stdlib")
    assert sum(len(text.encode()) for text in texts if text) > 8e6
    assert texts[:50] == [source[i] for i in range(50)] == _read("stdlib")[0][:50]


def test_long_lines_and_block_borders_do_not_move_documents(tmp_path, monkeypatch):
    monkeypatch.setattr("dsv3_jax.data.sources._INDEX_BLOCK_BYTES", 7)
    texts = ["x" * n for n in range(1, 30)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert _read(tmp_path / "a.jsonl")[0] == texts


@given(st.floats(0.01, 0.99), st.floats(0.01, 0.99), st.text(max_size=20))
@settings(deadline=None, max_examples=50)
def test_holding_out_more_never_moves_a_document_back_to_training(share, other, text):
    low, high = sorted((share, other))
    assert not is_held_out(text, low) or is_held_out(text, high)


def test_the_held_out_share_is_what_was_asked():
    held = sum(is_held_out(f"document {i}", 0.2) for i in range(5000))
    assert held == pytest.approx(1000, abs=120)
