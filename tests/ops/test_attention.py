"""Blockwise causal attention against a softmax over the whole score matrix, which it never forms."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_softmax import full_softmax, turns

from dsv3_jax.ops.attention import causal_attention, cudnn

HEADS, NOPE, ROPE, V, SCALE = 2, 8, 4, 6, 0.35


def naive(*inputs):
    return full_softmax(*inputs, turns(inputs[0].shape[1], ROPE), SCALE)


def attention(*inputs, implementation=None):
    return causal_attention(*inputs, turns(inputs[0].shape[1], ROPE), SCALE, implementation)


@jax.jit
def blockwise(*inputs):
    return attention(*inputs, implementation="reference")


def normal(seed: int, *shape: int, dtype=np.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape).astype(dtype))


def operands(seq: int, dtype=np.float32, batch: int = 2) -> list[jax.Array]:
    shapes = [(HEADS, NOPE + ROPE), (HEADS, NOPE + V), (ROPE,)]
    return [normal(seq + i, batch, seq, *s, dtype=dtype) for i, s in enumerate(shapes)]


def output_and_gradients(function, inputs, d_out):
    @jax.jit
    def run(inputs, d_out):
        out, pullback = jax.vjp(function, *inputs)
        return out, *pullback(d_out)

    return run(inputs, d_out)


# One query; a second block of two; a last block that is no whole one; more than one block of the largest size.
@pytest.mark.parametrize("seq", [1, 130, 300, 2100])
def test_float32_output_and_gradients_are_those_of_the_full_softmax(seq):
    inputs = operands(seq, batch=2 if seq < 1000 else 1)
    d_out = normal(1, *inputs[0].shape[:2], HEADS, V)
    ours = output_and_gradients(blockwise, inputs, d_out)
    expected = output_and_gradients(naive, inputs, d_out)
    for name, a, b in zip(["out", "q", "kv", "k_rope"], ours, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5, err_msg=name)


def test_bf16_stays_within_two_percent_of_the_largest_value():
    inputs = operands(300, jnp.bfloat16)
    d_out = normal(1, 2, 300, HEADS, V, dtype=jnp.bfloat16)
    ours = output_and_gradients(blockwise, inputs, d_out)
    wide = [np.float32(x) for x in inputs]
    expected = output_and_gradients(naive, wide, np.float32(d_out))
    for a, b in zip(ours, expected, strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.float32(a), b, atol=0.02 * float(np.abs(b).max()))


def test_softmax_is_stable_for_large_scores():
    inputs = [100 * np.asarray(x) for x in operands(130)]
    np.testing.assert_allclose(blockwise(*inputs), jax.jit(naive)(*inputs), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("pass_", ["forward", "backward"])
def test_no_array_of_size_seq_x_seq_is_computed(pass_, computed_shapes):
    seq = 2048
    inputs = operands(seq, batch=1)
    gradient = jax.grad(lambda *inputs: blockwise(*inputs).sum(), argnums=(0, 1, 2))
    # A quarter of the score matrix at most: a block of queries against all keys.
    shapes = computed_shapes(blockwise if pass_ == "forward" else gradient, *inputs)
    assert (1, HEADS, seq, seq // 4) in shapes
    assert max(int(np.prod(shape)) for shape in shapes) <= HEADS * seq * seq // 4
    full = computed_shapes(naive, *inputs)
    assert (1, HEADS, seq, seq) in full


def test_naming_an_implementation_that_cannot_run_says_why():
    with pytest.raises(NotImplementedError, match="cudnn attention needs a GPU, the backend is cpu: use"):
        attention(*operands(4, jnp.bfloat16), implementation="cudnn")


def test_an_unknown_implementation_is_refused():
    with pytest.raises(
        ValueError, match="implementation='flash': choose one of 'reference', 'cudnn', 'mosaic_gpu', or None"
    ):
        attention(*operands(4), implementation="flash")


def test_shapes_that_cudnn_refuses_run_the_reference_unless_it_is_named(monkeypatch):
    q, kv, k_rope = operands(4, jnp.bfloat16)
    wide = q, np.concatenate([kv, kv[..., NOPE:], kv[..., NOPE:]], axis=-1), k_rope
    expected = blockwise(*wide)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    np.testing.assert_array_equal(jax.jit(attention)(*wide), expected)
    with pytest.raises(NotImplementedError, match="values no wider than keys, not 18 against 12"):
        attention(*wide, implementation="cudnn")


def test_without_a_name_the_cpu_runs_the_reference():
    inputs = operands(4)
    np.testing.assert_array_equal(jax.jit(attention)(*inputs), blockwise(*inputs))


def cudnn_shapes(attention):
    """Of the output and of the gradient of the values."""
    q = jnp.zeros((1, 64, 2, 192), jnp.bfloat16)
    v = jnp.zeros((1, 64, 2, 128), jnp.bfloat16)
    out = jax.eval_shape(attention, q, q, v)
    dv = jax.eval_shape(jax.grad(lambda v: attention(q, q, v).astype(jnp.float32).sum()), v)
    return out.shape, dv.shape


def test_cudnn_takes_values_narrower_than_keys_as_they_are(monkeypatch):
    gone = "this jax has no private entry to cuDNN: the next test shows what happens then"
    fused = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo", reason=gone)
    for name, answer in {"check_cudnn_version": 91000, "check_compute_capability": True}.items():
        monkeypatch.setattr(fused, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(fused, "is_cuda_compute_capability_equal", lambda _: False)
    assert cudnn.unpadded_entry() is not None
    assert cudnn_shapes(partial(cudnn.cudnn_attention, scale=0.1)) == ((1, 64, 2, 128),) * 2


def test_without_jaxs_private_entry_values_are_padded(monkeypatch):
    widths, original = [], jax.nn.dot_product_attention

    def public(q, k, v, *, scale, is_causal, implementation):
        assert implementation == "cudnn"
        widths.append(v.shape[-1])
        return original(q, k, v, scale=scale, is_causal=is_causal)

    monkeypatch.setattr(cudnn, "unpadded_entry", lambda: None)
    monkeypatch.setattr(jax.nn, "dot_product_attention", public)
    assert cudnn_shapes(partial(cudnn.cudnn_attention, scale=0.1)) == ((1, 64, 2, 128),) * 2
    assert set(widths) == {192}
