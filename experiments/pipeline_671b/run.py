"""Traces and lowers the 671B model's step for 2048 devices, none of which has to be there (report 3.2).

    python experiments/pipeline_671b/run.py [SCHEDULE]

Prints how long both take, and the bytes that each device is called with beside what the planner says; fails where these
differ.
"""

import dataclasses
import math
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType

from dsv3_jax.cli import load_config
from dsv3_jax.config import Config
from dsv3_jax.model.transformer import initial_router_bias
from dsv3_jax.model_shapes import leaf_shapes, tree_shapes
from dsv3_jax.parallel.mesh import check_shape
from dsv3_jax.planner.cluster import plan_cluster
from dsv3_jax.planner.devices import load_device
from dsv3_jax.planner.memory import argument_bytes, state_memory
from dsv3_jax.train.loss import LossWeights
from dsv3_jax.train.optimizer import init_moments
from dsv3_jax.train.pipelined import plan_pipeline
from dsv3_jax.train.state import TrainState, model_structure, state_shardings
from dsv3_jax.train.step import Knobs, make_step

SHAPE = {"pipe": 16, "data": 2, "node": 8, "gpu": 8}


def abstract_state(config: Config, mesh: AbstractMesh) -> TrainState:
    """Shapes, types and shardings of the state, without a device."""
    params = model_structure(config.model)[1]
    moments = jax.eval_shape(lambda p: init_moments(config.optimizer, p), params)
    state = TrainState(params, moments, jax.eval_shape(lambda: initial_router_bias(config.model)))
    shardings = state_shardings(config, mesh)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)


def bytes_per_device(state: TrainState) -> int:
    """Of each array's shard."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(state))


def pipelined(schedule: str) -> Config:
    """The 671B run in another order of its 16 pipeline ranks."""
    config = load_config(str(Path(__file__).parents[2] / "configs" / "v3_671b.py"))
    return dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, schedule=schedule))


def abstract_mesh() -> AbstractMesh:
    """2048 devices that are not there."""
    return AbstractMesh(tuple(SHAPE.values()), tuple(SHAPE), axis_types=(AxisType.Auto,) * len(SHAPE))


def held_parameters(config: Config) -> int:
    """Parameters that each device computes with: ends, and on every rank as many layers of a kind as on the fullest."""
    microbatches = config.batch.sequences // config.batch.rows_per_microbatch
    layouts, group = plan_pipeline(config, microbatches).layouts, SHAPE["node"] * SHAPE["gpu"]
    total = 0
    for path, shape in leaf_shapes(tree_shapes(config.model)["params"]):
        layers = layouts[path[0]].held.shape[1] / shape[0] if path[0] in layouts else 1
        total += round(math.prod(shape) * layers) // (group if "experts" in path else 1)
    return total


def called_with(traced: jax.stages.Traced) -> tuple[int, int]:
    """Bytes of the step's arguments as one device gets them, and of what it reads besides: constants of the program."""
    (step,) = (equation for equation in traced.jaxpr.eqns if equation.primitive.name == "shard_map")
    arguments = {id(v) for v in traced.jaxpr.invars}
    found = [0, 0]
    for outside, inside in zip(step.invars, step.params["jaxpr"].invars, strict=True):
        found[id(outside) not in arguments] += math.prod(inside.aval.shape) * inside.aval.dtype.itemsize
    return found[0], found[1]


def main(schedule: str) -> None:
    """Prints times and bytes. Raises SystemExit where the planner's are others."""
    config, mesh = pipelined(schedule), abstract_mesh()
    check_shape(config, SHAPE)
    state, number = abstract_state(config, mesh), jax.ShapeDtypeStruct((), jnp.float32)
    knobs = Knobs(number, number, LossWeights(number, number, number))
    rows = config.batch.rows_per_microbatch
    tokens = jax.ShapeDtypeStruct((config.batch.sequences // rows, rows, config.batch.seq_len), jnp.int32)
    start = time.perf_counter()
    traced = make_step(config, mesh).trace(state, tokens, knobs)
    middle = time.perf_counter()
    traced.lower(lowering_platforms=("cuda",))
    print(f"{schedule}: traced in {middle - start:.1f} s, lowered in {time.perf_counter() - middle:.1f} s")
    held, planned = bytes_per_device(state), state_memory(config, SHAPE).total
    (arguments, constants), planned_arguments = called_with(traced), argument_bytes(config, SHAPE)
    print(f"bytes of state on each device: {held:,}; planned: {planned:,}")
    print(f"bytes of all arguments, tokens and knobs too: {arguments:,}; planned: {planned_arguments:,}")
    print(f"bytes of the program's constants, the schedule's table: {constants:,}")
    fullest = max(
        memory.weights + memory.gradients
        for memory in plan_cluster(config, load_device("h800"), SHAPE, schedule).memory
    )
    # A float32 gradient, and BF16 or FP8 in two layouts.
    print(
        f"GB of weights and gradients: {6e-9 * held_parameters(config):.1f} on every rank; planned for the fullest: "
        f"{1e-9 * fullest:.1f}"
    )
    if (held, arguments) != (planned, planned_arguments):
        raise SystemExit("the planner and the step differ")


if __name__ == "__main__":
    main(*(sys.argv[1:] or ["dualpipe"]))
