"""DeepSeek-V3: 671B parameters, 37B active, pre-trained on 14.8T tokens.

Sizes, schedules, the 16 pipeline ranks and the 8 x 8 expert-parallel group are the technical report's (3.2 and 4.2): on
its 2048 GPUs two replicas of 16 x 64. Ours, where the report says nothing: the grain of the batch ramp, the order of
its first steps, which have too few microbatches for DualPipe's, the decay of the averaged weights, and how often to
save.
"""

from dsv3_jax.config import (
    BatchConfig,
    CheckpointConfig,
    Config,
    LogConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
)


def config() -> Config:
    """The pre-training run, before context extension."""
    model = ModelConfig(
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
        num_mtp_modules=1,
        max_length=4096,
        init_std=0.006,
    )
    batch = BatchConfig(
        seq_len=4096,
        sequences=15360,
        start_sequences=3072,
        ramp_tokens=469e9,
        ramp_microbatches=2,  # one for each of DualPipe's directions
        microbatch=128,  # one sequence for each of the 2048 / 16 ranks that the report's 16 pipeline stages leave
    )
    optimizer = OptimizerConfig(
        peak_lr=2.2e-4,
        # 2000 steps, whose batch grows from 3072 to 3584 sequences meanwhile; without the ramp they would be 25.2B.
        warmup_tokens=26.98e9,
        decay_start_tokens=10e12,
        decay_end_tokens=14.3e12,
        decayed_lr=2.2e-5,
        final_start_tokens=14.633e12,
        final_lr=7.3e-6,
        ema_decay=0.999,
    )
    loss = LossConfig(
        mtp_weight=0.3,
        mtp_weight_late=0.1,
        mtp_switch_tokens=10e12,
        bias_update_speed=0.001,
        bias_freeze_tokens=14.3e12,
        sequence_balance_weight=1e-4,
    )
    return Config(
        model=model,
        batch=batch,
        optimizer=optimizer,
        loss=loss,
        parallel=ParallelConfig(pipe=16, schedule="dualpipe", node=8, gpu=8),
        checkpoint=CheckpointConfig(every=500),
        log=LogConfig(sample_tokens=0),  # a sample is decoded from all weights on one device
        steps=243_099,  # 15,314 of the growing batch, then 62.9M tokens each: 14.8T in all
        output_dir="runs/v3_671b",
        resume="auto",
        precision="fp8",
    )
