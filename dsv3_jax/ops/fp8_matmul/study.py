"""What Hopper's tensor cores and coarser scales would do to FP8 training, in plain jnp: for study, on one device.

The products have the signatures of `api`, and an accumulator. An FP8 instruction of Hopper adds 32 products at a time
into a running sum of about 14 bits, so that the report moves that sum into float32 every 128 elements (3.3.2, B.1).
Its other control quantizes the gradients of activations in 128x128 blocks (B.2).
"""

from dataclasses import dataclass
from math import gcd

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax.ops.groups import group_bounds
from dsv3_jax.ops.quantize.formats import TILE, Blocked, Tiled
from dsv3_jax.ops.quantize.reference import quantize_blocks

_FLOAT32_BITS = 24
# Steps whose partial sums are in memory at once: few where the result is activations, more where it is a weight.
_STEPS_OF_ACTIVATIONS, _STEPS_OF_WEIGHTS = 4, 16


@dataclass(frozen=True)
class Accumulator:
    """A running sum that is cut, towards zero, to `bits` significant bits after every `step` elements.

    It is added to a float32 total, and starts again at zero, after every `interval` elements. Where that is one tile,
    it sums the FP8 values and the scales come in with the promotion; a longer one meets many scales, and sums values
    already scaled. Raises ValueError for a step that does not divide 128 and an interval that 128 does not divide.
    """

    bits: int = 14
    step: int = 32
    interval: int | None = TILE
    """None never promotes."""

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= _FLOAT32_BITS:
            raise ValueError(f"bits={self.bits}: must lie between 1 and the {_FLOAT32_BITS} of float32")
        if self.step < 1 or TILE % self.step:
            raise ValueError(f"step={self.step}: must divide {TILE}, so that a step has one scale")
        if self.interval is not None and (self.interval < 1 or self.interval % TILE):
            raise ValueError(f"interval={self.interval}: must be a multiple of {TILE}, or None")


HOPPER = Accumulator()
"""What the kernels have."""
NEVER_PROMOTED = Accumulator(interval=None)
"""The negative control."""


def fp8_matmul(
    x: Tiled, weight: Blocked, dtype: jnp.dtype = jnp.bfloat16, *, accumulator: Accumulator = HOPPER
) -> Float[Array, "rows n"]:
    """x @ weight: the forward product."""
    return _product(x, _transposed_weight(weight), accumulator, _STEPS_OF_ACTIVATIONS).astype(dtype)


def fp8_matmul_transposed(
    dy: Tiled, weight: Blocked, dtype: jnp.dtype = jnp.bfloat16, *, accumulator: Accumulator = HOPPER
) -> Float[Array, "rows k"]:
    """dy @ weight^T: the gradient of the input."""
    return _product(dy, _weight(weight), accumulator, _STEPS_OF_ACTIVATIONS).astype(dtype)


def fp8_wgrad(
    x_columns: Tiled,
    dy_columns: Tiled,
    total: Float[Array, "k n"] | None = None,
    *,
    accumulator: Accumulator = HOPPER,
) -> Float[Array, "k n"]:
    """x^T @ dy in float32, added to `total` where given: the gradient of the weight."""
    dw = _product(x_columns, dy_columns, accumulator, _STEPS_OF_WEIGHTS)
    return dw if total is None else total + dw


def fp8_grouped_matmul(
    x: Tiled,
    weight: Blocked,
    tile_group: Int[Array, " tiles"],
    dtype: jnp.dtype = jnp.bfloat16,
    *,
    accumulator: Accumulator = HOPPER,
) -> Float[Array, "rows n"]:
    """Each tile of rows times the weight of its group."""
    return _grouped_product(x, _transposed_weight(weight), tile_group, accumulator).astype(dtype)


def fp8_grouped_matmul_transposed(
    dy: Tiled,
    weight: Blocked,
    tile_group: Int[Array, " tiles"],
    dtype: jnp.dtype = jnp.bfloat16,
    *,
    accumulator: Accumulator = HOPPER,
) -> Float[Array, "rows k"]:
    """Each tile of rows times the transposed weight of its group: the gradient of the rows."""
    return _grouped_product(dy, _weight(weight), tile_group, accumulator).astype(dtype)


def fp8_grouped_wgrad(
    x_columns: Tiled,
    dy_columns: Tiled,
    tile_group: Int[Array, " tiles"],
    groups: int,
    total: Float[Array, "groups k n"] | None = None,
    *,
    accumulator: Accumulator = HOPPER,
) -> Float[Array, "groups k n"]:
    """x^T @ dy of each group's rows in float32, added to `total` where given: the gradient of the weights.

    A group's sum runs over its own rows. All groups advance together, by one tile at a time.
    """
    tiles = tile_group.shape[0]
    rows = x_columns.values.shape[1] // tiles
    step = min(accumulator.step, rows)
    x, dy = (_tiles_in_steps(q, tiles, step) for q in (x_columns, dy_columns))
    bounds = group_bounds(tile_group, groups)
    first, count = bounds[:-1], jnp.diff(bounds)
    one_scale = accumulator.interval == rows == TILE
    promoted = accumulator.interval or x_columns.values.shape[1] + 1

    def add_tile(j: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        long, short = sums
        x_tile, dy_tile = jax.tree.map(lambda part: part.at[first + j].get(mode="clip"), (x, dy))
        there = (j < count)[:, None, None]
        added = jax.vmap(lambda *operands: _add_steps(*operands, accumulator.bits, not one_scale))(
            short, x_tile, dy_tile
        )
        short = jnp.where(there, added, short)
        due = there & ((j + 1) * rows % promoted == 0)
        scale = jax.vmap(_scales_of_first)(x_tile, dy_tile) if one_scale else 1.0
        return jnp.where(due, long + short * scale, long), jnp.where(due, 0.0, short)

    zeros = jnp.zeros((groups, x_columns.values.shape[0], dy_columns.values.shape[0]), jnp.float32)
    long, short = jax.lax.fori_loop(0, count.max(), add_tile, (zeros, zeros))
    dw = long + short
    return dw if total is None else total + dw


def truncate(x: Float[Array, "*shape"], bits: int) -> Float[Array, "*shape"]:
    """Float32 cut towards zero to `bits` significant bits, the leading one included."""
    kept = jnp.int32(-1 << (_FLOAT32_BITS - bits))
    return jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(x, jnp.int32) & kept, jnp.float32)


def quantize_both_by_block(dy: Float[Array, "rows k"]) -> tuple[Tiled, Tiled]:
    """dy in tiles along the features and, transposed, along the rows, which take the scale of their 128x128 block."""
    blocks = quantize_blocks(dy)
    return _weight(blocks), _transposed_weight(blocks)


# (values [steps, rows, step], scales [steps, rows]) of an operand, its reduced axis cut into steps.
_Steps = tuple[Array, Array]


def _product(a: Tiled, b: Tiled, accumulator: Accumulator, at_once: int) -> Float[Array, "m n"]:
    """a @ b^T in float32."""
    k = a.values.shape[1]
    whole = -(-k // TILE) * TILE
    interval = min(accumulator.interval or whole, whole)
    one_scale = accumulator.interval == TILE
    operands = tuple(_in_steps(q, accumulator.step, interval) for q in (a, b))
    in_interval = interval // accumulator.step
    at_once = gcd(in_interval, at_once)
    split = jax.tree.map(lambda x: x.reshape(-1, in_interval // at_once, at_once, *x.shape[1:]), operands)
    zeros = jnp.zeros((a.values.shape[0], b.values.shape[0]), jnp.float32)

    def add_steps(short: Array, operands: tuple[_Steps, _Steps]) -> tuple[Array, None]:
        return _add_steps(short, *operands, accumulator.bits, not one_scale), None

    def add_interval(total: Array, operands: tuple[_Steps, _Steps]) -> tuple[Array, None]:
        short, _ = jax.lax.scan(add_steps, zeros, operands)
        if one_scale:
            short = short * _scales_of_first(*jax.tree.map(lambda x: x[0], operands))
        return total + short, None

    return jax.lax.scan(add_interval, zeros, split)[0]


def _grouped_product(
    x: Tiled, weight: Tiled, tile_group: Int[Array, " tiles"], accumulator: Accumulator
) -> Float[Array, "rows n"]:
    tiles = tile_group.shape[0]
    values = x.values.reshape(tiles, -1, x.values.shape[1])
    scales = jnp.moveaxis(x.scales.reshape(x.scales.shape[0], tiles, -1), 1, 0)
    weight = jax.tree.map(lambda part: part.at[tile_group].get(mode="clip"), weight)
    product = jax.vmap(lambda a, b: _product(a, b, accumulator, _STEPS_OF_ACTIVATIONS))
    return product(Tiled(values, scales), weight).reshape(x.values.shape[0], -1)


def _add_steps(short: Float[Array, "m n"], a: _Steps, b: _Steps, bits: int, scaled: bool) -> Float[Array, "m n"]:
    """The running sum after these steps. E4M3 is exact in bfloat16, and so are its products in float32."""
    (a_values, a_scales), (b_values, b_scales) = a, b
    partial = jnp.einsum(
        "smk,snk->smn",
        a_values.astype(jnp.bfloat16),
        b_values.astype(jnp.bfloat16),
        preferred_element_type=jnp.float32,
    )
    if scaled:
        partial = partial * (a_scales[:, :, None] * b_scales[:, None, :])
    for i in range(partial.shape[0]):
        short = truncate(short + partial[i], bits)
    return short


def _scales_of_first(a: _Steps, b: _Steps) -> Float[Array, "m n"]:
    """Product of the scales, where all the steps have the same."""
    return a[1][0][:, None] * b[1][0][None, :]


def _in_steps(q: Tiled, step: int, multiple: int) -> _Steps:
    """The reduced axis, padded with zeros to a multiple of `multiple`, in steps."""
    rows, k = q.values.shape
    padded = -(-k // multiple) * multiple
    values = jnp.pad(q.values, ((0, 0), (0, padded - k))).reshape(rows, -1, step)
    scales = jnp.pad(q.scales, ((0, padded // TILE - q.scales.shape[0]), (0, 0)))
    return jnp.swapaxes(values, 0, 1), jnp.repeat(scales, TILE // step, axis=0)


def _tiles_in_steps(q: Tiled, tiles: int, step: int) -> _Steps:
    """The same by tile of a grouped product, which has no padding: values are [tiles, steps, rows, step]."""
    rows, k = q.values.shape
    values = jnp.moveaxis(q.values.reshape(rows, tiles, -1, step), 0, 2)
    return values, jnp.repeat(q.scales, TILE // step, axis=0)[: k // step].reshape(tiles, -1, rows)


def _transposed_weight(weight: Blocked) -> Tiled:
    """[*groups, n, k] in tiles along k, as the forward product reads it."""
    return Tiled(weight.transposed, _over_block(weight.scales, weight.values.shape[-1]))


def _weight(weight: Blocked) -> Tiled:
    """[*groups, k, n] in tiles along n, as the gradient of the input reads it."""
    return Tiled(weight.values, _over_block(jnp.swapaxes(weight.scales, -1, -2), weight.values.shape[-2]))


def _over_block(scales: Float[Array, "*groups tiles blocks"], size: int) -> Float[Array, "*groups tiles size"]:
    return jnp.repeat(scales, TILE, axis=-1)[..., :size]
