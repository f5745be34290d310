"""The simulator against the report's formulas, and against timelines worked out by hand."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.parallel.schedule import KINDS, make
from dsv3_jax.parallel.simulate import (
    ChunkTimes,
    pair_time,
    peak_activations,
    simulate,
    simulate_lockstep,
    ticks,
)

RANKS = st.sampled_from([2, 4, 8, 16])


@st.composite
def sizes(draw: st.DrawFn) -> tuple[int, int]:
    """Ranks, and an even number of microbatches from twice as many to 64."""
    ranks = draw(RANKS)
    return ranks, 2 * draw(st.integers(ranks, 32))


units = st.integers(1, 20)


@settings(max_examples=100, deadline=None)
@given(sizes(), units, units, units)
def test_1f1b_waits_as_long_as_the_report_says(size, forward, inputs, weight):
    (ranks, microbatches), backward = size, inputs + weight
    schedule = make("1f1b", ranks, microbatches)
    timeline = simulate(schedule, ChunkTimes(forward, backward, weight))
    assert max(timeline.bubble) == (ranks - 1) * (forward + backward)
    assert max(peak_activations(schedule)) == ranks


@settings(max_examples=100, deadline=None)
@given(sizes(), units, units, units)
def test_zb1p_waits_as_long_as_the_report_says_where_weight_gradients_are_the_shortest(size, forward, inputs, weight):
    """W <= F and W <= B - W: a weight gradient that is longer than what it makes way for delays the next rank."""
    (ranks, microbatches), weight = size, min(forward, inputs, weight)
    backward = inputs + weight
    schedule = make("zb1p", ranks, microbatches)
    timeline = simulate(schedule, ChunkTimes(forward, backward, weight))
    assert max(timeline.bubble) == (ranks - 1) * (forward + backward - 2 * weight)
    assert max(peak_activations(schedule)) == ranks


@settings(max_examples=100, deadline=None)
@given(sizes(), units, units, st.data())
def test_dualpipe_waits_as_long_as_the_report_says(size, forward, weight, data):
    """F = B - W >= W, which the formula supposes, and a pair that hides as much or as little as can be."""
    (ranks, microbatches), weight = size, min(forward, weight)
    backward = forward + weight
    pair = data.draw(st.integers(backward, forward + backward))
    times = ChunkTimes(forward, backward, weight, pair)
    for kind, half in (("dualpipe", ranks // 2), ("dualpipev", ranks)):
        schedule = make(kind, ranks, microbatches)
        assert max(simulate(schedule, times).bubble) == (half - 1) * (pair + backward - 3 * weight)
        assert max(peak_activations(schedule)) == 2 * half + 1


def test_gpipe_waits_like_1f1b_and_holds_everything():
    schedule = make("gpipe", 4, 8)
    assert set(simulate(schedule, ChunkTimes(3, 5, 2)).bubble) == {3 * (3 + 5)}
    assert peak_activations(schedule) == [8] * 4


def test_interleaved_1f1b_halves_the_bubble():
    schedule = make("interleaved_1f1b", 4, 8)
    assert set(simulate(schedule, ChunkTimes(1, 2, 1)).bubble) == {3 * (1 + 2)}  # of stages half as long as 1f1b's


def test_two_ranks_worked_out_by_hand():
    timeline = simulate(make("1f1b", 2, 2), ChunkTimes(forward=1, backward=2, weight=1, transfer=10))
    spans = [[(str(event.op), event.start, event.end) for event in row] for row in timeline.events]
    assert spans == [
        [("0F0", 0, 1), ("0F1", 1, 2), ("0B0", 24, 26), ("0B1", 27, 29)],
        [("1F0", 11, 12), ("1B0", 12, 14), ("1F1", 14, 15), ("1B1", 15, 17)],
    ]
    assert (timeline.makespan, timeline.busy, timeline.bubble, timeline.peak) == (29, [6, 6], [23, 23], [2, 1])


def test_exchange_is_hidden_only_in_pairs():
    alone = ChunkTimes(forward=3, backward=6, weight=2, exchange=4)
    assert (alone.of("F"), alone.of("B"), alone.of("I"), alone.of("W")) == (7, 10, 8, 2)
    assert pair_time(alone, alone) == 9
    assert pair_time(alone, alone, "I") == 8  # the exchanges are longer than what is left of the products
    assert pair_time(dataclasses.replace(alone, exchange=6), alone) == 10
    given_pair = dataclasses.replace(alone, pair=15)
    assert pair_time(given_pair, given_pair) == 15
    other = ChunkTimes(forward=1, backward=2, weight=1, pair=3)
    assert pair_time(given_pair, other) == (3 + 4) + 2 - (7 + 10 - 15) / 2


def test_stages_of_their_own_times():
    slow_head = [ChunkTimes(1, 2, 1), ChunkTimes(3, 6, 3)]
    timeline = simulate(make("1f1b", 2, 4), slow_head)
    assert timeline.busy == [12, 36]
    assert timeline.makespan == 1 + 36 + 2
    with pytest.raises(ValueError, match="times of 2 stages: 1f1b has 4; give one for each"):
        simulate(make("1f1b", 4, 4), slow_head)


def test_ranks_that_wait_for_each_other_are_named():
    schedule = make("1f1b", 2, 2)
    cells = schedule.cells.copy()
    cells[0, [0, 2]] = cells[0, [2, 0]]  # the backward before its forward
    stuck = dataclasses.replace(schedule, cells=cells)
    for run in (lambda: simulate(stuck, ChunkTimes()), lambda: ticks(stuck)):
        with pytest.raises(ValueError, match="1f1b: rank 0 waits for ever at 0B0"):
            run()


def test_activations_count_until_they_are_let_go():
    schedule = make("zb1p", 4, 8)
    assert peak_activations(schedule) == [4, 4, 4, 4]
    assert peak_activations(schedule, until="I") == [4, 3, 2, 1]
    assert peak_activations(schedule, sizes=[1, 10, 100, 1000]) == [4, 40, 400, 4000]


@settings(max_examples=40, deadline=None)
@given(sizes(), st.sampled_from([kind for kind in KINDS if kind != "interleaved_1f1b"]))
def test_lockstep_runs_the_same_operations_no_faster(size, kind):
    schedule, times = make(kind, *size), ChunkTimes(2, 4, 2, 5)
    free, stepped, barred = (
        simulate(schedule, times), simulate_lockstep(schedule, times), simulate_lockstep(schedule, times, "all"),
    )  # fmt: skip
    assert free.makespan <= stepped.makespan <= barred.makespan
    assert free.busy == stepped.busy == barred.busy
    for rank in range(schedule.ranks):
        assert [event.op for event in stepped.events[rank]] == schedule.ops(rank)


# Ranks, microbatches, and per kind the asynchronous time and that in lockstep, in units where F = I = W = 1
# and an overlapped pair saves half a unit.
LOCKSTEP = {
    (4, 8): {"dualpipe": (24, 24), "dualpipe_lockstep": (25, 25), "dualpipe_lockstep_late": (24, 24)},
    (8, 32): {"dualpipe": (89, 94), "dualpipe_lockstep": (93, 93), "dualpipe_lockstep_late": (90, 90)},
    (16, 60): {"dualpipe": (169, 184), "dualpipe_lockstep": (179, 179), "dualpipe_lockstep_late": (172, 172)},
}


@pytest.mark.parametrize("size", LOCKSTEP)
def test_what_lockstep_costs(size):
    times = ChunkTimes(forward=2, backward=4, weight=2, pair=5)
    for kind, expected in LOCKSTEP[size].items():
        schedule = make(kind, *size)
        measured = simulate(schedule, times).makespan / 2, simulate_lockstep(schedule, times).makespan / 2
        assert measured == expected


def test_an_order_for_lockstep_costs_nothing_in_lockstep_and_keeps_as_few_activations():
    times = ChunkTimes(forward=2, backward=4, weight=2, pair=5)
    for ranks, microbatches in ((4, 8), (8, 16), (8, 64), (16, 32), (16, 60)):
        schedule = make("dualpipe_lockstep", ranks, microbatches)
        assert simulate_lockstep(schedule, times, "all").makespan == simulate(schedule, times).makespan
        assert max(peak_activations(schedule)) == ranks + 1


def test_a_tick_uses_only_what_earlier_ticks_made():
    rows = ticks(make("1f1b", 2, 2))
    assert [[str(op or "-") for op in row] for row in rows] == [
        ["0F0", "-"], ["0F1", "1F0"], ["-", "1B0"], ["0B0", "1F1"], ["-", "1B1"], ["0B1", "-"],
    ]  # fmt: skip


def test_transfer_and_exchange_lengthen_lockstep():
    schedule, times = make("1f1b", 2, 2), ChunkTimes(1, 2, 1)
    plain = simulate_lockstep(schedule, times).makespan
    assert simulate_lockstep(schedule, dataclasses.replace(times, transfer=1)).makespan > plain
    assert simulate_lockstep(schedule, dataclasses.replace(times, exchange=1)).makespan > plain
