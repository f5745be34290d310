"""Speed of a run: tokens, model FLOPs, and what share of the hardware's they are."""

import time
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from dsv3_jax.config import Config
from dsv3_jax.planner.flops import training_flops_per_token_with_mtp

# Dense peak of the matrix units in FLOP/s, from the vendor's data sheets, by precision.
_PEAKS = {
    "H100": {"fp8": 1978.9e12, "bf16": 989.4e12, "fp32": 494.7e12},
    "H200": {"fp8": 1978.9e12, "bf16": 989.4e12, "fp32": 494.7e12},
    "H800": {"fp8": 1978.9e12, "bf16": 989.4e12, "fp32": 494.7e12},
    "A100": {"fp8": 312e12, "bf16": 312e12, "fp32": 156e12},  # without FP8 units: products run in wider types
    "B200": {"fp8": 4500e12, "bf16": 2250e12, "fp32": 1125e12},
}


@dataclass
class Throughput:
    """Counts tokens and device seconds over the whole run, resumed parts included."""

    flops_per_token: int
    peak_flops: float
    """Of all devices together, per second."""
    devices: int
    tokens: int = 0
    device_seconds: float = 0.0

    def record(self, tokens: int, seconds: float) -> dict[str, float]:
        """Figures of one step, by the names under which they are reported."""
        self.tokens += tokens
        self.device_seconds += seconds * self.devices
        flops = tokens * self.flops_per_token / seconds
        return {
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "model_flops_per_second": flops,
            "mfu": flops / self.peak_flops,
            "gpu_hours_per_trillion_tokens": self.device_seconds / 3600 / (self.tokens / 1e12),
        }


def measure_throughput(config: Config, devices: int) -> Throughput:
    """A counter for a run on this many devices. FLOPs count the MTP modules, and causal attention once."""
    flops = training_flops_per_token_with_mtp(config.model, config.batch.seq_len)
    return Throughput(flops, peak_flops(config.precision, devices), devices)


def peak_flops(precision: str, devices: int) -> float:
    """Peak of all devices in FLOP/s: the data sheet's for a known GPU, else what a large product reaches here.

    Emulated devices share one processor, whose peak is counted once.
    """
    kind = jax.devices()[0].device_kind
    for name, peaks in _PEAKS.items():
        if name in kind:
            return peaks[precision] * devices
    return _measured_peak() * (1 if jax.default_backend() == "cpu" else devices)


def _measured_peak(size: int = 2048, repeats: int = 2) -> float:
    x = jnp.ones((size, size), jnp.float32)
    multiply = jax.jit(jnp.matmul).lower(x, x).compile()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        multiply(x, x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
