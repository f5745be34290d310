"""config.json of the public DeepSeek-V3 checkpoints <-> ModelConfig."""

from collections.abc import Mapping
from typing import Any

from dsv3_jax.config import ConfigError, ModelConfig, YarnConfig

INTEGERS = {
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "num_hidden_layers": "num_layers",
    "first_k_dense_replace": "num_dense_layers",
    "intermediate_size": "d_ff",
    "num_attention_heads": "num_heads",
    "qk_nope_head_dim": "qk_nope_head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "n_routed_experts": "num_experts",
    "n_shared_experts": "num_shared_experts",
    "moe_intermediate_size": "d_ff_expert",
    "num_experts_per_tok": "top_k",
    "n_group": "num_groups",
    "topk_group": "top_k_groups",
    "num_nextn_predict_layers": "num_mtp_modules",
    "max_position_embeddings": "max_length",
}
FLOATS = {
    "routed_scaling_factor": "routed_scaling_factor",
    "rms_norm_eps": "rms_norm_eps",
    "initializer_range": "init_std",
}
NORMALIZE = "norm_topk_prob"

# The only value of each that this model implements; a key that is absent has it.
FIXED: dict[str, Any] = {
    "hidden_act": "silu",
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "moe_layer_freq": 1,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "rope_interleave": True,
}


def config_from_hf(values: Mapping[str, Any]) -> ModelConfig:
    """The model that a published config.json describes; keys that do not concern the model's numbers are ignored.

    RoPE is read in both spellings: `rope_theta` with `rope_scaling`, or `rope_parameters`. Raises ConfigError naming a
    key that is missing, and the key and value of what is not implemented.
    """
    for key, only in FIXED.items():
        if values.get(key, only) != only:
            raise ConfigError(f"config.json {key}={values[key]!r}: only {only!r} is implemented")
    sizes: dict[str, Any] = {field: _integer(values, key) for key, field in INTEGERS.items()}
    sizes |= {field: _float(values, key) for key, field in FLOATS.items()}
    sizes["normalize_top_k"] = _flag(values, NORMALIZE)
    heads = values.get("num_key_value_heads")
    if heads not in (None, sizes["num_heads"]):
        raise ConfigError(
            f"config.json num_key_value_heads={heads!r}: latent attention has as many as "
            f"num_attention_heads={sizes['num_heads']}"
        )
    fp8_block(values)
    theta, yarn = _rope(values, sizes["max_length"])
    return ModelConfig(**sizes, rope_theta=theta, yarn=yarn)


def config_to_hf(model: ModelConfig) -> dict[str, Any]:
    """The published spelling of config.json, from which `config_from_hf` returns an equal model."""
    values: dict[str, Any] = {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3"}
    values |= {key: getattr(model, field) for key, field in (INTEGERS | FLOATS).items()}
    values |= FIXED
    values |= {
        NORMALIZE: model.normalize_top_k,
        "num_key_value_heads": model.num_heads,
        "ep_size": 1,
        "rope_theta": model.rope_theta,
        "rope_scaling": None if model.yarn is None else _yarn_to_hf(model.yarn),
    }
    return values


def fp8_block(values: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns that share an FP8 scale, from `quantization_config`; None where weights are not quantized.

    Raises ConfigError for any quantization other than block-wise FP8 E4M3.
    """
    quantization = values.get("quantization_config")
    if quantization is None:
        return None
    for key, only in {"quant_method": "fp8", "fmt": "e4m3"}.items():
        if quantization.get(key, only) != only:
            raise ConfigError(
                f"config.json quantization_config.{key}={quantization[key]!r}: only {only!r} is implemented"
            )
    block = quantization.get("weight_block_size")
    if not (isinstance(block, list | tuple) and len(block) == 2 and all(_is_integer(b) and b > 0 for b in block)):
        raise ConfigError(
            f"config.json quantization_config.weight_block_size={block!r}: "
            "one scale per block is implemented, as in [128, 128]"
        )
    return block[0], block[1]


def _rope(values: Mapping[str, Any], max_length: int) -> tuple[float, YarnConfig | None]:
    spelling = "rope_scaling" if values.get("rope_scaling") else "rope_parameters"
    rope = dict(values.get(spelling) or {})
    theta = _float(rope if "rope_theta" in rope else values, "rope_theta")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("default", "yarn"):
        raise ConfigError(f"config.json {spelling}.rope_type={kind!r}: only 'default' and 'yarn' are implemented")
    partial = rope.get("partial_rotary_factor", values.get("partial_rotary_factor"))
    if partial not in (None, 1):
        raise ConfigError(f"config.json partial_rotary_factor={partial!r}: only 1 is implemented")
    return theta, _yarn(rope, max_length) if kind == "yarn" else None


def _yarn(rope: dict[str, Any], max_length: int) -> YarnConfig:
    """A null factor is the ratio of the lengths, and a zero is as good as absent, as in the public implementation."""

    def optional(key: str) -> float | None:
        return _float(rope, key) if rope.get(key) else None

    original = _integer({"original_max_position_embeddings": max_length} | rope, "original_max_position_embeddings")
    return YarnConfig(
        factor=max_length / original if _take(rope, "factor") is None else _float(rope, "factor"),
        original_length=original,
        beta_fast=optional("beta_fast") or 32.0,
        beta_slow=optional("beta_slow") or 1.0,
        mscale=optional("mscale"),
        mscale_all_dim=optional("mscale_all_dim"),
        attention_factor=None if rope.get("attention_factor") is None else _float(rope, "attention_factor"),
        truncate=_flag({"truncate": True} | rope, "truncate"),
    )


def _yarn_to_hf(yarn: YarnConfig) -> dict[str, Any]:
    values = {
        "type": "yarn",
        "factor": yarn.factor,
        "original_max_position_embeddings": yarn.original_length,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
        "mscale": yarn.mscale,
        "mscale_all_dim": yarn.mscale_all_dim,
        "attention_factor": yarn.attention_factor,
        "truncate": None if yarn.truncate else False,
    }
    return {key: value for key, value in values.items() if value is not None}


def _take(values: Mapping[str, Any], key: str) -> Any:
    if key not in values:
        raise ConfigError(f"config.json has no {key}, which a DeepSeek-V3 model needs: add it")
    return values[key]


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _integer(values: Mapping[str, Any], key: str) -> int | None:
    value = _take(values, key)
    if value is None and key == "q_lora_rank":
        return None
    if value is None and key == "n_shared_experts":
        return 0
    if not _is_integer(value):
        raise ConfigError(f"config.json {key}={value!r}: must be a whole number")
    return value


def _flag(values: Mapping[str, Any], key: str) -> bool:
    value = _take(values, key)
    if not isinstance(value, bool):
        raise ConfigError(f"config.json {key}={value!r}: must be true or false")
    return value


def _float(values: Mapping[str, Any], key: str) -> float:
    value = _take(values, key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"config.json {key}={value!r}: must be a number")
    return float(value)
