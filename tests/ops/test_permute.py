"""Sorting tokens by expert: every row accounted for, and both directions exact transposes of each other."""

from functools import partial

import hypothesis.extra.numpy as hnp
import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.ops.permute import assign_slots, mosaic_gpu, permute, permute_choices, tile_rows, unpermute
from dsv3_jax.ops.quantize import E4M3

# tokens, choices a token, groups, rows a tile: few, so that each compiles once. 255 groups and none are the most that
# keys of 8 bits tell apart.
SHAPES = [(1, 1, 1, 8), (3, 2, 9, 8), (40, 3, 5, 8), (64, 2, 4, 16), (40, 3, 255, 8), (40, 3, 256, 8)]

assign = jax.jit(assign_slots, static_argnums=(1, 2))


@st.composite
def assignments(draw):
    tokens, k, groups, tile = draw(st.sampled_from(SHAPES))
    # Low ceilings leave the upper groups empty, and 0 gives everything to one group.
    ceiling = draw(st.integers(0, groups - 1))
    group = draw(hnp.arrays(np.int32, (tokens, k), elements=st.integers(0, ceiling)))
    valid = draw(st.none() | hnp.arrays(bool, (tokens, k)))
    return group, groups, tile, valid


@settings(max_examples=60, deadline=None)
@given(assignments())
def test_every_valid_choice_gets_one_row_of_a_tile_of_its_group(case):
    group, groups, tile, valid = case
    tokens = len(group)
    slots = jax.tree.map(np.asarray, assign(group, groups, tile, valid))
    valid = np.ones(group.shape, bool) if valid is None else valid
    rows = len(slots.token_of)
    assert rows == len(slots.tile_group) * tile

    taken = slots.slot_of[valid]
    assert len(set(taken)) == valid.sum()
    assert (taken >= 0).all()
    assert (taken < rows).all()
    assert (slots.slot_of[~valid] == rows).all()

    np.testing.assert_array_equal(slots.token_of[taken], np.nonzero(valid)[0])
    assert (slots.token_of == tokens).sum() == rows - valid.sum()
    np.testing.assert_array_equal(slots.tile_group[taken // tile], group[valid])
    assert (np.diff(slots.tile_group) >= 0).all()
    np.testing.assert_array_equal(slots.sizes, np.bincount(group[valid], minlength=groups))


@settings(max_examples=30, deadline=None)
@given(assignments())
def test_groups_start_on_tiles_and_keep_the_order_of_the_tokens(case):
    group, groups, tile, valid = case
    slots = jax.tree.map(np.asarray, assign(group, groups, tile, valid))
    valid = np.ones(group.shape, bool) if valid is None else valid
    next_tile = 0
    for g in range(groups):
        taken = slots.slot_of[valid & (group == g)]  # in the order of tokens, then choices
        np.testing.assert_array_equal(taken, next_tile * tile + np.arange(len(taken)))
        next_tile += -(-len(taken) // tile)


def test_the_static_number_of_rows_is_enough_for_the_worst_assignment():
    # One row in all groups but the last, which takes the others: every group pads.
    groups, tile = 8, 8
    group = np.minimum(np.arange(64), groups - 1)[:, None]
    slots = assign(group, groups, tile)
    assert (np.asarray(slots.slot_of) < len(slots.token_of)).all()


@pytest.fixture(scope="module")
def slots():
    rng = np.random.default_rng(0)
    group, valid = rng.integers(0, 6, (20, 3)), rng.random((20, 3)) < 0.8
    return jax.device_get(assign(group, 6, 8, valid))


@pytest.fixture(scope="module")
def x_and_rows(slots):
    rng = np.random.default_rng(1)
    return [rng.standard_normal((count, 5)).astype(np.float32) for count in (20, len(slots.token_of))]


def test_permute_and_unpermute_are_transposes_of_each_other(slots, x_and_rows):
    x, rows = x_and_rows
    permuted, unpermuted = jax.jit(lambda x, rows: (permute(x, slots), unpermute(rows, slots)))(x, rows)
    np.testing.assert_allclose(np.vdot(permuted, rows), np.vdot(x, unpermuted), rtol=1e-5)


def test_gradients_are_those_of_a_plain_gather(slots, x_and_rows):
    def plain_permute(x):
        return jnp.concatenate([x, jnp.zeros((1, x.shape[1]))])[slots.token_of]

    def plain_unpermute(rows):
        return jnp.concatenate([rows, jnp.zeros((1, rows.shape[1]))])[slots.slot_of].sum(axis=1)

    @jax.jit
    def both(x, rows):
        def value_and_gradient(function, at, cotangent):
            y, pullback = jax.vjp(function, at)
            return y, pullback(cotangent)[0]

        there, back = (x, rows), (rows, x)
        ours = value_and_gradient(partial(permute, slots=slots), *there)
        plain = value_and_gradient(plain_permute, *there)
        ours += value_and_gradient(partial(unpermute, slots=slots), *back)
        return ours, plain + value_and_gradient(plain_unpermute, *back)

    for ours, expected in zip(*both(*x_and_rows), strict=True):
        np.testing.assert_allclose(ours, expected, atol=1e-6)


def test_unpermute_sums_in_float32():
    slots = jax.device_get(assign(np.arange(3)[None], 3, 8))
    values = np.zeros((len(slots.token_of), 1), jnp.bfloat16)
    values[slots.slot_of[0], 0] = [256, 1, 1]
    assert np.asarray(jax.jit(unpermute)(values, slots)) == 258  # one at a time, bfloat16 stays at 256


def test_weights_travel_with_their_choices_and_so_do_their_gradients(slots):
    weights = np.arange(1, 61, dtype=np.float32).reshape(20, 3)
    cotangent = np.arange(1, len(slots.token_of) + 1, dtype=np.float32)

    @jax.jit
    def rows_and_gradient(weights, cotangent):
        rows, pullback = jax.vjp(lambda w: permute_choices(w, slots), weights)
        return rows, pullback(cotangent)[0]

    rows, gradient = jax.device_get(rows_and_gradient(weights, cotangent))
    held = slots.slot_of < len(rows)
    np.testing.assert_array_equal(rows[slots.slot_of[held]], weights[held])
    assert np.count_nonzero(rows) == held.sum()
    expected = np.where(held, np.append(cotangent, 0)[slots.slot_of], 0)
    np.testing.assert_array_equal(gradient, expected)


@given(st.integers(1, 10**6), st.integers(1, 512))
def test_a_tile_is_a_power_of_two_and_pads_at_most_half_of_a_large_balanced_load(rows, groups):
    tile = tile_rows(rows, groups)
    assert tile in (8, 16, 32, 64, 128)
    assert tile == 8 or 2 * tile <= rows // groups


@pytest.mark.parametrize(("dtype", "width"), [(E4M3, 512), (jnp.bfloat16, 256)])
def test_the_kernel_takes_rows_as_indexing_does(dtype, width):
    """And none where the index is out of range."""
    random = np.random.default_rng(0)
    x = random.normal(size=(40, width)).astype(dtype)
    index = random.integers(0, 48, 96).astype(np.int32)
    taken = mosaic_gpu.take_rows(jnp.asarray(x), jnp.asarray(index), interpret=plgpu.InterpretGPUParams())
    padded = np.concatenate([np.asarray(x, np.float32), np.zeros((8, width), np.float32)])
    np.testing.assert_array_equal(np.asarray(taken, np.float32), padded[index])


@pytest.mark.parametrize("dtype", [E4M3, jnp.bfloat16])
def test_the_kernel_lowers_for_the_rows_of_the_671b_model(dtype):
    x, index = jax.ShapeDtypeStruct((4096, 7168), dtype), jax.ShapeDtypeStruct((33280,), jnp.int32)
    assert mosaic_gpu.unsupported(x, len(index)) is None
    traced = jax.jit(mosaic_gpu.take_rows).trace(x, index)
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(
    ("shape", "rows", "says"),
    [
        ((8, 100), 96, "takes rows of a multiple of 256"),
        ((8, 32768), 96, "do not fit"),
        ((8, 256), 40, "in multiples of 32"),
    ],
)
def test_the_kernel_says_what_it_does_not_take(shape, rows, says):
    assert says in mosaic_gpu.unsupported(jax.ShapeDtypeStruct(shape, jnp.bfloat16), rows)
