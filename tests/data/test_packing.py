import json

import grain
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.data.packing import PackRows


def _rows(lengths, seq_len):
    """Documents of these lengths, repeated without end, whose tokens count up through the first epoch."""
    ends = np.cumsum(lengths)
    documents = [np.arange(end - n, end, dtype=np.int32) for n, end in zip(lengths, ends, strict=True)]
    dataset = grain.MapDataset.source(documents).repeat().to_iter_dataset(grain.ReadOptions(1, 2))
    return iter(PackRows(dataset, seq_len)), int(ends[-1])


@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.integers(1, 16))
@settings(deadline=None, max_examples=40)
def test_rows_are_the_stream_cut_in_pieces_with_nothing_lost_between_epochs(lengths, seq_len):
    rows, total = _rows(lengths, seq_len)
    found = np.stack([next(rows) for _ in range(2 * total // seq_len + 1)])
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found.ravel(), np.arange(found.size) % total)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.integers(1, 16), st.integers(0, 20))
@settings(deadline=None, max_examples=40)
def test_a_restored_iterator_goes_on_with_the_next_row(lengths, seq_len, position):
    rows, _ = _rows(lengths, seq_len)
    for _ in range(position):
        next(rows)
    state = json.loads(json.dumps(rows.get_state()))
    expected = [next(rows) for _ in range(5)]
    fresh, _ = _rows(lengths, seq_len)
    fresh.set_state(state)
    assert fresh.get_state() == state
    np.testing.assert_array_equal([next(fresh) for _ in range(5)], expected)
    rows.set_state(state)  # going back works too
    np.testing.assert_array_equal([next(rows) for _ in range(5)], expected)
