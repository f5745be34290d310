"""The training state on the devices, and how it is spread over the mesh."""

from dataclasses import dataclass
from typing import Any

import jax
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dsv3_jax.config import Config, ModelConfig
from dsv3_jax.model.transformer import RouterBias, Transformer, initial_router_bias
from dsv3_jax.ops.weights import Params
from dsv3_jax.parallel.sharding import param_shardings
from dsv3_jax.train.optimizer import init_moments


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Master weights and moments, split as ZeRO-1 says, and the router bias, which gradients never touch."""

    params: Params
    moments: optax.ScaleByAdamState
    router_bias: RouterBias


def model_structure(config: ModelConfig) -> tuple[nnx.GraphDef, Params]:
    """What `nnx.merge` needs to make a module of parameters, and the shapes of these, without computing any."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(0))))
    return graphdef, nnx.to_pure_dict(state)


def state_specs(config: Config, mesh: Mesh) -> TrainState:
    """The partition spec of every array of the state."""
    _, shapes = model_structure(config.model)
    specs = jax.tree.map(lambda s: s.spec, param_shardings(shapes, mesh))
    moments = optax.ScaleByAdamState(count=PartitionSpec(), mu=specs, nu=specs)
    bias = jax.tree.map(lambda _: PartitionSpec(), jax.eval_shape(lambda: initial_router_bias(config.model)))
    return TrainState(specs, moments, bias)


def state_shardings(config: Config, mesh: Mesh) -> TrainState:
    """The sharding of every array of the state on a mesh."""
    is_spec = lambda x: isinstance(x, PartitionSpec)  # noqa: E731
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), state_specs(config, mesh), is_leaf=is_spec)


def init_state(config: Config, mesh: Mesh) -> TrainState:
    """A new state: the same weights on any mesh, each device computing only its shards."""

    def make() -> TrainState:
        params = nnx.to_pure_dict(nnx.split(Transformer(config.model, nnx.Rngs(config.seed)))[1])
        return TrainState(params, init_moments(config.optimizer, params), initial_router_bias(config.model))

    return jax.jit(make, out_shardings=state_shardings(config, mesh))()


def abstract_state(config: Config, mesh: Mesh) -> Any:
    """Shapes, types and shardings of the state, to restore a checkpoint into."""
    shapes = jax.eval_shape(lambda: init_state(config, mesh))
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        state_shardings(config, mesh),
    )
