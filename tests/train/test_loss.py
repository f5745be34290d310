"""The training loss, part by part, from the hidden states of a tiny model and a plain cross-entropy."""

import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.moe import LocalExchange
from dsv3_jax.model.transformer import initial_router_bias
from dsv3_jax.train.loss import LossWeights, held_out_loss, training_loss, training_losses
from dsv3_jax.train.state import model_structure

SEQ, DEPTHS = 9, 2
SIZES = {
    "vocab_size": 20, "d_model": 16, "d_ff": 16, "num_heads": 2, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4,
    "v_head_dim": 4, "q_lora_rank": None, "kv_lora_rank": 8, "num_experts": 8, "d_ff_expert": 8, "top_k": 2,
    "num_groups": 2, "top_k_groups": 1,
}  # fmt: skip
MODEL = ModelConfig(**SIZES, num_layers=3, num_dense_layers=1, num_mtp_modules=DEPTHS)
WEIGHTS = LossWeights(mtp=jnp.float32(0.3), sequence_balance=jnp.float32(0.07), batch_balance=jnp.float32(0.05))
ROW_WEIGHTS = np.array([1.0, 0.0, 0.5], np.float32)


def random_weights(config: ModelConfig):
    """Structure and weights; the initializers would take seconds to compile."""
    graphdef, shapes = model_structure(config)
    rng = np.random.default_rng(0)
    return graphdef, jax.tree.map(lambda s: jnp.asarray(0.3 * rng.normal(size=s.shape), jnp.float32), shapes)


@pytest.fixture(scope="module")
def result():
    """All that the tests compare, computed once."""
    graphdef, params = random_weights(MODEL)
    tokens = jax.random.randint(jax.random.key(1), (3, SEQ), 0, MODEL.vocab_size)
    bias = initial_router_bias(MODEL)

    @jax.jit
    def compute(params, tokens):
        model, exchange = nnx.merge(graphdef, params), LocalExchange()
        total, report = training_loss(model, tokens, bias, WEIGHTS, exchange)
        trunk = model.trunk(tokens, bias)
        ahead = model.predict_ahead(trunk, bias)
        held_out = held_out_loss(model, tokens, jnp.asarray(ROW_WEIGHTS), bias, exchange)
        return {
            "total": total, "report": report, "hidden": trunk.hidden, "ahead": ahead.hidden, "held_out": held_out,
            "stats": (trunk.stats, ahead.stats),
            "together": training_losses(model, [tokens, tokens[:, ::-1]], bias, WEIGHTS, exchange),
            "reversed": training_loss(model, tokens[:, ::-1], bias, WEIGHTS, exchange),
        }  # fmt: skip

    values = compute(params, tokens)
    return SimpleNamespace(**values, tokens=np.asarray(tokens), head=np.asarray(params["head"]["kernel"]))


def by_hand(hidden, head, tokens, distance) -> tuple[np.ndarray, np.ndarray]:
    """Loss and correctness, [batch, seq - distance], of predicting the token `distance` ahead of every position."""
    batch, seq = tokens.shape
    losses, correct = np.zeros((batch, seq - distance)), np.zeros((batch, seq - distance), bool)
    for b in range(batch):
        for i in range(seq - distance):
            logits = np.asarray(hidden[b, i], np.float64) @ head
            label = tokens[b, i + distance]
            losses[b, i] = np.log(np.exp(logits).sum()) - logits[label]
            correct[b, i] = logits.argmax() == label
    return losses, correct


def test_losses_of_microbatches_side_by_side_are_sums(result):
    total, report = result.together
    other_total, other = result.reversed
    np.testing.assert_allclose(total, result.total + other_total, rtol=1e-6)
    jax.tree.map(lambda a, b, c: np.testing.assert_allclose(a, b + c, rtol=1e-5), report, result.report, other)


def test_next_token_loss_is_the_mean_over_all_tokens_but_the_first(result):
    losses, _ = by_hand(result.hidden, result.head, result.tokens, 1)
    np.testing.assert_allclose(result.report.loss, losses.mean(), rtol=1e-5)


@pytest.mark.parametrize("k", range(DEPTHS))
def test_mtp_depth_k_predicts_the_token_k_plus_2_ahead_where_there_is_one(result, k):
    losses, correct = by_hand(result.ahead[k], result.head, result.tokens, k + 2)
    np.testing.assert_allclose(result.report.mtp_loss[k], losses.mean(), rtol=1e-5)
    np.testing.assert_allclose(result.report.mtp_accuracy[k], correct.mean(), rtol=1e-5)


def test_total_is_the_weighted_sum_of_the_parts(result):
    report = result.report
    expected = report.loss + 0.3 * report.mtp_loss.mean() + 0.07 * report.sequence_balance + 0.05 * report.batch_balance
    np.testing.assert_allclose(result.total, expected, rtol=1e-6)


def test_balance_losses_and_loads_are_those_of_all_moe_layers_and_depths(result):
    main, mtp = result.stats
    for name in ("sequence_balance", "batch_balance"):
        parts = np.concatenate([getattr(main, name), getattr(mtp, name)])
        assert parts.shape == (MODEL.num_moe_layers + DEPTHS,)
        np.testing.assert_allclose(getattr(result.report, name), parts.sum(), rtol=1e-6)
    # Main layers route every token; depth k only those that have a token k + 1 ahead.
    np.testing.assert_array_equal(result.report.load["moe_layers"].sum(axis=-1), [3 * SEQ * 2] * 2)
    np.testing.assert_array_equal(result.report.load["mtp"].sum(axis=-1), [3 * (SEQ - k - 1) * 2 for k in range(2)])
    assert int(result.report.overflow) == 0


def test_held_out_loss_weighs_rows(result):
    losses, _ = by_hand(result.hidden, result.head, result.tokens, 1)
    np.testing.assert_allclose(result.held_out, (ROW_WEIGHTS * losses.mean(axis=1)).sum(), rtol=1e-5)


@pytest.mark.parametrize("logits_tokens", [8, 3 * SEQ])
def test_logits_of_so_many_tokens_exist_at_a_time(logits_tokens):
    graphdef, params = random_weights(MODEL)
    bias = initial_router_bias(MODEL)

    def loss(params, tokens):
        model = nnx.merge(graphdef, params)
        return training_loss(model, tokens, bias, WEIGHTS, LocalExchange(), logits_tokens=logits_tokens)[0]

    traced = str(jax.make_jaxpr(jax.grad(loss))(params, jnp.zeros((3, SEQ), jnp.int32)))
    sizes = {int(rows) for rows in re.findall(rf"f32\[(\d+),{MODEL.vocab_size}\] = dot_general", traced)}
    assert sizes == {logits_tokens, MODEL.d_model}  # the logits, and the gradient of the head


def test_a_dense_model_without_mtp_trains_on_the_next_token_alone():
    config = ModelConfig(**SIZES, num_layers=1, num_dense_layers=1, num_mtp_modules=0)
    graphdef, params = random_weights(config)
    tokens = jax.random.randint(jax.random.key(1), (2, SEQ), 0, config.vocab_size)

    def loss(params):
        return training_loss(nnx.merge(graphdef, params), tokens, {}, WEIGHTS, LocalExchange())

    (total, report), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    assert float(total) == float(report.loss)
    assert report.mtp_loss.shape == (0,)
    assert all(jnp.isfinite(g).all() and g.any() for g in jax.tree.leaves(grads))
