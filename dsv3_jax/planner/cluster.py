"""A training run on a cluster, predicted: memory, exchange, chunk times, the pipeline's timeline, and what it costs."""

import dataclasses
import math
from dataclasses import dataclass
from functools import cache, cached_property

from dsv3_jax.config import BatchConfig, Config, ConfigError, ModelConfig
from dsv3_jax.ops.chunk import chunk_tokens
from dsv3_jax.parallel.expert import most_nodes
from dsv3_jax.parallel.schedule import Op, Schedule, make
from dsv3_jax.parallel.simulate import ChunkTimes, Timeline, peak_activations, simulate, simulate_lockstep
from dsv3_jax.planner.devices import Device
from dsv3_jax.planner.exchange import exchange_bytes, exchange_seconds, is_hierarchical
from dsv3_jax.planner.flops import training_flops_per_token, training_flops_per_token_with_mtp
from dsv3_jax.planner.memory import state_memory
from dsv3_jax.planner.parameters import count_parameters
from dsv3_jax.planner.stages import Stage, model_parts, split
from dsv3_jax.planner.work import Products, Recompute, seconds

AXES = ("pipe", "data", "node", "gpu")

EXTENSION = ((32768, 1920, 1000), (131072, 480, 1000))
"""Context extension: tokens of a sequence, sequences of a batch, steps of each of its stages (report 4.3)."""

_WEIGHT, _GRADIENT = 2, 4
"""Bytes of a parameter: computed with (BF16, or FP8 in both layouts), and its gradient."""


@dataclass(frozen=True)
class ClusterMemory:
    """Bytes on one rank, by kind."""

    weights: float
    """What it computes with: BF16, or FP8 in both layouts that products need."""
    gradients: float
    """Float32, of all the stages it holds."""
    optimizer: float
    """Its share of float32 master weights and both Adam moments (ZeRO-1), and the router biases: as much on all ranks,
    since each updates a slice of every layer."""
    activations: float
    """What forwards leave for backwards, at the schedule's peak."""
    buffers: float
    """Receive buffers, and one layer's values while it runs in both directions."""

    @property
    def total(self) -> float:
        """All of it."""
        return sum(dataclasses.astuple(self))

    @property
    def largest(self) -> str:
        """The kind that takes most."""
        return max(dataclasses.asdict(self).items(), key=lambda item: item[1])[0]


@dataclass(frozen=True)
class ClusterPlan:
    """A run on a mesh of one kind of device. Times are seconds, sizes bytes."""

    config: Config
    device: Device
    mesh: dict[str, int]
    """Sizes of `pipe`, `data`, `node`, `gpu`."""
    products: Products
    schedule: Schedule
    """Of a step with the whole batch."""
    tokens: int
    """Tokens of a microbatch on each device."""

    @property
    def devices(self) -> int:
        """GPUs of the mesh."""
        return math.prod(self.mesh.values())

    @cached_property
    def stages(self) -> list[Stage]:
        """The model, cut for the schedule."""
        model, seq_len = self.config.model, self.config.batch.seq_len
        return _cut(model, seq_len, self.products, self.config.recompute, self.schedule.stages, self.device)

    @cached_property
    def chunk_times(self) -> list[ChunkTimes]:
        """Seconds of each stage over one microbatch."""
        return [self._chunk_times(stage) for stage in self.stages]

    @cached_property
    def timeline(self) -> Timeline:
        """A step's pipeline, with asynchronous ranks."""
        return simulate(self.schedule, self.chunk_times)

    @cached_property
    def memory(self) -> list[ClusterMemory]:
        """Of each rank of the pipeline."""
        sizes = [stage.saved * self.tokens for stage in self.stages]
        activations = peak_activations(self.schedule, sizes)
        state = state_memory(self.config, self.mesh).total
        return [self._memory(rank, state, activations[rank]) for rank in range(self.schedule.ranks)]

    @property
    def fullest(self) -> int:
        """The rank that needs most memory."""
        return max(range(self.schedule.ranks), key=lambda rank: self.memory[rank].total)

    @property
    def fits(self) -> bool:
        """Every rank's memory fits its device."""
        return self.memory[self.fullest].total <= self.device.memory

    @property
    def exchange_bytes(self) -> dict[str, float]:
        """Bytes that a device sends per MoE layer and pass over a microbatch, by link."""
        per_token = exchange_bytes(self.config.model, *self._exchange)
        return {link: sent * self.tokens for link, sent in per_token.items()}

    @property
    def transfer_bytes(self) -> float:
        """Bytes from a stage to the next, BF16."""
        return 2 * self.config.model.d_model * self.tokens

    @cached_property
    def sync_bytes(self) -> dict[str, float]:
        """Bytes that the fullest rank sends once a step to sum gradients and to gather weights, by link.

        Over `gpu` first, then what is left over the network.
        """
        sent = {"nvlink": 0.0, "network": 0.0}
        for chunk in self.schedule.chunks(self.fullest):
            experts, others = self._local(self.stages[chunk])
            outside = self.mesh["data"] * self.schedule.copies
            gpu, everywhere = self.mesh["gpu"], outside * self.mesh["node"]
            each = _GRADIENT + _WEIGHT
            sent["nvlink"] += each * others * (gpu - 1) / gpu
            sent["network"] += each * (others / gpu * (everywhere - 1) / everywhere + experts * (outside - 1) / outside)
        return sent

    @property
    def sync_seconds(self) -> float:
        """Time of that, one link after the other, nothing hidden."""
        return sum(sent / self.device.achieved[link] for link, sent in self.sync_bytes.items())

    @property
    def optimizer_seconds(self) -> float:
        """AdamW on this rank's share: gradient, master weight and moments are read, the latter two written."""
        return self.memory[self.fullest].optimizer * (2 + 0.5) / self.device.achieved["memory"]

    @cached_property
    def lockstep_seconds(self) -> float:
        """A step's pipeline where ranks wait for their neighbours after every operation, as in one program for all."""
        return simulate_lockstep(self.schedule, self.chunk_times).makespan

    @cached_property
    def step_parts(self) -> dict[str, float]:
        """Where the busiest rank's step goes: overlapped pairs, lone forwards, backwards and weight gradients, waiting,
        and what follows the pipeline."""
        busy = self.timeline.busy
        rank = busy.index(max(busy))
        parts = dict.fromkeys(("pairs", "forward", "backward", "weight gradients"), 0.0)
        names = {"F": "forward", "B": "backward", "I": "backward", "W": "weight gradients"}
        for event in self.timeline.events[rank]:
            parts[names[event.op.kind] if isinstance(event.op, Op) else "pairs"] += event.end - event.start
        return parts | {
            "bubble": self.timeline.bubble[rank],
            "gradients and weights, shared": self.sync_seconds,
            "optimizer": self.optimizer_seconds,
        }

    @property
    def step_seconds(self) -> float:
        """A step with the whole batch."""
        return self.timeline.makespan + self.sync_seconds + self.optimizer_seconds

    @property
    def step_tokens(self) -> int:
        """Tokens of a step with the whole batch."""
        return self.config.batch.sequences * self.config.batch.seq_len

    @property
    def tokens_per_second_per_gpu(self) -> float:
        """Speed with the whole batch."""
        return self.step_tokens / self.step_seconds / self.devices

    def mfu(self, with_mtp: bool = False) -> float:
        """Share of the data sheet's BF16 peak, in the main model's FLOPs or with the MTP modules'."""
        flops = training_flops_per_token_with_mtp if with_mtp else training_flops_per_token
        per_token = flops(self.config.model, self.config.batch.seq_len)
        return per_token * self.tokens_per_second_per_gpu / self.device.peak["bf16"]

    @property
    def gpu_hours_per_trillion(self) -> float:
        """GPU-hours for 10^12 tokens, with the whole batch."""
        return 1e12 / self.tokens_per_second_per_gpu / 3600

    @cached_property
    def gpu_hours(self) -> float:
        """GPU-hours of all the configuration's steps, its growing batch taken into account.

        A smaller batch saves microbatches, not the bubble: each costs what the slowest rank works on it.
        """
        per_microbatch = max(self.timeline.busy) / self.schedule.microbatches
        microbatches = self.config.total_tokens * self.mesh["pipe"] / (self.tokens * self.devices)
        fixed = self.step_seconds - per_microbatch * self.schedule.microbatches
        return (self.config.steps * fixed + microbatches * per_microbatch) * self.devices / 3600

    def _local(self, stage: Stage) -> tuple[float, float]:
        """Parameters of a stage on one device: its experts, and the rest."""
        return stage.experts / (self.mesh["node"] * self.mesh["gpu"]), stage.others

    def _chunk_times(self, stage: Stage) -> ChunkTimes:
        forward, inputs, weight = (
            seconds(stage.work, self.device, passes) * self.tokens / self.device.busy for passes in "FIW"
        )
        exchange = self.exchange_seconds_per_layer * stage.exchanges
        if self.config.recompute == "layer":
            inputs += exchange  # the forward's is repeated, before anything could hide it
        transfer = self.transfer_bytes / self.device.achieved["network"]
        return ChunkTimes(forward, inputs + weight, weight, exchange=exchange, transfer=transfer)

    @property
    def exchange_seconds_per_layer(self) -> float:
        """Time of a MoE layer's exchange in a pass: the slower link's."""
        node, gpu, products, exchange = self._exchange
        return exchange_seconds(self.config.model, node, gpu, products, self.device, exchange) * self.tokens

    @property
    def _rows_between_links(self) -> float:
        """Rows of the buffer that a node's rows arrive in, for each of a device's tokens."""
        node, gpu, _, exchange = self._exchange
        if not is_hierarchical(node, gpu, exchange):
            return 0
        return min(node, most_nodes(self.config.model, node) * self.config.parallel.expert_buffer_factor)

    @property
    def _exchange(self) -> tuple[int, int, Products, str]:
        return self.mesh["node"], self.mesh["gpu"], self.products, self.config.parallel.exchange

    def _memory(self, rank: int, optimizer: int, activations: float) -> ClusterMemory:
        local = [self._local(self.stages[chunk]) for chunk in self.schedule.chunks(rank)]
        held = sum(experts + others for experts, others in local)
        return ClusterMemory(_WEIGHT * held, _GRADIENT * held, optimizer, activations, self._buffers(rank))

    def _buffers(self, rank: int) -> float:
        """Of a layer that runs forward while another runs backward: received rows beyond a balanced load, rows between
        two links, experts' values and their gradients, queries, keys and values; and a chunk's logits with their
        gradient."""
        model, stages = self.config.model, [self.stages[chunk] for chunk in self.schedule.chunks(rank)]
        factor = self.config.parallel.expert_buffer_factor
        row = 2 * (3 * model.d_model + 3 * 2 * model.d_ff_expert)
        rows = self.tokens * (model.top_k * factor * row + self._rows_between_links * 2 * 2 * model.d_model)
        rows = rows if any(stage.exchanges for stage in stages) else 0
        attention = self.tokens * 2 * 2 * model.num_heads * (2 * model.qk_head_dim + model.v_head_dim)
        has_head = any("head" in part.name or "MTP" in part.name for stage in stages for part in stage.parts)
        chunk = self.config.loss.logits_tokens or chunk_tokens(model.vocab_size)
        logits = 2 * 4 * min(chunk, self.tokens) * model.vocab_size if has_head else 0
        return rows + attention + logits


def plan_cluster(config: Config, device: Device, mesh: dict[str, int], schedule: str | None = None) -> ClusterPlan:
    """A plan of this run on this mesh.

    Args:
        config: its `batch.microbatch` says how many sequences the whole mesh takes at once, its `recompute` what the
            backward pass computes again, its `precision` the type of the matrix products.
        device: from `load_device`.
        mesh: sizes of `pipe`, `data`, `node`, `gpu`.
        schedule: one of `schedule.KINDS`; None is the report's dualpipe, or 1f1b where that does not divide.

    Raises:
        ConfigError: the mesh, the model, the batch and the schedule do not fit together.
    """
    if config.precision == "fp32":
        raise ConfigError("precision='fp32': device files know the rates of bf16 and fp8; pass --precision bf16")
    _check_mesh(config, device, mesh)
    spread, rows = mesh["data"] * mesh["node"] * mesh["gpu"], config.batch.rows_per_microbatch
    if rows % spread:
        raise ConfigError(
            f"{'batch.microbatch' if config.batch.microbatch else 'batch.sequences'}={rows}: must be a multiple of the "
            f"{spread} devices that data x node x gpu make; change it or the mesh"
        )
    microbatches = config.batch.sequences // rows
    kind = schedule or default_schedule(mesh["pipe"], microbatches)
    try:
        table = _make(kind, mesh["pipe"], microbatches)
    except ValueError as error:
        raise ConfigError(
            f"{error} (pipe={mesh['pipe']}, batch.sequences / batch.microbatch = {microbatches})"
        ) from error
    plan = ClusterPlan(config, device, mesh, config.precision, table, rows // spread * config.batch.seq_len)
    _ = plan.stages  # raises here what does not fit
    return plan


@cache
def _cut(
    model: ModelConfig, seq_len: int, products: Products, recompute: Recompute, stages: int, device: Device
) -> list[Stage]:
    return split(model_parts(model, seq_len, products, recompute), stages, device)


_make = cache(make)


def default_schedule(ranks: int, microbatches: int) -> str:
    """The report's dualpipe where it is possible, else 1f1b."""
    return "dualpipe" if ranks % 2 == 0 and microbatches % 2 == 0 and microbatches >= 2 * ranks else "1f1b"


def mean_state(config: Config, mesh: dict[str, int]) -> float:
    """Bytes of weights, gradients, master weights and moments on the average rank, where no stage has a second copy."""
    count = count_parameters(config.model)
    experts = count.routed_experts + count.mtp_modules.routed_experts
    held = (count.total - experts + experts / (mesh["node"] * mesh["gpu"])) / mesh["pipe"]
    return (_WEIGHT + _GRADIENT) * held + state_memory(config, mesh).total


def parse_mesh(text: str) -> dict[str, int]:
    """`pipe=16,data=2,node=8,gpu=8` as sizes; an axis that is left out has 1. Raises ConfigError."""
    mesh = dict.fromkeys(AXES, 1)
    for item in text.split(","):
        axis, equals, size = item.strip().partition("=")
        if axis not in AXES or not equals or not size.isdecimal() or int(size) < 1:
            raise ConfigError(f"--mesh {text}: {item.strip()!r} is not one of {', '.join(AXES)} with its size: pipe=16")
        mesh[axis] = int(size)
    return mesh


def _check_mesh(config: Config, device: Device, mesh: dict[str, int]) -> None:
    group = mesh["node"] * mesh["gpu"]
    if config.model.num_experts % group:
        raise ConfigError(
            f"model.num_experts={config.model.num_experts}: cannot be spread over node x gpu = {group} devices of the "
            "mesh; make it a multiple, or raise data instead"
        )
    if mesh["pipe"] > config.model.num_layers:
        raise ConfigError(f"--mesh pipe={mesh['pipe']}: the model has only {config.model.num_layers} layers; lower it")
    if mesh["gpu"] > device.gpus_per_node:
        raise ConfigError(
            f"--mesh gpu={mesh['gpu']}: {device.name} has {device.gpus_per_node} GPUs a node; raise node instead"
        )


def plan_extension(plan: ClusterPlan) -> list[ClusterPlan]:
    """The stages of context extension (report 4.3) on the same mesh, with microbatches of as many tokens.

    A sequence longer than a device's microbatch is split over devices, so that what grows is the attention core;
    gathering its latents, 1/25 of the bytes of the residual stream, is left out. Empty where a batch is less than one
    microbatch.
    """
    plans = []
    for seq_len, sequences, steps in EXTENSION:
        microbatches = seq_len * sequences * plan.mesh["pipe"] // (plan.tokens * plan.devices)
        if not microbatches:
            return []
        batch = BatchConfig(seq_len=seq_len, sequences=sequences)
        model = dataclasses.replace(plan.config.model, max_length=max(plan.config.model.max_length, seq_len))
        config = dataclasses.replace(plan.config, model=model, batch=batch, steps=steps)
        table = make(default_schedule(plan.mesh["pipe"], microbatches), plan.mesh["pipe"], microbatches)
        if microbatches == plan.schedule.microbatches:
            table = plan.schedule
        plans.append(dataclasses.replace(plan, config=config, schedule=table))
    return plans
