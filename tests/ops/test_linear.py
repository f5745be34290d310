"""Linear layers and the embedding: bf16 products whose weight gradients are summed in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.ops.linear import embedding_lookup, linear
from dsv3_jax.ops.products import api as products
from dsv3_jax.ops.products import matmul_f32, matmul_split, transposed_matmul_f32
from dsv3_jax.ops.weights import MixedWeight


def mixed(value: jax.Array) -> MixedWeight:
    value = value.astype(jnp.bfloat16)
    return MixedWeight(value, jnp.zeros(value.shape, jnp.float32))


def wide(x: jax.Array) -> np.ndarray:
    return np.asarray(x, np.float64)


def test_linear_gradients_are_the_products_of_the_bf16_operands():
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (2, 37, 6)).astype(jnp.bfloat16)
    weight = mixed(jax.random.normal(keys[1], (6, 5)))
    dy = jax.random.normal(keys[2], (2, 37, 5)).astype(jnp.bfloat16)
    y, pullback = jax.vjp(linear, x, weight)
    dx, dw = pullback(dy)
    assert y.dtype == dx.dtype == jnp.bfloat16
    assert dw.slot.dtype == jnp.float32
    np.testing.assert_allclose(wide(y), wide(x) @ wide(weight.value), rtol=2**-8, atol=1e-5)
    np.testing.assert_allclose(wide(dx), wide(dy) @ wide(weight.value).T, rtol=2**-8, atol=1e-5)
    expected = np.einsum("btk,btn->kn", wide(x), wide(dy))
    np.testing.assert_allclose(dw.slot, expected, atol=2e-5)  # rounded to bf16 it would be off by 1e-2


def test_a_sum_of_many_small_gradients_is_not_rounded_to_bf16():
    # bfloat16 has 8 bits: it counts to 256, and holds no odd number near 1001.
    x, ones = jnp.ones((1001, 1), jnp.bfloat16), jnp.ones((1001, 1), jnp.bfloat16)
    (grad,) = jax.vjp(lambda w: linear(x, w), mixed(jnp.ones((1, 1))))[1](ones)
    assert float(grad.slot[0, 0]) == 1001
    tokens = jnp.full(1001, 2)
    (grad,) = jax.vjp(lambda t: embedding_lookup(tokens, t), mixed(jnp.ones((4, 1))))[1](ones)
    np.testing.assert_array_equal(grad.slot[:, 0], [0, 0, 1001, 0])
    (control,) = jax.vjp(lambda t: embedding_lookup(tokens, t), jnp.ones((4, 1), jnp.bfloat16))[1](ones)
    assert float(control[2, 0]) != 1001


def test_embedding_gives_the_rows_of_the_tokens_and_sums_their_gradients():
    tokens = jnp.array([[3, 0, 3], [1, 3, 0]])
    table = mixed(jax.random.normal(jax.random.key(0), (5, 4)))
    dy = jax.random.normal(jax.random.key(1), (2, 3, 4)).astype(jnp.bfloat16)
    rows, pullback = jax.vjp(lambda t: embedding_lookup(tokens, t), table)
    np.testing.assert_array_equal(rows, table.value[tokens])
    expected = np.zeros((5, 4))
    np.add.at(expected, np.asarray(tokens), wide(dy))
    grad = pullback(dy)[0].slot
    assert grad.dtype == jnp.float32
    np.testing.assert_allclose(grad, expected, atol=1e-6)


def test_plain_weights_follow_the_type_of_the_rows():
    x, weight = jnp.ones((2, 3), jnp.bfloat16), jnp.ones((3, 4))
    y, pullback = jax.vjp(linear, x, weight)
    assert y.dtype == jnp.bfloat16
    assert pullback(y)[1].dtype == jnp.float32


@pytest.mark.parametrize("matrix_instructions", [False, True])
def test_products_of_bf16_are_float32_and_batched(matrix_instructions: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(products, "_has_matrix_instructions", lambda: matrix_instructions)
    keys = jax.random.split(jax.random.key(0), 2)
    a = jax.random.normal(keys[0], (2, 33, 7)).astype(jnp.bfloat16)
    b = jax.random.normal(keys[1], (2, 33, 9)).astype(jnp.bfloat16)
    expected = np.swapaxes(wide(a), 1, 2) @ wide(b)
    for product in (transposed_matmul_f32(a, b), matmul_f32(jnp.swapaxes(a, 1, 2), b)):
        assert product.dtype == jnp.float32
        np.testing.assert_allclose(product, expected, atol=2e-5)


def test_a_split_product_is_as_exact_as_one_in_float32():
    keys = jax.random.split(jax.random.key(3), 3)
    x = jax.random.normal(keys[0], (2, 40, 512)).astype(jnp.bfloat16)
    w, dy = jax.random.normal(keys[1], (512, 16)), jax.random.normal(keys[2], (2, 40, 16))
    y, pullback = jax.jit(lambda x, w: jax.vjp(matmul_split, x, w))(x, w)
    dx, dw = jax.jit(pullback)(dy)
    assert (y.dtype, dx.dtype, dw.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    in_float32 = jnp.matmul(x.astype(jnp.float32), w, precision="highest")
    error = np.abs(wide(y) - wide(x) @ wide(w)).max()
    assert error <= 2 * np.abs(wide(in_float32) - wide(x) @ wide(w)).max()
    assert error < 1e-4  # of sums as large as 80, which bf16 weights would get wrong by 0.2
    np.testing.assert_allclose(dw, np.einsum("btk,btn->kn", wide(x), wide(dy)), atol=1e-4)
    np.testing.assert_allclose(wide(dx), wide(dy) @ wide(w).T, rtol=2**-8, atol=1e-3)
