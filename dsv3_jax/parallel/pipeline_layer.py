"""A layer's passes apart: F keeps what the backward needs, I makes the input's gradient, W the weights' (report 3.2.1).

I runs on what F kept and computes nothing of F again but what the layer's own recomputation says; W multiplies what I
logged.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dsv3_jax.ops.weights import FP8Weight, Logs, MixedWeight
from dsv3_jax.parallel.mesh import vary_over

Weights = dict[str, Array | MixedWeight | FP8Weight]
"""One layer's weights by path, those of linears named; see `ops.weights.name_weights`."""

Layer = Callable[[Array, Weights, Any], tuple[tuple[Array, Array], Any]]
"""(x, weights, context) -> ((y, the layer's own loss), statistics). All that is differentiated or kept comes as an
argument: what a layer closes over would be kept for every microbatch."""


def forward(layer: Layer, x: Array, weights: Weights, context: Any) -> tuple[Array, Any, Any]:
    """F: the layer's output, what its backward pass needs besides weights and context, and its statistics."""
    (y, _), pullback, stats = _pullback(layer, x, weights, context)
    # The input is among the arguments, and not among the opaque residuals, where the layer keeps it as it is.
    return y, (pullback.args_res[0], pullback.opaque_residuals), stats


def backward(
    layer: Layer, kept: Any, dy: Float[Array, "batch seq d"], weights: Weights, context: Any
) -> tuple[Array, dict[str, Array], Logs]:
    """I: the input's gradient, those of norm gains and router, and the products that W computes.

    Differentiates the layer at zeros and puts in what F kept; the forward pass at zeros is dead code.
    """
    axes = tuple(jax.typeof(dy).mat.varying)
    _, pullback, _ = _pullback(layer, vary_over(jnp.zeros(dy.shape, dy.dtype), axes), weights, context)
    arguments = [kept[0], *pullback.args_res[1:]]
    pullback = pullback.replace(args_res=arguments, opaque_residuals=kept[1])
    (dx, small, *_), logs = pullback.with_logs((dy, vary_over(jnp.ones((), jnp.float32), axes)))
    return dx, small, logs


def _pullback(layer: Layer, x: Array, weights: Weights, context: Any) -> tuple:
    small = {path: w for path, w in weights.items() if isinstance(w, Array)}
    linears = {path: w for path, w in weights.items() if path not in small}

    def apply(x: Array, small: Weights, linears: Weights, context: Any) -> tuple[tuple[Array, Array], Any]:
        return layer(x, small | linears, context)

    return jax.vjp(apply, x, small, linears, context, has_aux=True, in_nzs=(True, True, False, False))
