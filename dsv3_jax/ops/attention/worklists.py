"""Which multiprocessor computes which tiles of causal attention, in which order; decided before the kernel runs."""

import heapq
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, Int


class Worklists(NamedTuple):
    """Tiles of worker w: tiles[bounds[w]:bounds[w + 1]]."""

    tiles: Int[np.ndarray, " all_tiles"]
    bounds: Int[np.ndarray, " workers_and_1"]


class Tile(NamedTuple):
    """One tile of the rows of one head."""

    batch: Array
    head: Array
    index: Array


def worklists(batch: int, heads: int, costs: Sequence[float], workers: int, group: int) -> Worklists:
    """Hands out the tiles of all heads, each to the worker that is free first, as a counter in memory would.

    `costs` are those of one head's tiles. The tiles of `group` heads are handed out together, so that what they read is
    still in L2, the longest first, so that all workers end at about the same time.
    """
    tiles_of_head = len(costs)
    longest_first = sorted(range(tiles_of_head), key=lambda tile: -costs[tile])
    free = [(0.0, worker) for worker in range(workers)]
    lists: list[list[int]] = [[] for _ in range(workers)]
    for first in range(0, batch * heads, group):
        for tile in longest_first:
            for row in range(first, min(first + group, batch * heads)):
                at, worker = free[0]
                heapq.heapreplace(free, (at + costs[tile], worker))
                lists[worker].append(row * tiles_of_head + tile)
    bounds = np.cumsum([0, *map(len, lists)])
    return Worklists(np.concatenate([*map(np.asarray, lists)]).astype(np.int32), bounds.astype(np.int32))


def locate(number: Array, heads: int, tiles_of_head: int) -> Tile:
    """Where a tile of a worklist lies."""
    row, heads, tiles_of_head = lax.div(number, jnp.int32(tiles_of_head)), jnp.int32(heads), jnp.int32(tiles_of_head)
    return Tile(lax.div(row, heads), lax.rem(row, heads), lax.rem(number, tiles_of_head))
