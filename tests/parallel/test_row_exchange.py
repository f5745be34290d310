"""Rows sent between 8 emulated devices: each arrives once, comes home, and its gradient takes the reversed way."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, PartitionSpec

from dsv3_jax.parallel.row_exchange import RowPlan, buffer_rows, exchange_rows

DEVICES, LARGEST, WIDTH = 8, 3, 2
ROWS = DEVICES * LARGEST
AXES = ("node", "gpu")


def plans(sizes):
    """Of every device, from how many rows each (row) sends each (column): packed on both sides, in device order."""
    starts = np.cumsum(sizes, axis=1) - sizes
    places = np.cumsum(sizes, axis=0) - sizes
    parts = (starts, sizes, places, places.T, sizes.T, starts.T)
    return RowPlan(*(jnp.asarray(part, jnp.int32) for part in parts))


def expected_arrivals(rows, sizes):
    starts = np.cumsum(sizes, axis=1) - sizes
    out = np.zeros_like(rows)
    for receiver in range(DEVICES):
        sent = [rows[s, starts[s, receiver] : starts[s, receiver] + sizes[s, receiver]] for s in range(DEVICES)]
        sent = np.concatenate(sent)
        out[receiver, : len(sent)] = sent
    return out


@pytest.fixture(scope="module")
def exchanges():
    """(rows [devices, rows, width], plans, d_out) -> arrived, brought home, gradient of sum(arrived * d_out)."""
    mesh = Mesh(np.asarray(jax.devices()[:DEVICES]).reshape(2, 4), AXES)

    def device(rows, plan, d_out):
        rows, plan, d_out = jax.tree.map(lambda x: x[0], (rows, plan, d_out))
        there = lambda x: exchange_rows(x, plan, ROWS, LARGEST, AXES)  # noqa: E731
        arrived, pull = jax.vjp(there, rows)
        home = exchange_rows(arrived, plan.reversed(), ROWS, LARGEST, AXES)
        return jax.tree.map(lambda x: x[None], (arrived, home, pull(d_out)[0]))

    spec = PartitionSpec(AXES)
    return jax.jit(jax.shard_map(device, mesh=mesh, in_specs=spec, out_specs=spec))


counts = st.lists(st.integers(0, LARGEST), min_size=DEVICES**2, max_size=DEVICES**2)


@settings(max_examples=25, deadline=None)
@given(counts, st.integers(0, 2**32 - 1))
def test_every_row_arrives_once_and_comes_home(exchanges, counts, seed):
    sizes = np.array(counts).reshape(DEVICES, DEVICES)
    rng = np.random.default_rng(seed)
    rows, d_out = rng.standard_normal((2, DEVICES, ROWS, WIDTH)).astype(np.float32)
    arrived, home, gradient = map(np.asarray, exchanges(rows, plans(sizes), d_out))
    np.testing.assert_array_equal(arrived, expected_arrivals(rows, sizes))
    sent = np.arange(ROWS) < sizes.sum(axis=1)[:, None]
    np.testing.assert_array_equal(home, np.where(sent[..., None], rows, 0))
    # The exchange is linear: <there(rows), d_out> = <rows, back(d_out)>.
    np.testing.assert_allclose((arrived * d_out).sum(), (rows * gradient).sum(), rtol=1e-4, atol=1e-4)
    assert not gradient[~sent].any()


def test_buffer_is_never_larger_than_what_can_arrive():
    assert buffer_rows(400, 1.0, most=1600) == 400
    assert buffer_rows(401, 1.5, most=1600) == 608
    assert buffer_rows(400, 1e6, most=1600) == 1600
