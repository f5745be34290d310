"""A new state has the same weights on any mesh."""

import jax
import numpy as np

from dsv3_jax.config import BatchConfig, Config, ModelConfig, ParallelConfig
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.train.state import init_state, state_shardings

MODEL = ModelConfig(
    vocab_size=64, d_model=16, num_layers=1, num_dense_layers=0, num_heads=1, qk_nope_head_dim=8, qk_rope_head_dim=8,
    v_head_dim=8, q_lora_rank=None, kv_lora_rank=8, num_experts=8, num_groups=2, top_k_groups=1, d_ff_expert=8,
    top_k=2, num_shared_experts=0, num_mtp_modules=0, max_length=64,
)  # fmt: skip


def assert_placed(x, sharding):
    assert x.sharding.is_equivalent_to(sharding, x.ndim)


def test_initial_weights_are_the_same_on_any_mesh():
    states = []
    for parallel in ({"devices": 1}, {"devices": 8, "data": 2, "node": 2, "gpu": 2}):
        config = Config(model=MODEL, batch=BatchConfig(seq_len=16, sequences=8), parallel=ParallelConfig(**parallel))
        mesh = make_mesh(config)
        states.append(init_state(config, mesh))
        jax.tree.map(assert_placed, states[-1], state_shardings(config, mesh))
    one, eight = map(jax.device_get, states)
    jax.tree.map(np.testing.assert_array_equal, eight, one)
    assert np.std(one.params["embed"]["embedding"]) > 0
