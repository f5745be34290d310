"""DeepSeekMoE: shared and routed experts behind a group-limited sigmoid router (report 2.1.2)."""

from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.layers import FeedForward, normal
from dsv3_jax.ops.feed_forward import Route, fp8_routed_feed_forward
from dsv3_jax.ops.grouped_matmul import grouped_matmul
from dsv3_jax.ops.linear import FP8Rows
from dsv3_jax.ops.permute import (
    Slots,
    assign_slots,
    permute,
    permute_choices,
    tile_rows,
    unpermute,
    unpermute_choices,
)
from dsv3_jax.ops.products import matmul_split
from dsv3_jax.ops.quantize import TILE
from dsv3_jax.ops.swiglu import swiglu
from dsv3_jax.ops.top_k import grouped_top_k
from dsv3_jax.ops.weights import is_fp8


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Routing:
    """Which experts each token passes, best first, and with what weight; `scores` are without bias."""

    scores: Float[Array, "batch seq experts"]
    experts: Int[Array, "batch seq top_k"]
    weights: Float[Array, "batch seq top_k"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MoEStats:
    """What a MoE layer reports of this device's tokens. Balance losses are unweighted."""

    load: Int[Array, " experts"]
    sequence_balance: Float[Array, ""]
    batch_balance: Float[Array, ""]
    overflow: Int[Array, ""]
    routing: Routing


class Exchange(Protocol):
    """Finds tokens their way to the devices that hold their experts and back. `LocalExchange` is that of one device."""

    def route(
        self, experts: Int[Array, "tokens top_k"], num_experts: int, tile: int | None
    ) -> tuple[Route, Int[Array, ""]]:
        """The way of these tokens, and the rows that did not fit into the buffer.

        Rows come in tiles of `tile`; None takes what wastes little.
        """

    def total(self, x: Array) -> Array:
        """Sum over all devices that share the batch."""


class LocalExchange:
    """All experts and all tokens on this device: nothing to exchange."""

    def route(
        self, experts: Int[Array, "tokens top_k"], num_experts: int, tile: int | None
    ) -> tuple[Route, Int[Array, ""]]:
        """See `Exchange`; nothing can overflow."""
        return sort_by_group(experts, num_experts, tile), jnp.zeros((), jnp.int32)

    def total(self, x: Array) -> Array:
        """The only device's value."""
        return x


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LocalRoute:
    """Tokens sorted by expert into whole tiles; see `Route`."""

    slots: Slots

    @property
    def tile_group(self) -> Int[Array, " tiles"]:
        """The expert of each tile of rows."""
        return self.slots.tile_group

    @property
    def arrived_of(self) -> Int[Array, " rows"]:
        """The token that each row holds."""
        return self.slots.token_of

    def send(self, x: Float[Array, "tokens d"]) -> Float[Array, "tokens d"]:
        """Tokens are where their experts are."""
        return x

    def sort(self, arrived: Float[Array, "tokens d"]) -> Float[Array, "rows d"]:
        """Each token to the rows of its choices."""
        return permute(arrived, self.slots)

    def combine(self, rows: Float[Array, "rows d"]) -> Float[Array, "tokens d"]:
        """The sum of each token's rows."""
        return unpermute(rows, self.slots)

    def dispatch_choices(self, values: Float[Array, "tokens k"]) -> Float[Array, " rows"]:
        """The value of the choice that each row holds."""
        return permute_choices(values, self.slots)

    def combine_choices(self, values: Float[Array, " rows"]) -> Float[Array, "tokens k"]:
        """The value of each choice's row."""
        return unpermute_choices(values, self.slots)


def sort_by_group(
    groups: Int[Array, "tokens k"],
    num_groups: int,
    tile: int | None,
    valid: Bool[Array, "tokens k"] | None = None,
    most: int | None = None,
) -> LocalRoute:
    """The route of tokens on one device; `valid` and `most` are those of `assign_slots`."""
    tile = tile or tile_rows(most or groups.size, num_groups)
    return LocalRoute(checkpoint_name(assign_slots(groups, num_groups, tile, valid, most), "routing"))


class Router(nnx.Module):
    """Affinity of tokens to experts, in float32 whatever the policy."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        self.kernel = normal(rngs, (config.d_model, config.num_experts), config.init_std)

    def __call__(self, x: Float[Array, "batch seq d_model"], bias: Float[Array, " experts"]) -> Routing:
        """Select by score plus bias within the best groups; weigh by the score alone."""
        config = self.config
        kernel = self.kernel.get_value().astype(jnp.float32)
        logits = matmul_split(x, kernel) if x.dtype == jnp.bfloat16 else jnp.matmul(x, kernel, precision="highest")
        scores = jax.nn.sigmoid(checkpoint_name(logits, "routing"))
        choice = jax.lax.stop_gradient(scores) + bias
        experts = checkpoint_name(select_experts(choice, config), "routing")
        weights = jnp.take_along_axis(scores, experts, axis=-1)
        if config.normalize_top_k:
            weights = weights / (weights.sum(axis=-1, keepdims=True) + 1e-20)
        return Routing(scores, experts, weights * config.routed_scaling_factor)


def select_experts(choice: Float[Array, "*batch experts"], config: ModelConfig) -> Int[Array, "*batch top_k"]:
    """The experts of each token; see `grouped_top_k`."""
    return grouped_top_k(choice, config.top_k, config.num_groups, config.top_k_groups)


class Experts(nnx.Module):
    """Weights of the routed experts, stacked on their first axis."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        num, d_model, d_ff, std = config.num_experts, config.d_model, config.d_ff_expert, config.init_std
        self.gate_up = normal(rngs, (num, d_model, 2 * d_ff), std)
        self.down = normal(rngs, (num, d_ff, d_model), std)

    def __call__(
        self, x: Float[Array, "tokens d_model"] | FP8Rows, weights: Float[Array, "tokens top_k"], route: Route
    ) -> Float[Array, "tokens d_model"]:
        """The sum of each token's experts' SwiGLU feed-forwards, weighted before the down projection."""
        gate_up, down = self.gate_up.get_value(), self.down.get_value()
        if is_fp8(gate_up):
            return fp8_routed_feed_forward(x, weights, route, gate_up, down)
        rows = route.sort(route.send(x))
        hidden = checkpoint_name(grouped_matmul(rows, gate_up, route.tile_group), "ffn")
        row_weights = route.dispatch_choices(weights)[:, None]
        return route.combine(grouped_matmul(swiglu(hidden, row_weights), down, route.tile_group))


class MoE(nnx.Module):
    """Shared experts plus the weighted sum of the selected routed ones. No token is ever dropped."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        self.router = Router(config, rngs)
        self.experts = Experts(config, rngs)
        if config.num_shared_experts:
            width = config.num_shared_experts * config.d_ff_expert
            self.shared = FeedForward(config.d_model, width, config.init_std, rngs)

    @property
    def is_fp8(self) -> bool:
        """Whether its products are in FP8; then it reads `FP8Rows`, with the 16-bit source for its router."""
        return is_fp8(self.experts.gate_up.get_value())

    def __call__(
        self,
        x: Float[Array, "batch seq d_model"] | FP8Rows,
        bias: Float[Array, " experts"],
        exchange: Exchange,
        counted: Bool[Array, " seq"] | None = None,
    ) -> tuple[Float[Array, "batch seq d_model"], MoEStats]:
        """The layer's output and its statistics, over the positions that are `counted` (None: all)."""
        config = self.config
        source = x.source if self.is_fp8 else x
        routing = self.router(source, bias)
        # FP8 weight gradients reduce tiles of 128 rows: each must lie within one expert.
        experts = routing.experts.reshape(-1, config.top_k)
        route, overflow = exchange.route(experts, config.num_experts, TILE if self.is_fp8 else None)
        rows = source.reshape(-1, config.d_model)
        flat = FP8Rows(x.tiles, rows) if self.is_fp8 else rows
        y = self.experts(flat, routing.weights.reshape(-1, config.top_k), route)
        if config.num_shared_experts:
            y = y + self.shared(flat)
        y = y.reshape(source.shape)
        return y, moe_stats(routing, overflow, config, exchange, counted)


def moe_stats(
    routing: Routing,
    overflow: Int[Array, ""],
    config: ModelConfig,
    exchange: Exchange,
    counted: Bool[Array, " seq"] | None,
) -> MoEStats:
    """Load and balance losses (report 2.1.2, equations 17 to 20).

    The losses' f counts the top k of the *unbiased* scores. Both are means over this device's share, so their mean
    over devices is the loss of the whole batch.
    """
    seq = routing.scores.shape[1]
    counted = jnp.ones(seq, bool) if counted is None else counted
    length = counted.sum()
    load = _count(routing.experts, config.num_experts, counted).sum(axis=0)
    unbiased = grouped_top_k(jax.lax.stop_gradient(routing.scores), config.top_k)
    counts = _count(unbiased, config.num_experts, counted).astype(jnp.float32)
    share = routing.scores / routing.scores.sum(axis=-1, keepdims=True)
    probability = jnp.where(counted[:, None], share, 0).sum(axis=1) / length
    per_choice = config.num_experts / (config.top_k * length)
    frequency = counts * per_choice
    rows = exchange.total(jnp.float32(counts.shape[0]))
    batch_frequency = exchange.total(counts.sum(axis=0)) * per_choice / rows
    return MoEStats(
        load=load,
        sequence_balance=(frequency * probability).sum(axis=-1).mean(),
        batch_balance=(batch_frequency * probability.mean(axis=0)).sum(),
        overflow=overflow,
        routing=routing,
    )


def _count(
    experts: Int[Array, "batch seq top_k"], num_experts: int, counted: Bool[Array, " seq"]
) -> Int[Array, "batch experts"]:
    """How many choices of each sequence fell on each expert."""
    chosen = (experts[..., None] == jnp.arange(num_experts)).any(axis=2)
    return (chosen & counted[:, None]).sum(axis=1, dtype=jnp.int32)
