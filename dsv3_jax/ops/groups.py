"""Where each group's tiles of rows lie."""

import jax.numpy as jnp
from jaxtyping import Array, Int


def group_bounds(tile_group: Int[Array, " tiles"], groups: int) -> Int[Array, " groups_and_1"]:
    """The first tile of each group and, last, the end of them all, of tiles sorted by group; a number of `groups` or
    more marks tiles of none.

    Counted, since a binary search is a loop of small kernels on a GPU.
    """
    return jnp.searchsorted(tile_group, jnp.arange(groups + 1), method="compare_all").astype(jnp.int32)
