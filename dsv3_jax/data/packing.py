"""Packing documents into rows without loss (report 4.1): concatenated, cut at row ends, nothing masked or dropped."""

from typing import Any

import grain
import numpy as np
from jaxtyping import Int32


class PackRows(grain.IterDataset):
    """Rows of exactly `seq_len` tokens; a document cut at a row's end goes on in the next row.

    Written here because the state of grain's own concat-then-split takes a document for a remainder once its tuples
    have been through JSON.
    """

    def __init__(self, documents: grain.IterDataset, seq_len: int):
        super().__init__(documents)
        self._seq_len = seq_len

    def __iter__(self) -> grain.DatasetIterator:
        return _RowIterator(iter(self._parent), self._seq_len)


class _RowIterator(grain.DatasetIterator):
    """Its state: where the documents stood before the one being cut, and how much of that one is used."""

    def __init__(self, documents: grain.DatasetIterator, seq_len: int):
        super().__init__(documents)
        self._seq_len = seq_len
        self._before = documents.get_state()
        self._document, self._used = np.zeros(0, np.int32), 0

    def __next__(self) -> Int32[np.ndarray, " seq"]:
        row, filled = np.empty(self._seq_len, np.int32), 0
        while filled < self._seq_len:
            if self._used == len(self._document):
                self._before = self._parent.get_state()
                self._document, self._used = next(self._parent), 0
            taken = min(self._seq_len - filled, len(self._document) - self._used)
            row[filled : filled + taken] = self._document[self._used : self._used + taken]
            filled, self._used = filled + taken, self._used + taken
        return row

    def get_state(self) -> dict[str, Any]:
        return {"documents": self._before, "used": self._used}

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state["documents"])
        self._before, self._used = state["documents"], state["used"]
        self._document = next(self._parent) if self._used else np.zeros(0, np.int32)
