"""Floating-point operations of training, counted per token."""

from dsv3_jax.config import ModelConfig
from dsv3_jax.planner.parameters import count_parameters


def training_flops_per_token(model: ModelConfig, seq_len: int) -> int:
    """FLOPs of one forward and backward pass of the main model, per token of a sequence of `seq_len`.

    6 x the weights of the matrix products a token passes (2 forward, 4 backward; the head is one, the embedding and
    the norms are none), plus 3 x causal attention, where a token attends to seq_len / 2 others on average. This is
    what the field compares: MTP and everything recomputed is left out. 250.4 GFLOP for DeepSeek-V3 at 4096.
    """
    count = count_parameters(model)
    matrices = count.active - count.norms
    return 6 * matrices + 3 * model.num_layers * _attention_flops_per_token(model, seq_len)


def training_flops_per_token_with_mtp(model: ModelConfig, seq_len: int) -> int:
    """FLOPs of one forward and backward pass with the MTP modules, per token: the utilization of the hardware (MFU)
    is measured against this, since a step does this work.

    Adds to `training_flops_per_token`, per module, the projection, one MoE block and one more pass of the shared head.
    The few last positions of a sequence that a module does not predict from count like the others.
    """
    count = count_parameters(model)
    mtp, modules = count.mtp_modules, model.num_mtp_modules
    unused = mtp.routed_experts // model.num_experts * (model.num_experts - model.top_k)
    matrices = mtp.total - mtp.norms - unused + modules * count.head
    attention = modules * _attention_flops_per_token(model, seq_len)
    return training_flops_per_token(model, seq_len) + 6 * matrices + 3 * attention


def _attention_flops_per_token(model: ModelConfig, seq_len: int) -> int:
    """Forward FLOPs of one layer's attention core: 2 x seq_len / 2 x heads x (query-key width + value width)."""
    return seq_len * model.num_heads * (model.qk_head_dim + model.v_head_dim)
