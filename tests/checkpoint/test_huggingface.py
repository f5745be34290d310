import dataclasses
import json
import math
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dsv3_jax.checkpoint.huggingface import CheckpointError, read_config, read_params, write_hf
from dsv3_jax.checkpoint.huggingface_layout import copied_tensors, tensor_shapes
from dsv3_jax.config import ModelConfig

BASE = Path(__file__).parents[1] / "data/reference/base"
MTP = "model.layers.4."
DOWN = "model.layers.2.mlp.experts.5.down_proj.weight"


@pytest.fixture(scope="module")
def tensors():
    return load_file(BASE / "model.safetensors")


@pytest.fixture(scope="module")
def model():
    return read_config(BASE)


@pytest.fixture(scope="module")
def trees(model):
    return read_params(BASE, model, np.float32)


def folder_with(folder, tensors, **config):
    """A checkpoint folder of these tensors, with base's config changed."""
    folder.mkdir(exist_ok=True)
    values = json.loads((BASE / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def without(tensors, *names):
    return {name: tensor for name, tensor in tensors.items() if name not in names}


def assert_same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(np.testing.assert_array_equal, left, right)


def read_error(folder, **changes):
    with pytest.raises(CheckpointError) as error:
        read_params(folder, dataclasses.replace(read_config(folder), **changes), np.float32)
    return str(error.value)


def test_the_671b_layout_has_the_published_number_of_tensors_and_elements():
    model = ModelConfig(
        vocab_size=129280, d_model=7168, num_layers=61, num_dense_layers=3, d_ff=18432, num_heads=128,
        qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, q_lora_rank=1536, kv_lora_rank=512,
        num_experts=256, d_ff_expert=2048, top_k=8, num_groups=8, top_k_groups=4,
    )  # fmt: skip
    shapes = dict(tensor_shapes(model))
    own = sum(math.prod(shape) for name, shape in shapes.items() if not name.endswith("_bias"))
    assert own == 671_026_404_352 + 11_610_067_968
    shapes |= {name: shapes[original] for name, original in copied_tensors(model).items()}
    fp8 = [
        shape
        for name, shape in shapes.items()
        if (".self_attn." in name or ".mlp." in name) and len(shape) == 2 and not name.endswith(".gate.weight")
    ]
    scales = [(math.ceil(out / 128), math.ceil(into / 128)) for out, into in fp8]
    every = [*shapes.values(), *scales]
    assert len(every) == 91_991
    assert sum(math.prod(shape) for shape in every) == 684_531_386_000


def test_tensors_land_where_the_parameter_tree_says(tensors, model, trees):
    params, router_bias = trees
    assert set(params) == {"embed", "dense_layers", "moe_layers", "final_norm", "head", "mtp"}
    equal = np.testing.assert_array_equal
    equal(params["embed"]["embedding"], tensors["model.embed_tokens.weight"])
    equal(params["head"]["kernel"], tensors["lm_head.weight"].T)
    equal(params["dense_layers"]["ffn"]["down"]["kernel"][0], tensors["model.layers.0.mlp.down_proj.weight"].T)
    layer = jax.tree.map(lambda leaf: leaf[1], params["moe_layers"])
    prefix = "model.layers.2."
    equal(layer["attention"]["kv_up"]["kernel"], tensors[f"{prefix}self_attn.kv_b_proj.weight"].T)
    equal(layer["ffn_norm"]["scale"], tensors[f"{prefix}post_attention_layernorm.weight"])
    equal(layer["ffn"]["router"]["kernel"], tensors[f"{prefix}mlp.gate.weight"].T)
    gate, up = np.split(layer["ffn"]["experts"]["gate_up"][5], 2, axis=-1)
    equal(gate, tensors[f"{prefix}mlp.experts.5.gate_proj.weight"].T)
    equal(up, tensors[f"{prefix}mlp.experts.5.up_proj.weight"].T)
    equal(layer["ffn"]["experts"]["down"][5], tensors[DOWN].T)
    gate, _ = np.split(layer["ffn"]["shared"]["gate_up"]["kernel"], 2, axis=-1)
    equal(gate, tensors[f"{prefix}mlp.shared_experts.gate_proj.weight"].T)
    equal(router_bias["moe_layers"][1], tensors[f"{prefix}mlp.gate.e_score_correction_bias"])
    equal(router_bias["mtp"][0], tensors[f"{MTP}mlp.gate.e_score_correction_bias"])
    mtp = jax.tree.map(lambda leaf: leaf[0], params["mtp"])
    equal(mtp["projection"]["kernel"], tensors[f"{MTP}eh_proj.weight"].T)
    equal(mtp["embed_norm"]["scale"], tensors[f"{MTP}enorm.weight"])
    equal(mtp["hidden_norm"]["scale"], tensors[f"{MTP}hnorm.weight"])
    equal(mtp["final_norm"]["scale"], tensors[f"{MTP}shared_head.norm.weight"])
    equal(mtp["block"]["attention"]["q_down"]["kernel"], tensors[f"{MTP}self_attn.q_a_proj.weight"].T)


def test_writing_what_was_read_gives_the_same_tensors_bit_for_bit(tmp_path, tensors, model, trees):
    write_hf(tmp_path, model, *trees)
    written = load_file(tmp_path / "model.safetensors")
    assert written.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert written[name].dtype == tensor.dtype
        np.testing.assert_array_equal(written[name].view(np.uint32), tensor.view(np.uint32), err_msg=name)
    assert read_config(tmp_path) == model


@pytest.mark.parametrize(
    "changes",
    [
        {"q_lora_rank": None, "num_shared_experts": 0, "num_dense_layers": 0},
        {"num_shared_experts": 2, "num_mtp_modules": 2},
        {"num_dense_layers": 2, "num_mtp_modules": 0},
    ],
)
def test_every_kind_of_model_survives_writing_and_reading(tmp_path, changes):
    model = ModelConfig(
        vocab_size=24, d_model=12, num_layers=2, d_ff=20, num_heads=2, qk_nope_head_dim=6, qk_rope_head_dim=4,
        v_head_dim=5, kv_lora_rank=7, num_experts=4, num_groups=1, top_k_groups=1, top_k=2, d_ff_expert=9,
    )  # fmt: skip
    model = dataclasses.replace(model, **({"num_dense_layers": 1, "q_lora_rank": 11} | changes))
    rng = np.random.default_rng(0)
    save_file(
        {name: rng.normal(size=shape).astype(np.float32) for name, shape in tensor_shapes(model)},
        tmp_path / "one.safetensors",
    )
    (tmp_path / "config.json").write_text("{}")
    params, router_bias = read_params(tmp_path, model, np.float32)
    assert ("mtp" in params) == (model.num_mtp_modules > 0)
    assert ("dense_layers" in params) == (model.num_dense_layers > 0)
    assert ("moe_layers" in params) == ("moe_layers" in router_bias) == (model.num_moe_layers > 0)
    write_hf(tmp_path / "again", model, params, router_bias)
    assert read_config(tmp_path / "again") == model
    assert_same(read_params(tmp_path / "again", model, np.float32), (params, router_bias))


def test_bfloat16_weights_are_rounded_once_and_the_router_bias_is_not(tmp_path, model, trees):
    params, router_bias = read_params(BASE, model, jnp.bfloat16)
    assert_same(params, jax.tree.map(lambda leaf: leaf.astype(ml_dtypes.bfloat16), trees[0]))
    assert_same(router_bias, trees[1])
    write_hf(tmp_path, model, jax.tree.map(jnp.asarray, params), router_bias)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert_same(read_params(tmp_path, model, jnp.bfloat16), (params, router_bias))


def test_shards_equal_a_single_file_with_and_without_an_index(tmp_path, model, trees):
    write_hf(tmp_path, model, *trees, shard_bytes=400_000)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 5
    assert shards[-1].name == f"model-{len(shards):05d}-of-{len(shards):05d}.safetensors"
    assert all(shard.stat().st_size < 450_000 for shard in shards)
    assert_same(read_params(tmp_path, model, np.float32), trees)
    (tmp_path / "model.safetensors.index.json").unlink()
    assert_same(read_params(tmp_path, model, np.float32), trees)


def test_copies_in_mtp_layers_may_be_absent_but_not_different(tmp_path, tensors, model, trees):
    embed, head = f"{MTP}embed_tokens.weight", f"{MTP}shared_head.head.weight"
    shared = folder_with(tmp_path / "shared", without(tensors, embed, head))
    assert_same(read_params(shared, model, np.float32), trees)
    write_hf(tmp_path / "written", model, *trees, mtp_copies=False)
    assert load_file(tmp_path / "written/model.safetensors").keys() == without(tensors, embed, head).keys()
    apart = folder_with(tmp_path / "apart", tensors | {head: tensors[head] + 1e-6})
    assert f"{head} differs from lm_head.weight" in read_error(apart)


def test_a_missing_tensor_is_named(tmp_path, tensors):
    other = "model.layers.3.mlp.gate.weight"
    folder = folder_with(tmp_path, without(tensors, DOWN, other))
    assert f"{DOWN} (and 1 others)" in read_error(folder)


def test_a_checkpoint_without_its_mtp_layers_says_what_to_set(tmp_path, tensors):
    main = {name: tensor for name, tensor in tensors.items() if not name.startswith(MTP)}
    assert "set num_nextn_predict_layers to 0" in read_error(folder_with(tmp_path, main))
    folder = folder_with(tmp_path, main, num_nextn_predict_layers=0)
    params, router_bias = read_params(folder, read_config(folder), np.float32)
    assert "mtp" not in params
    assert "mtp" not in router_bias


def test_an_unexpected_tensor_is_named(tmp_path, tensors):
    extra = "model.layers.1.self_attn.q_a_proj.bias"
    assert extra in read_error(folder_with(tmp_path, tensors | {extra: np.zeros(40, np.float32)}))
    assert MTP in read_error(folder_with(tmp_path, tensors), num_mtp_modules=0)


def test_a_misshapen_tensor_is_named_with_both_shapes(tmp_path, tensors):
    message = read_error(folder_with(tmp_path, tensors | {DOWN: tensors[DOWN].T.copy()}))
    assert DOWN in message
    assert "(48, 96)" in message
    assert "(96, 48)" in message


def test_weights_of_an_integer_type_are_refused(tmp_path, tensors):
    message = read_error(folder_with(tmp_path, tensors | {DOWN: tensors[DOWN].astype(np.uint8)}))
    assert DOWN in message
    assert "uint8" in message


def test_a_truncated_a_missing_and_a_corrupt_shard_are_named(tmp_path, model, trees):
    whole = tmp_path / "whole"
    write_hf(whole, model, *trees, shard_bytes=2_000_000)
    shard = sorted(whole.glob("*.safetensors"))[1]

    def damaged(name, damage):
        shutil.copytree(whole, tmp_path / name)
        damage(tmp_path / name / shard.name)
        return read_error(tmp_path / name)

    content = shard.read_bytes()
    assert f"{shard.name} is truncated" in damaged("cut", lambda path: path.write_bytes(content[:-1]))
    assert f"{shard.name} is truncated" in damaged("empty", lambda path: path.write_bytes(b""))
    assert f"{shard.name} is truncated" in damaged("corrupt", lambda path: path.write_bytes(b"\xff" * 1000))
    assert f"{shard.name} is missing" in damaged("missing", lambda path: path.unlink())
    swapped = sorted(whole.glob("*.safetensors"))[0].read_bytes()
    assert "both hold" in damaged("swapped", lambda path: path.write_bytes(swapped))


def test_an_index_that_disagrees_with_the_shards_names_the_tensor(tmp_path, model, trees):
    write_hf(tmp_path, model, *trees, shard_bytes=2_000_000)
    index = tmp_path / "model.safetensors.index.json"
    values = json.loads(index.read_text())
    values["weight_map"]["model.layers.9.ghost"] = next(iter(values["weight_map"].values()))
    index.write_text(json.dumps(values))
    assert "model.layers.9.ghost" in read_error(tmp_path)
    index.write_text("{")
    assert f"{index} is not a safetensors index" in read_error(tmp_path)


def test_an_unreadable_folder_is_named(tmp_path, model):
    with pytest.raises(CheckpointError, match="holds no"):
        read_params(tmp_path, model, np.float32)
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        read_config(tmp_path)


def test_writing_refuses_a_folder_in_use_and_trees_of_another_model(tmp_path, model, trees):
    params, router_bias = trees
    with pytest.raises(CheckpointError, match=r"\['params'\]\['mtp'\]"):
        write_hf(tmp_path / "new", dataclasses.replace(model, num_mtp_modules=0), params, router_bias)
    with pytest.raises(CheckpointError, match=r"\['router_bias'\]\['moe_layers'\]"):
        write_hf(tmp_path / "new", model, params, router_bias | {"moe_layers": router_bias["moe_layers"].T})
    assert not (tmp_path / "new").exists()
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty"):
        write_hf(tmp_path, model, params, router_bias)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
