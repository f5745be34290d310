"""15.7B parameters, 2.4B active: the small MoE of the report's ablations, trained on 1.33T tokens (report 4.5).

The report names only those two figures. The sizes are the ones DeepSeek published for such a model (DeepSeek-V2-Lite:
27 layers of width 2048, 64 routed experts of width 1408, two shared, vocabulary 102400, no query compression), with
V3's router; the dense FFN is as wide as the experts a token passes, as in the 671B model. The planner counts
15,708,450,304 parameters, of which a token passes 2,453,401,088; the MTP module adds 593,242,624 that inference does
not need. Batch and learning rate are DeepSeek-V2-Lite's, and the phases of every schedule take the same share of the
run as in the 671B model's 14.8T tokens.
"""

from dsv3_jax.config import (
    BatchConfig,
    CheckpointConfig,
    Config,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
)


def config() -> Config:
    """The ablation with MTP and auxiliary-loss-free balance; `num_mtp_modules=0` is the baseline without MTP."""
    model = ModelConfig(
        vocab_size=102400,
        d_model=2048,
        num_layers=27,
        num_dense_layers=1,
        d_ff=11264,  # (6 routed + 2 shared) x 1408
        num_heads=16,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        q_lora_rank=None,
        kv_lora_rank=512,
        num_experts=64,
        num_shared_experts=2,
        d_ff_expert=1408,
        top_k=6,
        num_groups=1,  # one node holds all the experts: nothing to limit
        top_k_groups=1,
        routed_scaling_factor=2.446,  # Moonlight's, for the same 6 of 64 under a sigmoid router
        num_mtp_modules=1,
        max_length=4096,
        init_std=0.006,  # DeepSeekMoE 16B, of the same width, starts there too
    )
    batch = BatchConfig(seq_len=4096, sequences=4608, microbatch=512)
    steps = 70_466
    tokens = steps * batch.sequences * batch.seq_len
    optimizer = OptimizerConfig(
        peak_lr=4.2e-4,
        warmup_tokens=2000 * batch.sequences * batch.seq_len,
        decay_start_tokens=10 / 14.8 * tokens,
        decay_end_tokens=14.3 / 14.8 * tokens,
        decayed_lr=4.2e-5,
        final_start_tokens=14.633 / 14.8 * tokens,
        final_lr=1.4e-5,
        ema_decay=0.999,
    )
    loss = LossConfig(
        mtp_switch_tokens=10 / 14.8 * tokens,
        bias_freeze_tokens=14.3 / 14.8 * tokens,
    )
    return Config(
        model=model,
        batch=batch,
        optimizer=optimizer,
        loss=loss,
        parallel=ParallelConfig(node=1, gpu=8),
        checkpoint=CheckpointConfig(every=500),
        steps=steps,
        output_dir="runs/moe_16b",
        resume="auto",
        precision="bf16",
        unroll_layers=32,
    )
