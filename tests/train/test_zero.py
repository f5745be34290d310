"""ZeRO-1: what each device holds is what the plan says, and weights and gradients are shared once a step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import JaxprEqn
from jaxpr_equations import equations

from dsv3_jax.config import BatchConfig, Config, ModelConfig, OptimizerConfig, ParallelConfig
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.planner.memory import training_memory
from dsv3_jax.train.ema import HostAverage
from dsv3_jax.train.loss import LossWeights
from dsv3_jax.train.state import abstract_state
from dsv3_jax.train.step import Knobs, make_step

# Every dimension divides by 8, so that nothing is left whole.
MODEL = ModelConfig(
    vocab_size=64, d_model=32, num_layers=3, d_ff=48, num_heads=2, qk_nope_head_dim=8, qk_rope_head_dim=8,
    v_head_dim=8, q_lora_rank=16, kv_lora_rank=16, num_experts=16, d_ff_expert=16, max_length=64,
)  # fmt: skip
COLLECTIVES = {"all_gather", "reduce_scatter", "psum", "psum_invariant", "all_gather_invariant"}
MICROBATCHES, ROWS, SEQ = 3, 8, 16
WEIGHTS = LossWeights(jnp.float32(0.3), jnp.float32(1e-2), jnp.float32(1e-2))


def make_config(**mesh) -> Config:
    return Config(
        model=MODEL,
        batch=BatchConfig(seq_len=SEQ, sequences=MICROBATCHES * ROWS, microbatch=ROWS),
        optimizer=OptimizerConfig(ema_decay=0.9),
        parallel=ParallelConfig(**mesh),
        precision="fp32",
    )


def planned(config: Config):
    parallel = config.parallel
    return training_memory(config, {"data": parallel.data, "node": parallel.node, "gpu": parallel.gpu})


def bytes_by_device(tree) -> set[int]:
    """Bytes of its arrays on each device; one number where all hold as much."""
    held = dict.fromkeys(jax.devices()[: jax.tree.leaves(tree)[0].sharding.num_devices], 0)
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    return set(held.values())


def assert_state_as_planned(config: Config) -> None:
    memory, shapes = planned(config), abstract_state(config, make_mesh(config))
    state = jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), shapes)
    assert bytes_by_device(state.params) == {memory.master}
    assert bytes_by_device((state.moments.mu, state.moments.nu)) == {memory.moments}
    average = HostAverage(state.params, config.optimizer.ema_decay)
    assert average.nbytes == memory.average * config.parallel.devices


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 2, 4)], ids=str)
def test_master_weights_moments_and_average_are_as_large_as_planned(shape):
    data, node, gpu = shape
    assert_state_as_planned(make_config(devices=8, data=data, node=node, gpu=gpu))


def test_eight_times_the_replicas_hold_an_eighth_of_the_state_each():
    one, eight = (make_config(devices=data, data=data, gpu=1) for data in (1, 8))
    for config in (one, eight):
        assert_state_as_planned(config)
    assert planned(one).master == 8 * planned(eight).master
    assert planned(one).moments == 8 * planned(eight).moments
    assert planned(one).average == 8 * planned(eight).average
    assert planned(one).gradients == planned(eight).gradients


def shares_floats(equation: JaxprEqn) -> bool:
    aval = equation.outvars[0].aval
    return bool(aval.ndim) and jnp.issubdtype(aval.dtype, jnp.floating)


def test_weights_are_gathered_and_gradients_scattered_once_a_step():
    config = make_config(devices=8, data=2, node=2, gpu=2)
    mesh = make_mesh(config)
    state = abstract_state(config, mesh)
    tokens = jax.ShapeDtypeStruct((MICROBATCHES, ROWS, SEQ), jnp.int32)
    knobs = Knobs(jnp.float32(1e-3), jnp.float32(1e-3), WEIGHTS)
    traced = jax.make_jaxpr(make_step(config, mesh))(state, tokens, knobs)
    found = {"step": [], "microbatch": []}
    for inside, equation in equations(traced.jaxpr):
        if equation.primitive.name in COLLECTIVES and shares_floats(equation):
            found["microbatch" if "scan" in inside else "step"].append(equation)
    leaves = len(jax.tree.leaves(state.params))
    gathered, scattered = (
        [e for e in found["step"] if e.primitive.name == n] for n in ("all_gather", "reduce_scatter")
    )
    assert len(gathered) == len(scattered) == leaves
    memory = planned(config)
    assert sum(4 * equation.outvars[0].aval.size for equation in gathered) == memory.weights
    assert sum(4 * equation.invars[0].aval.size for equation in scattered) == memory.gradients
    # In a microbatch nothing of a weight's size is shared: only the loads that the batch-wise balance loss needs.
    assert {e.outvars[0].aval.shape for e in found["microbatch"]} == {(MODEL.num_experts,)}
