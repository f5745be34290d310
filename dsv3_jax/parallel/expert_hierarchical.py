"""Expert parallelism over two links, a slow one between nodes and a fast one inside them (report 3.2.2).

    token --node--> same index, once a node --gpu--> once a device --> its experts there
                                                                            |
    token <--node-- sum of the node        <--gpu-- sum of the device <-----+

A row crosses `node` once for each node that holds any of its token's experts, to the device of the same index there,
and is then copied over `gpu` to each device that holds any of them. On the way back each level sums before it sends, so
that one row for each of these crosses it again. Rows carry the experts of their token, from which the next level finds
its way, and their weights. What a device or a node sends itself is copied in its memory and crosses nothing.

Over `gpu` a row travels once for each device, not once for each expert: fewer rows cross, and the copies for a second
expert on the same device are made where they are computed with.
"""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.moe import LocalRoute, sort_by_group
from dsv3_jax.ops.feed_forward import Route
from dsv3_jax.ops.kept import keep_bits
from dsv3_jax.ops.permute import Slots, assign_slots, permute, unpermute
from dsv3_jax.parallel.row_exchange import RowPlan, buffer_rows, exchange_rows, plan_rows


@dataclass(frozen=True)
class HierarchicalExchange:
    """One all-to-all over `node`, then one over `gpu`; see `model.moe.Exchange`."""

    node: str
    """Axis of the slow link."""
    gpu: str
    """Axis of the fast link."""
    batch_axes: tuple[str, ...]
    nodes_per_token: int
    """The most nodes that the experts of one token can live on; see `most_nodes`."""
    buffer_factor: float
    """Rows a device can receive, over a balanced load in which tokens go as far as they can."""

    def total(self, x: Array) -> Array:
        """Sum over all devices that share the batch."""
        return jax.lax.psum(x, self.batch_axes)

    def route(
        self, experts: Int[Array, "tokens top_k"], num_experts: int, tile: int | None
    ) -> tuple[Route, Int[Array, ""]]:
        """Tokens' way to their experts' devices; and the rows that the receiving buffers had no room for."""
        tokens, top_k = experts.shape
        nodes, gpus = jax.lax.axis_size(self.node), jax.lax.axis_size(self.gpu)
        here = num_experts // (nodes * gpus)
        reach = min(self.nodes_per_token, nodes, top_k)
        rows = buffer_rows(tokens * reach, self.buffer_factor, most=nodes * tokens)
        across, in_node, lost_across = _hop(experts, num_experts, self.node, reach, rows, largest=tokens)
        received = buffer_rows(tokens * top_k, self.buffer_factor, most=gpus * rows)
        reach = min(gpus, top_k)
        within, on_device, lost_within = _hop(in_node, here * gpus, self.gpu, reach, received, largest=rows)
        columns = _first_columns(on_device < here, min(top_k, here))
        chosen = jnp.take_along_axis(on_device, columns, axis=1, mode="fill", fill_value=here)
        computed = buffer_rows(tokens * top_k, self.buffer_factor, most=chosen.size)
        local = sort_by_group(chosen, here, tile, chosen < here, computed)
        lost_here = ((chosen < here) & (local.slots.slot_of >= local.slots.token_of.shape[0])).sum()
        route = HierarchicalRoute(across, within, checkpoint_name(columns, "routing"), local, top_k)
        return route, lost_across + lost_within + lost_here


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Hop:
    """Tokens' way over one axis: a row to every device of it that holds any of their experts, and back."""

    slots: Slots
    plan: RowPlan
    received: int = field(metadata={"static": True})
    """Rows this device can receive."""
    largest: int = field(metadata={"static": True})
    """The most rows that any device can send another."""
    axis: str = field(metadata={"static": True})

    def there(self, x: Float[Array, "tokens d"]) -> Float[Array, "received d"]:
        """Each token to its devices; rows that hold none are zero."""
        return exchange_rows(permute(x, self.slots), self.plan, self.received, self.largest, (self.axis,))

    def back(self, rows: Float[Array, "received d"]) -> Float[Array, "tokens d"]:
        """The sum over each token's devices. The transpose of `there`."""
        sent = self.slots.token_of.shape[0]
        return unpermute(exchange_rows(rows, self.plan.reversed(), sent, self.largest, (self.axis,)), self.slots)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class HierarchicalRoute:
    """Over `node`, over `gpu`, and sorted by expert where they arrived; see `ops.feed_forward.Route`."""

    across: Hop
    within: Hop
    columns: Int[Array, "received k"]
    """Which of its token's choices live on this device, of each received row; out of range where there is none."""
    local: LocalRoute
    top_k: int = field(metadata={"static": True})

    @property
    def tile_group(self) -> Int[Array, " tiles"]:
        """The expert of each tile of rows."""
        return self.local.tile_group

    def dispatch(self, x: Float[Array, "tokens d"]) -> Float[Array, "rows d"]:
        """Each token to the rows of its choices."""
        return self.local.dispatch(keep_bits(self.within.there(self.across.there(x)), "dispatched"))

    def combine(self, rows: Float[Array, "rows d"]) -> Float[Array, "tokens d"]:
        """The sum of each token's rows: of a device, of a node, of all nodes."""
        return self.across.back(self.within.back(self.local.combine(rows)))

    def dispatch_choices(self, values: Float[Array, "tokens top_k"]) -> Float[Array, " rows"]:
        """The value of the choice that each row holds."""
        arrived = checkpoint_name(self.within.there(self.across.there(values)), "dispatched")
        here = jnp.take_along_axis(arrived, self.columns, axis=1, mode="fill", fill_value=0)
        return self.local.dispatch_choices(here)

    def combine_choices(self, values: Float[Array, " rows"]) -> Float[Array, "tokens top_k"]:
        """The value of each choice's row."""
        here = self.local.combine_choices(values)
        row = jnp.arange(here.shape[0])[:, None]
        placed = jnp.zeros((here.shape[0], self.top_k), here.dtype).at[row, self.columns].set(here, mode="drop")
        return self.across.back(self.within.back(placed))


def most_nodes(model: ModelConfig, nodes: int) -> int:
    """The most of `nodes` nodes that the experts of one token can live on, its groups being limited (report 2.1.2)."""
    per_group, per_node = model.num_experts // model.num_groups, model.num_experts // nodes
    first = [group * per_group for group in range(model.num_groups)]
    spans = sorted((start + per_group - 1) // per_node - start // per_node + 1 for start in first)
    return min(nodes, model.top_k, sum(spans[-model.top_k_groups :]))


def _hop(
    experts: Int[Array, "tokens k"], num_experts: int, axis: str, reach: int, buffer: int, largest: int
) -> tuple[Hop, Int[Array, "received k"], Int[Array, ""]]:
    """The way over `axis`, whose devices share `num_experts`; a choice of that number is none.

    Also the choices of the rows that arrive, counted from the receiver's first expert on and its number of experts
    where they are none of its; and the rows that found no room.
    """
    devices = jax.lax.axis_size(axis)
    share = num_experts // devices
    target = jnp.sort(experts // share, axis=1)
    again = jnp.pad(target[:, 1:] == target[:, :-1], ((0, 0), (1, 0)))
    target = jnp.sort(jnp.where(again, devices, target), axis=1)
    out_of_reach = (target[:, reach:] < devices).sum()
    target = target[:, :reach]
    slots = checkpoint_name(assign_slots(target, devices, tile=1, valid=target < devices), "routing")
    me = jax.lax.axis_index(axis)
    plan, lost = plan_rows(jax.lax.all_gather(slots.sizes, axis), me, buffer)
    hop = Hop(slots, checkpoint_name(plan, "routing"), buffer, largest, axis)
    arrived = hop.there(experts) - me * share
    occupied = jnp.arange(buffer)[:, None] < plan.recv_sizes.sum()
    arrived = jnp.where(occupied & (arrived >= 0) & (arrived < share), arrived, share)
    return hop, checkpoint_name(arrived, "routing"), lost + out_of_reach


def _first_columns(valid: Bool[Array, "rows columns"], count: int) -> Int[Array, "rows count"]:
    """The indices of each row's valid columns, in order, and one beyond the last where there are no more."""
    columns = valid.shape[1]
    return jnp.sort(jnp.where(valid, jnp.arange(columns), columns), axis=1)[:, :count]
