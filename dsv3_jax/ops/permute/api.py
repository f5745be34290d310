"""Tokens to rows sorted by group and padded to whole tiles, and back.

The two directions are each other's transpose, so each is the other's backward pass: both are gathers, and neither
scatters or saves a row.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from dsv3_jax.ops.hopper import takes_kernel
from dsv3_jax.ops.permute import mosaic_gpu


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Slots:
    """Where each (token, choice) stands among the rows, and the reverse.

    `slot_of` is out of range (the number of rows) for a choice that has no slot, `token_of` (the number of tokens)
    for a row that holds none, `tile_group` (the number of groups) for a tile without rows.
    """

    slot_of: Int[Array, "tokens k"]
    token_of: Int[Array, " rows"]
    tile_group: Int[Array, " tiles"]
    sizes: Int[Array, " groups"]


def tile_rows(rows: int, groups: int, largest: int = 128) -> int:
    """Rows of a tile: a power of two, at most `largest`, that wastes little when `rows` spread over `groups`."""
    tile = 8
    while tile < largest and tile * 4 <= rows // groups:
        tile *= 2
    return tile


def assign_slots(
    group: Int[Array, "tokens k"],
    num_groups: int,
    tile: int,
    valid: Bool[Array, "tokens k"] | None = None,
    most: int | None = None,
) -> Slots:
    """Give every (token, choice) a row, so that rows are sorted by group, stably, each group starting a new tile.

    The number of rows is static: what any assignment of `most` choices (None: all) can need. Choices that are not
    `valid` get no slot, and of more than `most` the last may get none.
    """
    tokens, k = group.shape
    choices = tokens * k
    most = choices if most is None else most
    tiles = min(most // tile + num_groups, most)
    rows = tiles * tile
    flat = group.reshape(-1) if valid is None else jnp.where(valid, group, num_groups).reshape(-1)
    # In the narrowest type: a GPU sorts 8 bits at a time.
    order = jnp.argsort(flat.astype(np.min_scalar_type(num_groups)), stable=True)
    # Counted, since a binary search is a loop of some 16 times 5 small kernels on a GPU.
    bounds = jnp.searchsorted(flat[order], jnp.arange(num_groups + 1), method="compare_all")
    sizes = jnp.diff(bounds)
    ends = jnp.cumsum((sizes + tile - 1) // tile)
    starts = jnp.append((ends - (sizes + tile - 1) // tile) * tile, rows)
    sorted_group = flat[order]
    within = jnp.arange(choices) - bounds[sorted_group]
    slot = jnp.where(sorted_group < num_groups, starts[sorted_group] + within, rows)
    slot = jnp.minimum(slot, rows).astype(jnp.int32)
    slot_of = jnp.zeros(choices, jnp.int32).at[order].set(slot).reshape(tokens, k)
    choice_at = jnp.full(rows, choices, jnp.int32).at[slot].set(order.astype(jnp.int32), mode="drop")
    tile_group = jnp.searchsorted(ends, jnp.arange(tiles), side="right", method="compare_all")
    return Slots(
        slot_of=slot_of,
        token_of=choice_at // k,
        tile_group=tile_group.astype(jnp.int32),
        sizes=sizes.astype(jnp.int32),
    )


@jax.custom_vjp
def permute(x: Float[Array, "tokens d"], slots: Slots) -> Float[Array, "rows d"]:
    """Copy each token to the rows of its choices; rows that hold no token are zero."""
    if takes_kernel(None, "permutation", mosaic_gpu.unsupported(x, slots.token_of.shape[0])):
        return mosaic_gpu.take_rows(x, slots.token_of)
    return _take_rows(x, slots.token_of)


@jax.custom_vjp
def unpermute(rows: Float[Array, "rows d"], slots: Slots) -> Float[Array, "tokens d"]:
    """Sum the rows of each token's choices, in float32, into the type of the rows."""
    k = slots.slot_of.shape[1]
    total = sum(_take_rows(rows, slots.slot_of[:, j]).astype(jnp.float32) for j in range(k))
    return total.astype(rows.dtype)


def _take_rows(x: Array, index: Array) -> Array:
    return jnp.take(x, index, axis=0, mode="fill", fill_value=0)


permute.defvjp(
    lambda x, slots: (permute(x, slots), slots),
    lambda slots, drows: (unpermute(drows, slots), None),
)
unpermute.defvjp(
    lambda rows, slots: (unpermute(rows, slots), slots),
    lambda slots, dx: (permute(dx, slots), None),
)


def unpermute_choices(values: Float[Array, " rows"], slots: Slots) -> Float[Array, "tokens k"]:
    """The value of the row of each (token, choice); zero where it has none. The transpose of `permute_choices`."""
    return _take_rows(values, slots.slot_of)


def permute_choices(values: Float[Array, "tokens k"], slots: Slots) -> Float[Array, " rows"]:
    """The value of the (token, choice) that each row holds; zero where it holds none."""
    rows = slots.token_of.shape[0]
    flat = jnp.zeros(rows, values.dtype)
    return flat.at[slots.slot_of.reshape(-1)].set(values.reshape(-1), mode="drop")
