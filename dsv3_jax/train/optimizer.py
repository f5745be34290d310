"""AdamW on float32 master weights, with moments stored in a narrower type (report 3.3.2, 4.2)."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

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
    applied: Bool[Array, ""],
) -> tuple[Params, optax.ScaleByAdamState]:
    """New weights and moments, or the old ones where `applied` is False. Computed in float32; decay applies to weight
    matrices, not to norm gains."""
    wide = _cast_moments(moments, jnp.float32)
    _, state = _adam(config).update(gradients, wide)
    state = _where(applied, state, wide)
    if config.moments == "float32" and jax.default_backend() == "cpu":
        # Weights from written moments: XLA's CPU backend would compute them once more from a copy of the old ones.
        state = jax.lax.optimization_barrier(state)
    mu = optax.tree.bias_correction(state.mu, config.beta1, state.count)
    nu = optax.tree.bias_correction(state.nu, config.beta2, state.count)

    def update(w: Array, mu: Array, nu: Array, decays: bool) -> Array:
        step = mu / (jnp.sqrt(nu) + config.eps)
        return w - learning_rate * (step + config.weight_decay * w if decays else step)

    new = jax.tree.map(update, params, mu, nu, decayed(params))
    return _where(applied, new, params), _cast_moments(state, jnp.dtype(config.moments))


def _where(condition: Bool[Array, ""], new: Any, old: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)


def decayed(params: Params) -> dict[str, Any]:
    """True for weight matrices, False for norm gains."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key != "scale", params)


def _adam(config: OptimizerConfig) -> optax.GradientTransformation:
    return optax.scale_by_adam(config.beta1, config.beta2, config.eps)


def _cast_moments(state: optax.ScaleByAdamState, dtype: jnp.dtype) -> optax.ScaleByAdamState:
    cast = jax.tree.map(lambda x: x.astype(dtype), (state.mu, state.nu))
    return state._replace(mu=cast[0], nu=cast[1])
