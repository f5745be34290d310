"""All-to-all of rows, any number from each device to each other."""

import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax.parallel.mesh import vary_over


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RowPlan:
    """What this device sends to and receives from each device of the group."""

    send_starts: Int[Array, " devices"]
    """First row for each device, in this device's rows."""
    send_sizes: Int[Array, " devices"]
    """Rows for each device."""
    send_places: Int[Array, " devices"]
    """Where they land in that device's output."""
    recv_starts: Int[Array, " devices"]
    """First row from each device, in this device's output."""
    recv_sizes: Int[Array, " devices"]
    """Rows from each device."""
    recv_places: Int[Array, " devices"]
    """Where that device holds them."""

    def reversed(self) -> "RowPlan":
        """The plan that takes every row back to where it came from."""
        return RowPlan(
            self.recv_starts, self.recv_sizes, self.recv_places, self.send_starts, self.send_sizes, self.send_places
        )


def buffer_rows(balanced: int, factor: float, most: int) -> int:
    """Rows of a receiving buffer: a balanced load times the factor, at most what can arrive at all."""
    return min(most, math.ceil(balanced * factor / 8) * 8)


def plan_rows(
    wanted: Int[Array, "senders receivers"], me: Int[Array, ""], buffer: int
) -> tuple[RowPlan, Int[Array, ""]]:
    """This device's part in an exchange of `wanted` rows, which every sender holds in the order of the receivers.

    They arrive in the order of the senders, from the first row on. Also how many rows for this device do not fit into
    its `buffer`; those are not sent.
    """
    starts = jnp.cumsum(wanted, axis=1) - wanted
    places = jnp.minimum(jnp.cumsum(wanted, axis=0) - wanted, buffer)
    sent = jnp.minimum(wanted, buffer - places)
    plan = RowPlan(
        send_starts=starts[me],
        send_sizes=sent[me],
        send_places=places[me],
        recv_starts=places[:, me],
        recv_sizes=sent[:, me],
        recv_places=starts[:, me],
    )
    return plan, (wanted - sent)[:, me].sum()


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def exchange_rows(
    rows: Float[Array, "rows d"], plan: RowPlan, out_rows: int, largest: int, axes: tuple[str, ...]
) -> Float[Array, "out_rows d"]:
    """Send rows as the plan says; output rows that nobody sends are zero.

    `largest` bounds what any device sends another.

    Uses `lax.ragged_all_to_all` on GPU and TPU, and an exact emulation by padded slabs elsewhere. The backward pass is
    the reversed exchange.
    """
    if jax.default_backend() == "cpu":
        return _padded_exchange(rows, plan, out_rows, largest, axes)
    return _ragged_exchange(rows, plan, out_rows, axes)


def _ragged_exchange(rows: Array, plan: RowPlan, out_rows: int, axes: tuple[str, ...]) -> Array:
    output = vary_over(jnp.zeros((out_rows, rows.shape[1]), rows.dtype), tuple(jax.typeof(rows).mat.varying))
    return jax.lax.ragged_all_to_all(
        rows, output, plan.send_starts, plan.send_sizes, plan.send_places, plan.recv_sizes, axis_name=axes
    )


def _padded_exchange(rows: Array, plan: RowPlan, out_rows: int, largest: int, axes: tuple[str, ...]) -> Array:
    offset = jnp.arange(largest)
    index = jnp.where(offset < plan.send_sizes[:, None], plan.send_starts[:, None] + offset, rows.shape[0])
    slabs = jnp.take(rows, index, axis=0, mode="fill", fill_value=0)
    slabs = jax.lax.all_to_all(slabs, axes, split_axis=0, concat_axis=0, tiled=True)
    target = jnp.where(offset < plan.recv_sizes[:, None], plan.recv_starts[:, None] + offset, out_rows)
    output = jnp.zeros((out_rows, rows.shape[1]), rows.dtype)
    return output.at[target.reshape(-1)].set(slabs.reshape(-1, rows.shape[1]), mode="drop")


def _forward(
    rows: Array, plan: RowPlan, out_rows: int, largest: int, axes: tuple[str, ...]
) -> tuple[Array, tuple[RowPlan, Array]]:
    return exchange_rows(rows, plan, out_rows, largest, axes), (plan, rows[:, :0])


def _backward(
    out_rows: int, largest: int, axes: tuple[str, ...], residuals: tuple[RowPlan, Array], d_out: Array
) -> tuple[Array, None]:
    plan, like = residuals
    return exchange_rows(d_out, plan.reversed(), like.shape[0], largest, axes), None


exchange_rows.defvjp(_forward, _backward)
