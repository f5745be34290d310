"""The Hopper kernels of attention, interpreted, against a softmax over the whole score matrix; and their worklists."""

import re
from functools import partial

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from attention_softmax import full_softmax, parts, turns
from jax.sharding import Mesh, PartitionSpec
from jaxpr_equations import equations

from dsv3_jax.ops import hopper
from dsv3_jax.ops.attention import causal_attention, cudnn, mosaic_gpu
from dsv3_jax.ops.attention.kernel_parts import first_of_segment, last_of_segment
from dsv3_jax.ops.attention.mosaic_gpu import Kernels, kernel_attention
from dsv3_jax.ops.attention.mosaic_gpu_forward import ForwardConfig
from dsv3_jax.ops.attention.worklists import worklists

NOPE, ROPE, V = mosaic_gpu.WIDTHS
SCALE = 0.09


def operands(batch: int, seq: int, heads: int) -> tuple[list[np.ndarray], np.ndarray]:
    shapes = [(heads, NOPE + ROPE), (heads, NOPE + V), (ROPE,), (heads, V)]
    rng = np.random.default_rng(seq)
    *inputs, d_out = (rng.normal(size=(batch, seq, *s)).astype(ml_dtypes.bfloat16) for s in shapes)
    return inputs, d_out


def kernels_attention(kernels: Kernels, *inputs, segment_ids=None):
    return kernel_attention(*inputs, turns(inputs[0].shape[1], ROPE), segment_ids, SCALE, kernels)


def attention(*inputs, implementation=None, segment_ids=None):
    return causal_attention(*inputs, turns(inputs[0].shape[1], ROPE), SCALE, implementation, segment_ids)


def expected_attention(*inputs, segment_ids=None):
    return full_softmax(*inputs, turns(inputs[0].shape[1], ROPE), SCALE, segment_ids)


def output_and_gradients(attention, inputs, d_out):
    out, pullback = jax.vjp(attention, *inputs)
    return out, *pullback(d_out)


@jax.jit
def exact(wide, d_out, segment_ids=None):
    """Output and gradients of the full softmax in float32."""
    return output_and_gradients(partial(expected_attention, segment_ids=segment_ids), wide, d_out)


@partial(jax.jit, static_argnums=0)
def both_passes(kernels: Kernels, inputs, d_out, segment_ids=None):
    return output_and_gradients(partial(kernels_attention, kernels, segment_ids=segment_ids), inputs, d_out)


def assert_those_of_the_full_softmax(got, inputs, d_out, segment_ids=None) -> None:
    """Norms differ by half of one percent at most: operands, probabilities and results are rounded to 2^-9 each."""
    wide = [x.astype(np.float32) for x in inputs]
    expected = parts(NOPE, *jax.device_get(exact(wide, d_out.astype(np.float32), segment_ids)))
    for name, x in parts(NOPE, *jax.device_get(got)).items():
        assert x.dtype == jnp.bfloat16
        assert x.shape == expected[name].shape
        assert np.linalg.norm(x - expected[name]) < 5e-3 * np.linalg.norm(expected[name]), name


def interpreted(**cuts) -> Kernels:
    return Kernels(2, **cuts, interpret=plgpu.InterpretGPUParams())


# A last tile of queries that is no whole one, two heads, and more tiles of keys than slots; packed samples come in two
# sequences, and so do those that the forward pass cuts otherwise.
def test_output_and_gradients_are_those_of_the_full_softmax():
    given = operands(1, 330, 2)
    assert_those_of_the_full_softmax(both_passes(interpreted(), *given), *given)


@pytest.mark.parametrize(
    "forward", [ForwardConfig(3, 64, 3, heads=1), ForwardConfig(2, 64, 4)], ids=["three", "narrow"]
)
def test_however_the_forward_pass_is_cut(forward):
    inputs, _ = operands(2, 200, 1)
    got = np.asarray(jax.jit(partial(kernels_attention, interpreted(forward=forward)))(*inputs))
    expected = np.asarray(jax.jit(expected_attention)(*(x.astype(np.float32) for x in inputs)))
    assert np.linalg.norm(got - expected) < 5e-3 * np.linalg.norm(expected)


# Samples that end within a tile and at its end, that fill several tiles, and ids that do not ascend.
SEGMENTS = np.repeat([[3, 1, 7], [0, 0, 2]], [10, 118, 202], axis=1).astype(np.int32)


def mapped(function, devices: int):
    """Of a device's own part of each argument, over a mesh."""
    mesh, spec = Mesh(np.asarray(jax.devices()[:devices]), ("gpu",)), PartitionSpec("gpu")
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec))


def test_packed_samples_do_not_see_each_other_and_operands_may_vary_between_devices():
    """As in the training step: Pallas refuses a warp's references that vary. One device, as the interpreter's memory is
    one for all."""
    given = (*operands(2, 330, 1), SEGMENTS)
    got = mapped(lambda *given: both_passes(interpreted(), *given), 1)(*given)
    assert_those_of_the_full_softmax(got, *given)


@pytest.fixture
def on_hopper(monkeypatch):
    monkeypatch.setattr(hopper, "device_refusal", lambda: None)
    monkeypatch.setattr(hopper, "multiprocessors", lambda: 132)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")


@pytest.mark.parametrize("segmented", [False, True])
def test_without_a_name_a_hopper_gpu_runs_the_kernels(segmented, on_hopper):
    inputs, d_out = operands(4, 64, 2)
    ids = np.zeros((4, 64), np.int32) if segmented else None

    def device(inputs, d_out, ids):
        return output_and_gradients(partial(attention, segment_ids=ids), inputs, d_out)

    text = mapped(device, 4).trace(inputs, d_out, ids).lower(lowering_platforms=("cuda",)).as_text()
    assert len(re.findall(r"custom_call @mosaic_gpu", text)) == 2  # one for each pass


def test_what_the_kernels_refuse_runs_by_cudnn_and_what_it_refuses_by_the_reference(on_hopper, monkeypatch):
    monkeypatch.setattr(cudnn, "cudnn_attention", lambda q, k, v, scale: -jnp.ones_like(v))
    inputs, _ = operands(1, 8, 1)
    narrow = with_narrow_values(*inputs)
    ids = np.zeros((1, 8), np.int32)

    @jax.jit
    def run(narrow, half):
        both = (attention(*narrow, implementation=name, segment_ids=ids) for name in (None, "reference"))
        return attention(*narrow), attention(*half), *both

    *by_cudnn, found, reference = jax.device_get(run(narrow, [x.astype(np.float16) for x in inputs]))
    assert all((out == -1).all() for out in by_cudnn)
    np.testing.assert_array_equal(found, reference)


def with_narrow_values(q, kv, k_rope):
    return q, kv[..., : NOPE + 64], k_rope


def test_the_reference_masks_segments_too():
    inputs, d_out = operands(2, 330, 1)
    wide, d_out = [x.astype(np.float32) for x in inputs], d_out.astype(np.float32)
    reference = partial(attention, implementation="reference", segment_ids=SEGMENTS)
    got = jax.jit(lambda wide, d_out: output_and_gradients(reference, wide, d_out))(wide, d_out)
    expected = exact(wide, d_out, SEGMENTS)
    for name, x, e in zip(["out", "q", "kv", "k_rope"], got, expected, strict=True):
        np.testing.assert_allclose(x, e, atol=2e-5, rtol=1e-5, err_msg=name)


def test_tiles_without_a_common_sample_are_left_out():
    ids = np.repeat([[0, 1, 2]], [128, 256, 116], axis=1).astype(np.int32)
    bounds = jax.jit(lambda ids: [f(ids, 128, 64).bounds for f in (first_of_segment, last_of_segment)])(ids)
    np.testing.assert_array_equal(bounds, [[[0, 2, 2, 6]], [[1, 5, 5, 7]]])
    assert jax.eval_shape(lambda ids: first_of_segment(ids, 192, 128).ids, ids).shape == (1, 768)


@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("seq", [4096, 1000])
def test_both_passes_lower_for_a_gpu_at_the_671b_models_heads(seq, segmented):
    avals = jax.eval_shape(lambda: operands_of(seq))
    ids = jax.ShapeDtypeStruct((1, seq), jnp.int32) if segmented else None

    def run(inputs, d_out, ids):
        return output_and_gradients(partial(kernels_attention, Kernels(), segment_ids=ids), inputs, d_out)

    text = jax.jit(run).trace(*avals, ids).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu") >= 2


def test_keys_and_values_are_neither_taken_apart_nor_joined_outside_the_kernels():
    avals = jax.eval_shape(lambda: operands_of(256))
    traced = jax.make_jaxpr(partial(output_and_gradients, partial(kernels_attention, Kernels())))(*avals)
    cuts = [e for _, e in equations(traced.jaxpr) if e.primitive.name in ("slice", "split", "concatenate", "gather")]
    shapes = {x.aval.shape for e in cuts for x in (*e.invars, *e.outvars)}
    assert (1, 256, 128, NOPE + ROPE) in shapes  # queries' last columns are rotated
    assert (1, 256, 128, NOPE + V) not in shapes


def operands_of(seq: int) -> tuple[list[jax.Array], jax.Array]:
    shapes = [(128, NOPE + ROPE), (128, NOPE + V), (ROPE,), (128, V)]
    *inputs, d_out = (jnp.zeros((1, seq, *s), jnp.bfloat16) for s in shapes)
    return inputs, d_out


def test_every_tile_is_handed_out_once_and_workers_end_together():
    costs = list(range(1, 33))
    work = worklists(2, 128, costs, 132, 8)
    assert sorted(work.tiles) == list(range(2 * 128 * 32))
    loads = [sum(costs[t % 32] for t in work.tiles[a:b]) for a, b in zip(work.bounds, work.bounds[1:], strict=False)]
    assert max(loads) < 1.02 * sum(loads) / 132


def test_heads_are_handed_out_in_groups_longest_tiles_first():
    one = worklists(1, 4, [1, 2, 3], 1, 2)
    np.testing.assert_array_equal(one.tiles, [2, 5, 1, 4, 0, 3, 8, 11, 7, 10, 6, 9])
    np.testing.assert_array_equal(one.bounds, [0, 12])


def test_naming_a_kernel_that_cannot_run_says_why():
    inputs, _ = operands(1, 8, 1)
    with pytest.raises(NotImplementedError, match="mosaic_gpu attention needs a Hopper GPU, the backend is cpu: use"):
        attention(*inputs, implementation="mosaic_gpu")
    with pytest.raises(NotImplementedError, match=r"takes widths of \(128, 64, 128\) \(nope, rope, v\), not"):
        attention(*with_narrow_values(*inputs), implementation="mosaic_gpu")
    with pytest.raises(NotImplementedError, match="mosaic_gpu attention takes bfloat16, not float32"):
        attention(*(x.astype(np.float32) for x in inputs), implementation="mosaic_gpu")
