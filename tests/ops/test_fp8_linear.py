"""FP8 linears and feed-forwards: every product and gradient is that of the dequantized operands, computed apart.

The independent side quantizes with the formats' own functions, and multiplies in float64 with numpy.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from dsv3_jax.model.moe import sort_by_group
from dsv3_jax.ops import quantize
from dsv3_jax.ops.feed_forward import fp8_feed_forward, fp8_routed_feed_forward
from dsv3_jax.ops.fp8_matmul.study import Accumulator
from dsv3_jax.ops.linear import FP8Rows, linear, linear_after_attention, quantize_input
from dsv3_jax.ops.recipe import Recipe
from dsv3_jax.ops.weights import FP8Weight

ROWS, K, N, FF = 256, 192, 160, 128
# Compiled whole: op by op, each shape would compile dozens of programs.
quantize_rows, quantize_columns = (
    jax.jit(f, static_argnames="power_of_2") for f in (quantize.quantize_rows, quantize.quantize_columns)
)
quantize_blocks, dequantize, dequantize_blocks = map(
    jax.jit, (quantize.quantize_blocks, quantize.dequantize, quantize.dequantize_blocks)
)


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.bfloat16)


def weight(seed: int, *shape: int, recipe: Recipe | None = None) -> FP8Weight:
    value = jnp.asarray(0.1 * np.random.default_rng(seed).standard_normal(shape), jnp.float32)
    return FP8Weight(quantize_blocks(value), jnp.zeros(shape, jnp.float32), recipe or Recipe())


def difference(got: jax.Array, want: np.ndarray) -> float:
    """1 - 2 <x, y> / (<x, x> + <y, y>): 0 for equal tensors."""
    x, y = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert x.shape == y.shape
    return 1 - 2 * (x * y).sum() / ((x * x).sum() + (y * y).sum())


def rows(x: jax.Array, power_of_2: bool = False) -> np.ndarray:
    return np.asarray(dequantize(quantize_rows(x, power_of_2)), np.float64)


def columns(x: jax.Array) -> np.ndarray:
    return np.asarray(dequantize(quantize_columns(x)), np.float64).T


def blocks(w: FP8Weight) -> np.ndarray:
    return np.asarray(dequantize_blocks(w.value), np.float64)


def swiglu(hidden: np.ndarray) -> np.ndarray:
    gate, up = np.split(hidden, 2, axis=-1)
    return gate / (1 + np.exp(-gate)) * up


def swiglu_gradient(hidden: np.ndarray, d_out: np.ndarray) -> np.ndarray:
    gate, up = np.split(hidden, 2, axis=-1)
    sigmoid = 1 / (1 + np.exp(-gate))
    return np.concatenate([d_out * up * sigmoid * (1 + gate * (1 - sigmoid)), d_out * gate * sigmoid], axis=-1)


def bf16(x: np.ndarray) -> jax.Array:
    return jnp.asarray(x, jnp.bfloat16)


def test_linear_and_its_gradients_are_products_of_the_quantized_operands():
    x, w, dy = normal(0, 2, ROWS // 2, K), weight(1, K, N), normal(2, 2, ROWS // 2, N)
    y, pullback = jax.vjp(jax.jit(linear), x, w)
    dx, dw = pullback(dy)
    assert (y.dtype, dx.dtype, dw.slot.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    x, dy = x.reshape(ROWS, K), dy.reshape(ROWS, N)
    assert difference(y.reshape(ROWS, N), rows(x) @ blocks(w)) < 1e-5
    assert difference(dx.reshape(ROWS, K), rows(dy) @ blocks(w).T) < 1e-5
    kept = jnp.float32(rows(x))  # the weight gradient reads what the forward pass kept, turned: not x itself
    assert difference(dw.slot, columns(kept).T @ columns(dy)) < 1e-5
    assert difference(dw.slot, columns(x).T @ columns(dy)) > 1e-4


def test_linear_after_attention_keeps_e5m6():
    x, w, dy = normal(0, ROWS, K), weight(1, K, N), normal(2, ROWS, N)
    y, pullback = jax.vjp(linear_after_attention, x, w)
    dx, dw = pullback(dy)
    assert difference(y, rows(x) @ blocks(w)) < 1e-5
    assert difference(dx, rows(dy) @ blocks(w).T) < 1e-5
    kept = quantize.dequantize_e5m6(*quantize.quantize_e5m6(x))
    turned = np.asarray(dequantize(quantize_columns(kept, power_of_2=True)), np.float64)
    assert difference(dw.slot, turned @ columns(dy)) < 1e-5
    assert not any(part.dtype == jnp.bfloat16 and part.shape == x.shape for part in jax.tree.leaves(pullback))


def test_linears_that_share_an_input_quantize_it_once_and_sum_its_gradient():
    x, a, b = normal(0, ROWS, K), weight(1, K, N), weight(2, K, N)

    def both(x):
        shared = quantize_input(x)
        return linear(shared, a) + linear(shared, b)

    jaxpr = str(jax.make_jaxpr(both)(x))
    assert jaxpr.count(f"f8_e4m3fn[{ROWS},2,128]") + jaxpr.count("reduce_max") == 2  # one cast, one amax
    y, pullback = jax.vjp(both, x)
    (dx,) = pullback(y)
    assert difference(dx, rows(y) @ (blocks(a) + blocks(b)).T) < 2e-5  # either half is rounded to bf16


def expected_feed_forward(x, dy_rows, dy_columns, gate_up, down, row_weights):
    """Of the rows of one expert, from the tiles' values: output and gradients as the report's recipe has them."""
    hidden = bf16(np.asarray(dequantize(x), np.float64) @ blocks(gate_up))
    scale = row_weights[:, None]
    out = rows(jnp.float32(swiglu(np.asarray(hidden, np.float64)) * scale))
    kept = rows(hidden)
    d_out = np.asarray(bf16(dy_rows @ blocks(down).T), np.float64)
    d_hidden = bf16(swiglu_gradient(kept, d_out * scale))  # rounded before it is quantized along rows and columns
    again = columns(bf16(swiglu(kept) * scale))
    return {
        "y": out @ blocks(down),
        "dx": rows(d_hidden) @ blocks(gate_up).T,
        "d_row_weights": (swiglu(kept) * d_out).sum(axis=-1),
        "d_gate_up": columns(dequantize(x)).T @ columns(d_hidden),
        "d_down": again.T @ dy_columns,
    }


def test_feed_forward_and_its_gradients_are_products_of_the_quantized_operands():
    x, gate_up, down, dy = normal(0, ROWS, K), weight(1, K, 2 * FF), weight(2, FF, K), normal(3, ROWS, K)
    y, pullback = jax.vjp(jax.jit(lambda x, g, d: fp8_feed_forward(quantize_input(x), g, d)), x, gate_up, down)
    dx, d_gate_up, d_down = pullback(dy)
    want = expected_feed_forward(quantize_rows(x), rows(dy), columns(dy), gate_up, down, np.ones(ROWS))
    for name, got in {"y": y, "dx": dx, "d_gate_up": d_gate_up.slot, "d_down": d_down.slot}.items():
        assert difference(got, want[name]) < 1e-5, name
    kept = {part.dtype for part in jax.tree.leaves(pullback) if part.ndim == 2 and part.shape[0] == ROWS}
    assert kept == {jnp.dtype(jnp.float8_e4m3fn)}, "no input of a linear or of the SwiGLU is kept in 16 bits"


def group(w: FP8Weight, expert: int) -> FP8Weight:
    return FP8Weight(jax.tree.map(lambda part: part[expert], w.value))


def test_routed_feed_forward_and_its_gradients_are_those_of_each_experts_rows():
    experts, top_k, tokens = 3, 2, 201
    gate_up, down = weight(1, experts, K, 2 * FF), weight(2, experts, FF, K)
    x, dy = normal(0, tokens, K), normal(3, tokens, K)
    weights = jax.random.uniform(jax.random.key(4), (tokens, top_k))
    chosen = (np.arange(tokens)[:, None] + np.arange(top_k)) % experts  # 134 rows an expert: more than a tile
    route = sort_by_group(jnp.asarray(chosen), experts, 128)

    @jax.jit
    def layer(x, weights, gate_up, down):
        return fp8_routed_feed_forward(quantize_input(x, power_of_2=True), weights, route, gate_up, down)

    y, pullback = jax.vjp(layer, x, weights, gate_up, down)
    dx, d_weights, d_gate_up, d_down = pullback(dy)
    want_y, want_dx, want_weights = np.zeros((tokens, K)), np.zeros((tokens, K)), np.zeros((tokens, top_k))
    travelled = rows(dy, power_of_2=True)
    for expert in range(experts):
        token, choice = np.nonzero(chosen == expert)
        sent = quantize_rows(x[token], power_of_2=True)
        arrived = travelled[token]
        one = expected_feed_forward(
            sent, arrived, columns(jnp.float32(arrived)), group(gate_up, expert), group(down, expert),
            np.asarray(weights, np.float64)[token, choice],
        )  # fmt: skip
        want_y[token] += one["y"]
        want_dx[token] += one["dx"]
        want_weights[token, choice] = one["d_row_weights"]
        assert difference(d_gate_up.slot[expert], one["d_gate_up"]) < 1e-5
        assert difference(d_down.slot[expert], one["d_down"]) < 1e-5
    assert difference(y, want_y) < 1e-5
    assert difference(dx, want_dx) < 1e-5
    assert difference(d_weights, want_weights) < 1e-5


def three_gradients(recipe: Recipe) -> tuple[jax.Array, ...]:
    x, dy = normal(0, ROWS, K), normal(3, ROWS, K)
    gate_up, down = weight(1, 2, K, 2 * FF, recipe=recipe), weight(2, 2, FF, K, recipe=recipe)
    route = sort_by_group(jnp.arange(ROWS)[:, None] % 2, 2, 128)

    @jax.jit
    def layer(x, gate_up, down):
        return fp8_routed_feed_forward(quantize_input(x), jnp.ones((ROWS, 1)), route, gate_up, down)

    y, pullback = jax.vjp(layer, x, gate_up, down)
    dx, d_gate_up, d_down = pullback(dy)
    return y, dx, d_gate_up.slot, d_down.slot


def test_an_accumulator_replaces_the_sums_of_every_product():
    short = Recipe(accumulator=Accumulator(bits=4, interval=None))
    for got, want in zip(three_gradients(short), three_gradients(Recipe()), strict=True):
        assert difference(got, want) > 1e-3
    x, w, dy = normal(0, ROWS, K), weight(1, K, N), normal(2, ROWS, N)

    @jax.jit
    def gradients(x, w, dy):
        y, pullback = jax.vjp(linear, x, w)
        return y, pullback(dy)[0], pullback(dy)[1].slot

    products = gradients(x, dataclasses.replace(w, recipe=short), dy), gradients(x, w, dy)
    for got, want in zip(*products, strict=True):
        assert difference(got, want) > 1e-3


def test_gradients_in_blocks_lose_the_small_rows_that_tiles_keep():
    x, w = normal(0, ROWS, K), weight(1, K, N)
    dy = normal(2, ROWS, N).at[0].multiply(2.0**18)  # e4m3 reaches from 2^-9 to 448
    _, pullback = jax.vjp(linear, x, w)
    _, in_blocks = jax.vjp(linear, x, dataclasses.replace(w, recipe=Recipe(gradient_tiles="blocks")))
    want = np.asarray(dy, np.float64) @ blocks(w).T
    beside, elsewhere = slice(1, 128), slice(128, None)
    for kept in (beside, elsewhere):
        assert difference(pullback(dy)[0][kept], want[kept]) < 2e-3
    assert difference(in_blocks(dy)[0][elsewhere], want[elsewhere]) < 2e-3
    assert difference(in_blocks(dy)[0][beside], want[beside]) > 0.1
    assert all(jnp.isfinite(part).all() for part in three_gradients(Recipe(gradient_tiles="blocks")))


def test_rows_are_a_pytree_whose_tiles_take_no_gradient():
    x = normal(0, 128, 128)
    assert isinstance(quantize_input(x), FP8Rows)
    grad = jax.grad(lambda x: quantize_input(x).source.astype(jnp.float32).sum())(x)
    np.testing.assert_array_equal(grad, jnp.ones_like(x))
