"""Which weights the products read in bf16, which stay float32, and where the gradients of both land."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv3_jax.config import ConfigError, ModelConfig
from dsv3_jax.model.layers import FeedForward, RMSNorm
from dsv3_jax.ops.fp8_matmul.study import Accumulator
from dsv3_jax.ops.quantize import quantize_blocks, quantize_columns
from dsv3_jax.ops.recipe import Recipe
from dsv3_jax.ops.weights import (
    FP8Weight,
    MixedWeight,
    attach_slots,
    cast_for_inference,
    cast_weights,
    conclude_fp8,
    gradient_slots,
    is_fp8,
)
from dsv3_jax.train.state import model_structure


def test_all_but_norm_gains_and_the_router_are_cast_to_bf16():
    _, shapes = model_structure(ModelConfig(num_mtp_modules=1))
    cast = jax.eval_shape(lambda p: cast_weights(p, "bf16"), shapes)
    kept = {jax.tree_util.keystr(path): leaf.dtype for path, leaf in jax.tree_util.tree_leaves_with_path(cast)}
    for name, dtype in kept.items():
        wide = "norm" in name or "router" in name
        assert dtype == (jnp.float32 if wide else jnp.bfloat16), name
    assert sum("router" in name for name in kept) == 2  # of the MoE layers, and of the MTP modules
    float32 = jax.eval_shape(lambda p: cast_weights(p, "fp32"), shapes)
    assert {leaf.dtype for leaf in jax.tree.leaves(float32)} == {jnp.dtype(jnp.float32)}


def test_an_unknown_precision_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"precision='int8'.*'bf16', 'fp32', 'fp8'"):
        cast_weights({"kernel": jnp.ones(2)}, "int8")


def test_fp8_is_for_the_linears_and_nothing_else():
    _, shapes = model_structure(ModelConfig(num_mtp_modules=1))
    cast = jax.eval_shape(lambda p: cast_weights(p, "fp8"), shapes)
    leaves = jax.tree_util.tree_leaves_with_path(cast, is_leaf=is_fp8)
    linears = {jax.tree_util.keystr(path): leaf for path, leaf in leaves if is_fp8(leaf)}
    rest = {jax.tree_util.keystr(path): leaf.dtype for path, leaf in leaves if not is_fp8(leaf)}
    blocks = ["attention", "ffn"]
    assert all(any(f"['{block}']" in name for block in blocks) and "router" not in name for name in linears)
    for name, dtype in rest.items():
        bf16 = name.startswith(("['embed']", "['head']")) or "projection" in name
        assert bf16 or "norm" in name or "router" in name, name
        assert dtype == (jnp.bfloat16 if bf16 else jnp.float32), name
    for weight in linears.values():
        *groups, k, n = weight.value.values.shape
        assert weight.value.values.dtype == weight.value.transposed.dtype == jnp.float8_e4m3fn
        assert weight.value.transposed.shape == (*groups, n, k)
        assert weight.value.scales.dtype == jnp.float32
    slots = gradient_slots(cast)
    assert jax.tree.structure(slots) == jax.tree.structure(shapes)
    assert {slot.dtype for slot in jax.tree.leaves(slots)} == {jnp.dtype(jnp.float32)}
    for_inference = jax.eval_shape(lambda p: cast_for_inference(p, "fp8"), shapes)
    in_bf16 = jax.eval_shape(lambda p: cast_weights(p, "bf16"), shapes)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), for_inference) == jax.tree.map(
        lambda x: (x.shape, x.dtype), in_bf16
    )


class NormedFeedForward(nnx.Module):
    def __init__(self):
        self.norm = RMSNorm(16, 1e-6)
        self.ffn = FeedForward(16, 24, 0.3, nnx.Rngs(0))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.ffn(self.norm(x))


def test_gradients_of_a_bf16_module_are_float32_and_near_those_of_float32():
    graphdef, state = nnx.split(NormedFeedForward())
    params = nnx.to_pure_dict(state)
    x = jax.random.normal(jax.random.key(1), (50, 16))
    target = jax.random.normal(jax.random.key(2), (50, 16))

    def gradients(precision: str) -> dict:
        compute = cast_weights(params, precision)
        dtype = {"bf16": jnp.bfloat16, "fp32": jnp.float32}[precision]

        def loss(slots):
            y = nnx.merge(graphdef, attach_slots(compute, slots))(x.astype(dtype))
            return ((y.astype(jnp.float32) - target) ** 2).mean()

        return jax.jit(jax.grad(loss))(gradient_slots(compute))

    narrow, wide = gradients("bf16"), gradients("fp32")
    assert jax.tree.structure(narrow) == jax.tree.structure(wide)
    for a, b in zip(jax.tree.leaves(narrow), jax.tree.leaves(wide), strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, atol=0.02 * float(jnp.abs(b).max()))
        assert (a.astype(jnp.bfloat16).astype(jnp.float32) != a).any()  # more than bf16 holds


def test_slots_stand_in_for_the_weights_that_are_cast_and_are_the_others():
    compute = {"kernel": jnp.ones((2, 3), jnp.bfloat16), "scale": jnp.full(3, 2.0)}
    slots = gradient_slots(compute)
    np.testing.assert_array_equal(slots["kernel"], np.zeros((2, 3), np.float32))
    np.testing.assert_array_equal(slots["scale"], compute["scale"])
    attached = attach_slots(compute, slots)
    assert isinstance(attached["kernel"], MixedWeight)
    assert attached["kernel"].slot.dtype == jnp.float32
    np.testing.assert_array_equal(attached["scale"], compute["scale"])


@pytest.mark.parametrize("groups", [None, 2], ids=["dense", "grouped"])
@pytest.mark.parametrize("recipe", [Recipe(), Recipe(accumulator=Accumulator())], ids=["kernels", "study"])
def test_a_logged_gradient_is_added_to_one_layer(recipe, groups):
    rng = np.random.default_rng(0)
    w, x, dy = (jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in ((128, 72), (256, 128), (256, 72)))
    w = w if groups is None else jnp.stack([w] * groups)
    weight = FP8Weight(quantize_blocks(w.astype(jnp.float32)), recipe=recipe, name="w")
    tile_group = None if groups is None else jnp.array([0, 1], jnp.int32)
    _, logs = conclude_fp8(weight, quantize_columns(x), quantize_columns(dy), tile_group)
    total = jnp.ones((3, *w.shape))
    added = jax.jit(lambda product, total, layer: product.add_to(total, layer))(logs["w"], total, jnp.int32(1))
    # Sums of 256 products of about one in float32, in two compiled forms.
    np.testing.assert_allclose(added[1], 1 + logs["w"].compute(), rtol=1e-6, atol=2e-5)
    np.testing.assert_array_equal(added[::2], 1)
