"""Bytes: the cache of decoding, and the state of training on each device of a mesh."""

from dataclasses import dataclass

from dsv3_jax.config import Config, ConfigError, ModelConfig
from dsv3_jax.planner.parameters import count_parameters

# An FP8 linear is kept in both layouts that its products read, of one byte each; its scales, one in 16,384 elements,
# are left out.
_BYTES = {"bfloat16": 2, "bf16": 2, "fp8": 2, "float32": 4, "fp32": 4}


def kv_cache_bytes_per_token(model: ModelConfig, bytes_per_element: int = 2) -> int:
    """Bytes that decoding caches per token of context: in every layer of the main model the normed KV latent and the
    rotated shared key (report 2.1.1). BF16 by default: 70,272 for DeepSeek-V3.
    """
    return model.num_layers * (model.kv_lora_rank + model.qk_rope_head_dim) * bytes_per_element


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes of parameters and what belongs to them, on one device. Activations and buffers come on top."""

    master: int
    """This device's share of the float32 master weights."""
    moments: int
    """This device's share of both Adam moments."""
    weights: int
    """The weights it computes with."""
    gradients: int
    """The float32 gradients of those, summed over a step's microbatches."""
    average: int
    """This device's share of the float32 average of the weights, in the host's memory; 0 where none is kept."""

    @property
    def total(self) -> int:
        """All that is in the device's memory."""
        return self.master + self.moments + self.weights + self.gradients


def training_memory(config: Config, mesh: dict[str, int]) -> TrainingMemory:
    """Bytes for each device of a mesh of sizes {"data", "node", "gpu"}, MTP modules included.

    Routed experts are sharded over node x gpu and every other weight is replicated. ZeRO-1 shards master weights and
    moments over all the replicas a weight has, so that each device holds an equal share of that state whatever the
    mesh (report 3.2). What sharding pads is left out.

    Raises:
        ConfigError: the experts do not divide over node x gpu.
    """
    count = count_parameters(config.model)
    expert_shards = mesh["node"] * mesh["gpu"]
    if config.model.num_experts % expert_shards:
        raise ConfigError(
            f"model.num_experts={config.model.num_experts}: does not divide over parallel.node x parallel.gpu = "
            f"{expert_shards} devices: change one of the three"
        )
    experts = count.routed_experts + count.mtp_modules.routed_experts
    local = count.total - experts + experts // expert_shards
    share = -(-count.total // (mesh["data"] * expert_shards))
    return TrainingMemory(
        master=4 * share,
        moments=2 * _BYTES[config.optimizer.moments] * share,
        weights=_BYTES[config.precision] * local,
        gradients=4 * local,
        average=4 * share if config.optimizer.ema_decay else 0,
    )
