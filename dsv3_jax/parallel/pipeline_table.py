"""A schedule as the numbers that a program in lockstep reads: what each rank does in each tick, from and to which slot.

Four pools of slots hold what waits between ticks: stage inputs (until F), what F kept (until I), gradients of stage
outputs (until I; before, on the last stage, its output), and the products of deferred weight gradients (until W). A
slot is given for exactly as long as it is needed, so that a pool is as large as the schedule's own peak.
"""

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from dsv3_jax.parallel.schedule import Schedule
from dsv3_jax.parallel.simulate import ticks

POOLS = ("inputs", "kept", "gradients", "products")

type Work = tuple[bool, str, bool]
"""What a tick runs: a forward; no backward, I or B; a deferred weight gradient. One branch of the program each."""


@dataclass(frozen=True)
class Channel:
    """What a rank sends at the end of a tick, by how many ranks it moves on, around the end."""

    passes: str
    """F: outputs to the next stage. I: gradients to the stage before."""
    shift: int
    pairs: tuple[tuple[int, int], ...]
    """(sender, receiver) in any tick; a shift of 0 stays and is not sent."""

    @property
    def name(self) -> str:
        """Its column, which holds the slot that what arrives goes to."""
        return f"{self.passes}+{self.shift}"


@dataclass(frozen=True)
class Table:
    """One row of numbers per tick and rank; -1 for none."""

    columns: dict[str, Int[ndarray, "ticks ranks"]]
    works: list[Work]
    channels: list[Channel]
    slots: dict[str, int]
    """Slots of each pool."""


@dataclass
class _Builder:
    schedule: Schedule
    columns: dict[str, Int[ndarray, "ticks ranks"]] = field(default_factory=dict)
    lives: dict[str, list[tuple]] = field(default_factory=lambda: {name: [] for name in POOLS})
    pairs: dict[tuple[str, int], set[tuple[int, int]]] = field(default_factory=dict)


def make_table(schedule: Schedule) -> Table:
    """The table of a schedule in lockstep. Raises ValueError where ranks would wait for ever."""
    rows = ticks(schedule)
    build = _Builder(schedule)
    shape = (len(rows), schedule.ranks)
    names = ["work", *(f"{p}_{what}" for p in "FIW" for what in ("stage", "microbatch"))]
    names += ["F_from", "F_to", "F_last_to", "I_from", "I_kept", "I_to", "W_from"]
    build.columns = {name: np.full(shape, -1, np.int32) for name in names}
    at = {}
    for tick, row in enumerate(rows):
        for rank, op in enumerate(row):
            for part in op.parts if op else ():
                for letter in "IW" if part.kind == "B" else part.kind:
                    at[letter, part.chunk, part.microbatch] = (tick, rank)
    works: list[Work] = []
    for tick, row in enumerate(rows):
        for rank, op in enumerate(row):
            kinds = {part.kind for part in op.parts} if op else set()
            work = ("F" in kinds, next((k for k in "IB" if k in kinds), ""), "W" in kinds)
            works += [work] if work not in works else []
            build.columns["work"][tick, rank] = works.index(work)
    for (letter, stage, microbatch), (tick, rank) in at.items():
        build.columns[f"{letter}_stage"][tick, rank] = stage
        build.columns[f"{letter}_microbatch"][tick, rank] = microbatch
        if letter == "F":
            _live(build, at, stage, microbatch)
    slots = {name: _assign(build, name) for name in POOLS}
    channels = [Channel(passes, shift, tuple(sorted(pairs))) for (passes, shift), pairs in sorted(build.pairs.items())]
    return Table(build.columns, works, channels, slots)


def _live(build: _Builder, at: dict, stage: int, microbatch: int) -> None:
    """From when to when what one forward needs and leaves is held, and which columns name its slots."""
    forward, rank = at["F", stage, microbatch]
    if stage:
        _arrive(build, at["F", stage - 1, microbatch], (forward, rank), "F", "inputs", "F_from")
    if ("I", stage, microbatch) not in at:
        return  # evaluation: nothing waits for a backward
    (inputs, _), (weight, _) = (at[letter, stage, microbatch] for letter in "IW")
    build.lives["kept"].append((rank, forward, inputs, [(forward, "F_to"), (inputs, "I_kept")]))
    if stage + 1 < build.schedule.stages:
        _arrive(build, at["I", stage + 1, microbatch], (inputs, rank), "I", "gradients", "I_from")
    else:
        build.lives["gradients"].append((rank, forward, inputs, [(forward, "F_last_to"), (inputs, "I_from")]))
    if weight > inputs:
        build.lives["products"].append((rank, inputs, weight, [(inputs, "I_to"), (weight, "W_from")]))


def _arrive(build: _Builder, sent: tuple[int, int], used: tuple[int, int], passes: str, pool: str, column: str) -> None:
    (tick, sender), (until, rank) = sent, used
    shift = (rank - sender) % build.schedule.ranks
    build.pairs.setdefault((passes, shift), set()).add((sender, rank))
    name = f"{passes}+{shift}"
    build.columns.setdefault(name, np.full_like(build.columns["work"], -1))
    build.lives[pool].append((rank, tick, until, [(tick, name), (until, column)]))


def _assign(build: _Builder, pool: str) -> int:
    """Give every value a slot; returns how many are needed.

    A value is written at the end of its first tick and read before the end of its last, so that another can follow it
    within one tick.
    """
    ends: list[list[int]] = [[] for _ in range(build.schedule.ranks)]
    for rank, born, dies, places in sorted(build.lives[pool], key=lambda life: life[1]):
        slot = next((i for i, end in enumerate(ends[rank]) if end <= born), len(ends[rank]))
        ends[rank][slot : slot + 1] = [dies]
        for tick, column in places:
            build.columns[column][tick, rank] = slot
    return max(map(len, ends))
