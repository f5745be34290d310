"""The default job: a complete small DeepSeek-V3 that learns the Python standard library in minutes on two CPU cores."""

from dsv3_jax.config import (
    BatchConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
)


def config() -> Config:
    """MLA, 16 routed experts in 4 groups, auxiliary-loss-free balance and one MTP module."""
    batch = BatchConfig(seq_len=256, sequences=16)
    steps = 300
    tokens = steps * batch.sequences * batch.seq_len
    return Config(
        model=ModelConfig(
            vocab_size=2048,
            d_model=192,
            num_layers=4,
            num_dense_layers=1,
            d_ff=640,
            num_heads=6,
            qk_nope_head_dim=32,
            qk_rope_head_dim=16,
            v_head_dim=32,
            q_lora_rank=96,
            kv_lora_rank=64,
            num_experts=16,
            d_ff_expert=128,
            top_k=4,
            num_groups=4,
            top_k_groups=2,
            num_mtp_modules=1,
            max_length=1024,
            init_std=0.03,
        ),
        data=DataConfig(validation_share=0.05),
        batch=batch,
        optimizer=OptimizerConfig(
            peak_lr=2e-3,
            warmup_tokens=0.05 * tokens,
            decay_start_tokens=0.5 * tokens,
            decay_end_tokens=tokens,
            decayed_lr=2e-4,
            final_start_tokens=tokens,
            final_lr=2e-4,
            ema_decay=0.98,
        ),
        loss=LossConfig(
            mtp_switch_tokens=0.7 * tokens,
            bias_update_speed=0.005,  # the report's 0.001 is for hundreds of thousands of steps
            bias_freeze_tokens=2 * tokens,
            # Batches of 16 sequences, not thousands: the batch is even only if its sequences are, so the sequence-wise
            # loss weighs more than the report's 1e-4. Without effect on the validation loss here.
            sequence_balance_weight=0.03,
        ),
        checkpoint=CheckpointConfig(every=100),
        steps=steps,
        output_dir="runs/tiny",
        precision="bf16",
        unroll_layers=4,
    )
