"""What the benchmark of attention counts and prints, and that all who are timed compute the same."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_softmax import full_softmax
from jaxpr_equations import equations

from dsv3_jax.ops.attention import bench

HEADS, SEQ = 2, 64  # one block of the reference, which then skips nothing


def product_flop(function, *arguments) -> int:
    """Of all matrix products of a traced function."""
    total = 0
    for _, equation in equations(jax.make_jaxpr(function)(*arguments).jaxpr):
        if equation.primitive.name == "dot_general":
            left, (contracted, _) = equation.invars[0].aval.shape, equation.params["dimension_numbers"][0]
            total += 2 * equation.outvars[0].aval.size * int(np.prod([left[axis] for axis in contracted]))
    return total


@pytest.fixture(scope="module")
def given():
    inputs, d_out = bench.operands(1, SEQ, HEADS)
    return [x.astype(jnp.float32) for x in inputs], d_out.astype(jnp.float32)


def test_operations_a_pair_are_those_of_the_references_products(given):
    """The reference sums its weights in one more column of their product, which is not counted."""
    inputs, d_out = given
    pairs, column = HEADS * SEQ * SEQ, 2
    assert product_flop(bench.exact, *inputs) == (bench.FLOP_PER_PAIR["forward"] + column) * pairs
    both = bench.FLOP_PER_PAIR["forward and backward"] + column
    assert product_flop(bench.both_passes(bench.exact), inputs, d_out) == both * pairs


def test_both_passes_are_the_output_and_the_gradients(given):
    inputs, d_out = given
    out, *gradients = bench.both_passes(bench.exact)(inputs, d_out)
    np.testing.assert_array_equal(out, bench.exact(*inputs))
    loss = lambda *x: (bench.exact(*x) * d_out).sum()  # noqa: E731
    for ours, theirs in zip(gradients, jax.grad(loss, range(len(inputs)))(*inputs), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_what_others_are_given_is_the_same_attention(given):
    inputs, _ = given
    q, k, v = bench.joined(*inputs)
    scores = bench.SCALE * jnp.einsum("bqhd,bkhd->bhqk", q, k)
    probabilities = jax.nn.softmax(jnp.where(jnp.tril(jnp.ones((SEQ, SEQ), bool)), scores, -jnp.inf), axis=-1)
    expected = full_softmax(*inputs, bench.rotations(SEQ), bench.SCALE)
    # Sums of 192 products of float32, in another order.
    np.testing.assert_allclose(jnp.einsum("bhqk,bkhd->bqhd", probabilities, v), expected, rtol=1e-5, atol=1e-5)


def test_one_who_refuses_is_named_and_left_out(capsys):
    def refuses(x):
        raise ValueError("too wide")

    calls = bench.compiled({"twice": (lambda x: 2 * x, (3.0,)), "refuses": (refuses, (3.0,))})
    assert {name: float(call()) for name, call in calls.items()} == {"twice": 6.0}
    assert capsys.readouterr().out == "refuses: ValueError: too wide\n"


def test_a_line_counts_half_of_all_pairs_and_compares_with_the_first(monkeypatch, capsys):
    seconds = {"ours": 1e-3, "theirs": 2e-3}
    monkeypatch.setattr(bench, "interleaved_medians", lambda contenders, *_, **__: {n: seconds[n] for n in contenders})
    bench.print_times((2, 4096), "forward", dict.fromkeys(seconds, lambda: None))
    # 2 sequences x 128 heads x 4096^2 / 2 pairs x 640 operations in a millisecond are 1374 TFLOP/s.
    assert capsys.readouterr().out == "| 2 x 4096 forward | ours 1.000 (1374) 1.00x, theirs 2.000 (687) 2.00x |\n"


def test_the_sweep_holds_the_default_cuts_and_none_twice():
    for configs in (bench.FORWARD_CONFIGS, bench.BACKWARD_CONFIGS):
        assert configs[0] == type(configs[0])()
        assert len({dataclasses.astuple(config) for config in configs}) == len(configs)
