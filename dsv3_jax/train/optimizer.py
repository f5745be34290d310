"""AdamW on float32 master weights, with moments stored in a narrower type (report 3.3.2, 4.2)."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from dsv3_jax.config import OptimizerConfig
from dsv3_jax.ops.weights import Params


def init_moments(config: OptimizerConfig, params: Params) -> optax.ScaleByAdamState:
    """Zero moments in their stored type, and the count of updates."""
    return _cast_moments(_adam(config).init(params), jnp.dtype(config.moments))


def adamw_update(
    config: OptimizerConfig,
    params: Params,
    gradients: Params,
    moments: optax.ScaleByAdamState,
    learning_rate: Float[Array, ""],
) -> tuple[Params, optax.ScaleByAdamState]:
    """New weights and moments. Computed in float32; decay applies to weight matrices, not to norm gains."""
    wide = _cast_moments(moments, jnp.float32)
    transform = optax.chain(
        _adam(config), optax.add_decayed_weights(config.weight_decay, decayed), optax.scale(-learning_rate)
    )
    start = (wide, optax.MaskedState(optax.EmptyState()), optax.EmptyState())
    updates, state = transform.update(gradients, start, params)
    return optax.apply_updates(params, updates), _cast_moments(state[0], jnp.dtype(config.moments))


def decayed(params: Params) -> dict[str, Any]:
    """True for weight matrices, False for norm gains."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key != "scale", params)


def _adam(config: OptimizerConfig) -> optax.GradientTransformation:
    return optax.scale_by_adam(config.beta1, config.beta2, config.eps)


def _cast_moments(state: optax.ScaleByAdamState, dtype: jnp.dtype) -> optax.ScaleByAdamState:
    cast = jax.tree.map(lambda x: x.astype(dtype), (state.mu, state.nu))
    return state._replace(mu=cast[0], nu=cast[1])
