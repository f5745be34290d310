"""The DeepSeek-V3 transformer: dense and MoE layers, stacked and scanned, and its MTP modules (report 2)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.attention import MLA, LatentCache, Rotations
from dsv3_jax.model.layers import FeedForward, Linear, RMSNorm, normal
from dsv3_jax.model.moe import Exchange, LocalExchange, MoE, MoEStats
from dsv3_jax.model.rope import rotations
from dsv3_jax.ops.linear import embedding_lookup

RouterBias = dict[str, Float[Array, "layers experts"]]
Recompute = Literal["none", "report", "layer"]

# What the report's recomputation keeps (3.2.3): outputs of the down-projections, of attention, of gate and up, the rows
# that came over the network, and the routing, which must not be decided twice. All else is computed again.
_KEPT = ("latent", "attention", "residual", "ffn", "dispatched", "routing")


class DecoderLayer(nnx.Module):
    """Pre-normalized MLA and feed-forward, each added to the residual stream."""

    def __init__(self, config: ModelConfig, is_moe: bool, rngs: nnx.Rngs):
        self.is_moe = is_moe
        self.attention_norm = RMSNorm(config.d_model, config.rms_norm_eps)
        self.attention = MLA(config, rngs)
        self.ffn_norm = RMSNorm(config.d_model, config.rms_norm_eps)
        self.ffn = MoE(config, rngs) if is_moe else FeedForward(config.d_model, config.d_ff, config.init_std, rngs)

    def __call__(
        self,
        x: Float[Array, "batch seq d_model"],
        rotations: Rotations,
        bias: Float[Array, " experts"] | None,
        exchange: Exchange,
        counted: Bool[Array, " seq"] | None = None,
    ) -> tuple[Float[Array, "batch seq d_model"], MoEStats | None]:
        """The layer over whole sequences; a dense layer has no statistics."""
        normed = self.attention_norm.into(self.attention.kv_down, x)
        x = checkpoint_name(x + self.attention(normed, rotations), "residual")
        return self.feed_forward(x, bias, exchange, counted)

    def feed_forward(
        self,
        x: Float[Array, "batch seq d_model"],
        bias: Float[Array, " experts"] | None,
        exchange: Exchange,
        counted: Bool[Array, " seq"] | None = None,
    ) -> tuple[Float[Array, "batch seq d_model"], MoEStats | None]:
        """The second half of the layer."""
        if not self.is_moe:
            return x + self.ffn(self.ffn_norm.into(self.ffn.gate_up, x)), None
        normed = self.ffn_norm.to_travel(x) if self.ffn.is_fp8 else self.ffn_norm(x)
        y, stats = self.ffn(normed, bias, exchange, counted)
        return x + y, stats

    def decode(
        self,
        x: Float[Array, "batch new d_model"],
        rotations: Rotations,
        cache: LatentCache,
        start: Int[Array, ""],
        bias: Float[Array, " experts"] | None,
        exchange: Exchange,
    ) -> tuple[Float[Array, "batch new d_model"], LatentCache]:
        """New tokens at positions start.. against the cache."""
        attended, cache = self.attention.decode(self.attention_norm(x), rotations, cache, start)
        return self.feed_forward(x + attended, bias, exchange)[0], cache


class MTPModule(nnx.Module):
    """One depth of multi-token prediction (report 2.2). Embedding and head are the main model's."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.embed_norm = RMSNorm(config.d_model, config.rms_norm_eps)
        self.hidden_norm = RMSNorm(config.d_model, config.rms_norm_eps)
        self.projection = Linear(2 * config.d_model, config.d_model, config.init_std, rngs)
        self.block = DecoderLayer(config, True, rngs)
        self.final_norm = RMSNorm(config.d_model, config.rms_norm_eps)

    def __call__(
        self,
        hidden: Float[Array, "batch seq d_model"],
        embedded: Float[Array, "batch seq d_model"],
        rotations: Rotations,
        bias: Float[Array, " experts"],
        exchange: Exchange,
        counted: Bool[Array, " seq"],
    ) -> tuple[Float[Array, "batch seq d_model"], MoEStats]:
        """Normed output of this depth, from that of the depth before and the embedding of the token ahead.

        The embedding half comes first, as in the released weights.
        """
        joined = jnp.concatenate([self.embed_norm(embedded), self.hidden_norm(hidden)], axis=-1)
        x, stats = self.block(self.projection(joined), rotations, bias, exchange, counted)
        return self.final_norm(x), stats


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrunkOutput:
    """The main model without its head. Layers of one kind are stacked in front."""

    hidden: Float[Array, "batch seq d_model"]
    embedded: Float[Array, "batch seq d_model"]
    layers: tuple[Float[Array, "layers batch seq d_model"], ...]
    stats: MoEStats | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MTPOutput:
    """Normed output of every MTP depth, stacked; row i of depth k predicts the token at i + k + 2."""

    hidden: Float[Array, "depths batch seq d_model"]
    stats: MoEStats


class Transformer(nnx.Module):
    """DeepSeek-V3. Declares the parameters; every method is a pure function of them and its arguments."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        self.embed = Embedding(config, rngs)
        if config.num_dense_layers:
            self.dense_layers = _stack(lambda r: DecoderLayer(config, False, r), config.num_dense_layers, rngs)
        if config.num_moe_layers:
            self.moe_layers = _stack(lambda r: DecoderLayer(config, True, r), config.num_moe_layers, rngs)
        self.final_norm = RMSNorm(config.d_model, config.rms_norm_eps)
        self.head = Linear(config.d_model, config.vocab_size, config.init_std, rngs)
        if config.num_mtp_modules:
            self.mtp = _stack(lambda r: MTPModule(config, r), config.num_mtp_modules, rngs)

    def trunk(
        self,
        tokens: Int[Array, "batch seq"],
        router_bias: RouterBias,
        exchange: Exchange | None = None,
        recompute: Recompute = "none",
        unroll_layers: int = 1,
    ) -> TrunkOutput:
        """Embedding, all layers and the final norm. Stacks of at most `unroll_layers` layers are straight code, deeper
        ones loops."""
        return self.trunks([tokens], router_bias, exchange, recompute, unroll_layers)[0]

    def trunks(
        self,
        streams: Sequence[Int[Array, "batch seq"]],
        router_bias: RouterBias,
        exchange: Exchange | None = None,
        recompute: Recompute = "none",
        unroll_layers: int = 1,
    ) -> list[TrunkOutput]:
        """`trunk` of several microbatches, which pass each layer side by side: none needs what another computes, so
        that the exchange of one can run beside the products of another."""
        exchange = exchange or LocalExchange()
        embedded = [self.embed(tokens) for tokens in streams]
        # Written once: where layers are straight code, XLA would compute a sine for every head and sequence.
        turns = jax.lax.optimization_barrier(rotations(self.config, jnp.arange(streams[0].shape[1])))
        xs, layers, stats = embedded, [], [None] * len(streams)
        if self.config.num_dense_layers:
            xs, (outputs, _) = _scan(self.dense_layers, xs, None, turns, exchange, recompute, unroll_layers)
            layers.append(outputs)
        if self.config.num_moe_layers:
            bias = router_bias["moe_layers"]
            xs, (outputs, stats) = _scan(self.moe_layers, xs, bias, turns, exchange, recompute, unroll_layers)
            layers.append(outputs)
        return [
            TrunkOutput(self.final_norm(x), embedded[i], tuple(outputs[i] for outputs in layers), stats[i])
            for i, x in enumerate(xs)
        ]

    def predict_ahead(
        self,
        trunk: TrunkOutput,
        router_bias: RouterBias,
        exchange: Exchange | None = None,
        recompute: Recompute = "none",
    ) -> MTPOutput:
        """All MTP depths. Depth k reads the embedding of the token k + 1 ahead; its last k + 1 rows have none, hold
        nothing of use, and count in no statistics."""
        return self.predict_ahead_all([trunk], router_bias, exchange, recompute)[0]

    def predict_ahead_all(
        self,
        trunks: Sequence[TrunkOutput],
        router_bias: RouterBias,
        exchange: Exchange | None = None,
        recompute: Recompute = "none",
    ) -> list[MTPOutput]:
        """`predict_ahead` of several microbatches side by side, as in `trunks`."""
        exchange = exchange or LocalExchange()
        seq = trunks[0].hidden.shape[1]
        turns = rotations(self.config, jnp.arange(seq))
        graphdef, stacked = _split(self.mtp)

        def depth(hiddens: list[Array], inputs: tuple[Any, Array, Array]) -> tuple[list[Array], list[MTPOutput]]:
            params, bias, ahead = inputs
            counted = jnp.arange(seq) < seq - ahead
            module = nnx.merge(graphdef, params)
            outputs = []
            for hidden, trunk in zip(hiddens, trunks, strict=True):
                embedded = jnp.roll(trunk.embedded, -ahead, axis=1)
                outputs.append(MTPOutput(*module(hidden, embedded, turns, bias, exchange, counted)))
            return [output.hidden for output in outputs], outputs

        ahead = jnp.arange(1, self.config.num_mtp_modules + 1)
        inputs = (stacked, router_bias["mtp"], ahead)
        return jax.lax.scan(recomputed(depth, recompute), [trunk.hidden for trunk in trunks], inputs)[1]

    def decode(
        self,
        tokens: Int[Array, "batch new"],
        caches: dict[str, LatentCache],
        start: Int[Array, ""],
        router_bias: RouterBias,
        exchange: Exchange | None = None,
    ) -> tuple[Float[Array, "batch new d_model"], dict[str, LatentCache]]:
        """Final-normed output of new tokens at positions start.., and the caches they were written into."""
        exchange = exchange or LocalExchange()
        x = self.embed(tokens)
        turns = rotations(self.config, start + jnp.arange(tokens.shape[1]))
        written = {}
        for kind in caches:
            graphdef, stacked = _split(getattr(self, kind))

            def layer(x: Array, inputs: tuple, graphdef: nnx.GraphDef = graphdef) -> tuple[Array, LatentCache]:
                params, bias, cache = inputs
                return nnx.merge(graphdef, params).decode(x, turns, cache, start, bias, exchange)

            x, written[kind] = jax.lax.scan(layer, x, (stacked, router_bias.get(kind), caches[kind]))
        return self.final_norm(x), written

    def empty_caches(self, batch: int, length: int, dtype: Any) -> dict[str, LatentCache]:
        """Caches for `length` tokens: 576 numbers a token and layer in the 671B model."""
        config = self.config
        layers = {"dense_layers": config.num_dense_layers, "moe_layers": config.num_moe_layers}
        return {
            kind: LatentCache(
                jnp.zeros((count, batch, length, config.kv_lora_rank), dtype),
                jnp.zeros((count, batch, length, config.qk_rope_head_dim), dtype),
            )
            for kind, count in layers.items()
            if count
        }


class Embedding(nnx.Module):
    """Token embedding."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.embedding = normal(rngs, (config.vocab_size, config.d_model), config.init_std)

    def __call__(self, tokens: Int[Array, "*batch"]) -> Float[Array, "*batch d_model"]:
        """The rows of the tokens."""
        return embedding_lookup(tokens, self.embedding.get_value())


def initial_router_bias(config: ModelConfig) -> RouterBias:
    """Zeros for every MoE layer, those of the MTP modules included."""
    layers = {"moe_layers": config.num_moe_layers, "mtp": config.num_mtp_modules}
    return {kind: jnp.zeros((count, config.num_experts), jnp.float32) for kind, count in layers.items() if count}


def _stack(make: Callable[[nnx.Rngs], nnx.Module], count: int, rngs: nnx.Rngs) -> nnx.Module:
    """`count` modules as one, whose parameters carry a leading axis."""
    return nnx.split_rngs(splits=count)(nnx.vmap(make, in_axes=0, out_axes=0))(rngs)


def _split(stacked: nnx.Module) -> tuple[nnx.GraphDef, dict[str, Any]]:
    graphdef, state = nnx.split(stacked)
    return graphdef, nnx.to_pure_dict(state)


def recomputed(body: Callable, recompute: Recompute, in_loop: bool = True) -> Callable:
    """`body`, whose backward pass computes again what the policy says."""
    if recompute == "none":
        return body
    policy = jax.checkpoint_policies.save_only_these_names(*_KEPT) if recompute == "report" else None
    # Outside of a loop the compiler would see that the same was computed before, and keep that.
    return jax.checkpoint(body, policy=policy, prevent_cse=not in_loop)


def _scan(
    stacked: nnx.Module,
    xs: Sequence[Float[Array, "batch seq d_model"]],
    bias: Float[Array, "layers experts"] | None,
    turns: Rotations,
    exchange: Exchange,
    recompute: Recompute,
    unroll_layers: int,
) -> tuple[list[Array], tuple[list[Array], list[MoEStats | None]]]:
    """Run stacked layers one after the other on microbatches side by side; returns the last outputs and, stacked, every
    output and statistics."""
    graphdef, params = _split(stacked)

    def layer(
        xs: list[Array], inputs: tuple[Any, Array | None]
    ) -> tuple[list[Array], tuple[list[Array], list[MoEStats | None]]]:
        layer_params, layer_bias = inputs
        module = nnx.merge(graphdef, layer_params)
        ys, stats = zip(*(module(x, turns, layer_bias, exchange) for x in xs), strict=True)
        return list(ys), (list(ys), list(stats))

    # A loop copies all that the backward pass keeps into stacks and out again.
    straight = len(jax.tree.leaves(params)[0]) <= unroll_layers
    return jax.lax.scan(recomputed(layer, recompute, not straight), list(xs), (params, bias), unroll=straight or 1)
