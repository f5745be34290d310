"""What the FP8 kernels for Hopper share: slots by the round, and sums that are promoted to float32."""

import math
from collections.abc import Callable
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from dsv3_jax.ops.hopper import WARPGROUP_ROWS, Config
from dsv3_jax.ops.quantize.formats import TILE


def chunk_width(config: Config) -> int:
    """Columns that share a weight block wherever a tile starts."""
    return math.gcd(config.cols, TILE)


def unrolled_by_slot(k_blocks: int, stages: int, load: Callable[[Array, int], None]) -> None:
    """load(k_block, slot) for every block; slots are constants, and every tile starts with the first."""

    @pl.loop(0, k_blocks // stages)
    def _(i):
        for slot in range(stages):
            load(i * stages + slot, slot)

    for slot in range(k_blocks % stages):
        load(jnp.int32(k_blocks - k_blocks % stages + slot), slot)


def promoted_sums(
    k_blocks: int,
    stages: int,
    config: Config,
    step: Callable[[list[Array], Any, Array], list[Array]],
    scales_at: Callable[[Array], Any],
) -> list[Array]:
    """Sums of all blocks, chunk by chunk: step(sums, scales_at(k_block), slot), in the order of `unrolled_by_slot`.

    Scales are read one round of slots ahead.
    """

    def scales_of_round(i: Array) -> list[Any]:
        return [scales_at(lax.min(i * stages + slot, jnp.int32(k_blocks - 1))) for slot in range(stages)]

    def one_round(i: Array, carry: tuple) -> tuple:
        sums, scales, base = carry
        # Opaque, or every slot's descriptors are computed before the loop and spill.
        base = lax.optimization_barrier(base)
        following = scales_of_round(i + 1)
        for slot in range(stages):
            sums = step(sums, scales[slot], base + slot)
        return sums, following, base

    carry = (zero_sums(config), scales_of_round(jnp.int32(0)), jnp.int32(0))
    sums, scales, base = lax.fori_loop(0, k_blocks // stages, one_round, carry)
    for slot in range(k_blocks % stages):
        sums = step(sums, scales[slot], base + slot)
    return sums


def zero_sums(config: Config) -> list[Array]:
    """A warpgroup's float32 sums, chunk by chunk."""
    zeros = jnp.zeros((WARPGROUP_ROWS, chunk_width(config)), jnp.float32)
    return [plgpu.layout_cast(zeros, plgpu.Layout.WGMMA) for _ in range(config.cols // chunk_width(config))]
