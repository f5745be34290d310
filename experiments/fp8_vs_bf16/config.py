"""The run that every arm makes: configs/small.py, whose widths suit FP8 tiles; and one that a test can afford."""

from dataclasses import replace
from pathlib import Path

from dsv3_jax.cli import load_config
from dsv3_jax.config import BatchConfig, Config, DataConfig, LogConfig, ModelConfig, ParallelConfig

SMALL = Path(__file__).resolve().parents[2] / "configs" / "small.py"


def config() -> Config:
    """108M parameters with 32 experts and an MTP module; 2000 steps of 16 x 1024 tokens on one device.

    A larger share is held out than in small.py, since the differences looked for are a fraction of a percent.
    """
    small = load_config(str(SMALL))
    return replace(
        small,
        data=DataConfig(validation_share=0.05),
        parallel=ParallelConfig(devices=1),
        log=LogConfig(validation_rows=384),
        output_dir="runs/fp8_vs_bf16",
    )


def tiny() -> Config:
    """The same in minutes on a CPU, for tests: it shows that the arms run, not what they cost the loss."""
    full = config()
    steps, batch = 12, BatchConfig(seq_len=64, sequences=4)
    shorter = steps * batch.sequences * batch.seq_len / full.total_tokens
    times = ("warmup_tokens", "decay_start_tokens", "decay_end_tokens", "final_start_tokens")
    return replace(
        full,
        model=ModelConfig(
            vocab_size=512,
            d_model=64,
            num_layers=1,
            num_dense_layers=0,
            d_ff=256,
            num_heads=2,
            qk_nope_head_dim=32,
            qk_rope_head_dim=16,
            v_head_dim=32,
            q_lora_rank=64,
            kv_lora_rank=64,
            num_experts=4,
            d_ff_expert=64,
            top_k=2,
            num_groups=2,
            top_k_groups=2,
            max_length=64,
            init_std=0.03,
        ),
        batch=batch,
        log=LogConfig(validation_rows=8),
        optimizer=replace(
            full.optimizer, peak_lr=3e-3, **{name: getattr(full.optimizer, name) * shorter for name in times}
        ),
        steps=steps,
        recompute="none",
    )
