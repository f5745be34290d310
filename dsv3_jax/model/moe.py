"""DeepSeekMoE: shared and routed experts behind a group-limited sigmoid router (report 2.1.2)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.layers import FeedForward, normal, swiglu
from dsv3_jax.ops.grouped_matmul import grouped_matmul
from dsv3_jax.ops.permute import assign_slots, permute, permute_choices, tile_rows, unpermute

ExpertsFn = Callable[[Float[Array, "rows d"], Float[Array, " rows"], Int[Array, " tiles"]], Float[Array, "rows d"]]


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
    """Takes tokens to the devices that hold their experts and back. `LocalExchange` is the one of a single device."""

    def apply(
        self,
        x: Float[Array, "tokens d"],
        experts: Int[Array, "tokens top_k"],
        weights: Float[Array, "tokens top_k"],
        experts_fn: ExpertsFn,
        num_experts: int,
    ) -> tuple[Float[Array, "tokens d"], Int[Array, ""]]:
        """Sum of each token's weighted expert outputs, and the rows that did not fit into the buffer."""

    def total(self, x: Array) -> Array:
        """Sum over all devices that share the batch."""


class LocalExchange:
    """All experts and all tokens on this device: nothing to exchange."""

    def apply(
        self,
        x: Float[Array, "tokens d"],
        experts: Int[Array, "tokens top_k"],
        weights: Float[Array, "tokens top_k"],
        experts_fn: ExpertsFn,
        num_experts: int,
    ) -> tuple[Float[Array, "tokens d"], Int[Array, ""]]:
        """See `Exchange`; nothing can overflow."""
        return apply_sorted(x, experts, weights, experts_fn, num_experts), jnp.zeros((), jnp.int32)

    def total(self, x: Array) -> Array:
        """The only device's value."""
        return x


def apply_sorted(
    x: Float[Array, "tokens d"],
    groups: Int[Array, "tokens k"],
    weights: Float[Array, "tokens k"],
    experts_fn: ExpertsFn,
    num_groups: int,
    valid: Bool[Array, "tokens k"] | None = None,
) -> Float[Array, "tokens d"]:
    """Sort tokens by expert into whole tiles, run the experts, and sum each token's outputs."""
    tile = tile_rows(groups.size, num_groups)
    slots = checkpoint_name(assign_slots(groups, num_groups, tile, valid), "routing")
    rows = experts_fn(permute(x, slots), permute_choices(weights, slots), slots.tile_group)
    return unpermute(rows, slots)


class Router(nnx.Module):
    """Affinity of tokens to experts, in float32 whatever the policy."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        self.kernel = normal(rngs, (config.d_model, config.num_experts), config.init_std)

    def __call__(self, x: Float[Array, "batch seq d_model"], bias: Float[Array, " experts"]) -> Routing:
        """Select by score plus bias within the best groups; weigh by the score alone."""
        config = self.config
        kernel = self.kernel.get_value().astype(jnp.float32)
        scores = jax.nn.sigmoid(jnp.matmul(x.astype(jnp.float32), kernel, precision="highest"))
        choice = jax.lax.stop_gradient(scores) + bias
        experts = checkpoint_name(select_experts(choice, config), "routing")
        weights = jnp.take_along_axis(scores, experts, axis=-1)
        if config.normalize_top_k:
            weights = weights / (weights.sum(axis=-1, keepdims=True) + 1e-20)
        return Routing(scores, experts, weights * config.routed_scaling_factor)


def select_experts(choice: Float[Array, "*batch experts"], config: ModelConfig) -> Int[Array, "*batch top_k"]:
    """The top_k experts of the top_k_groups groups whose two best experts sum highest; ties go to the lower index."""
    if config.top_k_groups < config.num_groups:
        groups = choice.reshape(*choice.shape[:-1], config.num_groups, -1)
        group_score = jax.lax.top_k(groups, 2)[0].sum(axis=-1)
        kept = jax.lax.top_k(group_score, config.top_k_groups)[1]
        reachable = (kept[..., None] == jnp.arange(config.num_groups)).any(axis=-2)
        choice = jnp.where(reachable[..., None], groups, -jnp.inf).reshape(choice.shape)
    return jax.lax.top_k(choice, config.top_k)[1]


class Experts(nnx.Module):
    """Weights of the routed experts, stacked on their first axis."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        num, d_model, d_ff, std = config.num_experts, config.d_model, config.d_ff_expert, config.init_std
        self.gate_up = normal(rngs, (num, d_model, 2 * d_ff), std)
        self.down = normal(rngs, (num, d_ff, d_model), std)

    def __call__(
        self, rows: Float[Array, "rows d_model"], weights: Float[Array, " rows"], tile_group: Int[Array, " tiles"]
    ) -> Float[Array, "rows d_model"]:
        """SwiGLU of each row by the expert of its tile, weighted before the down projection."""
        hidden = checkpoint_name(grouped_matmul(rows, self.gate_up.get_value(), tile_group), "ffn")
        weighted = (swiglu(hidden).astype(jnp.float32) * weights[:, None]).astype(rows.dtype)
        return grouped_matmul(weighted, self.down.get_value(), tile_group)


class MoE(nnx.Module):
    """Shared experts plus the weighted sum of the selected routed ones. No token is ever dropped."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        self.router = Router(config, rngs)
        self.experts = Experts(config, rngs)
        if config.num_shared_experts:
            width = config.num_shared_experts * config.d_ff_expert
            self.shared = FeedForward(config.d_model, width, config.init_std, rngs)

    def __call__(
        self,
        x: Float[Array, "batch seq d_model"],
        bias: Float[Array, " experts"],
        exchange: Exchange,
        counted: Bool[Array, " seq"] | None = None,
    ) -> tuple[Float[Array, "batch seq d_model"], MoEStats]:
        """The layer's output and its statistics, over the positions that are `counted` (None: all)."""
        config = self.config
        routing = self.router(x, bias)
        flat = x.reshape(-1, config.d_model)
        y, overflow = exchange.apply(
            flat,
            routing.experts.reshape(-1, config.top_k),
            routing.weights.reshape(-1, config.top_k),
            self.experts,
            config.num_experts,
        )
        y = y.reshape(x.shape)
        if config.num_shared_experts:
            y = y + self.shared(x)
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
    unbiased = jax.lax.top_k(jax.lax.stop_gradient(routing.scores), config.top_k)[1]
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
