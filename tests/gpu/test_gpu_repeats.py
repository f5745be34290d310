"""Hopper kernels give the same bits each time: a slot that is given back, or refilled, too early shows in some of many
runs. Not the backward pass of attention, which adds in the order in which blocks come (README)."""

import functools

import jax
import jax.numpy as jnp
import pytest

from dsv3_jax.ops import fp8_matmul, hopper, quantize
from dsv3_jax.ops.attention import causal_attention
from dsv3_jax.ops.grouped_matmul import grouped_matmul
from dsv3_jax.ops.grouped_matmul import mosaic_gpu as bf16_kernels
from dsv3_jax.ops.groups import group_bounds
from dsv3_jax.ops.permute import mosaic_gpu as permute_kernels
from dsv3_jax.ops.top_k import grouped_top_k

refusal = hopper.device_refusal()
pytestmark = pytest.mark.skipif(refusal is not None, reason=str(refusal))

RUNS = 100
ROWS, WIDTH, OUT, GROUPS = 4096, 2048, 3072, 4


def normal(seed, *shape, dtype=jnp.bfloat16):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


@functools.cache
def operands():
    """x and dy of a linear and of groups of experts, in BF16 and in FP8, and the weights."""
    x, dy = normal(0, ROWS, WIDTH), normal(1, ROWS, OUT)
    weights = normal(2, GROUPS, WIDTH, OUT, dtype=jnp.float32)
    groups = jnp.repeat(jnp.arange(GROUPS + 1, dtype=jnp.int32), jnp.asarray([9, 0, 13, 8, 2]), total_repeat_length=32)
    return {
        "x": x, "dy": dy, "weights": weights, "groups": groups,
        "rows": quantize.quantize_rows(x, power_of_2=True),
        "columns": (quantize.quantize_columns(x), quantize.quantize_columns(dy)),
        "blocks": quantize.quantize_blocks(weights), "block": quantize.quantize_blocks(weights[0]),
        "places": jax.random.randint(jax.random.key(3), (8 * ROWS,), 0, ROWS + 50),
        "qkv": (normal(4, 1, 2000, 8, 192), normal(5, 1, 2000, 8, 256), normal(6, 1, 2000, 64)),
    }  # fmt: skip


def held_rows(groups, y):
    """Without those of tiles that hold none, which are undefined."""
    return y[: int((groups < GROUPS).sum()) * 128]


KERNELS = {
    "product": lambda o: fp8_matmul.fp8_matmul(o["rows"], o["block"]),
    "grouped product": lambda o: fp8_matmul.fp8_grouped_matmul(o["rows"], o["blocks"], o["groups"]),
    "weight gradient": lambda o: fp8_matmul.fp8_wgrad(*o["columns"]),
    "weight gradient, added": lambda o: fp8_matmul.fp8_wgrad(*o["columns"], o["weights"][0]),
    "grouped weight gradient": lambda o: fp8_matmul.fp8_grouped_wgrad(*o["columns"], o["groups"], GROUPS),
    "grouped weight gradient and its squares": lambda o: fp8_matmul.fp8_grouped_wgrad_with_squares(
        *o["columns"], o["groups"], GROUPS
    ),
    "grouped weight gradient, added": lambda o: fp8_matmul.fp8_grouped_wgrad(
        *o["columns"], o["groups"], GROUPS, o["weights"]
    ),
    "grouped product in BF16": lambda o: grouped_matmul(o["x"], o["weights"], o["groups"]),
    "grouped weight gradient in BF16 and its squares": lambda o: bf16_kernels.grouped_wgrad(
        o["x"], o["dy"], group_bounds(o["groups"], GROUPS), squares=True
    ),
    "quantize": lambda o: quantize.quantize_both(o["x"]),
    "quantize to half a tile": lambda o: quantize.quantize_both(o["x"][:, :576]),
    "columns through E5M6": lambda o: quantize.quantize_columns_through_e5m6(o["x"]),
    "blocks": lambda o: quantize.quantize_blocks(o["weights"]),
    "retile": lambda o: quantize.retile(o["rows"]),
    "retile of gathered rows": lambda o: quantize.retile(o["rows"], o["places"]),
    "RMSNorm": lambda o: quantize.rms_norm_quantize(o["x"], o["weights"][0, :, 0], 1e-6),
    "SwiGLU": lambda o: quantize.swiglu_quantize(o["dy"], o["weights"][0, 0, 0] * jnp.ones(ROWS)),
    "SwiGLU backward": lambda o: quantize.swiglu_quantize_backward(
        o["rows"], o["x"][:, : WIDTH // 2], o["x"][:, 0].astype(jnp.float32)
    ),
    "rows": lambda o: permute_kernels.take_rows(o["x"], o["places"]),
    "selection": lambda o: grouped_top_k(o["dy"][:, :256].astype(jnp.float32), 8, 8, 4),
    "attention": lambda o: causal_attention(*o["qkv"], (jnp.ones((2000, 32)), jnp.zeros((2000, 32))), 0.07),
}


@pytest.mark.parametrize("name", KERNELS)
def test_repeats_bit_by_bit(name):
    given, run = operands(), jax.jit(KERNELS[name])

    def bits():
        result = run(given)
        if name.startswith("grouped product"):
            result = held_rows(given["groups"], result)
        return [x.view(f"uint{8 * x.dtype.itemsize}") for x in jax.tree.leaves(result)]

    first = bits()
    assert not any(bool(jnp.any(a != b)) for _ in range(RUNS) for a, b in zip(first, bits(), strict=True))
