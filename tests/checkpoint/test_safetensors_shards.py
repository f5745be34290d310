import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from dsv3_jax.checkpoint.huggingface import read_config, read_params
from dsv3_jax.checkpoint.safetensors_shards import CheckpointError, fill, list_tensors, scale_values

BASE = Path(__file__).parents[1] / "data/reference/base"
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [32, 64]}


def quantized(rng, shape, block, scale_dtype):
    """Random FP8 values and block scales, and what they stand for."""
    blocks = [-(-n // b) for n, b in zip(shape, block, strict=True)]
    values = rng.normal(0, 50, shape).astype(ml_dtypes.float8_e4m3fn)
    exponents = rng.integers(110, 140, blocks).astype(np.uint8)
    scales = {
        "float32": rng.uniform(1e-4, 1, blocks).astype(np.float32),
        "e8m0": exponents.view(ml_dtypes.float8_e8m0fnu),
        "uint8": exponents,
    }[scale_dtype]
    exact = scales if scale_dtype == "float32" else np.exp2(exponents.astype(np.float32) - 127)
    grown = np.kron(exact, np.ones(block, np.float32))[: shape[0], : shape[1]]
    return values, scales, values.astype(np.float32) * grown


@given(
    st.integers(1, 300), st.integers(1, 300), st.sampled_from(["float32", "e8m0", "uint8"]),
    st.sampled_from([(128, 128), (32, 64), (1, 128)]), st.booleans(),
)  # fmt: skip
@settings(max_examples=30, deadline=None)
def test_dequantization_multiplies_every_block_by_its_scale(rows, columns, scale_dtype, block, transposed):
    values, scales, exact = quantized(np.random.default_rng(rows), (rows, columns), block, scale_dtype)
    target = np.empty((columns, rows), np.float32).T if transposed else np.empty((rows, columns), np.float32)
    fill(target, values, scale_values(scales), block)
    np.testing.assert_array_equal(target, exact)


@pytest.mark.parametrize("scale_dtype", ["float32", "e8m0", "uint8"])
def test_a_quantized_checkpoint_reads_as_its_dequantized_weights(tmp_path, scale_dtype):
    rng = np.random.default_rng(0)
    plain = load_file(BASE / "model.safetensors")
    stored, exact = dict(plain), dict(plain)
    for name, tensor in plain.items():
        if name.endswith(("_proj.weight", "_with_mqa.weight")) and "eh_proj" not in name:
            block = tuple(FP8["weight_block_size"])
            stored[name], stored[f"{name}_scale_inv"], exact[name] = quantized(rng, tensor.shape, block, scale_dtype)
    config = json.loads((BASE / "config.json").read_text())
    trees = []
    for kind, tensors in {"fp8": stored, "plain": exact}.items():
        (tmp_path / kind).mkdir()
        extra = {"quantization_config": FP8} if kind == "fp8" else {}
        (tmp_path / kind / "config.json").write_text(json.dumps(config | extra))
        save_file(tensors, tmp_path / kind / "model.safetensors")
        trees.append(read_params(tmp_path / kind, read_config(tmp_path / kind), np.float32))
    np.testing.assert_equal(*trees)


def test_quantized_weights_need_their_scales_and_block_size(tmp_path):
    tensors = load_file(BASE / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    values, scales, _ = quantized(np.random.default_rng(0), tensors[name].shape, (32, 64), "float32")
    config = json.loads((BASE / "config.json").read_text())

    def read(tensors, **changes):
        save_file(tensors, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps(config | changes))
        read_params(tmp_path, read_config(tmp_path), np.float32)

    read(tensors | {name: values, f"{name}_scale_inv": scales}, quantization_config=FP8)
    with pytest.raises(CheckpointError, match=f"without {name}_scale_inv"):
        read(tensors | {name: values}, quantization_config=FP8)
    with pytest.raises(CheckpointError, match=f"no place for, {name}_scale_inv"):
        read(tensors | {f"{name}_scale_inv": scales}, quantization_config=FP8)
    with pytest.raises(CheckpointError, match=f"{name}_scale_inv"):
        read(tensors | {name: values, f"{name}_scale_inv": scales[:, :1].copy()}, quantization_config=FP8)
    with pytest.raises(CheckpointError, match="weight_block_size"):
        read(tensors | {name: values, f"{name}_scale_inv": scales})


def test_stored_bytes_are_found_for_every_dtype(tmp_path):
    rng = np.random.default_rng(0)
    dtypes = [np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e8m0fnu, np.uint8]
    tensors = {f"t{i}": rng.integers(1, 50, (3, 5 + i)).astype(dtype) for i, dtype in enumerate(dtypes)}
    save_file(tensors, tmp_path / "any.safetensors")
    stored = list_tensors(tmp_path)
    assert stored.keys() == tensors.keys()
    for name, tensor in tensors.items():
        read = stored[name].read()
        assert read.dtype == tensor.dtype
        np.testing.assert_array_equal(read.view(np.uint8), tensor.view(np.uint8))


def test_a_dtype_that_cannot_be_read_is_named(tmp_path):
    save_file({"steps": np.arange(3)}, tmp_path / "any.safetensors")
    with pytest.raises(CheckpointError, match=r"steps in .* has dtype I64"):
        list_tensors(tmp_path)


def test_a_shard_cut_while_it_is_read_is_named(tmp_path):
    shard = tmp_path / "any.safetensors"
    save_file({"weight": np.ones((8, 8), np.float32)}, shard)
    weight = list_tensors(tmp_path)["weight"]
    shard.write_bytes(shard.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=r"any\.safetensors ends before"):
        weight.read()
