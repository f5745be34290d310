"""FP8 linears and feed-forwards: every product and gradient is that of the dequantized operands, computed apart.

The independent side quantizes in numpy, and multiplies in float64.
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import quantize_numpy as expected

from dsv3_jax.model.moe import sort_by_group
from dsv3_jax.ops.feed_forward import fp8_feed_forward, fp8_routed_feed_forward
from dsv3_jax.ops.fp8_matmul.study import Accumulator
from dsv3_jax.ops.linear import FP8Rows, linear, linear_after_attention, quantize_input
from dsv3_jax.ops.quantize import Blocked, dequantize_e5m6, quantize_e5m6
from dsv3_jax.ops.recipe import Recipe
from dsv3_jax.ops.weights import FP8Weight

ROWS, K, N, FF = 256, 192, 160, 128


def bf16(x: np.ndarray) -> np.ndarray:
    return x.astype(ml_dtypes.bfloat16)


def normal(seed: int, *shape: int) -> np.ndarray:
    return bf16(np.random.default_rng(seed).standard_normal(shape))


def weight(seed: int, *shape: int, recipe: Recipe | None = None) -> FP8Weight:
    value = 0.1 * np.random.default_rng(seed).standard_normal(shape)
    parts = [expected.blocks(part) for part in value.reshape(-1, *shape[-2:])]
    values, transposed, scales = (
        np.stack(part).reshape(*shape[:-2], *part[0].shape) for part in zip(*parts, strict=True)
    )
    blocked = Blocked(values, transposed, scales, np.swapaxes(scales, -1, -2))
    return FP8Weight(blocked, np.zeros(shape, np.float32), recipe or Recipe())


@partial(jax.jit, static_argnums=0)
def output_and_gradients(function, dy: jax.Array, *arguments) -> tuple[jax.Array, ...]:
    """Compiled whole: op by op, each shape would compile dozens of programs. Of a weight, the gradient of its slot."""
    y, pullback = jax.vjp(function, *arguments)
    return y, *(gradient.slot if isinstance(gradient, FP8Weight) else gradient for gradient in pullback(dy))


def kept_for_backward(function, *arguments) -> list[jax.ShapeDtypeStruct]:
    return jax.tree.leaves(jax.eval_shape(lambda *arguments: jax.vjp(function, *arguments)[1], *arguments))


def difference(got: jax.Array, want: np.ndarray) -> float:
    """1 - 2 <x, y> / (<x, x> + <y, y>): 0 for equal tensors."""
    x, y = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert x.shape == y.shape
    return 1 - 2 * (x * y).sum() / ((x * x).sum() + (y * y).sum())


def rows(x: np.ndarray, power_of_2: bool = False) -> np.ndarray:
    return expected.dequantize(*expected.rows(x, power_of_2)).astype(np.float64)


def columns(x: np.ndarray, power_of_2: bool = False) -> np.ndarray:
    return rows(np.asarray(x).T, power_of_2).T


def blocks(w: FP8Weight) -> np.ndarray:
    values, scales = w.value.values, w.value.scales
    row, column = np.indices(values.shape[-2:]) // 128
    return values.astype(np.float64) * scales[..., row, column]


def swiglu(hidden: np.ndarray) -> np.ndarray:
    gate, up = np.split(hidden, 2, axis=-1)
    return gate / (1 + np.exp(-gate)) * up


def swiglu_gradient(hidden: np.ndarray, d_out: np.ndarray) -> np.ndarray:
    gate, up = np.split(hidden, 2, axis=-1)
    sigmoid = 1 / (1 + np.exp(-gate))
    return np.concatenate([d_out * up * sigmoid * (1 + gate * (1 - sigmoid)), d_out * gate * sigmoid], axis=-1)


def test_linear_and_its_gradients_are_products_of_the_quantized_operands():
    x, w, dy = normal(0, 2, ROWS // 2, K), weight(1, K, N), normal(2, 2, ROWS // 2, N)
    y, dx, dw = output_and_gradients(linear, dy, x, w)
    assert (y.dtype, dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    x, dy = x.reshape(ROWS, K), dy.reshape(ROWS, N)
    assert difference(y.reshape(ROWS, N), rows(x) @ blocks(w)) < 1e-5
    assert difference(dx.reshape(ROWS, K), rows(dy) @ blocks(w).T) < 1e-5
    kept = rows(x)  # the weight gradient reads what the forward pass kept, turned: not x itself
    assert difference(dw, columns(kept).T @ columns(dy)) < 1e-5
    assert difference(dw, columns(x).T @ columns(dy)) > 1e-4


def test_linear_after_attention_reads_e5m6_and_keeps_no_copy_of_its_input():
    x, w, dy = normal(0, ROWS, K), weight(1, K, N), normal(2, ROWS, N)
    y, dx, dw = output_and_gradients(linear_after_attention, dy, x, w)
    assert difference(y, rows(x) @ blocks(w)) < 1e-5
    assert difference(dx, rows(dy) @ blocks(w).T) < 1e-5
    kept = jax.jit(lambda x: dequantize_e5m6(*quantize_e5m6(x)))(x)
    assert difference(dw, columns(kept, power_of_2=True).T @ columns(dy)) < 1e-5
    # Of the input there is nothing but itself, which attention keeps too.
    residuals = kept_for_backward(linear_after_attention, x, w)
    assert [part.dtype for part in residuals if part.size == x.size] == [x.dtype]


def test_linears_that_share_an_input_quantize_it_once_and_sum_its_gradient():
    x, a, b = normal(0, ROWS, K), weight(1, K, N), weight(2, K, N)

    def both(x):
        shared = quantize_input(x)
        return linear(shared, a) + linear(shared, b)

    jaxpr = str(jax.make_jaxpr(both)(x))
    assert jaxpr.count(f"f8_e4m3fn[{ROWS},2,128]") + jaxpr.count("reduce_max") == 2  # one cast, one amax
    dy = normal(3, ROWS, N)
    _, dx = output_and_gradients(both, dy, x)
    assert difference(dx, rows(dy) @ (blocks(a) + blocks(b)).T) < 2e-5  # either half is rounded to bf16


def expected_feed_forward(x, dy_rows, dy_columns, gate_up, down, row_weights):
    """Of the rows of one expert, x as its tiles have it: output and gradients as the report's recipe has them."""
    hidden = bf16(x @ blocks(gate_up))
    scale = row_weights[:, None]
    out = rows(swiglu(hidden.astype(np.float64)) * scale)
    kept = rows(hidden)
    d_out = bf16(dy_rows @ blocks(down).T).astype(np.float64)
    d_hidden = bf16(swiglu_gradient(kept, d_out * scale))  # rounded before it is quantized along rows and columns
    again = columns(bf16(swiglu(kept) * scale))
    return {
        "y": out @ blocks(down),
        "dx": rows(d_hidden) @ blocks(gate_up).T,
        "d_row_weights": (swiglu(kept) * d_out).sum(axis=-1),
        "d_gate_up": columns(x).T @ columns(d_hidden),
        "d_down": again.T @ dy_columns,
    }


def test_feed_forward_and_its_gradients_are_products_of_the_quantized_operands():
    x, gate_up, down, dy = normal(0, ROWS, K), weight(1, K, 2 * FF), weight(2, FF, K), normal(3, ROWS, K)
    layer = lambda x, gate_up, down: fp8_feed_forward(quantize_input(x), gate_up, down)  # noqa: E731
    got = output_and_gradients(layer, dy, x, gate_up, down)
    want = expected_feed_forward(rows(x), rows(dy), columns(dy), gate_up, down, np.ones(ROWS))
    for name, part in zip(("y", "dx", "d_gate_up", "d_down"), got, strict=True):
        assert difference(part, want[name]) < 1e-5, name
    residuals = kept_for_backward(layer, x, gate_up, down)
    kept = {part.dtype for part in residuals if part.ndim == 2 and part.shape[0] == ROWS}
    assert kept == {jnp.dtype(jnp.float8_e4m3fn)}, "no input of a linear or of the SwiGLU is kept in 16 bits"


def group(w: FP8Weight, expert: int) -> FP8Weight:
    return FP8Weight(jax.tree.map(lambda part: part[expert], w.value))


def test_routed_feed_forward_and_its_gradients_are_those_of_each_experts_rows():
    experts, top_k, tokens = 3, 2, 201
    gate_up, down = weight(1, experts, K, 2 * FF), weight(2, experts, FF, K)
    x, dy = normal(0, tokens, K), normal(3, tokens, K)
    weights = np.random.default_rng(4).uniform(size=(tokens, top_k)).astype(np.float32)
    chosen = (np.arange(tokens)[:, None] + np.arange(top_k)) % experts  # 134 rows an expert: more than a tile

    def layer(x, weights, gate_up, down):
        route = sort_by_group(jnp.asarray(chosen), experts, 128)
        return fp8_routed_feed_forward(quantize_input(x, power_of_2=True), weights, route, gate_up, down)

    y, dx, d_weights, d_gate_up, d_down = output_and_gradients(layer, dy, x, weights, gate_up, down)
    want_y, want_dx, want_weights = np.zeros((tokens, K)), np.zeros((tokens, K)), np.zeros((tokens, top_k))
    travelled = rows(dy, power_of_2=True)
    for expert in range(experts):
        token, choice = np.nonzero(chosen == expert)
        arrived = travelled[token]
        one = expected_feed_forward(
            rows(x[token], power_of_2=True), arrived, columns(arrived), group(gate_up, expert), group(down, expert),
            weights[token, choice].astype(np.float64),
        )  # fmt: skip
        want_y[token] += one["y"]
        want_dx[token] += one["dx"]
        want_weights[token, choice] = one["d_row_weights"]
        assert difference(d_gate_up[expert], one["d_gate_up"]) < 1e-5
        assert difference(d_down[expert], one["d_down"]) < 1e-5
    assert difference(y, want_y) < 1e-5
    assert difference(dx, want_dx) < 1e-5
    assert difference(d_weights, want_weights) < 1e-5
    # What arrived is kept, and turned in the order of the experts: their rows, 6 tiles of 128, are more.
    kept = kept_for_backward(layer, x, weights, gate_up, down)
    assert (tokens, K) in {part.shape for part in kept}
    assert (6 * 128, K) not in {part.shape for part in kept}


def products(recipe: Recipe) -> tuple[jax.Array, ...]:
    """Outputs and gradients of experts and of a linear."""
    x, dy = normal(0, ROWS, K), normal(3, ROWS, K + N)
    gate_up, down = weight(1, 2, K, 2 * FF, recipe=recipe), weight(2, 2, FF, K, recipe=recipe)

    def layers(x, gate_up, down, w):
        route = sort_by_group(jnp.arange(ROWS)[:, None] % 2, 2, 128)
        routed = fp8_routed_feed_forward(quantize_input(x), jnp.ones((ROWS, 1)), route, gate_up, down)
        return jnp.concatenate([routed, linear(x, w)], axis=-1)

    y, dx, *gradients = output_and_gradients(layers, dy, x, gate_up, down, weight(1, K, N, recipe=recipe))
    return y[:, :K], y[:, K:], dx, *gradients


def test_an_accumulator_replaces_the_sums_of_every_product():
    short = Recipe(accumulator=Accumulator(bits=4, interval=None))
    for got, want in zip(products(short), products(Recipe()), strict=True):
        assert difference(got, want) > 1e-3


def test_gradients_in_blocks_lose_the_small_rows_that_tiles_keep():
    x, w = normal(0, ROWS, K), weight(1, K, N)
    dy = normal(2, ROWS, N)
    dy[0] *= 2.0**18  # e4m3 reaches from 2^-9 to 448
    in_tiles = np.asarray(output_and_gradients(linear, dy, x, w)[1])
    in_blocks = np.asarray(output_and_gradients(linear, dy, x, replace(w, recipe=Recipe(gradient_tiles="blocks")))[1])
    want = dy.astype(np.float64) @ blocks(w).T
    beside, elsewhere = slice(1, 128), slice(128, None)
    for kept in (beside, elsewhere):
        assert difference(in_tiles[kept], want[kept]) < 2e-3
    assert difference(in_blocks[elsewhere], want[elsewhere]) < 2e-3
    assert difference(in_blocks[beside], want[beside]) > 0.1
    assert all(np.isfinite(part).all() for part in products(Recipe(gradient_tiles="blocks")))


def test_rows_are_a_pytree_whose_tiles_take_no_gradient():
    x = normal(0, 128, 128)

    @jax.jit
    def rows_and_gradient(x):
        return quantize_input(x), jax.grad(lambda x: quantize_input(x).source.astype(jnp.float32).sum())(x)

    rows, gradient = rows_and_gradient(x)
    assert isinstance(rows, FP8Rows)
    np.testing.assert_array_equal(gradient, np.ones_like(x))
