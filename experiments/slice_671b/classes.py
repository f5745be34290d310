"""A profile by class of kernel, beside what the planner says each class has to do."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from share import Share

from dsv3_jax.parallel.trace import Kernel
from dsv3_jax.planner.devices import Device
from dsv3_jax.planner.work import Work, layer_work


@dataclass(frozen=True)
class KernelClass:
    """Kernels that one rate describes."""

    name: str
    kernels: str
    """What their names match."""
    work: str
    """What the names and passes of the planner's work match: "name, pass"."""
    rate: str | None = None
    """Of a device file."""


MEMORY = "of them bound by memory"
CLASSES = (
    KernelClass("grouped products", r"fp8_grouped_matmul", r"routed experts' products", "grouped_fp8"),
    KernelClass("dense products", r"fp8_matmul", r"(attention and dense products|recomputation), [FI]", "dense_fp8"),
    KernelClass("weight gradients", r"fp8_(grouped_)?wgrad", r"weight gradients, W", "weight_gradient_fp8"),
    KernelClass("attention forward", r"attention_forward", r"attention core, F", "attention_forward"),
    KernelClass("attention backward", r"attention_backward", r"attention core, I", "attention_backward"),
    KernelClass("router", r"nvjet|gemm", r"router"),
    KernelClass("quantization", r"quantize|retile", ""),
    KernelClass("routed rows", r"take_rows", ""),
    KernelClass("the rest", r"", ""),
)
"""A kernel is of the first class that its name matches."""


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    name: str
    milliseconds: float
    kernels: float
    """How many run in one pair."""
    flops: float
    roofline: float
    """Milliseconds at the data sheet's peaks."""


def rows(kernels: Iterable[Kernel], pairs: int, share: Share, device: Device) -> list[Row]:
    """Of a profile of so many pairs. What is bound by memory has one roofline, in the last row."""
    kernels, found = list(kernels), []
    for name, seconds, count in _measured(kernels, pairs):
        work = [item for item in _work(share) if item.flops and _class_of_work(item) == name]
        flops = sum(item.flops for item in work)
        bound = sum(item.flops / device.peak["fp8" if item.rate.endswith("fp8") else "bf16"] for item in work)
        found.append(Row(name, 1e3 * seconds, count, flops, 1e3 * bound))
    in_bytes = sum(item.bytes for item in _work(share))
    parts = [row for row in found if not row.flops]
    total = Row(
        MEMORY,
        sum(row.milliseconds for row in parts),
        sum(row.kernels for row in parts),
        0,
        1e3 * in_bytes / device.peak["memory"],
    )
    return [*found, total]


def achieved(table: Sequence[Row], share: Share) -> dict[str, float]:
    """The rates of a device file that the table measured."""
    by_name = {row.name: row for row in table}
    speed = lambda name, amount: 1e3 * amount / by_name[name].milliseconds  # noqa: E731
    rates = {kind.rate: speed(kind.name, by_name[kind.name].flops) for kind in CLASSES if kind.rate}
    return rates | {"memory": speed(MEMORY, sum(item.bytes for item in _work(share)))}


def markdown(table: Sequence[Row], step: float) -> str:
    """The table; `step` is the measured time of a pair in milliseconds."""
    lines = [
        "| kernels | ms | of the pair | number | TFLOP/s | at the peaks, ms |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in table:
        rate = f"{row.flops / row.milliseconds / 1e9:.0f}" if row.flops else ""
        bound = f"{row.roofline:.1f}" if row.roofline else ""
        time = f"{row.milliseconds:.2f} | {row.milliseconds / step:.1%}"
        lines.append(f"| {row.name} | {time} | {row.kernels:.0f} | {rate} | {bound} |")
    busy = sum(row.milliseconds for row in table if row.name != MEMORY)
    flops, bound = sum(row.flops for row in table), sum(row.roofline for row in table)
    lines.append(f"| no kernel runs | {step - busy:.2f} | {1 - busy / step:.1%} | | | |")
    lines.append(f"| **the pair** | **{step:.2f}** | | | {flops / step / 1e9:.0f} | {bound:.1f} |")
    return "\n".join(lines)


def _measured(kernels: Sequence[Kernel], pairs: int) -> Iterable[tuple[str, float, float]]:
    """Name, seconds and number of kernels of every class, of one pair."""
    of: dict[str, list[float]] = {kind.name: [] for kind in CLASSES}
    for kernel in kernels:
        of[_class_of(kernel.name)].append(kernel.end - kernel.start)
    return [(name, sum(seconds) / pairs, len(seconds) / pairs) for name, seconds in of.items()]


def _class_of(kernel: str) -> str:
    return next(kind.name for kind in CLASSES if re.search(kind.kernels, kernel))


def _class_of_work(item: Work) -> str:
    if item.name == "weight gradients" and not item.rate.endswith("fp8"):
        return "router"
    return next(kind.name for kind in CLASSES if kind.work and re.search(kind.work, f"{item.name}, {item.passes}"))


def _work(share: Share) -> list[Work]:
    """Of all layers over a microbatch, forward and backward."""
    tokens = share.layers * share.seq_len
    items = layer_work(share.model, True, share.seq_len, "fp8", share.recompute)
    return [replace(item, flops=item.flops * tokens, bytes=item.bytes * tokens) for item in items]
