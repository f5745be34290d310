"""Expert parallelism: rows travel to the devices that hold their experts, and back (report 3.2.2).

dispatch -> experts -> combine, each a function of local arrays and axis names. The exchange here is flat: one
all-to-all over all devices of the expert group, a row for every expert of a token. `expert_hierarchical` has the
report's, which spares the slow link.
"""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from dsv3_jax.model.moe import LocalExchange, LocalRoute, sort_by_group
from dsv3_jax.ops.feed_forward import Route
from dsv3_jax.ops.kept import keep_bits
from dsv3_jax.ops.permute import Slots, assign_slots, permute, permute_choices, unpermute, unpermute_choices
from dsv3_jax.parallel.row_exchange import RowPlan, buffer_rows, exchange_rows, plan_rows


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

    def route(
        self, experts: Int[Array, "tokens top_k"], num_experts: int, tile: int | None
    ) -> tuple[Route, Int[Array, ""]]:
        """Tokens' way to their experts' devices; and the rows that the receiving buffers had no room for."""
        tokens, top_k = experts.shape
        here = num_experts // jax.lax.axis_size(self.expert_axes)
        slots = checkpoint_name(assign_slots(experts, num_experts, tile=1), "routing")
        largest = tokens * min(top_k, here)
        buffer = buffer_rows(experts.size, self.buffer_factor, most=num_experts // here * largest)
        plan, received_expert, overflow = checkpoint_name(
            plan_exchange(slots.sizes, here, buffer, self.expert_axes), "routing"
        )
        group = received_expert[:, None]
        local = sort_by_group(group, here, tile, group < here)
        return FlatRoute(slots, plan, local, experts.size, buffer, largest, self.expert_axes), overflow


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FlatRoute:
    """Sorted by device, exchanged, and sorted by expert where they arrived; see `ops.feed_forward.Route`."""

    slots: Slots
    plan: RowPlan
    local: LocalRoute
    sent: int = field(metadata={"static": True})
    """Rows this device sends."""
    buffer: int = field(metadata={"static": True})
    """Rows this device can receive."""
    largest: int = field(metadata={"static": True})
    """The most rows that any device can send another."""
    axes: tuple[str, ...] = field(metadata={"static": True})

    @property
    def tile_group(self) -> Int[Array, " tiles"]:
        """The expert of each tile of rows."""
        return self.local.tile_group

    def dispatch(self, x: Float[Array, "tokens d"]) -> Float[Array, "rows d"]:
        """Each token to the rows of its choices."""
        return self.local.dispatch(keep_bits(self._there(permute(x, self.slots)), "dispatched"))

    def combine(self, rows: Float[Array, "rows d"]) -> Float[Array, "tokens d"]:
        """The sum of each token's rows."""
        return unpermute(self._back(self.local.combine(rows)), self.slots)

    def dispatch_choices(self, values: Float[Array, "tokens k"]) -> Float[Array, " rows"]:
        """The value of the choice that each row holds."""
        there = self._there(permute_choices(values, self.slots)[:, None])
        return self.local.dispatch_choices(checkpoint_name(there, "dispatched"))

    def combine_choices(self, values: Float[Array, " rows"]) -> Float[Array, "tokens k"]:
        """The value of each choice's row."""
        return unpermute_choices(self._back(self.local.combine_choices(values))[:, 0], self.slots)

    def _there(self, rows: Float[Array, "sent d"]) -> Float[Array, "buffer d"]:
        return exchange_rows(rows, self.plan, self.buffer, self.largest, self.axes)

    def _back(self, rows: Float[Array, "buffer d"]) -> Float[Array, "sent d"]:
        return exchange_rows(rows, self.plan.reversed(), self.sent, self.largest, self.axes)


def plan_exchange(
    sizes: Int[Array, " experts"], here: int, buffer: int, axes: tuple[str, ...]
) -> tuple[RowPlan, Int[Array, " buffer"], Int[Array, ""]]:
    """Who sends how many rows where, from the rows that each device has for each expert, sorted by expert.

    Also the local expert of each received row (`here` where there is none), and how many rows for this device do not
    fit into its buffer; those are not sent.
    """
    me = jax.lax.axis_index(axes)
    per_expert = jax.lax.all_gather(sizes, axes).reshape(-1, sizes.shape[0] // here, here)
    plan, overflow = plan_rows(per_expert.sum(axis=2), me, buffer)
    row = jnp.arange(buffer)
    source = jnp.searchsorted(plan.recv_starts, row, side="right") - 1
    within = row - plan.recv_starts[source]
    bounds = jnp.cumsum(per_expert[:, me], axis=1)
    expert = (within[:, None] >= bounds[source]).sum(axis=1)
    expert = jnp.where(within < plan.recv_sizes[source], expert, here)
    return plan, expert.astype(jnp.int32), overflow
