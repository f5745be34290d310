"""What the benchmarks share."""

import importlib

import jax
import pytest

BENCHMARKS = [
    "dsv3_jax.ops.fp8_matmul.tune",
    "dsv3_jax.ops.fp8_matmul.bench",
    "dsv3_jax.ops.attention.bench",
    "dsv3_jax.ops.quantize.bench",
    "dsv3_jax.model.moe_bench",
]


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="a Hopper GPU runs them, for minutes")
@pytest.mark.parametrize("name", BENCHMARKS)
def test_without_a_hopper_gpu_a_benchmark_ends_in_a_sentence(name, monkeypatch):
    monkeypatch.setattr("sys.argv", [name])
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")  # which one of them sets
    with pytest.raises(SystemExit, match=r"^(tuning|this benchmark) needs a Hopper GPU, the backend is cpu$"):
        importlib.import_module(name).main()
