"""Settings that contradict each other are refused by name, with what to change; settings that build can run."""

import re
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.config import (
    BatchConfig,
    CheckpointConfig,
    Config,
    ConfigError,
    DataConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    YarnConfig,
)

POSITIVE_SIZES = [
    "vocab_size", "d_model", "num_layers", "d_ff", "num_heads", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
    "kv_lora_rank", "num_experts", "d_ff_expert", "top_k", "num_groups", "top_k_groups", "max_length",
]  # fmt: skip

# What is built, the setting the message must name with its value, and the remedy it must give.
REFUSED: list[tuple[Callable[..., object], dict[str, object], str, str]] = [
    *[(ModelConfig, {name: 0}, f"model.{name}=0", "must be positive") for name in POSITIVE_SIZES],
    (ModelConfig, {"q_lora_rank": 0}, "model.q_lora_rank=0", "or None"),
    (ModelConfig, {"num_shared_experts": -1}, "model.num_shared_experts=-1", "cannot be negative"),
    (ModelConfig, {"num_mtp_modules": -1}, "model.num_mtp_modules=-1", "cannot be negative"),
    (ModelConfig, {"qk_rope_head_dim": 15}, "model.qk_rope_head_dim=15", "must be even"),
    (ModelConfig, {"num_dense_layers": 6}, "model.num_dense_layers=6", "model.num_layers=5"),
    (ModelConfig, {"num_dense_layers": -1}, "model.num_dense_layers=-1", "between 0 and"),
    (ModelConfig, {"num_experts": 18}, "model.num_experts=18", "a multiple of model.num_groups=4"),
    (ModelConfig, {"top_k_groups": 5}, "model.top_k_groups=5", "more than model.num_groups=4"),
    (ModelConfig, {"top_k": 9}, "model.top_k=9", "lower top_k or raise top_k_groups"),
    (ModelConfig, {"num_groups": 16, "top_k_groups": 16}, "model.num_groups=16", "use fewer groups"),
    (ModelConfig, {"init_std": 0.0}, "model.init_std=0.0", "must be positive"),
    (YarnConfig, {"factor": 0.5}, "yarn.factor=0.5", "at least 1"),
    (YarnConfig, {"original_length": 0}, "yarn.original_length=0", "positive length"),
    (YarnConfig, {"beta_fast": 1.0}, "yarn.beta_fast=1.0", "above yarn.beta_slow=1.0"),
    (DataConfig, {"fim_rate": 1.1}, "data.fim_rate=1.1", "between 0 and 1"),
    (DataConfig, {"split_rate": -0.1}, "data.split_rate=-0.1", "between 0 and 1"),
    (DataConfig, {"validation_share": 0.0}, "data.validation_share=0.0", "both excluded"),
    (OptimizerConfig, {"peak_lr": 0.0}, "optimizer.peak_lr=0.0", "must be positive"),
    (OptimizerConfig, {"warmup_tokens": 11e12}, "optimizer.warmup_tokens", "optimizer.decay_start_tokens"),
    (OptimizerConfig, {"decay_start_tokens": 14.4e12}, "optimizer.decay_start_tokens", "optimizer.decay_end_tokens"),
    (OptimizerConfig, {"decay_end_tokens": 15e12}, "optimizer.decay_end_tokens", "optimizer.final_start_tokens"),
    (OptimizerConfig, {"beta1": 1.0}, "optimizer.beta1=1.0", "[0, 1)"),
    (OptimizerConfig, {"beta2": -0.1}, "optimizer.beta2=-0.1", "[0, 1)"),
    (OptimizerConfig, {"clip_norm": 0.0}, "optimizer.clip_norm=0.0", "must be positive"),
    (OptimizerConfig, {"ema_decay": 1.0}, "optimizer.ema_decay=1.0", "or be None"),
    (LossConfig, {"mtp_weight": -0.3}, "loss.mtp_weight=-0.3", "cannot be negative"),
    (LossConfig, {"bias_update_speed": -0.001}, "loss.bias_update_speed=-0.001", "cannot be negative"),
    (LossConfig, {"logits_tokens": 0}, "loss.logits_tokens=0", "must be at least 1, or None"),
    (BatchConfig, {"seq_len": 1}, "batch.seq_len=1", "at least 2"),
    (BatchConfig, {"sequences": 0}, "batch.sequences=0", "must be positive"),
    (BatchConfig, {"microbatch": 0}, "batch.microbatch=0", "must be positive"),
    (BatchConfig, {"start_sequences": 16, "microbatch": 8}, "batch.start_sequences=16", "batch.sequences=8"),
    (BatchConfig, {"ramp_microbatches": 2}, "batch.ramp_microbatches=2", "set batch.start_sequences"),
    (BatchConfig, {"start_sequences": 4}, "batch.start_sequences=4", "needs batch.microbatch"),
    (BatchConfig, {"microbatch": 3}, "batch.sequences=8", "a multiple of batch.microbatch=3"),
    (BatchConfig, {"start_sequences": 2, "microbatch": 4}, "batch.start_sequences=2", "batch.microbatch=4"),
    (ParallelConfig, {"node": 0}, "parallel.node=0", "must be positive"),
    (ParallelConfig, {"pipe": 0}, "parallel.pipe=0", "must be positive"),
    (ParallelConfig, {"schedule": "zb1p"}, "parallel.schedule='zb1p'", "parallel.pipe=1 is none; set parallel.pipe"),
    (ParallelConfig, {"schedule": "2f2b"}, "parallel.schedule='2f2b'", "'dualpipe'"),
    (ParallelConfig, {"devices": -1}, "parallel.devices=-1", "must be positive"),
    (ParallelConfig, {"expert_buffer_factor": 0.5}, "parallel.expert_buffer_factor=0.5", "at least 1"),
    (ParallelConfig, {"exchange": "ring"}, "parallel.exchange='ring'", "one of 'hierarchical', 'flat'"),
    (CheckpointConfig, {"every": 0}, "checkpoint.every=0", "must be positive"),
    (CheckpointConfig, {"keep": 0}, "checkpoint.keep=0", "must be positive"),
    (
        Config,
        {"parallel": ParallelConfig(pipe=2, overlap_microbatches=True)},
        "parallel.overlap_microbatches=True",
        "parallel.pipe=2",
    ),
    (Config, {"steps": 0}, "steps=0", "must be positive"),
    (Config, {"max_bad_steps": 0}, "max_bad_steps=0", "must be positive"),
    (Config, {"batch": BatchConfig(seq_len=8192)}, "batch.seq_len=8192", "model.max_length=4096"),
    (Config, {"parallel": ParallelConfig(overlap_microbatches=True)}, "parallel.overlap_microbatches=True", "one: set"),
    (Config, {"batch": BatchConfig(seq_len=2)}, "batch.seq_len=2", "model.num_mtp_modules + 1 = 2"),
]


@pytest.mark.parametrize(("build", "wrong", "setting", "remedy"), REFUSED, ids=[case[2] for case in REFUSED])
def test_wrong_setting_is_refused_by_name_with_its_remedy(
    build: Callable[..., object], wrong: dict[str, object], setting: str, remedy: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(setting)) as refusal:
        build(**wrong)
    assert str(refusal.value).startswith(setting)
    assert remedy in str(refusal.value)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(-1, 16), st.integers(-1, 8), st.integers(-1, 8), st.integers(-1, 8), st.integers(0, 2**31)
)  # fmt: skip
def test_router_of_a_model_that_builds_always_finds_top_k_experts(
    experts: int, groups: int, top_k_groups: int, top_k: int, seed: int
) -> None:
    try:
        model = ModelConfig(num_experts=experts, num_groups=groups, top_k_groups=top_k_groups, top_k=top_k)
    except ConfigError:
        return  # and nothing else: a division by zero here would fail the test
    scores = np.random.default_rng(seed).normal(size=(groups, experts // groups))
    group_scores = np.sort(scores, axis=1)[:, -2:].sum(axis=1)
    closed = np.argsort(-group_scores)[model.top_k_groups :]
    scores[closed] = -np.inf
    chosen = np.sort(scores.ravel())[-model.top_k :]
    assert len(chosen) == model.top_k
    assert np.isfinite(chosen).all()


sizes = st.none() | st.integers(1, 6)


@settings(max_examples=200, deadline=None)
@given(pipe=st.integers(1, 4), data=sizes, node=st.integers(1, 6), gpu=sizes, devices=st.integers(1, 64))
def test_mesh_uses_every_device_and_keeps_what_was_asked_or_is_refused(
    pipe: int, data: int | None, node: int, gpu: int | None, devices: int
) -> None:
    parallel = ParallelConfig(pipe=pipe, data=data, node=node, gpu=gpu)
    asked = pipe * (data or 1) * node * (gpu or 1)
    if devices % asked or (data and gpu and asked != devices):
        with pytest.raises(ConfigError, match=f"there are {devices}"):
            parallel.shape(devices)
        return
    shape = parallel.shape(devices)
    assert shape["pipe"] * shape["data"] * shape["node"] * shape["gpu"] == devices
    assert shape["pipe"] == pipe
    assert shape["node"] == node
    assert data in (None, shape["data"])
    assert gpu in (None, shape["gpu"])
