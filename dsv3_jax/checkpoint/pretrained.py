"""A model read from a folder in the public DeepSeek-V3 layout, ready to be applied."""

from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dsv3_jax.checkpoint.huggingface import read_config, read_params
from dsv3_jax.config import ModelConfig
from dsv3_jax.model.moe import MoEStats
from dsv3_jax.model.transformer import RouterBias, Transformer, TrunkOutput
from dsv3_jax.ops.linear import linear
from dsv3_jax.ops.weights import Params


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Output:
    """All that a forward pass computes.

    `hidden_states`: the embedding, then the output of each layer, the last one after the final norm. `mtp_logits[k]`:
    row i predicts the token at i + k + 2. `selected_experts` and `expert_weights`: one entry for each MoE layer of the
    main model, in the order of the experts' indices, weights after normalization and scaling.
    """

    logits: Float[Array, "batch seq vocab"]
    mtp_logits: tuple[Float[Array, "batch short_seq vocab"], ...]
    hidden_states: tuple[Float[Array, "batch seq d_model"], ...]
    selected_experts: tuple[Int[Array, "batch seq top_k"], ...]
    expert_weights: tuple[Float[Array, "batch seq top_k"], ...]


@dataclass(frozen=True)
class PretrainedModel:
    """Weights and router bias, and what they compute."""

    config: ModelConfig
    params: Params
    router_bias: RouterBias

    @cached_property
    def graphdef(self) -> nnx.GraphDef:
        """The structure that `nnx.merge(graphdef, params)` makes a module of."""
        return nnx.graphdef(nnx.eval_shape(lambda: Transformer(self.config, nnx.Rngs(0))))

    @cached_property
    def _compiled(self) -> Any:
        return jax.jit(partial(_apply, self.graphdef))

    def apply(self, tokens: Int[Array, "batch seq"]) -> Output:
        """Logits of the main head and of every MTP depth, hidden states and routing. Raises ValueError for tokens that
        are not in the vocabulary or not [batch, seq]."""
        tokens = jnp.asarray(tokens, jnp.int32)
        if tokens.ndim != 2 or tokens.size == 0:
            raise ValueError(f"tokens have shape {tokens.shape}: give [batch, seq]")
        if tokens.min() < 0 or tokens.max() >= self.config.vocab_size:
            raise ValueError(f"tokens must lie between 0 and {self.config.vocab_size - 1}, the vocabulary of the model")
        return self._compiled(self.params, self.router_bias, tokens)


def load_pretrained(folder: str | Path, dtype: Any = jnp.bfloat16) -> PretrainedModel:
    """Read config.json and all safetensors shards of a folder, with the weights cast to `dtype`.

    FP8 block-quantized weights are dequantized. Raises an error that names the tensor where one is missing, unexpected
    or of another shape.
    """
    config = read_config(folder)
    params, router_bias = read_params(folder, config, dtype)
    return PretrainedModel(config, jax.tree.map(jnp.asarray, params), jax.tree.map(jnp.asarray, router_bias))


def _apply(graphdef: nnx.GraphDef, params: Params, router_bias: RouterBias, tokens: Array) -> Output:
    model = nnx.merge(graphdef, params)
    trunk = model.trunk(tokens, router_bias)
    head = model.head.kernel.get_value()
    experts, weights = _by_index(trunk.stats)
    return Output(
        logits=linear(trunk.hidden, head),
        mtp_logits=_mtp_logits(model, trunk, router_bias),
        hidden_states=_hidden_states(trunk),
        selected_experts=experts,
        expert_weights=weights,
    )


def _mtp_logits(model: Transformer, trunk: TrunkOutput, router_bias: RouterBias) -> tuple[Array, ...]:
    if not model.config.num_mtp_modules:
        return ()
    hidden = model.predict_ahead(trunk, router_bias).hidden
    seq = hidden.shape[2]
    return tuple(linear(h[:, : seq - k - 1], model.head.kernel.get_value()) for k, h in enumerate(hidden))


def _hidden_states(trunk: TrunkOutput) -> tuple[Array, ...]:
    layers = [layer for kind in trunk.layers for layer in kind]
    return (trunk.embedded, *layers[:-1], trunk.hidden)


def _by_index(stats: MoEStats | None) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    if stats is None:
        return (), ()
    order = jnp.argsort(stats.routing.experts, axis=-1)
    experts = jnp.take_along_axis(stats.routing.experts, order, axis=-1)
    weights = jnp.take_along_axis(stats.routing.weights, order, axis=-1)
    return tuple(experts), tuple(weights)
