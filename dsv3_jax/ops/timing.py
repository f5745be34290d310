"""Timing of GPU functions side by side, for the benchmarks beside the operations."""

import itertools
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax

from dsv3_jax.ops.hopper import device_refusal


def end_without_hopper(what: str) -> None:
    """Ends the process in a sentence where `what` cannot run its kernels."""
    refusal = device_refusal()
    if refusal is not None:
        sys.exit(f"{what} {refusal}")


def interleaved_medians(
    contenders: dict[str, Callable[[], Any]], wait: Callable[[Any], Any], burst: float = 0.06, rounds: int = 7
) -> dict[str, float]:
    """Median seconds of a call of each contender, taking turns so that a hot card slows all alike.

    A turn is a burst of calls that lasts at least `burst` seconds by a first estimate: shorter ones, timed from the
    host, read too long. `wait` blocks until the result it is given is there.
    """
    calls = {name: _calls(f, wait, burst) for name, f in contenders.items()}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds):
        for name in list(contenders) if turn % 2 == 0 else reversed(list(contenders)):
            seconds[name].append(_burst(contenders[name], wait, calls[name]))
    return {name: statistics.median(values) for name, values in seconds.items()}


def wait_for_all(result: Any) -> None:
    """Blocks until a result of JAX or PyTorch is there."""
    if any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(result)):
        jax.block_until_ready(result)
        return
    import torch  # only where the peer runs

    torch.cuda.synchronize()


def _calls(f: Callable[[], Any], wait: Callable[[Any], Any], burst: float) -> int:
    _burst(f, wait, 3)
    return max(3, int(burst / _burst(f, wait, 5)) + 1)


def _burst(f: Callable[[], Any], wait: Callable[[Any], Any], calls: int) -> float:
    started = time.perf_counter()
    for _ in range(calls):
        result = f()
    wait(result)
    return (time.perf_counter() - started) / calls


def rotating(f: Callable[..., Any], sets: list[dict[str, Any]]) -> Callable[[], Any]:
    """Calls of f on one set of keyword arguments after the other, so that no call finds its operands in the cache."""
    turns = itertools.cycle(sets)
    return lambda: f(**next(turns))
