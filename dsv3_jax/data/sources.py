"""Documents: random access to the texts of a folder or file, read when they are asked for."""

import json
import logging
import os
import sysconfig
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Protocol

import grain
import numpy as np
from jaxtyping import Int64

from dsv3_jax.config import ConfigError, DataConfig

logger = logging.getLogger(__name__)

TEXT_SUFFIXES = (".txt", ".md", ".py")
ARRAY_RECORD_SUFFIXES = (".arrayrecord", ".array_record")
SUFFIXES = (*TEXT_SUFFIXES, ".jsonl", ".parquet", *ARRAY_RECORD_SUFFIXES)
# Tests, tables of code points and other people's packages say little about how Python is written.
STDLIB_SKIPPED = frozenset(["site-packages", "dist-packages", "__pycache__", "test", "tests", "idlelib", "encodings"])
# Decoded row groups kept in memory, over all files: a shuffled reader comes back to the same ones.
ROW_GROUPS_KEPT = 8
# Runs of neighbouring documents that `spread` reads, so that one large file is not the whole sample.
SPREAD_RUNS = 8
_INDEX_BLOCK_BYTES = 1 << 24


class BadDocument(ValueError):
    """A document that cannot be trained on; the message says why."""


class Documents(Protocol):
    """The documents of one file, or of files of one kind."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> str | None:
        """The text, or None where there is no document (a blank line); raises ValueError or OSError if it is bad."""
        ...

    def where(self, index: int) -> str:
        """File and line (or row, or record) of the document, counted from 1, for messages."""
        ...


def _field(record: Any, name: str) -> Any:
    if not isinstance(record, dict):
        raise BadDocument(f"is a JSON {type(record).__name__}, not an object")
    if name not in record:
        raise BadDocument(f"has no field {name!r}")
    return record[name]


def _checked(text: Any) -> str:
    if not isinstance(text, str):
        raise BadDocument(f"its text is of type {type(text).__name__}, not a string")
    if not text or text.isspace():
        raise BadDocument("is empty")
    text.encode()  # JSON can spell lone surrogates, which are not text
    return text


class TextFiles:
    """Every file is one document."""

    def __init__(self, paths: Sequence[Path]):
        self._paths = paths

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, index: int) -> str:
        return _checked(self._paths[index].read_bytes().decode())

    def where(self, index: int) -> str:
        return f"{self._paths[index]}:1"


class JsonLines:
    """Every line is a JSON object with a text field. Only the offsets of the lines are held in memory."""

    def __init__(self, path: Path, field: str):
        self._path, self._field = path, field
        self._offsets = _line_offsets(path)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def read(self, index: int) -> str | None:
        start, end = int(self._offsets[index]), int(self._offsets[index + 1])
        with self._path.open("rb") as file:
            file.seek(start)
            line = file.read(end - start).strip()
        return _checked(_field(json.loads(line.decode()), self._field)) if line else None

    def where(self, index: int) -> str:
        return f"{self._path}:{index + 1}"


def _line_offsets(path: Path) -> Int64[np.ndarray, " lines_plus_1"]:
    """Where each line starts, and the size of the file at the end."""
    starts, size = [np.zeros(1, np.int64)], 0
    with path.open("rb") as file:
        while block := file.read(_INDEX_BLOCK_BYTES):
            starts.append(np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + size + 1)
            size += len(block)
    offsets = np.concatenate(starts)
    return offsets if offsets[-1] == size else np.append(offsets, size)


class RowGroups:
    """The last few decoded row groups of parquet files; safe to share between threads."""

    def __init__(self, kept: int = ROW_GROUPS_KEPT):
        self._kept, self._columns, self._lock = kept, OrderedDict(), threading.Lock()

    def column(self, path: Path, field: str, group: int) -> Any:
        """One column of one row group, as an arrow array."""
        import pyarrow.parquet

        key = (path, field, group)
        with self._lock:
            if key not in self._columns:
                with pyarrow.parquet.ParquetFile(path) as file:
                    self._columns[key] = file.read_row_group(group, columns=[field]).column(field)
                if len(self._columns) > self._kept:
                    self._columns.popitem(last=False)
            self._columns.move_to_end(key)
            return self._columns[key]


class ParquetRows:
    """Every row is a document. Reading one decodes its row group: shuffled corpora much larger than a few row groups
    are read faster as ArrayRecord."""

    def __init__(self, path: Path, field: str, groups: RowGroups):
        import pyarrow.parquet

        self._path, self._field, self._groups = path, field, groups
        metadata = pyarrow.parquet.read_metadata(path)
        names = metadata.schema.to_arrow_schema().names
        if field not in names:
            raise BadDocument(f"has no column {field!r} among {names}: set data.text_field")
        self._ends = list(accumulate(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def read(self, index: int) -> str:
        group = bisect_right(self._ends, index)
        first = self._ends[group - 1] if group else 0
        value = self._groups.column(self._path, self._field, group)[index - first].as_py()
        return _checked(value.decode() if isinstance(value, bytes) else value)

    def where(self, index: int) -> str:
        return f"{self._path}:{index + 1}"


class ArrayRecords:
    """Every record is UTF-8 text, or a JSON object with a text field."""

    def __init__(self, path: Path, field: str):
        self._path, self._field = path, field
        self._records = grain.sources.ArrayRecordDataSource([str(path)])

    def __len__(self) -> int:
        return len(self._records)

    def read(self, index: int) -> str:
        text = self._records[index].decode()
        if not text.startswith("{"):
            return _checked(text)
        try:
            record = json.loads(text)
        except json.JSONDecodeError:  # text that happens to start with a brace
            return _checked(text)
        return _checked(_field(record, self._field))

    def where(self, index: int) -> str:
        return f"{self._path}:{index + 1}"


class Source:
    """Documents by number, over all files. `source[i]` is the text, or None if it cannot be used.

    `bad_documents` maps the place of every unusable document met so far to the reason: each is counted, and named in
    the log, once.
    """

    def __init__(self, parts: Sequence[Documents], bad_documents: dict[str, str] | None = None):
        self._parts = [part for part in parts if len(part)]
        self._ends = list(accumulate(map(len, self._parts)))
        self.bad_documents: dict[str, str] = {}
        for where, reason in (bad_documents or {}).items():
            self._report(where, reason)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> str | None:
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of a source of {len(self)}")
        number = bisect_right(self._ends, index)
        part, local = self._parts[number], index - (self._ends[number - 1] if number else 0)
        try:
            return part.read(local)
        except (OSError, ValueError, RuntimeError) as error:  # pyarrow and array_record raise all three
            self._report(part.where(local), str(error))
            return None

    def _report(self, where: str, reason: str) -> None:
        if where not in self.bad_documents:
            self.bad_documents[where] = reason
            logger.warning("skipped a document: %s: %s", where, reason)


def open_source(data: DataConfig) -> Source:
    """The documents that `data.source` names.

    `stdlib`, a folder (searched recursively, hidden files and unknown kinds left out) of .txt, .md, .py, .jsonl,
    .parquet and .arrayrecord files, or one such file. A file or folder that cannot be opened counts as one bad
    document.

    Raises:
        ConfigError: there is no such path, its kind is unknown, or it holds no document.
    """
    bad: dict[str, str] = {}
    if data.source == "stdlib":
        paths = _files(Path(sysconfig.get_path("stdlib")), STDLIB_SKIPPED, bad)
        # Many packages have an empty __init__.py, which is no document.
        paths = [path for path in paths if path.suffix == ".py" and path.stat().st_size]
    else:
        root = Path(data.source).expanduser()
        if not root.exists():
            raise ConfigError(f"data.source={data.source!r}: no such file or folder; give one, or 'stdlib'")
        paths = _files(root, frozenset(), bad) if root.is_dir() else [root]
    known = [path for path in paths if path.suffix in SUFFIXES]
    if not known:
        found = ", ".join(sorted({path.suffix or path.name for path in paths})[:10]) or "nothing"
        raise ConfigError(f"data.source={data.source!r}: found {found}; give files ending in {', '.join(SUFFIXES)}")
    source = Source(_open_files(known, data.text_field, bad), bad)
    if not len(source):
        first = next((f" ({where}: {reason})" for where, reason in source.bad_documents.items()), "")
        raise ConfigError(f"data.source={data.source!r}: holds no document{first}; give files with text in them")
    return source


def _files(root: Path, skipped: frozenset[str], bad: dict[str, str]) -> list[Path]:
    """Files below a folder in a fixed order, without hidden ones and those below folders of a skipped name."""
    paths = []
    for folder, folders, names in os.walk(root, onerror=lambda error: bad.update({error.filename: str(error)})):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in skipped)
        paths += [Path(folder, name) for name in sorted(names) if not name.startswith(".")]
    return paths


def _open_files(paths: Sequence[Path], field: str, bad: dict[str, str]) -> list[Documents]:
    groups = RowGroups()
    openers: dict[str, Callable[[Path], Documents]] = {
        ".jsonl": lambda path: JsonLines(path, field),
        ".parquet": lambda path: ParquetRows(path, field, groups),
        **dict.fromkeys(ARRAY_RECORD_SUFFIXES, lambda path: ArrayRecords(path, field)),
    }
    parts: list[Documents] = [TextFiles([path for path in paths if path.suffix in TEXT_SUFFIXES])]
    for path in paths:
        if path.suffix in TEXT_SUFFIXES:
            continue
        try:
            parts.append(openers[path.suffix](path))
        except (OSError, ValueError, RuntimeError) as error:
            bad[str(path)] = str(error)
    return parts


def is_held_out(text: str, share: float) -> bool:
    """Whether a document belongs to the validation part, which holds about `share` of the distinct documents.

    Depends on the content alone, so adding documents moves none, and copies of one never lie on both sides.
    """
    digest = blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest) < share * 2**64


def spread(source: Source, keep: Callable[[str], bool]) -> Iterator[str]:
    """Every usable document that `keep` accepts, once: the next of each of a few evenly spaced runs, in turn.

    A prefix of it is a cheap sample of the whole source, since neighbours are read together.
    """
    starts = np.linspace(0, len(source), SPREAD_RUNS + 1).astype(int)
    runs = [_kept(source, range(a, b), keep) for a, b in pairwise(starts)]
    while runs:
        texts = [next(run, None) for run in runs]
        runs = [run for run, text in zip(runs, texts, strict=True) if text is not None]
        yield from (text for text in texts if text is not None)


def _kept(source: Source, indices: range, keep: Callable[[str], bool]) -> Iterator[str]:
    for index in indices:
        text = source[index]
        if text is not None and keep(text):
            yield text
