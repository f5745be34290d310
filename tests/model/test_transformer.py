"""What must hold of the whole model whatever its weights: causality, the cache, recomputation, its size in HLO."""

import dataclasses
import re
import runpy
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jaxpr_equations import equations

from dsv3_jax.config import ModelConfig, YarnConfig
from dsv3_jax.model.attention import LatentCache
from dsv3_jax.model.moe import LocalExchange
from dsv3_jax.model.transformer import initial_router_bias
from dsv3_jax.planner.parameters import count_parameters
from dsv3_jax.train.loss import LossWeights, training_loss
from dsv3_jax.train.state import model_structure

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.py"))
SEQ = 12
MODEL = ModelConfig(
    vocab_size=50, d_model=24, num_layers=3, num_dense_layers=1, d_ff=32, num_heads=2, qk_nope_head_dim=8,
    qk_rope_head_dim=4, v_head_dim=6, q_lora_rank=12, kv_lora_rank=10, num_experts=8, d_ff_expert=8, top_k=2,
    num_groups=4, top_k_groups=2, num_mtp_modules=2, init_std=0.2, max_length=64,
    yarn=YarnConfig(factor=4.0, original_length=16),
)  # fmt: skip
LEAN = dataclasses.replace(MODEL, q_lora_rank=None, num_shared_experts=0, num_mtp_modules=2)
WEIGHTS = LossWeights(jnp.float32(0.3), jnp.float32(0.01), jnp.float32(0.02))


def loss_of(config: ModelConfig, recompute: str, unroll_layers: int = 1):
    graphdef, _ = model_structure(config)

    def loss(params, bias, tokens):
        model = nnx.merge(graphdef, params)
        return training_loss(model, tokens, bias, WEIGHTS, LocalExchange(), recompute, unroll_layers)[0]

    return loss


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)  # the initializers would take seconds to compile

    def weight(path, leaf):
        normal = rng.normal(size=leaf.shape).astype(np.float32)
        return jnp.asarray(1 + 0.1 * normal if path[-1].key == "scale" else MODEL.init_std * normal)

    return jax.tree_util.tree_map_with_path(weight, model_structure(MODEL)[1])


@pytest.fixture(scope="module")
def bias():
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(lambda: initial_router_bias(MODEL))
    return jax.tree.map(lambda b: jnp.asarray(0.1 * rng.normal(size=b.shape), jnp.float32), shapes)


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(2).integers(0, MODEL.vocab_size, (2, SEQ), dtype=np.int32)


@pytest.fixture(scope="module")
def forward(bias):
    """(params, tokens) -> final-normed output, and that of every MTP depth."""
    graphdef, _ = model_structure(MODEL)

    @jax.jit
    def run(params, tokens):
        model = nnx.merge(graphdef, params)
        trunk = model.trunk(tokens, bias)
        return trunk.hidden, model.predict_ahead(trunk, bias).hidden

    return lambda params, tokens: jax.device_get(run(params, tokens))


def test_a_token_changes_no_output_before_it(forward, params, tokens):
    hidden, ahead = forward(params, tokens)
    for position in (0, 5, SEQ - 1):
        other_token = tokens.copy()
        other_token[:, position] = (tokens[:, position] + 1) % MODEL.vocab_size
        other, other_ahead = forward(params, other_token)
        changed = np.abs(other - hidden).max(axis=(0, 2))
        assert (changed[:position] < 1e-5).all()
        assert changed[position] > 1e-3
        # Row i of depth k has seen the tokens up to i + k + 1; rows without such a token hold nothing of use.
        for k in range(MODEL.num_mtp_modules):
            changed = np.abs(other_ahead[k] - ahead[k]).max(axis=(0, 2))[: SEQ - k - 1]
            first = max(position - k - 1, 0)
            assert (changed[:first] < 1e-5).all()
            assert changed[first] > 1e-3


def test_the_main_model_reads_no_parameter_of_the_mtp_modules(forward, params, tokens):
    hidden, _ = forward(params, tokens)
    broken = params | {"mtp": jax.tree.map(lambda x: np.full(x.shape, np.nan, x.dtype), params["mtp"])}
    without, without_ahead = forward(broken, tokens)
    np.testing.assert_array_equal(without, hidden)
    assert np.isnan(without_ahead).all()


def test_decoding_in_chunks_from_the_cache_gives_the_trunks_output(forward, params, bias, tokens):
    graphdef, _ = model_structure(MODEL)

    @jax.jit
    def decode(params, tokens, caches, start):
        return nnx.merge(graphdef, params).decode(tokens, caches, start, bias)

    caches = jax.eval_shape(lambda: nnx.merge(graphdef, params).empty_caches(2, SEQ + 3, jnp.float32))
    caches = jax.tree.map(lambda x: np.full(x.shape, 5, x.dtype), caches)  # what is yet to be written must not be read
    outputs, start = [], 0
    for count in (5, 1, 1, 5):
        out, caches = decode(params, tokens[:, start : start + count], caches, np.int32(start))
        outputs.append(out)
        start += count
    assert start == SEQ
    np.testing.assert_allclose(np.concatenate(outputs, axis=1), forward(params, tokens)[0], atol=2e-5)


def test_671b_caches_576_numbers_a_token_and_layer():
    config = next(runpy.run_path(str(path))["config"]().model for path in CONFIGS if path.stem == "v3_671b")
    model = nnx.merge(*model_structure(config))
    caches = jax.eval_shape(lambda: model.empty_caches(2, 7, jnp.bfloat16))
    assert {kind: cache.latent.shape[0] for kind, cache in caches.items()} == {"dense_layers": 3, "moe_layers": 58}
    assert all(isinstance(cache, LatentCache) for cache in caches.values())
    assert sum(x.size for x in jax.tree.leaves(caches)) == 576 * 61 * 2 * 7
    assert sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(caches)) == 70_272 * 2 * 7


@pytest.fixture(scope="module")
def stored(params, bias, tokens):
    """Loss and gradients when nothing is computed again."""
    return jax.device_get(jax.jit(jax.value_and_grad(loss_of(MODEL, "none")))(params, bias, tokens))


@pytest.mark.parametrize(("recompute", "unroll_layers"), [("report", 1), ("layer", 9)])
def test_recomputation_changes_neither_loss_nor_gradients(recompute, unroll_layers, stored, params, bias, tokens):
    """Nor does it matter whether layers are a loop or straight code."""
    loss, grads = jax.jit(jax.value_and_grad(loss_of(MODEL, recompute, unroll_layers)))(params, bias, tokens)
    np.testing.assert_allclose(loss, stored[0], rtol=1e-6)
    expected = dict(jax.tree_util.tree_leaves_with_path(stored[1]))
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        name, scale = jax.tree_util.keystr(path), float(np.abs(expected[path]).max())
        assert scale > 0, f"{name} gets no gradient"
        np.testing.assert_allclose(grad, expected[path], rtol=1e-4, atol=2e-6 * max(scale, 1), err_msg=name)


def test_the_more_is_recomputed_the_less_is_kept_for_the_backward_pass(bias, tokens):
    _, shapes = model_structure(MODEL)

    def kept(recompute: str) -> int:
        loss = partial(loss_of(MODEL, recompute), bias=bias, tokens=tokens)
        return sum(x.size for x in jax.tree.leaves(jax.eval_shape(lambda p: jax.vjp(loss, p)[1], shapes)))

    assert kept("none") > 1.2 * kept("report") > 1.2 * 1.2 * kept("layer")


def test_straight_code_has_no_loop_over_layers_and_keeps_recomputation_apart(bias, tokens):
    """The compiler would take what is computed again for what was computed before."""
    _, shapes = model_structure(MODEL)

    def count(what: str, unroll_layers: int) -> int:
        gradient = jax.jit(jax.grad(loss_of(MODEL, "report", unroll_layers)))
        return gradient.lower(shapes, bias, tokens).as_text().count(what)

    assert count("stablehlo.while", 9) <= count("stablehlo.while", 1) - 2
    assert count("optimization_barrier", 9) > count("optimization_barrier", 1)


@pytest.mark.parametrize("source", [*CONFIGS, LEAN], ids=lambda s: s.stem if isinstance(s, Path) else "lean")
def test_the_planner_counts_the_parameters_that_the_model_declares(source):
    config = runpy.run_path(str(source))["config"]().model if isinstance(source, Path) else source
    _, shapes = model_structure(config)
    count = count_parameters(config)

    def size(tree) -> int:
        return sum(x.size for x in jax.tree.leaves(tree))

    assert count.total == size(shapes)
    assert count.mtp == size(shapes["mtp"])
    assert count.dense_ffn == size(shapes["dense_layers"]["ffn"])
    assert count.routed_experts == size(shapes["moe_layers"]["ffn"]["experts"])


def test_the_gradient_that_is_compiled_does_not_grow_with_the_depth(tokens):
    def instructions(moe_layers: int) -> int:
        config = dataclasses.replace(MODEL, num_layers=1 + moe_layers, num_mtp_modules=0)
        _, shapes = model_structure(config)
        bias = jax.eval_shape(lambda: initial_router_bias(config))
        lowered = jax.jit(jax.grad(loss_of(config, "report"))).lower(shapes, bias, tokens)
        return len(re.findall(r"^\s*%\S+ = ", lowered.as_text(), re.MULTILINE))

    shallow, deep = instructions(4), instructions(32)
    assert shallow > 1000
    assert deep / shallow < 1.05


@pytest.mark.parametrize(("layers", "straight"), [(4, True), (5, False)])
def test_few_layers_are_straight_code_and_more_are_a_loop(tokens, layers, straight):
    config = dataclasses.replace(MODEL, num_layers=layers, num_dense_layers=layers, num_mtp_modules=0)
    graphdef, shapes = model_structure(config)
    trunk = lambda params, tokens: nnx.merge(graphdef, params).trunk(tokens, {}, unroll_layers=4).hidden  # noqa: E731
    (scan,) = (e for _, e in equations(jax.make_jaxpr(trunk)(shapes, tokens).jaxpr) if e.primitive.name == "scan")
    assert scan.params["length"] == layers
    assert (scan.params["unroll"] == layers) is straight
