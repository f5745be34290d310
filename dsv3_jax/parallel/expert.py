"""Expert parallelism: rows travel to the devices that hold their experts, and back (report 3.2.2).

dispatch -> experts -> combine, each a function of local arrays and axis names. The exchange is flat: one all-to-all
over all devices of the expert group.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from dsv3_jax.model.moe import ExpertsFn, LocalExchange, apply_sorted
from dsv3_jax.ops.permute import assign_slots, permute, permute_choices, unpermute
from dsv3_jax.parallel.row_exchange import RowPlan, exchange_rows


@dataclass(frozen=True)
class ReplicatedExperts(LocalExchange):
    """Every device holds all experts: no token travels, and only statistics are shared."""

    batch_axes: tuple[str, ...]

    def total(self, x: Array) -> Array:
        """Sum over all devices that share the batch."""
        return jax.lax.psum(x, self.batch_axes)


@dataclass(frozen=True)
class FlatExchange:
    """One all-to-all over `expert_axes`; see `model.moe.Exchange`."""

    expert_axes: tuple[str, ...]
    batch_axes: tuple[str, ...]
    buffer_factor: float
    """Rows a device can receive, over a balanced load."""

    def total(self, x: Array) -> Array:
        """Sum over all devices that share the batch."""
        return jax.lax.psum(x, self.batch_axes)

    def apply(
        self,
        x: Float[Array, "tokens d"],
        experts: Int[Array, "tokens top_k"],
        weights: Float[Array, "tokens top_k"],
        experts_fn: ExpertsFn,
        num_experts: int,
    ) -> tuple[Float[Array, "tokens d"], Int[Array, ""]]:
        """Dispatch, run this device's experts, combine; and the rows that the receiving buffers had no room for."""
        here = num_experts // jax.lax.axis_size(self.expert_axes)
        slots = checkpoint_name(assign_slots(experts, num_experts, tile=1), "routing")
        buffer = buffer_rows(x.shape[0], experts.shape[1], num_experts, here, self.buffer_factor)
        plan, received_expert, overflow = checkpoint_name(
            plan_exchange(slots.sizes, here, buffer, self.expert_axes), "routing"
        )
        largest = x.shape[0] * min(experts.shape[1], here)
        rows = exchange_rows(permute(x, slots), plan, buffer, largest, self.expert_axes)
        row_weights = permute_choices(weights, slots)[:, None]
        row_weights = exchange_rows(row_weights, plan, buffer, largest, self.expert_axes)
        rows, row_weights = checkpoint_name((rows, row_weights), "dispatched")
        group = received_expert[:, None]
        out = apply_sorted(rows, group, row_weights, experts_fn, here, group < here)
        out = exchange_rows(out, plan.reversed(), experts.size, largest, self.expert_axes)
        return unpermute(out, slots), overflow


def buffer_rows(tokens: int, top_k: int, num_experts: int, here: int, factor: float) -> int:
    """Rows of the receiving buffer: a balanced load times the factor, at most what can arrive at all."""
    devices = num_experts // here
    most = devices * tokens * min(top_k, here)
    return min(most, math.ceil(tokens * top_k * factor / 8) * 8)


def plan_exchange(
    sizes: Int[Array, " experts"], here: int, buffer: int, axes: tuple[str, ...]
) -> tuple[RowPlan, Int[Array, " buffer"], Int[Array, ""]]:
    """Who sends how many rows where, from the rows that each device has for each expert, sorted by expert.

    Also the local expert of each received row (`here` where there is none), and how many rows for this device do not
    fit into its buffer; those are not sent.
    """
    me = jax.lax.axis_index(axes)
    per_expert = jax.lax.all_gather(sizes, axes).reshape(-1, sizes.shape[0] // here, here)
    wanted = per_expert.sum(axis=2)
    starts = _exclusive_cumsum(wanted, axis=1)
    places = jnp.minimum(_exclusive_cumsum(wanted, axis=0), buffer)
    sent = jnp.minimum(wanted, buffer - places)
    plan = RowPlan(
        send_starts=starts[me],
        send_sizes=sent[me],
        send_places=places[me],
        recv_starts=places[:, me],
        recv_sizes=sent[:, me],
        recv_places=starts[:, me],
    )
    row = jnp.arange(buffer)
    source = jnp.searchsorted(places[:, me], row, side="right") - 1
    within = row - places[source, me]
    bounds = jnp.cumsum(per_expert[:, me], axis=1)
    expert = (within[:, None] >= bounds[source]).sum(axis=1)
    expert = jnp.where(within < sent[source, me], expert, here)
    return plan, expert.astype(jnp.int32), (wanted - sent)[:, me].sum()


def _exclusive_cumsum(x: Array, axis: int) -> Array:
    return jnp.cumsum(x, axis=axis) - x
