"""The average kept in host memory: its arithmetic, and that what it hands out stays as it was."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from random_state import random_state

from dsv3_jax.checkpoint.training import Checkpoints
from dsv3_jax.config import BatchConfig, CheckpointConfig, Config, ModelConfig, OptimizerConfig, ParallelConfig
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.train.ema import HostAverage
from dsv3_jax.train.state import abstract_state

DECAY = 0.9


@pytest.fixture(scope="module")
def config():
    model = ModelConfig(
        vocab_size=64, d_model=16, num_layers=2, d_ff=32, num_heads=2, qk_nope_head_dim=8, qk_rope_head_dim=4,
        v_head_dim=8, q_lora_rank=8, kv_lora_rank=8, num_experts=8, top_k=2, d_ff_expert=8, num_mtp_modules=0,
        max_length=32, init_std=0.1,
    )  # fmt: skip
    return Config(
        model=model,
        batch=BatchConfig(seq_len=16, sequences=8),
        optimizer=OptimizerConfig(ema_decay=DECAY),
        parallel=ParallelConfig(devices=8, data=2, gpu=4),
        precision="fp32",
    )


@pytest.fixture(scope="module")
def mesh(config):
    return make_mesh(config)


def series(mesh, steps, shape=(8, 6)):
    """Weights that change at every step, split over part of the mesh, and the same in float64."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((steps, *shape)).astype(np.float32)
    sharding = NamedSharding(mesh, PartitionSpec("gpu"))
    return [{"w": jax.device_put(value, sharding)} for value in values], values.astype(np.float64)


def test_equals_the_closed_form_of_a_moving_average(mesh):
    weights, values = series(mesh, 30)
    average = HostAverage(weights[0], DECAY)
    for params in weights[1:]:
        average.update(params)
    steps = len(values) - 1
    expected = DECAY**steps * values[0]
    expected += sum((1 - DECAY) * DECAY ** (steps - k) * values[k] for k in range(1, steps + 1))
    got = average.params()["w"]
    assert got.dtype == jnp.float32
    assert got.sharding == weights[0]["w"].sharding
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_weights_may_be_donated_once_update_has_returned(mesh):
    weights, values = series(mesh, 2)
    average = HostAverage(weights[0], DECAY)
    advance = jax.jit(lambda p: jax.tree.map(lambda x: x * 0 + 100, p), donate_argnums=0)
    average.update(weights[1])
    advance(weights[1])
    np.testing.assert_allclose(average.params()["w"], DECAY * values[0] + (1 - DECAY) * values[1], rtol=1e-5, atol=1e-6)


def test_what_was_handed_out_does_not_change_with_later_updates():
    # Many sizes, so that some of the host arrays are aligned as the device's own memory is.
    params = {str(n): jax.device_put(np.zeros(n, np.float32)) for n in range(1000, 1064)}
    average = HostAverage(params, DECAY)
    before = average.params()
    average.update(jax.tree.map(lambda x: jax.device_put(np.ones_like(x)), params))
    average.params()
    assert all(not np.asarray(x).any() for x in before.values())


def test_continues_from_a_checkpoint_as_if_never_stopped(config, mesh, tmp_path):
    state = random_state(config, mesh)
    times = jax.jit(lambda params, factor: jax.tree.map(lambda x: x * factor, params))
    grow = lambda factor: times(state.params, factor)  # noqa: E731
    average = HostAverage(state.params, DECAY)
    average.update(grow(2.0))
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    checkpoints.save(1, config, state, average.params(), {})
    average.update(grow(3.0))
    checkpoints.wait()
    restored = checkpoints.restore_newest(config, abstract_state(config, mesh))
    checkpoints.close()
    again = HostAverage(restored.average, DECAY)
    again.update(grow(3.0))
    jax.tree.map(np.testing.assert_array_equal, again.params(), average.params())
