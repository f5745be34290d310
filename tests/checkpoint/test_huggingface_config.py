import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.checkpoint.huggingface_config import config_from_hf, config_to_hf, fp8_block
from dsv3_jax.config import ConfigError, ModelConfig, YarnConfig

PUBLISHED = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 129280,
}
V3 = ModelConfig(
    vocab_size=129280,
    d_model=7168,
    num_layers=61,
    num_dense_layers=3,
    d_ff=18432,
    num_heads=128,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    q_lora_rank=1536,
    kv_lora_rank=512,
    num_experts=256,
    num_shared_experts=1,
    d_ff_expert=2048,
    top_k=8,
    num_groups=8,
    top_k_groups=4,
    routed_scaling_factor=2.5,
    normalize_top_k=True,
    num_mtp_modules=1,
    rope_theta=10000.0,
    yarn=YarnConfig(factor=40, original_length=4096, beta_fast=32, beta_slow=1, mscale=1, mscale_all_dim=1),
    max_length=163840,
    rms_norm_eps=1e-6,
    init_std=0.02,
)


def changed(**changes):
    return PUBLISHED | changes


def without(key):
    return {k: v for k, v in PUBLISHED.items() if k != key}


def yarn_of(**rope):
    return config_from_hf(changed(rope_scaling={"type": "yarn", **rope})).yarn


def test_the_published_config_is_the_671b_model():
    assert config_from_hf(PUBLISHED) == V3
    assert fp8_block(PUBLISHED) == (128, 128)


def test_written_values_are_the_published_ones():
    written = config_to_hf(V3)
    assert {key: PUBLISHED[key] for key in written.keys() & PUBLISHED.keys()} == {
        key: written[key] for key in written.keys() & PUBLISHED.keys()
    }
    added_by_publisher = {
        "attention_dropout", "auto_map", "bos_token_id", "eos_token_id", "quantization_config", "torch_dtype",
        "use_cache",
    }  # fmt: skip
    assert PUBLISHED.keys() - written.keys() == added_by_publisher


@pytest.mark.parametrize("scaling", [PUBLISHED["rope_scaling"], None])
def test_both_spellings_of_rope_agree(scaling):
    old = changed(rope_scaling=scaling)
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    if scaling:
        rope |= {key: value for key, value in scaling.items() if key != "type"} | {"rope_type": "yarn"}
    new = {key: value for key, value in old.items() if key not in ("rope_theta", "rope_scaling")}
    assert config_from_hf(new | {"rope_parameters": rope}) == config_from_hf(old)


def test_yarn_keys_that_are_absent_take_the_public_defaults():
    expected = YarnConfig(factor=8, original_length=163840, beta_fast=32, beta_slow=1, mscale=None, mscale_all_dim=None)
    assert yarn_of(factor=8) == expected
    assert yarn_of(factor=8, mscale=0, mscale_all_dim=0, beta_fast=None, truncate=True) == expected
    assert yarn_of(factor=None, original_max_position_embeddings=16384).factor == 10
    other = yarn_of(factor=8, attention_factor=1.25, truncate=False)
    assert (other.attention_factor, other.truncate) == (1.25, False)


def test_dense_experts_and_queries_may_be_null():
    model = config_from_hf(changed(n_shared_experts=None, q_lora_rank=None))
    assert (model.num_shared_experts, model.q_lora_rank) == (0, None)


yarns = st.builds(
    YarnConfig,
    factor=st.floats(1, 100),
    original_length=st.integers(1, 10000),
    beta_fast=st.floats(8, 64),
    beta_slow=st.floats(0.5, 4),
    mscale=st.none() | st.floats(0.1, 2),
    mscale_all_dim=st.none() | st.floats(0.1, 2),
    attention_factor=st.none() | st.floats(0.1, 2),
    truncate=st.booleans(),
)
models = st.builds(
    ModelConfig,
    d_model=st.integers(1, 10000),
    num_layers=st.integers(3, 9),
    num_dense_layers=st.integers(0, 3),
    q_lora_rank=st.none() | st.integers(1, 2000),
    num_shared_experts=st.integers(0, 3),
    num_mtp_modules=st.integers(0, 3),
    normalize_top_k=st.booleans(),
    routed_scaling_factor=st.floats(0.1, 10),
    rope_theta=st.floats(100, 1e7),
    rms_norm_eps=st.floats(1e-8, 1e-3),
    init_std=st.floats(1e-4, 1),
    yarn=st.none() | yarns,
)


@given(models)
@settings(max_examples=40, deadline=None)
def test_a_model_survives_the_file(model):
    assert config_from_hf(json.loads(json.dumps(config_to_hf(model)))) == model


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("scoring_func", "softmax"),
        ("topk_method", "greedy"),
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("tie_word_embeddings", True),
        ("rope_interleave", False),
        ("moe_layer_freq", 2),
        ("num_key_value_heads", 8),
        ("hidden_size", "7168"),
        ("hidden_size", True),
        ("vocab_size", None),
        ("rms_norm_eps", "small"),
        ("norm_topk_prob", 1),
        ("partial_rotary_factor", 0.5),
    ],
)
def test_an_unsupported_value_is_named(key, value):
    with pytest.raises(ConfigError) as error:
        config_from_hf(changed(**{key: value}))
    assert f"{key}={value!r}" in str(error.value)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("rope_scaling", "type", "linear"),
        ("rope_scaling", "factor", "forty"),
        ("rope_scaling", "truncate", "no"),
        ("quantization_config", "quant_method", "awq"),
        ("quantization_config", "fmt", "e5m2"),
        ("quantization_config", "weight_block_size", None),
    ],
)
def test_an_unsupported_value_inside_a_section_is_named(section, key, value):
    with pytest.raises(ConfigError) as error:
        config_from_hf(changed(**{section: PUBLISHED[section] | {key: value}}))
    assert f"{key}={value!r}" in str(error.value)


@pytest.mark.parametrize(
    "key", ["hidden_size", "q_lora_rank", "rope_theta", "num_nextn_predict_layers", "norm_topk_prob", "rms_norm_eps"]
)
def test_a_missing_key_is_named(key):
    with pytest.raises(ConfigError, match=f"has no {key}"):
        config_from_hf(without(key))
    with pytest.raises(ConfigError, match="has no factor"):
        yarn_of(original_max_position_embeddings=4096)
