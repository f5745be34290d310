"""The order of operations of each schedule. See `schedule` for the vocabulary and for what users call.

A function here takes ranks and microbatches and returns where stages live, and each rank's cells in order. A cell is
one operation or an overlapped pair of them; an operation is (kind, chunk, microbatch, direction).
"""

from collections import deque
from collections.abc import Callable
from functools import partial

type Part = tuple[str, int, int, int]
type Cell = tuple[Part, ...]
type Placement = list[list[int]]
type Order = tuple[Placement, list[list[Cell]]]

INTERLEAVED_STAGES = 2
"""Stages that each rank of `interleaved_1f1b` holds."""


def gpipe(ranks: int, microbatches: int) -> Order:
    """All forwards, then all backwards."""
    every = range(microbatches)
    order = [[*(_one("F", r, m) for m in every), *(_one("B", r, m) for m in every)] for r in range(ranks)]
    return [list(range(ranks))], order


def one_f_one_b(ranks: int, microbatches: int) -> Order:
    """1F1B: as many forwards as there are ranks behind, then a forward and a backward in turn, then backwards."""

    def rank_order(rank: int) -> list[Cell]:
        ahead = min(ranks - 1 - rank, microbatches)
        forwards = [_one("F", rank, m) for m in range(microbatches)]
        backwards = [_one("B", rank, m) for m in range(microbatches)]
        return forwards[:ahead] + _alternate(forwards[ahead:], backwards) + backwards[microbatches - ahead :]

    return [list(range(ranks))], [rank_order(r) for r in range(ranks)]


def interleaved_1f1b(ranks: int, microbatches: int) -> Order:
    """1F1B with several stages a rank: rank r holds stages r, r + ranks, ... Microbatches go in rounds of `ranks`."""
    if microbatches % ranks:
        raise ValueError(
            f"microbatches={microbatches}: interleaved_1f1b takes them in rounds of ranks={ranks}; make it a multiple"
        )
    stages = range(INTERLEAVED_STAGES)
    rounds = [range(start, start + ranks) for start in range(0, microbatches, ranks)]

    def rank_order(rank: int) -> list[Cell]:
        forwards = [_one("F", rank + v * ranks, m) for turn in rounds for v in stages for m in turn]
        backwards = [_one("B", rank + v * ranks, m) for turn in rounds for v in reversed(stages) for m in turn]
        ahead = min((INTERLEAVED_STAGES - 1) * ranks + 2 * (ranks - 1 - rank), len(forwards))
        return forwards[:ahead] + _alternate(forwards[ahead:], backwards) + backwards[len(forwards) - ahead :]

    return [[r for _ in stages for r in range(ranks)]], [rank_order(r) for r in range(ranks)]


def zb1p(ranks: int, microbatches: int) -> Order:
    """1F1B with the backward pass split: rank r lets r weight gradients wait, which fill the idle time at the end.

    The input's gradient travels on before the weights' is computed. A microbatch waits for its weight gradient no
    longer than it would on rank 0, so that every rank holds at most as many as there are ranks.
    """

    def rank_order(rank: int) -> list[Cell]:
        ahead, waiting = min(ranks - 1 - rank, microbatches), min(rank, microbatches)
        order = [_one("F", rank, m) for m in range(ahead)]
        for m in range(microbatches):
            if ahead + m < microbatches:
                order.append(_one("F", rank, ahead + m))
            order.append(_one("I", rank, m))
            if m >= waiting:
                order.append(_one("W", rank, m - waiting))
        return order + [_one("W", rank, m) for m in range(microbatches - waiting, microbatches)]

    return [list(range(ranks))], [rank_order(r) for r in range(ranks)]


def dualpipe(ranks: int, microbatches: int) -> Order:
    """Both ends feed: rank r runs stage r of direction 0 and stage R-1-r of direction 1 (report 3.2.1, figure 5).

    A rank and its mirror image do the same, with the directions exchanged.
    """
    _check_two_directions("dualpipe", ranks, microbatches)
    if microbatches < 2 * ranks:
        raise ValueError(
            f"microbatches={microbatches}: dualpipe on {ranks} ranks needs at least 2 x ranks = {2 * ranks}"
        )
    half, each = ranks // 2, microbatches // 2

    def rank_order(rank: int) -> list[Cell]:
        near = min(rank, ranks - 1 - rank)
        first = int(rank >= half)  # the direction that starts at this rank's end of the pipeline
        chunks = {first: near, 1 - first: ranks - 1 - near}
        order = _Bidirectional([(chunks[d], d * each, d) for d in (first, 1 - first)])
        return order.run(half, near, each - ranks + near + 1)

    return _both_ways(ranks), [rank_order(r) for r in range(ranks)]


def dualpipev(ranks: int, microbatches: int) -> Order:
    """DualPipe cut in half: rank r runs stages r and 2R-1-r of one model, which turns around at the last rank."""
    if microbatches < 2 * ranks:
        raise ValueError(
            f"microbatches={microbatches}: dualpipev on {ranks} ranks needs at least 2 x ranks = {2 * ranks}"
        )

    def rank_order(rank: int) -> list[Cell]:
        order = _Bidirectional([(rank, 0, 0), (2 * ranks - 1 - rank, 0, 1)])
        return order.run(ranks, rank, microbatches - 2 * ranks + rank + 1)

    absent = [-1] * ranks
    return [[*range(ranks), *absent], [*absent, *reversed(range(ranks))]], [rank_order(r) for r in range(ranks)]


def dualpipe_lockstep(ranks: int, microbatches: int, late: bool = False) -> Order:
    """DualPipe's stages in an order for ranks that wait for each other after every operation; ours, not the report's.

    Every direction sends a microbatch every other tick, and it moves one rank a tick. With an even number of ranks the
    forward of one direction then meets the backward of the other on every rank, in every tick: pairs line up. In the
    last `ranks` ticks, which have no forward, weight gradients fill what one direction leaves empty. `late` defers them
    in the first `ranks` ticks with a backward too, where some ranks have none to wait for: it takes less time, and
    ranks / 2 + 1 more microbatches wait for their weight gradients to the end.
    """
    _check_two_directions("dualpipe_lockstep", ranks, microbatches)
    half, each = ranks // 2, microbatches // 2
    last_tick = 2 * (each - 1) + 2 * ranks

    def rank_order(rank: int) -> list[Cell]:
        near, far = min(rank, ranks - 1 - rank), max(rank, ranks - 1 - rank)
        first = int(rank >= half)
        forwards, backwards = {}, {}  # by tick: (chunk, microbatch, direction)
        for k in range(each):
            inward, outward = (near, first * each + k, first), (far, (1 - first) * each + k, 1 - first)
            forwards |= {near + 2 * k: inward, far + 2 * k: outward}
            backwards |= {ranks + near + 2 * k: outward, ranks + far + 2 * k: inward}
        cells: list[Cell] = []
        deferred: deque[Part] = deque()
        for tick in range(last_tick):
            cell: list[Part] = [("F", *forwards[tick])] if tick in forwards else []
            if tick in backwards:
                defer = (late and tick < 2 * ranks) or tick >= last_tick - ranks
                cell.append(("I" if defer else "B", *backwards[tick]))
                deferred.extend([("W", *backwards[tick])] if defer else [])
            elif not cell and deferred:
                cell.append(deferred.popleft())
            cells += [tuple(cell)] if cell else []
        return cells + [(part,) for part in deferred]

    return _both_ways(ranks), [rank_order(r) for r in range(ranks)]


class _Bidirectional:
    """Writes the eight steps of DualPipe; 0 is the direction that starts at this rank's end, 1 the other."""

    def __init__(self, directions: list[tuple[int, int, int]]) -> None:
        """Each direction as (chunk, first microbatch, direction in the table)."""
        self.directions = directions
        self.next = {(kind, i): start for i, (_, start, _) in enumerate(directions) for kind in "FB"}
        self.deferred: deque[Part] = deque()
        self.cells: list[Cell] = []

    def run(self, half: int, near: int, pairs: int) -> list[Cell]:
        """The cells of a rank that is `near` ranks from an end, `half` from one end to the middle."""
        outer = half - near - 1
        for _ in range(2 * outer):  # 1
            self._add("F0")
        for _ in range(near + 1):  # 2
            self._add("F0", "F1")
        for _ in range(outer):  # 3
            self._add("I1", "W", "F1")
        for i in range(pairs):  # 4
            # The middle ranks wait for this backward, and would wait longer if it overlapped.
            self._add(*(["F0", "B1"] if i == 0 and outer == 0 else ["F0B1"]), "F1B0")
        for _ in range(outer):  # 5
            self._add("B1", "F1B0")
        backwards = ["B1", "B0"] * (near + 1)  # 6
        for i, name in enumerate(backwards):
            self._add(name if i < near + 1 else name.replace("B", "I"))
        for _ in range(outer):  # 7
            self._add("W", "I0")
        for _ in range(near + 1):  # 8
            self._add("W")
        return self.cells

    def _add(self, *names: str) -> None:
        for name in names:
            self.cells.append(tuple(self._part(*name[i : i + 2]) for i in range(0, len(name), 2)))

    def _part(self, kind: str, side: str = "") -> Part:
        if kind == "W":
            return self.deferred.popleft()
        chunk, _, direction = self.directions[int(side)]
        counter = ("F" if kind == "F" else "B", int(side))
        microbatch = self.next[counter]
        self.next[counter] += 1
        if kind == "I":
            self.deferred.append(("W", chunk, microbatch, direction))
        return (kind, chunk, microbatch, direction)


def _both_ways(ranks: int) -> Placement:
    return [list(range(ranks)), list(reversed(range(ranks)))]


def _check_two_directions(kind: str, ranks: int, microbatches: int) -> None:
    if ranks % 2:
        raise ValueError(f"ranks={ranks}: {kind} pairs each rank with its mirror image; use an even number")
    if microbatches % 2:
        raise ValueError(f"microbatches={microbatches}: {kind} sends half of them each way; use an even number")


def _one(kind: str, chunk: int, microbatch: int) -> Cell:
    return ((kind, chunk, microbatch, 0),)


def _alternate(forwards: list[Cell], backwards: list[Cell]) -> list[Cell]:
    """A forward, a backward, and so on, for as long as there are forwards."""
    return [cell for pair in zip(forwards, backwards, strict=False) for cell in pair]


ORDERS: dict[str, Callable[[int, int], Order]] = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "interleaved_1f1b": interleaved_1f1b,
    "zb1p": zb1p,
    "dualpipe": dualpipe,
    "dualpipev": dualpipev,
    "dualpipe_lockstep": dualpipe_lockstep,
    "dualpipe_lockstep_late": partial(dualpipe_lockstep, late=True),
}
