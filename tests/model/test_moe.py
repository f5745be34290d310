"""The router against a selection written out by hand, the balance losses against the report's formulas."""

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.moe import LocalExchange, MoE, MoEStats, Router, Routing, moe_stats, select_experts

SIZES = {"d_model": 12, "num_experts": 12, "d_ff_expert": 8, "num_layers": 2, "init_std": 0.3}
GROUPED = ModelConfig(**SIZES, num_groups=4, top_k_groups=2, top_k=4)
UNGROUPED = ModelConfig(**SIZES, num_groups=1, top_k_groups=1, top_k=3)
ALL_GROUPS = ModelConfig(**SIZES, num_groups=3, top_k_groups=3, top_k=5)

select = jax.jit(select_experts, static_argnums=1)


def selected_by_hand(choice: np.ndarray, config: ModelConfig) -> list[int]:
    """One token's experts, best first; Python's sort is stable, so that the lower index wins a tie."""
    members = np.split(np.arange(config.num_experts), config.num_groups)

    def group_score(group: int) -> float:
        return -float(np.sort(choice[members[group]])[-2:].sum(dtype=np.float32))

    kept = sorted(range(config.num_groups), key=group_score)[: config.top_k_groups]
    reachable = [e for e in range(config.num_experts) if any(e in members[g] for g in kept)]
    return sorted(reachable, key=lambda e: -float(choice[e]))[: config.top_k]


# Quarters are exact in float32, so that sums tie where they should; all may be negative, below a masked group's 0.
choices = hnp.arrays(np.float32, (5, 12), elements=st.integers(-8, 4).map(lambda n: n / 4))


@pytest.mark.parametrize("config", [GROUPED, UNGROUPED, ALL_GROUPS], ids=["grouped", "ungrouped", "all-groups"])
@settings(max_examples=40, deadline=None)
@given(choice=choices)
def test_selection_is_that_by_hand_with_ties_to_the_lower_index(config, choice):
    experts = np.asarray(select(choice, config))
    for token in range(len(choice)):
        assert experts[token].tolist() == selected_by_hand(choice[token], config)


def test_a_group_out_of_reach_is_not_chosen_for_negative_scores():
    choice = np.float32([-1, -1, -1, -3, -3, -3, -1, -1, -1, -2, -2, -2])
    assert select(choice, GROUPED).tolist() == [0, 1, 2, 6]


def drawn(module, config: ModelConfig, seed: int):
    """The module with weights from numpy: its initializers would take seconds to compile."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: module(config, nnx.Rngs(0))))
    rng = np.random.default_rng(seed)
    normal = lambda shape: jnp.asarray(config.init_std * rng.standard_normal(shape), np.float32)  # noqa: E731
    return nnx.merge(graphdef, jax.tree.map(lambda leaf: normal(leaf.shape), state))


@nnx.jit
def run_router(router: Router, x: jax.Array, bias: jax.Array) -> Routing:
    return router(x, bias)


@pytest.fixture(scope="module")
def router():
    return drawn(Router, GROUPED, 0)


@pytest.fixture(scope="module")
def x():
    return np.random.default_rng(1).standard_normal((2, 7, 12)).astype(np.float32)


@pytest.fixture(scope="module")
def bias():
    return np.random.default_rng(2).standard_normal(12).astype(np.float32) - 1


def test_selection_adds_the_bias_and_weights_do_not(router, x, bias, routing):
    logits = np.asarray(x, np.float64) @ np.asarray(router.kernel.get_value(), np.float64)
    np.testing.assert_allclose(routing.scores, 1 / (1 + np.exp(-logits)), atol=1e-6)
    choice = routing.scores + bias
    for place in np.ndindex(x.shape[:2]):
        experts = selected_by_hand(choice[place], GROUPED)
        assert routing.experts[place].tolist() == experts
        scores = routing.scores[place][experts]
        np.testing.assert_allclose(routing.weights[place], 2.5 * scores / scores.sum(), rtol=1e-5)
    np.testing.assert_allclose(routing.weights.sum(axis=-1), GROUPED.routed_scaling_factor, rtol=1e-5)
    assert (run_router(router, x, np.zeros(12, np.float32)).experts != routing.experts).any()


def test_router_is_float32_for_bf16_tokens(router, x, bias):
    """To the last bits: sums come in another order. Weights in bf16 would move scores by 1e-3."""
    narrow = x.astype(jnp.bfloat16)
    wide = run_router(router, narrow.astype(np.float32), bias)
    np.testing.assert_allclose(run_router(router, narrow, bias).scores, wide.scores, rtol=1e-6)


def test_bias_gets_no_gradient_and_the_router_does(router, x, bias):
    graphdef, state = nnx.split(router)

    def loss(state, bias):
        return (nnx.merge(graphdef, state)(x, bias).weights * jnp.arange(4.0)).sum()

    d_state, d_bias = jax.jit(jax.grad(loss, argnums=(0, 1)))(state, bias)
    assert not np.asarray(d_bias).any()
    assert np.asarray(d_state.kernel.get_value()).any()


def balance_by_hand(scores: np.ndarray, config: ModelConfig) -> tuple[float, float]:
    """Sequence-wise loss, mean over sequences, and the batch-wise one (report 2.1.2), unweighted."""

    def loss(s: np.ndarray) -> float:
        tokens, total = len(s), 0.0
        top = [sorted(range(config.num_experts), key=lambda e: -row[e])[: config.top_k] for row in s]
        for i in range(config.num_experts):
            f = config.num_experts / (config.top_k * tokens) * sum(i in t for t in top)
            p = sum(row[i] / row.sum() for row in s) / tokens
            total += f * p
        return total

    return float(np.mean([loss(s) for s in scores])), loss(scores.reshape(-1, config.num_experts))


@pytest.fixture(scope="module")
def routing(router, x, bias) -> Routing:
    return jax.device_get(run_router(router, x, bias))


@jax.jit
def stats_of(routing: Routing, counted: np.ndarray | None) -> MoEStats:
    return moe_stats(routing, jnp.zeros((), jnp.int32), GROUPED, LocalExchange(), counted)


def test_balance_losses_are_the_reports_from_unbiased_scores(routing):
    stats = stats_of(routing, counted=None)
    sequence, batch = balance_by_hand(np.asarray(routing.scores, np.float64), GROUPED)
    np.testing.assert_allclose(stats.sequence_balance, sequence, rtol=1e-5)
    np.testing.assert_allclose(stats.batch_balance, batch, rtol=1e-5)
    assert sequence != pytest.approx(batch, rel=1e-3)
    np.testing.assert_array_equal(stats.load, np.bincount(np.asarray(routing.experts).ravel(), minlength=12))


def test_even_scores_have_the_least_balance_loss_of_one():
    # Token t prefers experts t, t + 1, ... a little: every expert is chosen equally often.
    scores = np.stack([np.roll(np.float32([0.501] * 4 + [0.5] * 8), t) for t in range(12)])[None]
    experts = np.argsort(-scores, axis=-1, kind="stable")[..., :4].astype(np.int32)
    routing = Routing(scores, experts, np.ones((1, 12, 4), np.float32))
    stats = stats_of(routing, counted=None)
    np.testing.assert_allclose([stats.sequence_balance, stats.batch_balance], 1, rtol=1e-4)


def test_positions_that_are_not_counted_change_no_statistic(routing):
    counted = np.arange(7) < 5
    stats = stats_of(routing, counted=counted)
    shorter = stats_of(jax.tree.map(lambda a: a[:, :5], routing), counted=None)
    for name in ("load", "sequence_balance", "batch_balance"):
        np.testing.assert_allclose(getattr(stats, name), getattr(shorter, name), rtol=1e-6)
    assert np.sum(stats.load) == 2 * 5 * GROUPED.top_k


def test_balance_gradient_reaches_the_scores_through_p_alone(routing):
    def loss(scores):
        return stats_of(Routing(scores, routing.experts, routing.weights), counted=None).sequence_balance

    def through_p(scores):
        top = jax.lax.top_k(routing.scores, GROUPED.top_k)[1]
        f = jax.nn.one_hot(top, 12).sum(axis=(1, 2)) * 12 / (GROUPED.top_k * 7)
        return (f * (scores / scores.sum(axis=-1, keepdims=True)).mean(axis=1)).sum(axis=-1).mean()

    ours, expected = jax.jit(lambda scores: (jax.grad(loss)(scores), jax.grad(through_p)(scores)))(routing.scores)
    np.testing.assert_allclose(ours, expected, atol=1e-7)


@nnx.jit
def run(moe: MoE, x: jax.Array, bias: jax.Array) -> tuple[jax.Array, MoEStats]:
    return moe(x, bias, LocalExchange())


def swiglu(hidden: np.ndarray) -> np.ndarray:
    gate, up = np.split(hidden, 2, axis=-1)
    return gate / (1 + np.exp(-gate)) * up


@pytest.mark.parametrize("shared", [0, 2])
def test_layer_is_the_shared_experts_plus_the_weighted_sum_of_the_selected(shared, x, bias):
    config = ModelConfig(**SIZES, num_groups=4, top_k_groups=2, top_k=4, num_shared_experts=shared)
    moe = drawn(MoE, config, 3)
    y, stats = run(moe, x, bias)
    gate_up, down = (np.asarray(w.get_value(), np.float64) for w in (moe.experts.gate_up, moe.experts.down))
    every = np.stack([swiglu(x @ gate_up[e]) @ down[e] for e in range(12)], axis=2)
    dense = np.zeros(every.shape[:3])
    for j in range(config.top_k):
        chosen = np.asarray(stats.routing.experts)[..., j, None] == np.arange(12)
        dense += chosen * np.asarray(stats.routing.weights)[..., j, None]
    expected = (dense[..., None] * every).sum(axis=2)
    if shared:
        gate_up, down = (np.asarray(w.kernel.get_value(), np.float64) for w in (moe.shared.gate_up, moe.shared.down))
        expected += swiglu(x @ gate_up) @ down
    np.testing.assert_allclose(y, expected, atol=1e-5)
    assert int(stats.overflow) == 0


def test_no_token_is_dropped_when_all_choose_the_same_experts(x):
    bias = np.where(np.isin(np.arange(12), [1, 2, 7, 8]), np.float32(10), np.float32(0))
    moe = drawn(MoE, GROUPED, 3)
    y, stats = run(moe, x, bias)
    assert np.flatnonzero(np.asarray(stats.load)).tolist() == [1, 2, 7, 8]
    assert set(np.asarray(stats.load)[[1, 2, 7, 8]]) == {14}
    one_by_one = np.concatenate([run(moe, x[:, i : i + 1], bias)[0] for i in range(x.shape[1])], axis=1)
    np.testing.assert_allclose(y, one_by_one, atol=1e-5)
