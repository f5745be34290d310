"""Expert parallelism: tokens travel to the devices that hold their experts, and back (report 3.2.2).

    token --node--> same index, once a node --gpu--> once a device --> its experts there
                                                                            |
    token <--node-- sum of the node        <--gpu-- sum of the device <-----+

The exchange takes levels of mesh axes, the slow link first. On two levels a row crosses `node` once for each node that
holds any of its token's experts, to the device of the same index there, and is then copied over `gpu` to each device
that holds any of them; on one level it goes straight to each device. On the way back each level sums before it sends.
Rows carry the experts of their token, from which the next level finds its way, and their weights; copies for a second
expert on the same device are made where they are computed with. What a device or a node sends itself is copied in its
memory and crosses nothing.

A level is one all-to-all of equal slabs, one for each device, so that all shapes are static; what a slab has no room
for is counted, and the step runs again with larger ones. `lax.ragged_all_to_all` would send no padding, but moved 8
GB/s on four H200, where an all-to-all of equal parts moves 311 (experiments/multi_gpu).
"""

import math
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.moe import LocalExchange, LocalRoute, sort_by_group
from dsv3_jax.ops.feed_forward import Route
from dsv3_jax.ops.kept import keep_bits
from dsv3_jax.ops.permute import Slots, permute, unpermute


@dataclass(frozen=True)
class ReplicatedExperts(LocalExchange):
    """Every device holds all experts: no token travels, and only statistics are shared."""

    batch_axes: tuple[str, ...]

    def total(self, x: Array) -> Array:
        """Sum over all devices that share the batch."""
        return jax.lax.psum(x, self.batch_axes)


Level = tuple[str, ...]
"""Mesh axes that one all-to-all goes over."""


@dataclass(frozen=True)
class ExpertExchange:
    """One all-to-all over each level; see `model.moe.Exchange`."""

    levels: tuple[Level, ...]
    """Of the expert group, the slow link first."""
    reach: tuple[int, ...]
    """Of each level, the most devices of it that the experts of one token can live on; see `reach_of`."""
    batch_axes: tuple[str, ...]
    buffer_factor: float
    """Rows a device can send another, over a balanced load in which tokens go as far as they can."""

    def total(self, x: Array) -> Array:
        """Sum over all devices that share the batch."""
        return jax.lax.psum(x, self.batch_axes)

    def route(
        self, experts: Int[Array, "tokens top_k"], num_experts: int, tile: int | None
    ) -> tuple[Route, Int[Array, ""]]:
        """Tokens' way to their experts' devices; and the rows that slabs and buffers had no room for."""
        tokens, top_k = experts.shape
        chosen, held, spread = experts, num_experts, 1
        hops, lost = [], jnp.zeros((), jnp.int32)
        for level, reach in zip(self.levels, self.reach, strict=True):
            devices = jax.lax.axis_size(level)
            spread = min(spread * reach, top_k)
            slab = buffer_rows(tokens * spread / devices, self.buffer_factor, most=chosen.shape[0])
            hop, chosen, none = _hop(chosen, held, level, min(reach, top_k), slab)
            hops, lost, held = [*hops, hop], lost + none, held // devices
        columns = _first_columns(chosen < held, min(top_k, held))
        chosen = jnp.take_along_axis(chosen, columns, axis=1, mode="fill", fill_value=held)
        computed = buffer_rows(tokens * top_k, self.buffer_factor, most=chosen.size)
        local = sort_by_group(chosen, held, tile, chosen < held, computed)
        lost_here = ((chosen < held) & (local.slots.slot_of >= local.slots.token_of.shape[0])).sum()
        route = ExpertRoute(tuple(hops), checkpoint_name(columns, "routing"), local, top_k)
        return route, lost + lost_here


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Hop:
    """Tokens' way over one level: a row to every device of it that holds any of their experts, and back."""

    slots: Slots
    """Where each token stands in the slabs."""
    level: Level = field(metadata={"static": True})

    def there(self, x: Float[Array, "tokens d"]) -> Float[Array, "received d"]:
        """Each token to its devices; rows that hold none are zero."""
        return self._exchange(permute(x, self.slots))

    def back(self, rows: Float[Array, "received d"]) -> Float[Array, "tokens d"]:
        """The sum over each token's devices. The transpose of `there`."""
        return unpermute(self._exchange(rows), self.slots)

    def _exchange(self, slabs: Array) -> Array:
        """The slab for each device becomes the slab from each: its own reverse, and its own transpose."""
        return jax.lax.all_to_all(slabs, self.level, split_axis=0, concat_axis=0, tiled=True)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ExpertRoute:
    """Over one level after the other, and sorted by expert where they arrived; see `ops.feed_forward.Route`."""

    hops: tuple[Hop, ...]
    columns: Int[Array, "received k"]
    """Which of its token's choices live on this device, of each received row; out of range where there is none."""
    local: LocalRoute
    top_k: int = field(metadata={"static": True})

    @property
    def tile_group(self) -> Int[Array, " tiles"]:
        """The expert of each tile of rows."""
        return self.local.tile_group

    @property
    def arrived_of(self) -> Int[Array, " rows"]:
        """The arrived row that each row holds."""
        return self.local.arrived_of

    def send(self, x: Float[Array, "tokens d"]) -> Float[Array, "received d"]:
        """Each token to the devices of its choices."""
        return keep_bits(self._there(x), "dispatched")

    def sort(self, arrived: Float[Array, "received d"]) -> Float[Array, "rows d"]:
        """Each arrived row to those of its choices here."""
        return self.local.sort(arrived)

    def combine(self, rows: Float[Array, "rows d"]) -> Float[Array, "tokens d"]:
        """The sum of each token's rows: of a device, of a node, of all nodes."""
        return self._back(self.local.combine(rows))

    def dispatch_choices(self, values: Float[Array, "tokens top_k"]) -> Float[Array, " rows"]:
        """The value of the choice that each row holds."""
        arrived = checkpoint_name(self._there(values), "dispatched")
        here = jnp.take_along_axis(arrived, self.columns, axis=1, mode="fill", fill_value=0)
        return self.local.dispatch_choices(here)

    def combine_choices(self, values: Float[Array, " rows"]) -> Float[Array, "tokens top_k"]:
        """The value of each choice's row."""
        here = self.local.combine_choices(values)
        row = jnp.arange(here.shape[0])[:, None]
        placed = jnp.zeros((here.shape[0], self.top_k), here.dtype).at[row, self.columns].set(here, mode="drop")
        return self._back(placed)

    def _there(self, x: Float[Array, "tokens d"]) -> Float[Array, "received d"]:
        for hop in self.hops:
            x = hop.there(x)
        return x

    def _back(self, rows: Float[Array, "received d"]) -> Float[Array, "tokens d"]:
        for hop in reversed(self.hops):
            rows = hop.back(rows)
        return rows


def buffer_rows(balanced: float, factor: float, most: int) -> int:
    """Rows of a slab or a buffer: a balanced load times the factor, at most what can come at all."""
    return min(most, math.ceil(balanced * factor / 8) * 8)


def reach_of(model: ModelConfig, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Of each level of an expert group of these sizes, the most devices that the experts of one token can live on."""
    first, *rest = sizes
    return (most_nodes(model, first), *(min(size, model.top_k) for size in rest))


def most_nodes(model: ModelConfig, nodes: int) -> int:
    """The most of `nodes` nodes that the experts of one token can live on, its groups being limited (report 2.1.2)."""
    per_group, per_node = model.num_experts // model.num_groups, model.num_experts // nodes
    first = [group * per_group for group in range(model.num_groups)]
    spans = sorted((start + per_group - 1) // per_node - start // per_node + 1 for start in first)
    return min(nodes, model.top_k, sum(spans[-model.top_k_groups :]))


def _hop(
    experts: Int[Array, "tokens k"], held: int, level: Level, reach: int, slab: int
) -> tuple[Hop, Int[Array, "received k"], Int[Array, ""]]:
    """The way over a level whose devices share `held` experts; a choice of that number is none.

    Also the choices of the rows that arrive, counted from the receiver's first expert on and its number of experts
    where they are none of its; and the rows that found no room.
    """
    devices = jax.lax.axis_size(level)
    share = held // devices
    slots, lost = _slabs(experts // share, devices, reach, slab)
    slots = checkpoint_name(slots, "routing")
    hop = Hop(slots, level)
    sent = jnp.take(experts, slots.token_of, axis=0, mode="fill", fill_value=held)
    arrived = hop._exchange(sent) - jax.lax.axis_index(level) * share
    arrived = jnp.where((arrived >= 0) & (arrived < share), arrived, share)
    return hop, checkpoint_name(arrived, "routing"), lost


def _slabs(target: Int[Array, "tokens k"], devices: int, reach: int, slab: int) -> tuple[Slots, Int[Array, ""]]:
    """A row in the slab of each device that any of a token's targets is, in the order of tokens.

    And how many found no room: beyond the end of a slab, or of more devices than `reach`.
    """
    tokens, rows = target.shape[0], devices * slab
    reached = (target[..., None] == jnp.arange(devices)).any(axis=1)
    within = jnp.cumsum(reached, axis=0) - 1
    place = jnp.where(reached & (within < slab), jnp.arange(devices) * slab + within, rows).astype(jnp.int32)
    slot_of = jnp.sort(place, axis=1)[:, :reach]
    token_of = jnp.full(rows, tokens, jnp.int32).at[place].set(jnp.arange(tokens)[:, None], mode="drop")
    sizes = reached.sum(axis=0, dtype=jnp.int32)
    lost = sizes.sum() - (slot_of < rows).sum(dtype=jnp.int32)
    return Slots(slot_of, token_of, jnp.arange(devices, dtype=jnp.int32), sizes), lost


def _first_columns(valid: Bool[Array, "rows columns"], count: int) -> Int[Array, "rows count"]:
    """The indices of each row's valid columns, in order, and one beyond the last where there are no more."""
    columns = valid.shape[1]
    return jnp.sort(jnp.where(valid, jnp.arange(columns), columns), axis=1)[:, :count]
