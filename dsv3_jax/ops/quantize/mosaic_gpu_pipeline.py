"""What the Hopper kernels share: how a block walks over tiles, and how it turns one into FP8 (report 3.3.1).

All of them are limited by memory: the warpgroups of a block work on the same tile while the copy engine fetches a later
one and writes back an earlier one. More blocks than a multiprocessor needs to be busy cost bandwidth (on an H200 with
both orientations, 0.86 of a copy's with one block on each, 0.80 with two), since memory sees more places at once.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float8e4m3fn, Int

from dsv3_jax.ops.quantize.formats import E4M3, TILE, Tiled
from dsv3_jax.ops.quantize.reference import E4M3_MAX, E5M6_MAX, SMALLEST_AMAX, nearest_quotient

WARPGROUPS = 2
"""In most blocks."""
HALF = TILE // 2
"""Rows or columns of a tile that a warpgroup takes at once."""

_TWELVE = 0x41400000
"""12 in float32, as an integer."""
_SIGN = -0x80000000
LAYOUT = plgpu.Layout.WGMMA
ROWS, COLUMNS = LAYOUT.reduce(1), LAYOUT.reduce(0)
"""A value per row of a tile in registers, and one per column."""


def staging(shape: tuple[int, ...], dtype: jnp.dtype, swizzle: int = 128) -> plgpu.SMEM:
    """Shared memory for tiles, swizzled so that neither rows nor columns collide in a bank. Pieces of a tile begin and
    end at multiples of `swizzle` bytes of its rows."""
    transforms = (plgpu.TilingTransform((8, swizzle // jnp.dtype(dtype).itemsize)), plgpu.SwizzleTransform(swizzle))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def output_staging(buffers: int, warpgroups: int = WARPGROUPS, width: int = TILE) -> list:
    """Values and scales that wait to be written: `buffers` halves of a tile for each warpgroup. Rows of the values have
    a `width` of whole or half tiles: the copy engine takes whole pieces."""
    values = staging((warpgroups, buffers, HALF, TILE), E4M3, swizzle=math.gcd(width, TILE))
    return [values, plgpu.SMEM((warpgroups, buffers, HALF), jnp.float32)]


def tiled_types(rows: int, k: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    """Of the values and the scales of a `Tiled`, these with room for whole tiles of rows: the copy engine drops what
    lies beyond the last row of values, but not what lies beyond the end of a row of scales."""
    scales = pl.cdiv(k, TILE), pl.cdiv(rows, TILE) * TILE
    return jax.ShapeDtypeStruct((rows, k), E4M3), jax.ShapeDtypeStruct(scales, jnp.float32)


def tiled(values: Float8e4m3fn[Array, "rows k"], scales: Float[Array, "tiles padded_rows"]) -> Tiled:
    """Of what `tiled_types` describes."""
    return Tiled(values, scales[:, : values.shape[0]])


def launch(
    name: str,
    body: Callable,
    inputs: list[Array],
    *,
    blocks: int,
    warpgroups: int = WARPGROUPS,
    interpret: plgpu.InterpretGPUParams | None,
    **options,
):
    """Runs `body` in blocks of warpgroups, axes "block" and "wg"; `options` as plgpu.kernel takes them. Profiles
    show `name`."""
    if interpret is not None:
        options["interpret"] = interpret
    options |= {"kernel_name": name, "num_threads": warpgroups, "thread_name": "wg"}
    kernel = plgpu.kernel(body, grid=(blocks,), grid_names=("block",), **options)
    return kernel(*inputs)


def for_each_tile(
    grid: tuple[int, int],
    streams: Sequence[tuple[Callable, jax.Ref]],
    work: Callable[..., None],
) -> None:
    """Shares the tiles of `grid` out to the blocks, and keeps every slot busy with a fetch or with work on it.

    A stream is `fetch(slot, i, j)`, which starts copies of a tile into its slot, and the barriers, one per slot, at
    which the warpgroups arrive when they have read it. `work(slot, i, j, *refills)` waits for the copies, arrives
    there, and then calls the stream's refill.
    """
    block, blocks = lax.axis_index("block"), lax.axis_size("block")
    slots = streams[0][1].shape[0]
    steps = lax.div(math.prod(grid) - block + blocks - 1, blocks)
    first_warpgroup = lax.axis_index("wg") == 0

    def position(step):
        tile = block + step * blocks
        return lax.div(tile, jnp.int32(grid[1])), lax.rem(tile, jnp.int32(grid[1]))

    def start(fetch, slot, step):
        pl.when(first_warpgroup & (step < steps))(lambda: fetch(slot, *position(step)))

    def refill(fetch, released, slot, step):
        @pl.when(first_warpgroup)
        def _():
            plgpu.barrier_wait(released.at[slot])
            pl.when(step < steps)(lambda: fetch(slot, *position(step)))

    for slot in range(slots):
        for fetch, _ in streams:
            start(fetch, jnp.int32(slot), slot)

    @pl.loop(0, steps)
    def _step(step):
        slot = lax.rem(step, jnp.int32(slots))
        work(slot, *position(step), *[partial(refill, *stream, slot, step + slots) for stream in streams])

    plgpu.wait_smem_to_gmem(0)


def quantize_tile(
    x: Float[Array, "*rows 128"], power_of_2: bool = False
) -> tuple[Float8e4m3fn[Array, "*rows 128"], Float[Array, "*rows"]]:
    """Float32 or BF16 tiles in registers to FP8, and their scales: the reference's numbers.

    BF16 is widened after its largest magnitude is found, two numbers at a time. No clip is needed: what is multiplied
    by 448 / amax rounds to 448 at most.
    """
    scale, inverse = scale_and_inverse(jnp.abs(x).max(axis=-1).astype(jnp.float32), power_of_2)
    return (x.astype(jnp.float32) * lax.broadcast_in_dim(inverse, x.shape, range(x.ndim - 1))).astype(E4M3), scale


def round_tile_to_e5m6(x: Float[Array, "rows 128"]) -> Float[Array, "rows 128"]:
    """Tiles in registers, rounded to E5M6 with scales of powers of two, in the type of x, which holds all of its
    numbers: the reference's."""
    scale, inverse = scale_and_inverse(jnp.abs(x).max(axis=-1).astype(jnp.float32), True, E5M6_MAX)
    inner = x.astype(jnp.float32) * lax.broadcast_in_dim(inverse, x.shape, [0])
    bits = lax.bitcast_convert_type(inner, jnp.int32)
    odd = lax.shift_right_logical(bits, 17) & 1
    normal = lax.bitcast_convert_type((bits + 0xFFFF + odd) & ~0x1FFFF, jnp.float32)  # ties to even
    # Between 8 and 16 numbers are 2^-20 apart. Counted as integers: a compiler may drop 12 that come and go.
    steps = lax.bitcast_convert_type(inner + 12, jnp.int32) - _TWELVE
    subnormal = lax.bitcast_convert_type(steps.astype(jnp.float32) * 2.0**-20, jnp.int32)
    subnormal = lax.bitcast_convert_type(subnormal | (bits & _SIGN), jnp.float32)  # of -0 too
    rounded = jnp.where(jnp.abs(inner) < 2.0**-14, subnormal, normal)
    return (rounded * lax.broadcast_in_dim(scale, x.shape, [0])).astype(x.dtype)


def scale_and_inverse(
    amax: Float[Array, "*tiles"], power_of_2: bool = False, largest: float = E4M3_MAX
) -> tuple[Array, Array]:
    """As in the reference, from the largest magnitudes of tiles."""
    amax = jnp.maximum(amax, SMALLEST_AMAX)
    scale, inverse = amax * (1 / largest), nearest_quotient(largest / amax, amax)
    if not power_of_2:
        return scale, inverse
    bits = lax.bitcast_convert_type(scale, jnp.int32)
    exponent = lax.shift_right_logical(bits + 0x7FFFFF, 23)  # rounded up
    power = lambda biased: lax.bitcast_convert_type(lax.shift_left(biased, 23), jnp.float32)  # noqa: E731
    finite = amax < jnp.inf
    return jnp.where(finite, power(exponent), scale), jnp.where(finite, power(254 - exponent), inverse)


def write(
    quantized: tuple[Float8e4m3fn[Array, "64 128"], Float[Array, "64"]],
    buffers: tuple[jax.Ref, jax.Ref],
    buffer: int | Int[Array, ""],
    destination: tuple[jax.Ref, jax.Ref],
    row: Int[Array, ""],
    tile: Int[Array, ""],
    in_flight: int | None = None,
) -> None:
    """Sends half a tile to rows `row`... and tile `tile` of the `destination` values and scales.

    Before that, all but the last `in_flight` of the warpgroup's writes leave their buffers: by default all but those
    since its last of this buffer, if it takes its buffers in turn.
    """
    mine = lax.axis_index("wg"), buffer
    in_flight = buffers[0].shape[1] - 1 if in_flight is None else in_flight
    plgpu.wait_smem_to_gmem(in_flight, wait_read_only=True)
    buffers[0].at[mine][...], buffers[1].at[mine][...] = quantized
    plgpu.commit_smem()
    rows = pl.ds(row, HALF)
    values = destination[0].at[rows, pl.ds(tile * TILE, TILE)]
    plgpu.copy_smem_to_gmem(buffers[0].at[mine], values, commit_group=False)
    plgpu.copy_smem_to_gmem(buffers[1].at[mine], destination[1].at[tile, rows])


def write_values(
    values: Float8e4m3fn[Array, "64 128"],
    buffers: jax.Ref,
    buffer: int,
    destination: jax.Ref,
    row: Int[Array, ""],
    tile: Int[Array, ""],
) -> None:
    """`write` for values whose scale is their block's."""
    mine = lax.axis_index("wg"), buffer
    plgpu.wait_smem_to_gmem(buffers.shape[1] - 1, wait_read_only=True)
    buffers.at[mine][...] = values
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(buffers.at[mine], destination.at[pl.ds(row, HALF), pl.ds(tile * TILE, TILE)])
