"""How a weight is stored for the matrix products, and where its gradient goes (report 3.3).

Training keeps float32 master weights. Once per optimizer step they are cast to what the products read; the gradient
must not be rounded to that type on its way back. So a cast weight travels as a `MixedWeight`: the cast value, and a
float32 slot of the same shape that is never read. Differentiating with respect to the slot gives the float32
gradient. An FP8 weight, with its two layouts and scales, is one more class beside this one.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dsv3_jax.config import ConfigError

Params = dict[str, Any]

# Norm gains and the router stay in float32 whatever the policy (report 3.3.1).
_FLOAT32_LEAVES = {"scale", "router"}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MixedWeight:
    """A weight in the type the products read, and the float32 slot that its gradient lands in."""

    value: Float[Array, "*shape"]
    slot: Float[Array, "*shape"]


Weight = Array | MixedWeight


def value_of(weight: Weight) -> Array:
    """The array that a product reads."""
    return weight.value if isinstance(weight, MixedWeight) else weight


def cast_weights(params: Params, precision: str) -> Params:
    """The compute copy of float32 master weights: bf16 but for norm gains and the router, or float32 throughout.

    Raises ConfigError for another precision than "bf16" and "fp32".
    """
    dtypes = {"bf16": jnp.bfloat16, "fp32": jnp.float32}
    if precision not in dtypes:
        raise ConfigError(f"precision={precision!r}: choose one of {' or '.join(map(repr, dtypes))}")
    dtype = dtypes[precision]

    def cast(path: tuple[Any, ...], leaf: Array) -> Array:
        kept = _FLOAT32_LEAVES & {entry.key for entry in path}
        return leaf if kept else leaf.astype(dtype)

    return jax.tree_util.tree_map_with_path(cast, params)


def gradient_slots(compute: Params) -> Params:
    """What to differentiate with respect to: float32 weights themselves, zeros in the shape of the others."""
    return jax.tree.map(lambda w: w if w.dtype == jnp.float32 else jnp.zeros(w.shape, jnp.float32), compute)


def attach_slots(compute: Params, slots: Params) -> Params:
    """The tree a model is applied to, from the compute copy and what `gradient_slots` returned for it."""
    return jax.tree.map(lambda w, s: s if w.dtype == jnp.float32 else MixedWeight(w, s), compute, slots)
