"""SwiGLU feed-forwards in FP8: what lies between two products is quantized where it is made (report 3.3).

The backward pass needs the input's tiles and the SwiGLU's input in FP8, and nothing in 16 bits: the SwiGLU's output
is computed again (report 3.3.3).
"""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax.ops.kept import keep_bits
from dsv3_jax.ops.linear.fp8 import FP8Rows
from dsv3_jax.ops.quantize import Tiled, quantize_rows, retile, swiglu_quantize
from dsv3_jax.ops.weights import FP8Weight, Logs, conclude_fp8


class Route(Protocol):
    """Where the tokens of one layer go: to the devices of their experts, there to their rows, and back. `combine` is
    the transpose of the way there, `sort` after `send`."""

    @property
    def tile_group(self) -> Int[Array, " tiles"]:
        """The expert of each tile of rows on this device; the number of experts for a tile without rows."""

    @property
    def arrived_of(self) -> Int[Array, " rows"]:
        """What each row holds of what arrived; out of range for a row that holds nothing."""

    def send(self, x: Float[Array, "tokens d"]) -> Float[Array, "arrived d"]:
        """Each token to the devices of its choices. Any type travels as it is."""

    def sort(self, arrived: Float[Array, "arrived d"]) -> Float[Array, "rows d"]:
        """What arrived, to the rows of its choices on this device; rows that hold nothing are zero."""

    def combine(self, rows: Float[Array, "rows d"]) -> Float[Array, "tokens d"]:
        """The sum of each token's rows. Reads no row that holds no token."""

    def dispatch_choices(self, values: Float[Array, "tokens k"]) -> Float[Array, " rows"]:
        """The value of the choice that each row holds."""

    def combine_choices(self, values: Float[Array, " rows"]) -> Float[Array, "tokens k"]:
        """The value of each choice's row."""


class _Kept(NamedTuple):
    """What the backward pass of a feed-forward needs."""

    tiles: Tiled
    """The input, as it arrived."""
    arrived_of: Int[Array, " rows"] | None
    """Where each row is in it; None where it is in order."""
    hidden: Tiled
    row_weights: Float[Array, " rows"] | None
    tile_group: Int[Array, " tiles"] | None
    gate_up: FP8Weight
    down: FP8Weight


class _Gradients(NamedTuple):
    rows: Float[Array, "rows d"]
    row_weights: Float[Array, " rows"] | None
    gate_up: FP8Weight
    down: FP8Weight
    logs: Logs


@jax.custom_vjp
def fp8_feed_forward(x: FP8Rows, gate_up: FP8Weight, down: FP8Weight) -> Float[Array, "*batch d"]:
    """down(silu(gate(x)) * up(x)), with the gate and up projections fused, gate first."""
    return _dense_fwd(x, gate_up, down)[0]


def _dense_fwd(x: FP8Rows, gate_up: FP8Weight, down: FP8Weight) -> tuple[Array, _Kept]:
    y, kept = _forward(x.tiles, None, None, gate_up, down, x.source.dtype)
    return y.reshape(x.source.shape), kept


def _dense_bwd(kept: _Kept, dy: Array) -> tuple[tuple[FP8Rows, FP8Weight, FP8Weight], Logs]:
    dy_tiles = kept.down.recipe.gradient(dy.reshape(-1, dy.shape[-1]))
    gradients = _backward(kept, *dy_tiles, dy.dtype)
    return (FP8Rows(None, gradients.rows.reshape(dy.shape)), gradients.gate_up, gradients.down), gradients.logs


fp8_feed_forward.defvjp_with_logs(_dense_fwd, _dense_bwd)


@jax.custom_vjp
def fp8_routed_feed_forward(
    x: FP8Rows, weights: Float[Array, "tokens k"], route: Route, gate_up: FP8Weight, down: FP8Weight
) -> Float[Array, "tokens d"]:
    """The sum over each token's experts of their feed-forward, weighted before the down projection.

    Tokens, and the gradients of the experts' outputs, travel in FP8 with the power-of-two scales that x must have;
    outputs, and the gradients of the tokens, in the type of x (report 3.3.3). Rows must come in tiles of 128, along
    which the weight gradients' tiles run.
    """
    return _routed_fwd(x, weights, route, gate_up, down)[0]


def _routed_fwd(
    x: FP8Rows, weights: Array, route: Route, gate_up: FP8Weight, down: FP8Weight
) -> tuple[Array, tuple[_Kept, Route]]:
    arrived, row_weights = _of_rows(route.send, x.tiles), route.dispatch_choices(weights)
    tiles = _of_rows(route.sort, arrived)
    rows, kept = _forward(tiles, row_weights, route.tile_group, gate_up, down, x.source.dtype)
    # The backward pass sorts what arrived while it turns it: sorted rows are several times as many.
    kept = kept._replace(tiles=arrived, arrived_of=route.arrived_of)
    return route.combine(rows).reshape(x.source.shape), (kept, route)


def _routed_bwd(residuals: tuple[_Kept, Route], dy: Array) -> tuple[tuple, Logs]:
    kept, route = residuals
    arrived = _of_rows(route.send, quantize_rows(dy.reshape(-1, dy.shape[-1]), power_of_2=True))
    dy_tiles = kept.down.recipe.received_gradient(arrived, _of_rows(route.sort, arrived), route.arrived_of)
    gradients = _backward(kept, *dy_tiles, dy.dtype)
    d_source = route.combine(gradients.rows).reshape(dy.shape)
    d_weights = route.combine_choices(gradients.row_weights)
    return (FP8Rows(None, d_source), d_weights, None, gradients.gate_up, gradients.down), gradients.logs


fp8_routed_feed_forward.defvjp_with_logs(_routed_fwd, _routed_bwd)


def _of_rows(move: Callable[[Array], Array], tiles: Tiled) -> Tiled:
    """Rows move with their scales."""
    return Tiled(move(tiles.values), move(tiles.scales.T).T)


def _forward(
    tiles: Tiled,
    row_weights: Float[Array, " rows"] | None,
    tile_group: Int[Array, " tiles"] | None,
    gate_up: FP8Weight,
    down: FP8Weight,
    dtype: jnp.dtype,
) -> tuple[Float[Array, "rows d"], _Kept]:
    hidden = gate_up.recipe.matmul(tiles, gate_up.value, tile_group, dtype)
    hidden, out = swiglu_quantize(hidden, row_weights)
    hidden = Tiled(keep_bits(hidden.values, "ffn"), keep_bits(hidden.scales, "ffn"))
    y = down.recipe.matmul(out, down.value, tile_group, dtype)
    return y, _Kept(tiles, None, hidden, row_weights, tile_group, replace(gate_up, slot=None), replace(down, slot=None))


def _backward(kept: _Kept, dy_rows: Tiled, dy_columns: Tiled, dtype: jnp.dtype) -> _Gradients:
    tiles, arrived_of, hidden, row_weights, tile_group, gate_up, down = kept
    d_out = down.recipe.matmul_transposed(dy_rows, down.value, tile_group, dtype)
    inner = down.recipe.swiglu_backward(hidden, d_out, row_weights)
    d_rows = gate_up.recipe.matmul_transposed(inner.d_hidden_rows, gate_up.value, tile_group, dtype)
    d_down, down_logs = conclude_fp8(down, inner.output_columns, dy_columns, tile_group)
    d_gate_up, logs = conclude_fp8(gate_up, retile(tiles, arrived_of), inner.d_hidden_columns, tile_group)
    return _Gradients(d_rows, inner.d_weights, d_gate_up, d_down, logs | down_logs)
