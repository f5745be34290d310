"""Reading a profile: how much of an exchange runs beside products, counted on a grid of moments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.parallel.trace import Kernel, exchange_time, read_kernels

NAMES = ("ncclDevKernel_SendRecv", "RaggedAllToAllKernel", "gemm", "mosaic_gpu", "ncclDevKernel_AllGather", "MemcpyD2D")
kernels = st.lists(st.tuples(st.sampled_from(NAMES), st.integers(0, 50), st.integers(1, 20)), max_size=12)


@settings(deadline=None, derandomize=True)
@given(kernels)
def test_seconds_are_those_of_counting_every_moment(drawn):
    moments = {name: np.zeros(80, bool) for name in NAMES}
    for name, start, length in drawn:
        moments[name][start : start + length] = True
    exchange, compute = moments[NAMES[0]] | moments[NAMES[1]], moments["gemm"] | moments["mosaic_gpu"]
    found = exchange_time(Kernel(name, start, start + length) for name, start, length in drawn)
    assert (found.exchange, found.hidden, found.compute) == (exchange.sum(), (exchange & compute).sum(), compute.sum())


def test_a_folder_without_a_profile_says_how_to_make_one(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no \*\.xplane\.pb; profile with jax\.profiler\.trace"):
        read_kernels(tmp_path)


def test_a_profile_of_a_cpu_has_no_gpus(tmp_path):
    with jax.profiler.trace(str(tmp_path)):
        jax.block_until_ready(jnp.ones(8) + 1)
    assert read_kernels(tmp_path) == {}
