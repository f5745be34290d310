"""Every setting of a run, as frozen dataclasses that refuse inconsistent values when they are built.

A config file under `configs/` has one function `config() -> Config`. No other module reads flags or the
environment: what a function needs it is given, from here.
"""

import dataclasses
import itertools
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_type_hints

from dsv3_jax.model_config import ModelConfig, YarnConfig
from dsv3_jax.settings import ConfigError, require, require_choices

__all__ = [
    "BatchConfig",
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "LogConfig",
    "LossConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "YarnConfig",
    "from_dict",
    "to_dict",
]


@dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how it becomes rows of tokens (report 4.1)."""

    source: str = "stdlib"
    """`stdlib` (the Python standard library's own source), a folder of .txt/.md/.py, or a .jsonl, .parquet or
    .arrayrecord file, or a folder of such files."""
    text_field: str = "text"
    """Field that holds the text in .jsonl, .parquet and .arrayrecord records of JSON."""
    tokenizer: str | None = None
    """A tokenizer.json to load; None trains a byte-level BPE on the source and caches it by content."""
    cache_dir: str = "~/.cache/dsv3_jax"
    """Where trained tokenizers are kept."""
    fim_rate: float = 0.1
    """Share of documents rearranged as prefix-suffix-middle."""
    split_rate: float = 0.1
    """Share of merged punctuation tokens that are split at random."""
    shuffle_rows: int = 1024
    """Rows shuffled among each other, since consecutive rows often come from one document; 1 keeps their order."""
    validation_share: float = 0.02
    """Share of documents held out, chosen by a hash of their content."""
    streams: int | None = None
    """Streams that documents are dealt to, and processes read. The rows of a run depend on their number alone, so that
    it can go on with any number of processes that divides it. None is one a process, or as many as before."""

    def __post_init__(self) -> None:
        require(self.shuffle_rows > 0, "data.shuffle_rows", self.shuffle_rows, "must be positive; 1 keeps the order")
        require(self.streams is None or self.streams > 0, "data.streams", self.streams, "must be positive")
        require(bool(self.source), "data.source", self.source, "name a folder, a file, or 'stdlib'")
        for name in ("fim_rate", "split_rate"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"data.{name}", value, "must lie between 0 and 1")
        require(
            0 < self.validation_share < 1,
            "data.validation_share",
            self.validation_share,
            "must lie between 0 and 1, both excluded",
        )


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and the learning rate, whose times are counted in tokens (report 4.2)."""

    peak_lr: float = 2.2e-4
    """Learning rate after warmup."""
    warmup_tokens: float = 25.2e9
    """Tokens of linear warmup from 0."""
    decay_start_tokens: float = 10e12
    """Where the cosine decay starts."""
    decay_end_tokens: float = 14.3e12
    """Where the cosine decay ends."""
    decayed_lr: float = 2.2e-5
    """Learning rate at the end of the cosine."""
    final_start_tokens: float = 14.633e12
    """Where the last phase starts."""
    final_lr: float = 7.3e-6
    """Learning rate of the last phase."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay, on every weight matrix and not on norm gains."""
    clip_norm: float = 1.0
    """Largest global norm of the gradient."""
    moments: Literal["bfloat16", "float32"] = "bfloat16"
    """Type the Adam moments are stored in."""
    ema_decay: float | None = None
    """Decay per step of the average of the weights kept in host memory; None keeps none."""

    def __post_init__(self) -> None:
        require_choices(self, "optimizer.")
        for name in ("warmup_tokens", "decayed_lr", "final_lr", "weight_decay"):
            require(getattr(self, name) >= 0, f"optimizer.{name}", getattr(self, name), "cannot be negative")
        require(self.eps > 0, "optimizer.eps", self.eps, "must be positive")
        require(self.peak_lr > 0, "optimizer.peak_lr", self.peak_lr, "must be positive")
        order = ["warmup_tokens", "decay_start_tokens", "decay_end_tokens", "final_start_tokens"]
        for before, after in itertools.pairwise(order):
            require(
                getattr(self, before) <= getattr(self, after),
                f"optimizer.{before}",
                getattr(self, before),
                f"must not come after optimizer.{after}={getattr(self, after)}",
            )
        for name in ("beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, f"optimizer.{name}", getattr(self, name), "must lie in [0, 1)")
        require(self.clip_norm > 0, "optimizer.clip_norm", self.clip_norm, "must be positive")
        require(
            self.ema_decay is None or 0 < self.ema_decay < 1,
            "optimizer.ema_decay",
            self.ema_decay,
            "must lie between 0 and 1, or be None",
        )


@dataclass(frozen=True)
class LossConfig:
    """Weights of the losses and the speed of the router bias, over tokens (report 2.1.2, 2.2, 4.2)."""

    mtp_weight: float = 0.3
    """Lambda of the MTP losses before `mtp_switch_tokens`."""
    mtp_weight_late: float = 0.1
    """Lambda afterwards."""
    mtp_switch_tokens: float = 10e12
    """When lambda changes."""
    bias_update_speed: float = 0.001
    """Gamma of the router bias; 0 switches auxiliary-loss-free balancing off."""
    bias_freeze_tokens: float = 14.3e12
    """From here on gamma is 0."""
    sequence_balance_weight: float = 1e-4
    """Alpha of the sequence-wise balance loss."""
    batch_balance_weight: float = 0.0
    """Weight of the batch-wise balance loss, over each microbatch of the whole mesh."""
    logits_tokens: int | None = None
    """Tokens of a device whose logits exist at a time, 6 bytes for each logit and its gradient; None is as many as half
    a GiB of float32 holds. More take less time: the head's float32 gradient is read and written for each part."""

    def __post_init__(self) -> None:
        tokens = self.logits_tokens
        require(tokens is None or tokens > 0, "loss.logits_tokens", tokens, "must be at least 1, or None")
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            require(value is None or value >= 0, f"loss.{f.name}", value, "cannot be negative")


@dataclass(frozen=True)
class BatchConfig:
    """How many tokens a step takes (report 4.2)."""

    seq_len: int = 256
    """Tokens of one sequence."""
    sequences: int = 8
    """Sequences of the global batch, once the ramp is over."""
    start_sequences: int | None = None
    """Sequences of the first steps; None is no ramp."""
    ramp_tokens: float = 0.0
    """Tokens over which the batch grows linearly to `sequences`."""
    ramp_microbatches: int = 1
    """Microbatches that the batch grows by at a time. Schedules of two directions, as dualpipe, need an even number."""
    microbatch: int | None = None
    """Sequences of one forward and backward pass, over the whole mesh; None takes the batch at once. The batch grows
    by whole microbatches."""

    def __post_init__(self) -> None:
        require(self.seq_len > 1, "batch.seq_len", self.seq_len, "must be at least 2")
        for name in ("sequences", "start_sequences", "microbatch", "ramp_microbatches"):
            value = getattr(self, name)
            require(value is None or value > 0, f"batch.{name}", value, "must be positive")
        require(
            self.ramp_microbatches == 1 or self.start_sequences is not None,
            "batch.ramp_microbatches",
            self.ramp_microbatches,
            "is for a batch that grows; set batch.start_sequences, or leave it out",
        )
        require(
            self.start_sequences is None or self.start_sequences <= self.sequences,
            "batch.start_sequences",
            self.start_sequences,
            f"must not exceed batch.sequences={self.sequences}",
        )
        require(
            self.start_sequences is None or self.microbatch is not None,
            "batch.start_sequences",
            self.start_sequences,
            "a batch that grows needs batch.microbatch",
        )
        for name in ("sequences", "start_sequences"):
            value = getattr(self, name)
            require(
                value is None or value % self.rows_per_microbatch == 0,
                f"batch.{name}",
                value,
                f"must be a multiple of batch.microbatch={self.microbatch}",
            )
        require(
            (self.start_sequences is None) == (self.ramp_tokens == 0) and self.ramp_tokens >= 0,
            "batch.ramp_tokens",
            self.ramp_tokens,
            "a growing batch needs batch.start_sequences and a positive batch.ramp_tokens, a constant one neither",
        )

    @property
    def rows_per_microbatch(self) -> int:
        """Sequences of one forward and backward pass, over the whole mesh."""
        return self.microbatch or self.sequences

    def sequences_at(self, tokens: int) -> int:
        """Sequences of the step that starts after `tokens` tokens: linear over the ramp, so many microbatches at a
        time."""
        if self.start_sequences is None or tokens >= self.ramp_tokens:
            return self.sequences
        grown = (self.sequences - self.start_sequences) * tokens / self.ramp_tokens
        return self.start_sequences + int(grown // self._grain) * self._grain

    @property
    def sizes(self) -> list[int]:
        """Sequences of every batch that the run may take, from the first to the last."""
        return [*range(self.start_sequences or self.sequences, self.sequences, self._grain), self.sequences]

    @property
    def _grain(self) -> int:
        return self.ramp_microbatches * self.rows_per_microbatch

    def tokens_after(self, steps: int) -> int:
        """Tokens that the first `steps` optimizer steps take."""
        tokens = taken = 0
        while taken < steps and (sequences := self.sequences_at(tokens)) < self.sequences:
            tokens, taken = tokens + sequences * self.seq_len, taken + 1
        return tokens + (steps - taken) * self.sequences * self.seq_len


@dataclass(frozen=True)
class ParallelConfig:
    """The mesh. Experts live on `node` x `gpu`, the batch on `data` x `node` x `gpu`, layers on `pipe` (report 3.2)."""

    pipe: int = 1
    """Ranks of the pipeline, which the layers are cut into stages for; 1 is no pipeline."""
    schedule: Literal[
        "gpipe", "1f1b", "interleaved_1f1b", "zb1p", "dualpipe", "dualpipev", "dualpipe_lockstep",
        "dualpipe_lockstep_late",
    ] = "1f1b"  # fmt: skip
    """In which order the pipeline's ranks run their stages. interleaved_1f1b and dualpipev cut the model into two
    stages a rank; dualpipe and its lockstep orders keep two copies of it, for an even number of ranks. While a batch
    that grows is too small for dualpipe (less than 2 x pipe microbatches), steps take dualpipe_lockstep's order."""
    data: int | None = None
    """Replicas of the experts; None takes what `node` and `gpu` leave."""
    node: int = 1
    """Nodes of one expert-parallel group: the slow link."""
    gpu: int | None = None
    """GPUs of a node that share its experts: the fast link. None takes all the devices that `data` and `node` leave."""
    devices: int | None = None
    """Devices to use, over all processes; on CPU they are emulated by the command line. None takes all there are."""
    expert_buffer_factor: float = 2.0
    """Rows a device can send another in the expert exchange, and compute with, over a balanced load. A step that needs
    more is run again with a larger buffer."""
    start_timeout: float = 50.0
    """Seconds that the processes of a run wait for one another at its start."""
    exchange: Literal["hierarchical", "flat"] = "hierarchical"
    """How rows reach their experts: `hierarchical` sends each to every node once, and on to every device there; `flat`
    straight to every device."""
    overlap_microbatches: bool = False
    """Run two microbatches side by side, so that the expert exchange of one can hide behind the products of the other;
    takes the activations of both."""

    def __post_init__(self) -> None:
        require_choices(self, "parallel.")
        for name in ("pipe", "data", "node", "gpu", "devices"):
            value = getattr(self, name)
            require(value is None or value > 0, f"parallel.{name}", value, "must be positive")
        require(
            self.expert_buffer_factor >= 1,
            "parallel.expert_buffer_factor",
            self.expert_buffer_factor,
            "a balanced load needs a factor of at least 1",
        )
        require(
            self.pipe > 1 or self.schedule == "1f1b",
            "parallel.schedule",
            self.schedule,
            "orders the ranks of a pipeline, and parallel.pipe=1 is none; set parallel.pipe, or leave it out",
        )
        require(self.start_timeout > 0, "parallel.start_timeout", self.start_timeout, "must be positive")

    def shape(self, devices: int) -> dict[str, int]:
        """The size of each mesh axis on this many devices; raises ConfigError where they do not divide."""
        gpu, data = self.gpu, self.data
        if gpu is None:
            gpu = max(1, devices // (self.pipe * (data or 1) * self.node))
        if data is None:
            data = max(1, devices // (self.pipe * self.node * gpu))
        total = self.pipe * data * self.node * gpu
        require(
            total == devices,
            "parallel",
            f"pipe {self.pipe} x data {data} x node {self.node} x gpu {gpu}",
            f"is {total} devices, and there are {devices}: change parallel.pipe, parallel.data, parallel.node, "
            "parallel.gpu or parallel.devices",
        )
        return {"pipe": self.pipe, "data": data, "node": self.node, "gpu": gpu}


@dataclass(frozen=True)
class CheckpointConfig:
    """When the whole state is saved, and how much of it is kept."""

    every: int = 100
    """Steps between checkpoints; the last step and a SIGTERM save too."""
    keep: int = 3
    """Checkpoints kept."""

    def __post_init__(self) -> None:
        require(self.every > 0, "checkpoint.every", self.every, "must be positive")
        require(self.keep > 0, "checkpoint.keep", self.keep, "must be positive")


@dataclass(frozen=True)
class LogConfig:
    """Where the run reports to, besides the terminal and metrics.jsonl."""

    tensorboard: bool = True
    """Write TensorBoard event files into the output folder, when the package is installed."""
    wandb_project: str | None = None
    """Weights & Biases project; needs the wandb package."""
    sample_tokens: int = 120
    """Tokens of the sample completion at the end."""
    validation_rows: int = 64
    """Held-out sequences that the final validation loss is measured on."""

    def __post_init__(self) -> None:
        require(self.sample_tokens >= 0, "log.sample_tokens", self.sample_tokens, "cannot be negative")
        require(self.validation_rows > 0, "log.validation_rows", self.validation_rows, "must be positive")


@dataclass(frozen=True)
class Config:
    """One training run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    steps: int = 100
    """Optimizer steps of the whole run."""
    output_dir: str = "runs/tiny"
    """Folder for checkpoints, metrics and pictures."""
    resume: Literal["auto", "never"] = "never"
    """`auto` continues from the newest readable checkpoint in the output folder, if there is one."""
    precision: Literal["bf16", "fp32", "fp8"] = "bf16"
    """Type of the matrix products. Master weights and gradients are float32 whatever it is. `fp8` is the report's
    recipe (3.3) for the linears; the rest, decoding and samples are in bf16."""
    recompute: Literal["none", "report", "layer"] = "report"
    """What the backward pass computes again: nothing; norms, MLA up-projections and SwiGLU as the report does; or
    every layer from its input."""
    unroll_layers: int = 1
    """Stacks of at most so many layers are compiled as straight code, deeper ones as a loop, which compiles as fast for
    any depth but copies weights, gradients and what is kept into its stacks and out: a fifth of a step on a GPU."""
    seed: int = 0
    """Seed of the weights, the shuffling, FIM and the sample."""
    profile: bool = False
    """Write a trace of three steps that xprof and Perfetto open."""
    max_bad_steps: int = 5
    """Stop after this many steps in a row with a non-finite loss or gradient."""

    def __post_init__(self) -> None:
        require_choices(self)
        require(self.steps > 0, "steps", self.steps, "must be positive")
        require(self.unroll_layers > 0, "unroll_layers", self.unroll_layers, "must be at least 1, which is a loop")
        require(self.max_bad_steps > 0, "max_bad_steps", self.max_bad_steps, "must be positive")
        require(
            self.batch.seq_len <= self.model.max_length,
            "batch.seq_len",
            self.batch.seq_len,
            f"exceeds model.max_length={self.model.max_length}",
        )
        require(
            self.batch.seq_len > self.model.num_mtp_modules + 1,
            "batch.seq_len",
            self.batch.seq_len,
            f"must exceed model.num_mtp_modules + 1 = {self.model.num_mtp_modules + 1}",
        )
        require(
            not self.parallel.overlap_microbatches or self.parallel.pipe == 1,
            "parallel.overlap_microbatches",
            True,
            f"with parallel.pipe={self.parallel.pipe} the schedule pairs microbatches, as dualpipe does; leave it off",
        )
        require(
            not self.parallel.overlap_microbatches or self.batch.sequences > self.batch.rows_per_microbatch,
            "parallel.overlap_microbatches",
            True,
            "needs two microbatches, and the batch is one: set batch.microbatch to at most half of batch.sequences="
            f"{self.batch.sequences}",
        )

    @property
    def total_tokens(self) -> int:
        """Tokens of the whole run, its growing batch taken into account."""
        return self.batch.tokens_after(self.steps)


def to_dict(config: Config) -> dict[str, Any]:
    """The settings as plain values that JSON can hold."""
    return dataclasses.asdict(config)


def from_dict(values: dict[str, Any], kind: type = Config) -> Any:
    """The settings that `to_dict` made the values of. Raises ConfigError for a name that is not a setting."""
    types = get_type_hints(kind)
    unknown = sorted(values.keys() - types.keys())
    if unknown:
        raise ConfigError(f"{unknown[0]}={values[unknown[0]]!r}: is not a setting of {kind.__name__}; remove it")

    def build(name: str, value: Any) -> Any:
        nested = [t for t in (types[name], *get_args(types[name])) if dataclasses.is_dataclass(t)]
        return from_dict(value, nested[0]) if nested and isinstance(value, dict) else value

    return kind(**{name: build(name, value) for name, value in values.items()})
