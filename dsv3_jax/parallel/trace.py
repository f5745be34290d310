"""What a profile of GPUs says about exchanges: how long they ran, and how much of that beside products."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import jax

_EXCHANGE = re.compile(r"sendrecv|all.?to.?all", re.IGNORECASE)
_OTHER_COLLECTIVE = re.compile(r"nccl|memcpy|memset", re.IGNORECASE)


@dataclass(frozen=True)
class Kernel:
    """What ran on a GPU, and when, in seconds."""

    name: str
    start: float
    end: float


@dataclass(frozen=True)
class ExchangeTime:
    """Seconds of one GPU in a profile."""

    exchange: float
    """In which a kernel of an expert exchange ran."""
    hidden: float
    """Of them, those in which a kernel that computes ran too."""
    compute: float
    """In which a kernel that computes ran."""


def exchange_time(kernels: Iterable[Kernel]) -> ExchangeTime:
    """From all kernels of one GPU. Other collectives and copies count as neither."""
    kernels = list(kernels)
    exchange = _union(k for k in kernels if _EXCHANGE.search(k.name))
    compute = _union(k for k in kernels if not _EXCHANGE.search(k.name) and not _OTHER_COLLECTIVE.search(k.name))
    return ExchangeTime(_length(exchange), _length(_intersection(exchange, compute)), _length(compute))


def read_kernels(folder: Path) -> dict[str, list[Kernel]]:
    """The kernels of each GPU from the newest profile that `jax.profiler` wrote into a folder.

    Raises FileNotFoundError where there is none.
    """
    files = sorted(folder.rglob("*.xplane.pb"), key=lambda file: file.stat().st_mtime)
    if not files:
        raise FileNotFoundError(f"{folder}: holds no *.xplane.pb; profile with jax.profiler.trace({str(folder)!r})")
    planes = jax.profiler.ProfileData.from_file(str(files[-1])).planes
    return {
        plane.name: [
            Kernel(event.name, 1e-9 * event.start_ns, 1e-9 * (event.start_ns + event.duration_ns))
            for line in plane.lines
            if line.name.startswith("Stream")
            for event in line.events
        ]
        for plane in planes
        if plane.name.startswith("/device:GPU")
    }


Intervals = list[tuple[float, float]]


def _union(kernels: Iterable[Kernel]) -> Intervals:
    """Disjoint intervals, in order."""
    merged: Intervals = []
    for start, end in sorted((k.start, k.end) for k in kernels):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def _intersection(a: Intervals, b: Intervals) -> Intervals:
    found, i, j = [], 0, 0
    while i < len(a) and j < len(b):
        start, end = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        if start < end:
            found.append((start, end))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return found


def _length(intervals: Intervals) -> float:
    return sum(end - start for start, end in intervals)
