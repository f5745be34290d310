"""Bytes: the cache of decoding, and the state of training on each device of a mesh."""

import dataclasses
import math
from dataclasses import dataclass

from dsv3_jax.config import Config, ConfigError, ModelConfig
from dsv3_jax.model_shapes import leaf_shapes, tree_shapes
from dsv3_jax.parallel.placement import Sizes, batch_axes, place, shard_elements
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
class StateMemory:
    """The training state on each device, in bytes. All devices hold as much, on all ranks of a pipeline."""

    master: int
    """Float32 master weights."""
    moments: int
    """Both Adam moments."""
    router_bias: int
    """Of all layers, on every device."""
    count: int
    """The number of updates."""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(dataclasses.astuple(self))


def state_memory(config: Config, sizes: Sizes) -> StateMemory:
    """The training state on a mesh of these sizes, sharded as the step shards it: by `parallel.placement`."""
    shapes = tree_shapes(config.model)
    share = sum(
        shard_elements(place(path, shape, sizes), shape, sizes) for path, shape in leaf_shapes(shapes["params"])
    )
    biases = sum(math.prod(shape) for _, shape in leaf_shapes(shapes["router_bias"]))
    return StateMemory(
        master=4 * share, moments=2 * _BYTES[config.optimizer.moments] * share, router_bias=4 * biases, count=4
    )


def argument_bytes(config: Config, sizes: Sizes) -> int:
    """Bytes that the step with the whole batch is called with on each device: state, tokens, the five numbers that the
    schedules set, of which a model without MTP modules leaves out their weight, and the overflow before."""
    tokens = config.batch.sequences * config.batch.seq_len // math.prod(sizes[axis] for axis in batch_axes(sizes))
    numbers = 6 if config.model.num_mtp_modules else 5
    return state_memory(config, sizes).total + 4 * tokens + 4 * numbers


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
    moments over all the replicas a weight has, as far as its dimensions divide: see `state_memory`.

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
    state = state_memory(config, mesh)
    return TrainingMemory(
        master=state.master,
        moments=state.moments,
        weights=_BYTES[config.precision] * local,
        gradients=4 * local,
        average=state.master if config.optimizer.ema_decay else 0,
    )
