"""Pipeline schedules as data: in which order each rank runs which stage on which microbatch (report 3.2.1).

One small vocabulary serves all of them. F is a stage's forward pass; I its backward pass for the input's gradient; W
the deferred one for the weights' gradients; B is I and W at once. A pair is a forward and a backward of the two
directions that overlap, so that one's exchange hides behind the other's products. A table is plain numpy: it is
compared, simulated, drawn and checked without a device.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from dsv3_jax.parallel.schedule_orders import ORDERS, Cell, Placement

KINDS = tuple(ORDERS)
"""The schedules that `make` knows."""

CODES = "FIBW"
"""An operation's code in a table is the position of its letter here; -1 fills what is empty."""


@dataclass(frozen=True)
class Op:
    """One stage's pass over one microbatch. Prints as `<chunk><kind><microbatch>`: `7F0`."""

    kind: Literal["F", "I", "B", "W"]
    """Forward, input gradient, both gradients, or weight gradients."""
    chunk: int
    """Index of the stage along the model."""
    microbatch: int
    direction: int
    """0 where microbatches move to higher ranks, 1 where they move to lower ones."""

    def __str__(self) -> str:
        return f"{self.chunk}{self.kind}{self.microbatch}"

    @property
    def parts(self) -> tuple["Op", ...]:
        """The operations in it: itself."""
        return (self,)


@dataclass(frozen=True)
class Pair:
    """A forward and a backward that run at the same time. Prints as `(0F7;7B3)`."""

    forward: Op
    backward: Op

    def __str__(self) -> str:
        return f"({self.forward};{self.backward})"

    @property
    def parts(self) -> tuple[Op, ...]:
        """The operations in it: the forward, then the backward."""
        return (self.forward, self.backward)


@dataclass(frozen=True)
class Schedule:
    """The operations of every rank, in order."""

    kind: str
    """One of `KINDS`, or `forward_only`."""
    ranks: int
    microbatches: int
    """Of all directions together."""
    rank_of: Int[ndarray, "directions stages"]
    """The rank that runs a stage in a direction; -1 where that direction does not run it."""
    cells: Int[ndarray, "ranks length 2 4"]
    """Per rank and place: one operation, or the forward and the backward of a pair, each as (index of its letter in
    `CODES`, chunk, microbatch, direction). -1 where there is none."""

    @property
    def stages(self) -> int:
        """Parts the model is cut into."""
        return self.rank_of.shape[1]

    @property
    def copies(self) -> int:
        """Ranks that hold each stage: 2 where both directions run the whole model."""
        return int((self.rank_of >= 0).sum(axis=0).max())

    def chunks(self, rank: int) -> list[int]:
        """The stages that a rank holds, in the order of the directions."""
        return [int(stage) for stage in np.argwhere(self.rank_of == rank)[:, 1]]

    def ops(self, rank: int) -> list[Op | Pair]:
        """A rank's operations in order. Raises ValueError for a rank that is not there."""
        if not 0 <= rank < self.ranks:
            raise ValueError(f"rank={rank}: this schedule has ranks 0 to {self.ranks - 1}")
        return self._ops[rank]

    @cached_property
    def _ops(self) -> list[list[Op | Pair]]:
        return [[_decode(cell) for cell in row if cell[0][0] >= 0] for row in self.cells.tolist()]


def make(kind: str, ranks: int, microbatches: int) -> Schedule:
    """The table of a schedule.

    Args:
        kind: one of `KINDS`: `gpipe`, `1f1b`, `interleaved_1f1b` (two stages a rank), `zb1p`, `dualpipe` (report
            3.2.1), `dualpipev` (it cut in half: no second copy of the parameters), `dualpipe_lockstep` (ours:
            dualpipe's stages in an order for ranks that wait for each other after every operation), and
            `dualpipe_lockstep_late` (the same, faster, with more weight gradients deferred). Spaces and hyphens stand
            for underscores.
        ranks: devices along the pipeline.
        microbatches: of one step. The first half moves in direction 0 where there are two directions.

    Raises:
        ValueError: no such kind, or one that does not work with these ranks and microbatches.
    """
    kind = kind.replace(" ", "_").replace("-", "_")
    if kind not in ORDERS:
        raise ValueError(f"schedule={kind!r}: choose one of {', '.join(KINDS)}")
    for name, value in (("ranks", ranks), ("microbatches", microbatches)):
        if value < 1:
            raise ValueError(f"{name}={value}: a {kind} schedule needs at least 1")
    placement, order = ORDERS[kind](ranks, microbatches)
    return from_cells(kind, ranks, microbatches, placement, order)


def forward_only(ranks: int, microbatches: int) -> Schedule:
    """gpipe's forwards without its backwards: what an evaluation runs. Raises ValueError as `make`."""
    whole = make("gpipe", ranks, microbatches)
    return replace(whole, kind="forward_only", cells=whole.cells[:, :microbatches])


def from_cells(
    kind: str, ranks: int, microbatches: int, placement: Placement, order: Sequence[Sequence[Cell]]
) -> Schedule:
    """The table of operations that are already in order: per rank a list of cells, each of one or two
    (kind, chunk, microbatch, direction); `placement` says per direction which rank runs each stage."""
    cells = np.full((ranks, max(map(len, order)), 2, 4), -1, np.int32)
    for rank, row in enumerate(order):
        parts = [[(CODES.index(letter), *numbers) for letter, *numbers in cell] for cell in row]
        cells[rank, : len(row)] = [cell if len(cell) == 2 else [*cell, (-1,) * 4] for cell in parts]
    return Schedule(kind, ranks, microbatches, np.array(placement, np.int32), cells)


def check(schedule: Schedule) -> None:
    """Every stage sees every microbatch exactly once, on the rank that holds it: F before B, B before W.

    That no rank waits for ever is shown by `simulate`, which raises where one does.

    Raises:
        ValueError: names the first operation that breaks this.
    """
    seen: dict[tuple[str, int, int], int] = {}
    for rank in range(schedule.ranks):
        for op in (op for cell in schedule.ops(rank) for op in cell.parts):
            if schedule.rank_of[op.direction, op.chunk] != rank:
                raise ValueError(f"{op} on rank {rank}: stage {op.chunk} does not live there")
            for letter in _PASSES[op.kind]:
                _count(seen, op, letter, rank)
    stages = len(_PASSES["F"] + _PASSES["B"]) * schedule.stages * schedule.microbatches
    if len(seen) != stages:
        raise ValueError(f"{schedule.kind}: holds {len(seen)} passes where {stages} are needed")


_PASSES = {"F": "F", "I": "I", "W": "W", "B": "IW"}
_BEFORE = {"I": "F", "W": "I"}


def _count(seen: dict[tuple[str, int, int], int], op: Op, letter: str, rank: int) -> None:
    key = (letter, op.chunk, op.microbatch)
    if key in seen:
        raise ValueError(f"{op} on rank {rank}: has run before, on rank {seen[key]}")
    before = _BEFORE.get(letter)
    if before and seen.get((before, op.chunk, op.microbatch)) != rank:
        raise ValueError(f"{op} on rank {rank}: comes before the {before} it needs")
    seen[key] = rank


def _decode(cell: list[list[int]]) -> Op | Pair:
    first, second = (Op(CODES[part[0]], *part[1:]) if part[0] >= 0 else None for part in cell)
    return first if second is None else Pair(first, second)
