"""Two microbatches side by side: the numbers of one after the other, and exchanges that products need not wait for."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.config import BatchConfig, Config, ModelConfig, OptimizerConfig, ParallelConfig
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.parallel.program import exchange_overlaps
from dsv3_jax.train.loss import LossWeights
from dsv3_jax.train.state import abstract_state
from dsv3_jax.train.step import Knobs, make_step

# Neither shared experts, which need no exchange, nor dense layers or MTP modules: all products wait for each other.
MODEL = ModelConfig(
    vocab_size=64, d_model=16, num_layers=2, num_dense_layers=0, num_heads=2, qk_nope_head_dim=8, qk_rope_head_dim=8,
    v_head_dim=8, q_lora_rank=16, kv_lora_rank=16, num_experts=8, top_k=2, d_ff_expert=8, num_shared_experts=0,
    num_mtp_modules=0, max_length=64, init_std=0.1,
)  # fmt: skip
MICROBATCHES, ROWS, SEQ = 3, 4, 16
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
KNOBS = Knobs(jnp.float32(1e-3), jnp.float32(1e-3), LossWeights(*[jnp.float32(1e-2)] * 3))


def run(overlap: bool):
    """The compiled step, and what it gives: two microbatches side by side, and one that is left over."""
    config = Config(
        model=MODEL,
        batch=BatchConfig(seq_len=SEQ, sequences=MICROBATCHES * ROWS, microbatch=ROWS),
        optimizer=OptimizerConfig(moments="float32"),
        parallel=ParallelConfig(devices=4, node=2, gpu=2, expert_buffer_factor=4.0, overlap_microbatches=overlap),
        precision="fp32",
    )
    mesh = make_mesh(config)
    tokens = np.random.default_rng(0).integers(0, MODEL.vocab_size, (MICROBATCHES, ROWS, SEQ)).astype(np.int32)
    rng = np.random.default_rng(1)
    random = lambda x: np.asarray(0.1 * rng.standard_normal(x.shape), x.dtype)  # noqa: E731
    state = jax.tree.map(lambda x: jax.device_put(random(x), x.sharding), abstract_state(config, mesh))
    state = dataclasses.replace(state, moments=jax.tree.map(jnp.zeros_like, state.moments))
    step = make_step(config, mesh).lower(state, tokens, KNOBS).compile(QUICK)
    return step, jax.device_get(step(state, tokens, KNOBS))


@pytest.fixture(scope="module")
def overlapped():
    return run(True)


def test_numbers_are_those_of_one_microbatch_after_the_other(overlapped):
    (state, report), (want_state, want) = overlapped[1], run(False)[1]
    assert report.applied
    jax.tree.map(np.testing.assert_array_equal, report.losses.load, want.losses.load)
    for name in ("loss", "sequence_balance", "batch_balance"):
        np.testing.assert_allclose(getattr(report.losses, name), getattr(want.losses, name), rtol=1e-6)
    np.testing.assert_allclose(report.grad_norm, want.grad_norm, rtol=1e-5)
    # The first moment is the gradient times a constant.
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6 * np.abs(b).max())  # noqa: E731
    jax.tree.map(close, state.moments.mu, want_state.moments.mu)


def test_in_one_loop_body_no_exchange_waits_for_the_other_microbatchs_products(overlapped):
    found = sorted(exchange_overlaps(overlapped[0].as_text()), key=lambda x: (x.products, x.computation))
    bodies = [list(group) for _, group in itertools.groupby(found, key=lambda x: x.computation)]
    # Forward and backward of a layer for the microbatch that is alone, and for two.
    alone, pair, alone_backward, pair_backward = bodies
    assert pair[0].products == 2 * alone[0].products
    assert pair_backward[0].products == 2 * alone_backward[0].products
    # Experts, weights and rows over two links and the way back; backward, gradients there, and both kinds back: nothing
    # that was sent is sent again.
    assert [len(body) for body in bodies] == [8, 16, 6, 12]
    for one, two in ((alone, pair), (alone_backward, pair_backward)):
        own = sorted(x.independent for x in one)
        # What was independent before, and every product of the other microbatch.
        assert sorted(x.independent for x in two) == sorted(2 * [n + one[0].products for n in own])
    assert min(x.independent for x in alone) == 0, "alone, an exchange has nothing to hide behind"
