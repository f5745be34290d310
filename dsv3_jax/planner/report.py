"""The plan of a run, as data and as tables."""

import dataclasses
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from dsv3_jax.config import Config, ParallelConfig
from dsv3_jax.planner.flops import training_flops_per_token, training_flops_per_token_with_mtp
from dsv3_jax.planner.memory import TrainingMemory, kv_cache_bytes_per_token, training_memory
from dsv3_jax.planner.parameters import ParameterCount, count_parameters


@dataclass(frozen=True)
class Plan:
    """What a run costs, known before it starts."""

    parameters: ParameterCount
    """Exact counts by kind."""
    flops_per_token: int
    """Training FLOPs per token of the main model."""
    flops_per_token_with_mtp: int
    """Training FLOPs per token, MTP modules included."""
    kv_cache_bytes_per_token: int
    """Bytes a decoded token keeps, in BF16."""
    tokens: int
    """Tokens of the whole run, its growing batch taken into account."""
    mesh: dict[str, int] | None
    """Size of each mesh axis; None where the configuration leaves the number of devices open."""
    memory: TrainingMemory | None
    """Training state per device of that mesh; None with a pipeline, whose ranks differ: see `plan_cluster`."""

    @property
    def training_flops(self) -> int:
        """FLOPs of the run, main model."""
        return self.flops_per_token * self.tokens

    @property
    def training_flops_with_mtp(self) -> int:
        """FLOPs of the run, MTP modules included."""
        return self.flops_per_token_with_mtp * self.tokens


def plan(config: Config) -> Plan:
    """Everything the planner knows about a run.

    The memory is planned if `parallel` says how many devices there are: by `devices`, or by `data`, `node` and `gpu`
    together.

    Raises:
        ConfigError: the mesh contradicts itself, or the experts do not divide over it.
    """
    model, seq_len = config.model, config.batch.seq_len
    mesh = mesh_of(config.parallel)
    return Plan(
        parameters=count_parameters(model),
        flops_per_token=training_flops_per_token(model, seq_len),
        flops_per_token_with_mtp=training_flops_per_token_with_mtp(model, seq_len),
        kv_cache_bytes_per_token=kv_cache_bytes_per_token(model),
        tokens=config.total_tokens,
        mesh=mesh,
        memory=None if mesh is None or mesh["pipe"] > 1 else training_memory(config, mesh),
    )


def print_plan(config: Config) -> None:
    """Prints `plan(config)` as tables: parameters, compute, and memory per device. Raises what `plan` raises."""
    planned = plan(config)
    console = Console()
    print_model(config, planned, console)
    if planned.memory is None and planned.mesh is not None:
        console.print("The ranks of a pipeline hold different stages: see their memory with --device.")
    elif planned.memory is None:
        console.print("Training state per device: set parallel.devices, or parallel.data and parallel.gpu, to see it.")
    else:
        console.print(_memory_table(planned.memory, planned.mesh))


def print_model(config: Config, planned: Plan, console: Console) -> None:
    """Prints what does not depend on the devices: parameters and compute."""
    console.print(_parameter_table(planned.parameters))
    console.print(_compute_table(planned, config))


def mesh_of(parallel: ParallelConfig) -> dict[str, int] | None:
    """The mesh, or None where its size is open until the devices are counted."""
    if parallel.devices is not None:
        return parallel.shape(parallel.devices)
    if parallel.data is None or parallel.gpu is None:
        return None
    return parallel.shape(parallel.pipe * parallel.data * parallel.node * parallel.gpu)


def table(title: str, headers: tuple[str, ...], rows: list[tuple[str, ...] | None]) -> Table:
    """A table whose first column is text and whose others are numbers; None draws a line."""
    table = Table(title=title, title_justify="left")
    for i, header in enumerate(headers):
        table.add_column(header, justify="right" if i else "left", no_wrap=bool(i))
    for row in rows:
        if row is None:
            table.add_section()
        else:
            table.add_row(*row)
    return table


def _parameter_table(count: ParameterCount) -> Table:
    mtp = dataclasses.asdict(count.mtp_modules)
    kinds = ["embedding", "attention", "dense_ffn", "routed_experts", "shared_experts", "router", "projection",
             "norms", "head"]  # fmt: skip
    rows: list[tuple[str, ...] | None] = [
        (kind.replace("_", " ").replace("ffn", "FFN"), _integer(getattr(count, kind, 0)), _integer(mtp.get(kind, 0)))
        for kind in kinds
    ]
    rows += [
        None,
        ("total", _integer(count.main), _integer(count.mtp)),
        ("active per token", _integer(count.active), ""),
    ]
    return table("Parameters", ("", "main model", "MTP modules"), rows)


def _compute_table(planned: Plan, config: Config) -> Table:
    main, with_mtp = planned.flops_per_token, planned.flops_per_token_with_mtp
    return table(
        f"Compute at {config.batch.seq_len:,} tokens a sequence",
        ("", "main model", "with MTP"),
        [
            ("training per token (GFLOP)", f"{main / 1e9:,.4g}", f"{with_mtp / 1e9:,.4g}"),
            ("tokens of the run", _integer(planned.tokens), ""),
            ("training of the run (FLOP)", f"{planned.training_flops:.3e}", f"{planned.training_flops_with_mtp:.3e}"),
            ("KV cache per token (bytes)", _integer(planned.kv_cache_bytes_per_token), ""),
        ],
    )


def _memory_table(memory: TrainingMemory, mesh: dict[str, int]) -> Table:
    on_host = [("averaged weights, likewise, in host memory", _gibibytes(memory.average))] if memory.average else []
    sizes = " x ".join(f"{axis} {size}" for axis, size in mesh.items())
    return table(
        "Training state per device, activations excluded",
        (f"of {sizes}", "GiB"),
        [
            ("master weights, ZeRO-1 over all replicas", _gibibytes(memory.master)),
            ("Adam moments, likewise", _gibibytes(memory.moments)),
            ("compute weights, experts over node x gpu", _gibibytes(memory.weights)),
            ("gradients, likewise", _gibibytes(memory.gradients)),
            None,
            ("total", _gibibytes(memory.total)),
            *on_host,
        ],
    )


def _integer(value: int) -> str:
    return f"{value:,}" if value else "-"


def _gibibytes(value: int) -> str:
    return f"{value / 2**30:,.2f}"
