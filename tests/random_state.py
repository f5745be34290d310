"""A training state drawn by numpy: the initializers of every parameter take seconds to compile for every mesh."""

import jax
import numpy as np
from jax.sharding import Mesh

from dsv3_jax.config import Config
from dsv3_jax.train.state import TrainState, abstract_state


def random_state(config: Config, mesh: Mesh) -> TrainState:
    """What `init_state` gives, of other random numbers: the same on any mesh, and placed as it is."""
    rng, like = np.random.default_rng(config.seed), abstract_state(config, mesh)

    def zeros(x):
        return jax.device_put(np.zeros(x.shape, x.dtype), x.sharding)

    def weight(path, x):
        normal = config.model.init_std * rng.standard_normal(x.shape)
        return jax.device_put((np.ones(x.shape) if path[-1].key == "scale" else normal).astype(x.dtype), x.sharding)

    params = jax.tree_util.tree_map_with_path(weight, like.params)
    return TrainState(params, jax.tree.map(zeros, like.moments), jax.tree.map(zeros, like.router_bias))
