"""What changes during training, as functions of the tokens seen (report 4.2)."""

import math

from dsv3_jax.config import LossConfig, OptimizerConfig


def learning_rate(config: OptimizerConfig, tokens: int) -> float:
    """Linear warmup, constant, cosine decay, then two constant phases."""
    if tokens < config.warmup_tokens:
        return config.peak_lr * tokens / config.warmup_tokens
    if tokens < config.decay_start_tokens:
        return config.peak_lr
    if tokens < config.decay_end_tokens:
        progress = (tokens - config.decay_start_tokens) / (config.decay_end_tokens - config.decay_start_tokens)
        return config.decayed_lr + (config.peak_lr - config.decayed_lr) * (1 + math.cos(math.pi * progress)) / 2
    return config.decayed_lr if tokens < config.final_start_tokens else config.final_lr


def mtp_weight(config: LossConfig, tokens: int) -> float:
    """Lambda of the MTP losses."""
    return config.mtp_weight if tokens < config.mtp_switch_tokens else config.mtp_weight_late


def bias_update_speed(config: LossConfig, tokens: int) -> float:
    """Gamma of the router bias."""
    return config.bias_update_speed if tokens < config.bias_freeze_tokens else 0.0
