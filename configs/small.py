"""About 100M parameters with everything the 671B model has: MLA, MoE with group-limited routing, and MTP.

For one GPU, on the Python standard library's source or on any folder (`data.source`). The proportions are the 671B
model's: the dense FFN is as wide as the experts a token passes, half of the expert groups are reachable, and the phases
of every schedule take the same share of the run. The planner counts 93,939,840 parameters, of which a token passes
23,685,248, and 14,322,560 more in the MTP module. The run takes 32.8M tokens. The standard library has 2.4M, so the run
passes over it about 14 times and will memorize much of it; a folder of 100 MB of text or more suits the model better.
With more text raise the steps here, where the schedules follow.
"""

from dsv3_jax.config import (
    BatchConfig,
    CheckpointConfig,
    Config,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
)


def config() -> Config:
    """The run on one GPU."""
    model = ModelConfig(
        vocab_size=8192,
        d_model=512,
        num_layers=7,
        num_dense_layers=1,
        d_ff=1280,  # (4 routed + 1 shared) x 256
        num_heads=8,
        qk_nope_head_dim=64,
        qk_rope_head_dim=32,
        v_head_dim=64,
        q_lora_rank=256,
        kv_lora_rank=128,
        num_experts=32,
        num_shared_experts=1,
        d_ff_expert=256,
        top_k=4,
        num_groups=4,
        top_k_groups=2,
        num_mtp_modules=1,
        max_length=1024,
        # A matrix multiplies the size of its input by about init_std x sqrt(d_model): 0.5 at 0.006 and width 7168, so
        # a width of 512 needs 0.02 for the same.
        init_std=0.02,
    )
    batch = BatchConfig(seq_len=1024, sequences=16)
    steps = 2000
    tokens = steps * batch.sequences * batch.seq_len
    optimizer = OptimizerConfig(
        peak_lr=6e-4,
        warmup_tokens=0.05 * tokens,
        decay_start_tokens=10 / 14.8 * tokens,
        decay_end_tokens=14.3 / 14.8 * tokens,
        decayed_lr=6e-5,
        final_start_tokens=14.633 / 14.8 * tokens,
        final_lr=2e-5,
    )
    loss = LossConfig(
        mtp_switch_tokens=10 / 14.8 * tokens,
        bias_update_speed=0.003,  # faster than 0.001 as the learning rate is: router scores drift in proportion to it
        bias_freeze_tokens=14.3 / 14.8 * tokens,
    )
    return Config(
        model=model,
        batch=batch,
        optimizer=optimizer,
        loss=loss,
        checkpoint=CheckpointConfig(every=500),
        steps=steps,
        output_dir="runs/small",
        precision="bf16",
        unroll_layers=32,
    )
