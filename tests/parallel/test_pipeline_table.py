"""The table that the executor reads: followed step by step, every pass finds what it needs in the slot it is told."""

import numpy as np
import pytest

from dsv3_jax.parallel.pipeline_table import make_table
from dsv3_jax.parallel.schedule import KINDS, forward_only, make
from dsv3_jax.parallel.simulate import peak_activations

SHAPES = [(2, 4), (4, 8), (4, 32), (8, 16)]


def follow(table, schedule):
    """Runs the table on names of values instead of values; returns the passes that ran."""
    ticks, ranks = table.columns["work"].shape
    empty = [[None] * max(1, count) for count in table.slots.values()]
    pools = [dict(zip(table.slots, [list(slots) for slots in empty], strict=True)) for _ in range(ranks)]
    ran = []
    for tick in range(ticks):
        made = []
        for rank in range(ranks):
            row = {name: int(column[tick, rank]) for name, column in table.columns.items()}
            pool, out = pools[rank], {}
            forward, backward, weight = table.works[row["work"]]
            assert forward == (row["F_stage"] >= 0)
            if forward:
                stage, m = row["F_stage"], row["F_microbatch"]
                if stage:
                    assert pool["inputs"][row["F_from"]] == ("F", stage - 1, m)
                out |= {"F": ("F", stage, m), "kept": ("kept", stage, m)}
            if backward:
                stage, m = row["I_stage"], row["I_microbatch"]
                assert pool["kept"][row["I_kept"]] == ("kept", stage, m)
                last = stage == schedule.stages - 1
                assert pool["gradients"][row["I_from"]] == (("F", stage, m) if last else ("I", stage + 1, m))
                out |= {"I": ("I", stage, m)} | ({"products": ("products", stage, m)} if backward == "I" else {})
            if weight:
                assert pool["products"][row["W_from"]] == ("products", row["W_stage"], row["W_microbatch"])
            ran += [("F", stage, m)] if forward and not backward else []
            ran += [out["F"]] if forward and backward else []
            ran += [out["I"]] if backward else []
            ran += [("W", row["W_stage"], row["W_microbatch"])] if weight or backward == "B" else []
            made.append((row, out))
        for rank, (row, out) in enumerate(made):
            for column, pool, name in (
                ("F_to", "kept", "kept"),
                ("I_to", "products", "products"),
                ("F_last_to", "gradients", "F"),
            ):
                if row[column] >= 0:
                    pools[rank][pool][row[column]] = out[name]
        for channel in table.channels:
            for sender, receiver in channel.pairs:
                slot = made[receiver][0][channel.name]
                if slot >= 0:
                    pools[receiver]["inputs" if channel.passes == "F" else "gradients"][slot] = made[sender][1][
                        channel.passes
                    ]
    return ran


@pytest.mark.parametrize("kind", KINDS)
def test_every_pass_runs_once_on_what_it_needs(kind):
    for ranks, microbatches in SHAPES:
        schedule = make(kind, ranks, microbatches)
        ran = follow(make_table(schedule), schedule)
        passes = {(p, s, m) for p in "FIW" for s in range(schedule.stages) for m in range(microbatches)}
        assert len(ran) == len(passes)
        assert set(ran) == passes


def test_an_evaluations_forwards_follow_each_other_without_a_gap_through_one_slot():
    for ranks, microbatches in SHAPES:
        schedule = forward_only(ranks, microbatches)
        table = make_table(schedule)
        assert len(table.columns["work"]) == microbatches + ranks - 1
        assert table.slots == {"inputs": 1, "kept": 0, "gradients": 0, "products": 0}
        ran = follow(table, schedule)
        assert sorted(ran) == [("F", s, m) for s in range(ranks) for m in range(microbatches)]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "gpipe"])
def test_pools_are_as_large_as_the_schedules_peak_and_do_not_grow_with_microbatches(kind):
    for ranks in (2, 4, 8):
        few, many = (make_table(make(kind, ranks, factor * ranks)).slots for factor in (2, 8))
        assert few == many
        schedule = make(kind, ranks, 8 * ranks)
        # A pair's backward has read what it needs before its forward's is written: one less than both would take.
        paired = max(peak_activations(schedule, until="I"))
        alone = max(peak_activations(_unpaired(schedule), until="I"))
        assert alone <= many["kept"] <= paired
        assert many["products"] == _most_deferred(schedule)


def _most_deferred(schedule):
    """The most input gradients of a rank whose weight gradients have yet to be computed."""
    steps = {"I": 1, "W": -1}
    ops = [[op for cell in schedule.ops(rank) for op in cell.parts] for rank in range(schedule.ranks)]
    return max(int(np.cumsum([0, *(steps.get(op.kind, 0) for op in row)]).max()) for row in ops)


def _unpaired(schedule):
    """The same with a pair's backward first."""
    cells = schedule.cells.copy()
    pairs = cells[:, :, 1, 0] >= 0
    cells[pairs] = cells[pairs][:, ::-1]
    return type(schedule)(schedule.kind, schedule.ranks, schedule.microbatches, schedule.rank_of, cells)
