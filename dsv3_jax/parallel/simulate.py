"""How long a schedule takes, where ranks wait, and how many activations they hold: without a device."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dsv3_jax.parallel.schedule import CODES, Op, Pair, Schedule

type Number = int | float
type Finished = dict[tuple[str, int, int], tuple[int, Number]]
"""When a stage's pass over a microbatch has finished: its rank and time, by (F, I or W; chunk; microbatch)."""


@dataclass(frozen=True)
class ChunkTimes:
    """Times of one stage over one microbatch, in any unit; whole numbers stay whole."""

    forward: Number = 1
    """F: the forward pass, exchange excluded."""
    backward: Number = 2
    """B: the whole backward pass, weight gradients included, exchange excluded."""
    weight: Number = 1
    """W: the weight gradients' part of it."""
    pair: Number | None = None
    """F&B: a forward and a whole backward that overlap. None: the longer of all their products and all their
    exchanges, that is, either hides behind the other."""
    exchange: Number = 0
    """The expert exchange of a forward, and as much of a backward; nothing hides it outside a pair."""
    transfer: Number = 0
    """From a rank to the next; both go on with other work meanwhile."""

    def of(self, kind: str) -> Number:
        """Time of an operation that runs alone."""
        times = {"F": self.forward, "B": self.backward, "I": self.backward - self.weight, "W": self.weight}
        return times[kind] + (0 if kind == "W" else self.exchange)


def pair_time(forward: ChunkTimes, backward: ChunkTimes, kind: str = "B") -> Number:
    """Time of an overlapped pair: the forward of one stage with the backward (B, or only I) of another.

    Where the stages' own pairs are given, the pair saves what those save on average, over running one after the other.
    """
    left_out = backward.weight if kind == "I" else 0
    products = forward.forward + backward.backward - left_out
    exchanges = forward.exchange + backward.exchange
    if forward.pair is None or backward.pair is None:
        return max(products, exchanges)
    if forward is backward:
        return forward.pair - left_out
    return products + exchanges - (_saved(forward) + _saved(backward)) / 2


def _saved(times: ChunkTimes) -> Number:
    return times.of("F") + times.of("B") - times.pair


@dataclass(frozen=True)
class Event:
    """An operation of a rank, with its start and end."""

    op: Op | Pair
    start: Number
    end: Number


@dataclass(frozen=True)
class Timeline:
    """A schedule that has run."""

    schedule: Schedule
    events: list[list[Event]]
    """Of each rank, in order."""

    @property
    def makespan(self) -> Number:
        """From the first operation's start to the last one's end."""
        return max(row[-1].end for row in self.events)

    @property
    def busy(self) -> list[Number]:
        """Time that each rank works."""
        return [sum(event.end - event.start for event in row) for row in self.events]

    @property
    def bubble(self) -> list[Number]:
        """Time that each rank waits."""
        return [self.makespan - busy for busy in self.busy]

    @property
    def peak(self) -> list[int]:
        """Activations that each rank holds at once, at most: see `peak_activations`."""
        return peak_activations(self.schedule)


def simulate(schedule: Schedule, times: ChunkTimes | Sequence[ChunkTimes]) -> Timeline:
    """Runs a schedule as asynchronous ranks would: an operation starts once its rank is free and its inputs are there.

    Args:
        schedule: from `schedule.make`.
        times: of every stage alike, or of each.

    Raises:
        ValueError: ranks wait for each other for ever; or there are not as many times as stages.
    """
    chunk_times = _per_chunk(schedule, times)
    finished: Finished = {}
    events: list[list[Event]] = [[] for _ in range(schedule.ranks)]
    progress = True
    while progress:
        progress = False
        for rank, row in enumerate(events):
            ops = schedule.ops(rank)
            while len(row) < len(ops):
                op = ops[len(row)]
                ready = _ready(op, rank, schedule, finished, chunk_times)
                if ready is None:
                    break
                start = max(ready, row[-1].end if row else 0)
                row.append(Event(op, start, start + _duration(op, chunk_times)))
                _finish(op, rank, row[-1].end, finished)
                progress = True
    _require_finished(schedule, [len(row) for row in events])
    return Timeline(schedule, events)


def ticks(schedule: Schedule) -> list[list[Op | Pair | None]]:
    """The schedule in lockstep: what every rank does in each tick, None where it waits.

    An operation comes as early as its rank's order allows, one a tick, after the ticks that make what it needs.

    Raises:
        ValueError: ranks wait for each other for ever.
    """
    finished: Finished = {}
    done = [0] * schedule.ranks
    rows: list[list[Op | Pair | None]] = []
    no_time = [ChunkTimes(0, 0, 0)] * schedule.stages
    while any(done[rank] < len(schedule.ops(rank)) for rank in range(schedule.ranks)):
        row: list[Op | Pair | None] = []
        for rank in range(schedule.ranks):
            op = next(iter(schedule.ops(rank)[done[rank] : done[rank] + 1]), None)
            ready = None if op is None else _ready(op, rank, schedule, finished, no_time)
            row.append(op if ready is not None and ready <= len(rows) else None)
        for rank, op in enumerate(row):
            if op is not None:
                _finish(op, rank, len(rows) + 1, finished)
                done[rank] += 1
        if not any(row):
            _require_finished(schedule, done)
        rows.append(row)
    return rows


def simulate_lockstep(
    schedule: Schedule, times: ChunkTimes | Sequence[ChunkTimes], sync: Literal["neighbour", "all"] = "neighbour"
) -> Timeline:
    """Runs a schedule as one program on all ranks does, which exchanges with its neighbours at the end of every tick.

    Args:
        schedule: from `schedule.make`.
        times: of every stage alike, or of each; a transfer adds its time to every tick that ends in one.
        sync: a tick starts when both neighbours' last tick has ended, or when all ranks' has.

    Raises:
        ValueError: as `simulate`.
    """
    chunk_times = _per_chunk(schedule, times)
    events: list[list[Event]] = [[] for _ in range(schedule.ranks)]
    ends: list[Number] = [0] * schedule.ranks
    for row in ticks(schedule):
        starts = [max(ends if sync == "all" else ends[max(rank - 1, 0) : rank + 2]) for rank in range(schedule.ranks)]
        for rank, (op, start) in enumerate(zip(row, starts, strict=True)):
            ends[rank] = start
            if op is not None:
                end = start + _duration(op, chunk_times)
                events[rank].append(Event(op, start, end))
                ends[rank] = end + (0 if _kinds(op) == {"W"} else chunk_times[op.parts[0].chunk].transfer)
    return Timeline(schedule, events)


def peak_activations(
    schedule: Schedule, sizes: Sequence[Number] | None = None, until: Literal["W", "I"] = "W"
) -> list[Number]:
    """The most that each rank holds at once of what forwards leave for backwards.

    Args:
        schedule: from `schedule.make`.
        sizes: what a microbatch takes of each stage; None counts stages, each as 1.
        until: a microbatch is let go after its weight gradients, or after its input's gradient.
    """
    sizes_of = np.array([1] * schedule.stages if sizes is None else sizes)
    # Parts one after the other: a pair's forward begins before its backward has let anything go.
    kinds, chunks = (schedule.cells[..., column].reshape(schedule.ranks, -1) for column in (0, 1))
    held = (kinds == CODES.index("F")) * 1
    for kind in ("B", until):
        held -= kinds == CODES.index(kind)
    return (held * sizes_of[chunks]).cumsum(axis=1).max(axis=1).tolist()


def _per_chunk(schedule: Schedule, times: ChunkTimes | Sequence[ChunkTimes]) -> Sequence[ChunkTimes]:
    if isinstance(times, ChunkTimes):
        return [times] * schedule.stages
    if len(times) != schedule.stages:
        raise ValueError(f"times of {len(times)} stages: {schedule.kind} has {schedule.stages}; give one for each")
    return times


def _duration(op: Op | Pair, times: Sequence[ChunkTimes]) -> Number:
    if isinstance(op, Pair):
        return pair_time(times[op.forward.chunk], times[op.backward.chunk], op.backward.kind)
    return times[op.chunk].of(op.kind)


def _kinds(op: Op | Pair) -> set[str]:
    return {part.kind for part in op.parts}


def _ready(
    op: Op | Pair, rank: int, schedule: Schedule, finished: Finished, times: Sequence[ChunkTimes]
) -> Number | None:
    """When all that an operation needs has reached its rank; None while that is not known."""
    ready: Number = 0
    for need in (need for part in op.parts for need in _needs(part, schedule)):
        if need not in finished:
            return None
        maker, end = finished[need]
        ready = max(ready, end if maker == rank else end + times[need[1]].transfer)
    return ready


def _needs(op: Op, schedule: Schedule) -> list[tuple[str, int, int]]:
    if op.kind == "F":
        return [("F", op.chunk - 1, op.microbatch)] if op.chunk else []
    if op.kind == "W":
        return [("I", op.chunk, op.microbatch)]
    above = [("I", op.chunk + 1, op.microbatch)] if op.chunk + 1 < schedule.stages else []
    return [("F", op.chunk, op.microbatch), *above]


def _finish(op: Op | Pair, rank: int, end: Number, finished: Finished) -> None:
    for part in op.parts:
        for kind in "IW" if part.kind == "B" else part.kind:
            finished[kind, part.chunk, part.microbatch] = (rank, end)


def _require_finished(schedule: Schedule, done: list[int]) -> None:
    for rank, count in enumerate(done):
        if count < len(schedule.ops(rank)):
            raise ValueError(f"{schedule.kind}: rank {rank} waits for ever at {schedule.ops(rank)[count]}")
