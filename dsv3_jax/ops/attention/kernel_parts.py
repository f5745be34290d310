"""What the Hopper kernels of attention share."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

LOG2_E = math.log2(math.e)


class Segments(NamedTuple):
    """Which sample of a packed row each position belongs to; in a kernel, the references to it."""

    ids: Int[Array, "batch padded_seq"]
    bounds: Int[Array, "batch tiles"]
    """For each tile, the first tile of keys (forward) or the last of queries (backward) that holds a sample of it."""

    @classmethod
    def take(cls, refs: Sequence[Any], segments: Self | None) -> tuple[Self | None, Sequence[Any]]:
        """The references to the segments, where there are any, and the other references."""
        return (None, refs) if segments is None else (cls(*refs[:2]), refs[2:])


def first_of_segment(segment_ids: Int[Array, "batch seq"], queries: int, keys: int) -> Segments:
    """For each tile of `queries`, the first tile of `keys` with a sample in common."""
    ids, shared = _shared_tiles(segment_ids, queries, keys)
    return Segments(ids, jnp.argmax(shared, axis=2).astype(jnp.int32))


def last_of_segment(segment_ids: Int[Array, "batch seq"], keys: int, queries: int) -> Segments:
    """For each tile of `keys`, the last tile of `queries` with a sample in common."""
    ids, shared = _shared_tiles(segment_ids, keys, queries)
    last = shared.shape[2] - 1 - jnp.argmax(shared[:, :, ::-1], axis=2)
    return Segments(ids, last.astype(jnp.int32))


def _shared_tiles(
    segment_ids: Int[Array, "batch seq"], rows: int, columns: int
) -> tuple[Int[Array, "batch padded_seq"], Bool[Array, "batch row_tiles column_tiles"]]:
    """Ids padded to whole tiles, and which pairs of tiles may hold the same sample: ranges of ids that overlap."""
    seq = segment_ids.shape[1]
    ids = jnp.pad(segment_ids, ((0, 0), (0, -seq % math.lcm(rows, columns))), mode="edge")
    by_row, by_column = (ids.reshape(len(ids), -1, size) for size in (rows, columns))
    by_row, by_column = by_row[:, : pl.cdiv(seq, rows)], by_column[:, : pl.cdiv(seq, columns)]
    begins = by_row.min(2)[:, :, None] <= by_column.max(2)[:, None]
    return ids, begins & (by_row.max(2)[:, :, None] >= by_column.min(2)[:, None])


def following(slot: Array, stages: int) -> Array:
    """The slot after this one."""
    return lax.select(slot == stages - 1, jnp.int32(0), slot + 1)


def unseen_zero() -> Array:
    """Zero, of which the compiler does not know that it is: addresses and indices that depend on it are computed where
    they are used, instead of once for all and then kept in registers."""
    return lax.optimization_barrier(jnp.int32(0))


def not_after(shape: tuple[int, int], key: Array, query: Array, keys: int) -> Bool[Array, "rows columns"]:
    """Which keys, from `key` on, are not after the queries, from `query` on. `keys` is the axis of the keys."""
    index = [plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA) for axis in (0, 1)]
    return index[1 - keys] + (query - key) >= index[keys] + unseen_zero()


def of_one_segment(shape: tuple[int, int], query_ids: Array, key_ids: Array, keys: int) -> Bool[Array, "rows columns"]:
    """Which keys are of the same segment as the queries."""
    return lax.broadcast_in_dim(query_ids, shape, [1 - keys]) == lax.broadcast_in_dim(key_ids, shape, [keys])


def preset(acc_ref: Any, start: Float[Array, "m n"], interpret: Any) -> None:
    """Lets an accumulator start from a value. The interpreter cannot: there, `settled` adds it."""
    if interpret is None:
        acc_ref[...] = start


def settled(acc_ref: Any, start: Float[Array, "m n"], interpret: Any, later: int = 0) -> Float[Array, "m n"]:
    """The sums of a preset accumulator, once only so many later products are under way."""
    sums = plgpu.wgmma_accumulator_load(acc_ref, wait_n=later)
    return sums if interpret is None else start + sums


def accumulate(
    acc_ref: Any, start: Float[Array, "m n"], a: Float[Array, "m k"], b_ref: Any, interpret: Any
) -> Callable[[int], Float[Array, "m n"]]:
    """Begins start + a @ b with a in registers. The function it returns gives the result, once only so many later
    products are under way. The interpreter knows no left side in registers: it gets the product itself."""
    if interpret is not None:
        product = jnp.dot(a, b_ref[...], preferred_element_type=jnp.float32)
        return lambda later: start + product
    acc_ref[...] = start
    plgpu.wgmma(acc_ref, a, b_ref)
    return lambda later: plgpu.wgmma_accumulator_load(acc_ref, wait_n=later)
