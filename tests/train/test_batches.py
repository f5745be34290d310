"""Batches are made of streams, whose rows have their place in them."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from dsv3_jax.config import BatchConfig, Config, ConfigError, ModelConfig, ParallelConfig
from dsv3_jax.parallel.agreement import local_part
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.train.batches import Batches, open_streams

CONFIG = Config(
    model=ModelConfig(num_experts=16, num_mtp_modules=0),
    batch=BatchConfig(seq_len=2, sequences=16, microbatch=8),
    parallel=ParallelConfig(devices=8, gpu=2),
)


class Numbers:
    """A stream whose n-th row says so."""

    def __init__(self, number, count):
        self.number, self.count, self.next = number, count, 0

    def __next__(self):
        self.next += 1
        return np.array([self.number, self.next - 1], np.int32)

    def get_state(self):
        return {"place": self.next}


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(CONFIG)


@settings(max_examples=10, deadline=None)
@given(count=st.sampled_from([1, 2, 4, 8]), taken=st.integers(1, 3))
def test_each_stream_fills_its_part_of_every_microbatch_in_order(mesh, count, taken):
    streams = open_streams(Numbers, CONFIG.batch, mesh, count)
    assert {(rows.number, rows.count) for rows in streams.mine.values()} == {(i, count) for i in range(count)}
    batches = Batches(streams, CONFIG.batch, mesh)
    got = np.stack([jax.device_get(batches.take(16)) for _ in range(taken)])
    assert got.shape == (taken, 2, 8, 2)
    for number in range(count):
        part = got[:, :, number * 8 // count : (number + 1) * 8 // count].reshape(-1, 2)
        np.testing.assert_array_equal(part, [[number, n] for n in range(taken * 16 // count)])
    assert batches.states() == [{"place": taken * 16 // count}] * count
    assert batches.rows_taken == taken * 16 // count


def test_one_process_reads_one_stream_unless_told(mesh):
    assert open_streams(Numbers, CONFIG.batch, mesh, None).count == 1
    with pytest.raises(ConfigError, match=r"data.streams=3: .* a divisor of its 8 sequences"):
        open_streams(Numbers, CONFIG.batch, mesh, 3)
    with pytest.raises(ConfigError, match=r"data.streams=0: must be positive"):
        dataclasses.replace(CONFIG.data, streams=0)


def test_part_of_a_dimension_that_a_process_holds(mesh):
    assert local_part(NamedSharding(mesh, PartitionSpec(("data", "gpu"))), (16,), 0) == (0, 1)
    assert local_part(NamedSharding(mesh, PartitionSpec()), (16, 3), 1) == (0, 1)
