"""One pipeline rank's MoE layers with one GPU's share of their experts, forward and backward."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.moe import LocalExchange, Router, sort_by_group
from dsv3_jax.model.rope import rotations
from dsv3_jax.model.transformer import DecoderLayer, Recompute, recomputed
from dsv3_jax.ops.feed_forward import Route
from dsv3_jax.ops.rotary import Rotations
from dsv3_jax.ops.weights import Params, attach_slots, cast_weights, gradient_slots


@dataclass(frozen=True)
class Share:
    """What one GPU computes of a rank."""

    model: ModelConfig
    layers: int = 4
    local_experts: int = 4
    seq_len: int = 4096
    recompute: Recompute = "report"


@dataclass(frozen=True)
class EvenExchange(LocalExchange):
    """In the place of an exchange: as many rows for each expert here as the other GPUs would send.

    They are this GPU's own tokens. The router's choices give the rows their weights, not their places, so that loads
    are even whatever the router learnt.
    """

    local_experts: int

    def route(
        self, experts: Int[Array, "tokens top_k"], num_experts: int, tile: int | None
    ) -> tuple[Route, Int[Array, ""]]:
        """See `Exchange`; nothing overflows."""
        here = jnp.broadcast_to(jnp.arange(experts.shape[1], dtype=jnp.int32) % self.local_experts, experts.shape)
        return sort_by_group(here, self.local_experts, tile), jnp.zeros((), jnp.int32)


class Pass(NamedTuple):
    """What a microbatch leaves behind."""

    y: Float[Array, "1 seq d_model"]
    kept: "Kept"


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Kept:
    """What the backward pass of a microbatch needs besides the weights."""

    values: list[Array]
    pullback: Any = field(metadata={"static": True})
    """The structure of the function from the output's gradient to those of the weights and of the input."""
    weights: tuple[int | None, ...] = field(metadata={"static": True})
    """For each of its arrays the weight that it is, or None: then it is the next of the `values`."""


class Functions(NamedTuple):
    """Jitted; all take the compute copy of the weights first."""

    forward: Callable[[Sequence[Params], Array], Pass]
    pair: Callable[[Sequence[Params], Array, Kept, Array], tuple[Pass, Any]]
    """The forward of one microbatch, and the gradients of weights and input of another from that of its output."""


def share_functions(share: Share) -> Functions:
    """Of the layers in a row, none scanned: each has weights and gradients of its own, as on a pipeline rank."""
    graphdef = nnx.split(nnx.eval_shape(lambda: DecoderLayer(share.model, True, nnx.Rngs(0))))[0]
    exchange = EvenExchange(share.local_experts)
    bias = jnp.zeros(share.model.num_experts, jnp.float32)

    def layer(params: Params, x: Array, turns: Rotations) -> Array:
        return nnx.merge(graphdef, params)(x, turns, bias, exchange)[0]

    def layers(compute: Sequence[Params], slots: Sequence[Params], x: Array) -> Array:
        turns = jax.lax.optimization_barrier(rotations(share.model, jnp.arange(share.seq_len)))
        for weights in map(attach_slots, compute, slots):
            x = recomputed(layer, share.recompute)(weights, x, turns)
        return x

    def forward(compute: Sequence[Params], x: Array) -> Pass:
        slots = [gradient_slots(weights) for weights in compute]
        y, pullback = jax.vjp(partial(layers, compute), slots, x)
        return Pass(y, _keep(pullback, compute))

    def backward(compute: Sequence[Params], kept: Kept, dy: Array) -> Any:
        values, weights = iter(kept.values), jax.tree.leaves(compute)
        leaves = [next(values) if place is None else weights[place] for place in kept.weights]
        return jax.tree.unflatten(kept.pullback, leaves)(dy)

    def pair(compute: Sequence[Params], x: Array, kept: Kept, dy: Array) -> tuple[Pass, Any]:
        return forward(compute, x), backward(compute, kept, dy)

    return Functions(jax.jit(forward), jax.jit(pair))


def _keep(pullback: Callable, compute: Sequence[Params]) -> Kept:
    """Without the weights, which a jitted function that returned them would copy."""
    place = {id(weight): i for i, weight in enumerate(jax.tree.leaves(compute))}
    leaves, structure = jax.tree.flatten(pullback)
    places = tuple(place.get(id(leaf)) for leaf in leaves)
    values = [leaf for leaf, place in zip(leaves, places, strict=True) if place is None]
    return Kept(values, structure, places)


def share_weights(share: Share, precision: str, seed: int = 0) -> list[Params]:
    """The compute copy of each layer's random weights, with this GPU's experts alone."""
    model = share.model
    local = dataclasses.replace(
        model,
        num_experts=share.local_experts,
        num_groups=1,
        top_k_groups=1,
        top_k=min(model.top_k, share.local_experts),
    )

    def of_layer(key: Array) -> Params:
        rngs = nnx.Rngs(key)
        params = nnx.to_pure_dict(nnx.split(DecoderLayer(local, True, rngs))[1])
        router = nnx.to_pure_dict(nnx.split(Router(model, rngs))[1])
        return cast_weights(params | {"ffn": params["ffn"] | {"router": router}}, precision)

    return [jax.jit(of_layer)(key) for key in jax.random.split(jax.random.key(seed), share.layers)]


def microbatches(share: Share, count: int, seed: int = 1) -> list[Float[Array, "1 seq d_model"]]:
    """Random values of the residual stream, or of its gradient."""
    keys = jax.random.split(jax.random.key(seed), count)
    return [jax.random.normal(key, (1, share.seq_len, share.model.d_model), jnp.bfloat16) for key in keys]


def tiny(model: ModelConfig) -> ModelConfig:
    """The model cut down for a CPU, with all its parts."""
    return dataclasses.replace(
        model, d_model=256, num_heads=2, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64, q_lora_rank=128,
        kv_lora_rank=128, num_experts=16, num_groups=4, top_k_groups=2, top_k=4, d_ff_expert=128, max_length=128,
    )  # fmt: skip
