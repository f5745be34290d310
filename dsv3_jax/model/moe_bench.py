"""A MoE layer of the 671B model on one GPU, in BF16 and in FP8, forward and backward.

python -m dsv3_jax.model.moe_bench

What one GPU of 64 computes (report 3.2.2): 4 of the 256 experts, 4096 tokens of its own for the shared expert, and
32768 routed rows, here of its own tokens, each of which goes to every expert twice. Sorting rows by expert and summing
them for their tokens is counted; the router and the exchange are not. Weights are cast, or quantized, once an optimizer
step, which is not counted either; their gradients in float32 are.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.layers import FeedForward
from dsv3_jax.model.moe import Experts, LocalExchange
from dsv3_jax.ops.linear import quantize_input
from dsv3_jax.ops.quantize import TILE
from dsv3_jax.ops.timing import end_without_hopper, interleaved_medians
from dsv3_jax.ops.weights import Params, attach_slots, cast_weights, gradient_slots

TOKENS, CHOICES = 4096, 8
LAYER = ModelConfig(
    d_model=7168, d_ff_expert=2048, num_experts=4, num_groups=1, top_k_groups=1, top_k=4, num_shared_experts=1
)


class Layer(nnx.Module):
    """Routed and shared experts, without the router."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.num_experts = config.num_experts
        self.experts = Experts(config, rngs)
        self.shared = FeedForward(config.d_model, config.d_ff_expert, config.init_std, rngs)

    def __call__(
        self, x: Float[Array, "tokens d"], weights: Float[Array, "tokens k"], fp8: bool
    ) -> Float[Array, "tokens d"]:
        """Every token through each expert as often as any other."""
        choices = jnp.broadcast_to(jnp.arange(weights.shape[1], dtype=jnp.int32) % self.num_experts, weights.shape)
        route, _ = LocalExchange().route(choices, self.num_experts, TILE if fp8 else None)
        flat = quantize_input(x, power_of_2=True) if fp8 else x
        return self.experts(flat, weights, route) + self.shared(flat)


def layer_functions(config: ModelConfig, precision: str) -> tuple[Params, dict[str, Callable[..., Any]]]:
    """The compute copy of random weights, and functions of (compute copy, x, weights, dy)."""
    graphdef, params = nnx.split(Layer(config, nnx.Rngs(0)))
    compute = jax.jit(partial(cast_weights, precision=precision))(nnx.to_pure_dict(params))

    def forward(compute: Params, slots: Params, x: Array, weights: Array) -> Array:
        return nnx.merge(graphdef, attach_slots(compute, slots))(x, weights, precision == "fp8")

    def forward_only(compute: Params, x: Array, weights: Array, dy: Array) -> Array:
        return forward(compute, gradient_slots(compute), x, weights)

    def both(compute: Params, x: Array, weights: Array, dy: Array) -> Any:
        y, pullback = jax.vjp(partial(forward, compute), gradient_slots(compute), x, weights)
        return y, pullback(dy)

    return compute, {"forward": jax.jit(forward_only), "forward and backward": jax.jit(both)}


def inputs(config: ModelConfig, tokens: int) -> tuple[Array, Array, Array]:
    """x, the choices' weights, dy."""
    keys = jax.random.split(jax.random.key(1), 3)
    x, dy = (jax.random.normal(key, (tokens, config.d_model), jnp.bfloat16) for key in keys[:2])
    return x, jax.nn.softmax(jax.random.normal(keys[2], (tokens, CHOICES))), dy


def main() -> None:
    """Prints one markdown table."""
    end_without_hopper("this benchmark")
    given = inputs(LAYER, TOKENS)
    layers = {precision: layer_functions(LAYER, precision) for precision in ("bf16", "fp8")}
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}; medians of calls that take turns, ms\n")
    print("| | BF16 | FP8 | |\n|---|---:|---:|---:|")
    for what in ("forward", "forward and backward"):
        calls = {name: partial(functions[what], compute, *given) for name, (compute, functions) in layers.items()}
        seconds = interleaved_medians(calls, jax.block_until_ready, burst=0.3, rounds=5)
        times = " | ".join(f"{1e3 * s:.2f}" for s in seconds.values())
        print(f"| {what} | {times} | {seconds['bf16'] / seconds['fp8']:.2f}x |", flush=True)


if __name__ == "__main__":
    main()
