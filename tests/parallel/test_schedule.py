"""The tables of pipeline schedules: the report's orders step by step, and what every schedule must keep."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.parallel.schedule import KINDS, Op, Pair, Schedule, check, make
from dsv3_jax.parallel.simulate import ChunkTimes, peak_activations, simulate

TWO_WAY = ("dualpipe", "dualpipe_lockstep", "dualpipe_lockstep_late")


def steps(schedule: Schedule, rank: int) -> str:
    """A rank's cells as the report's steps: kinds and directions, seen from the end that the rank is nearer to."""
    flip = int(schedule.kind == "dualpipe" and rank >= schedule.ranks // 2)
    names = []
    for cell in schedule.ops(rank):
        kinds = "FB" if isinstance(cell, Pair) else cell.kind
        names.append(kinds + ("" if kinds == "W" else "".join(str(part.direction ^ flip) for part in cell.parts)))
    return " ".join(names)


def test_dualpipe_of_four_ranks_is_the_reports():
    schedule = make("dualpipe", 4, 8)
    outer = "F0 F0 F0 F1 I1 W F1 FB01 FB10 B1 FB10 B1 I0 W I0 W"
    inner = "F0 F1 F0 F1 F0 B1 FB10 FB01 FB10 B1 B0 I1 I0 W W"
    assert [steps(schedule, rank) for rank in range(4)] == [outer, inner, inner, outer]


@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 4), (4, 12), (8, 16), (8, 40), (16, 60)])
def test_dualpipe_takes_the_reports_eight_steps(ranks, microbatches):
    schedule, half, each = make("dualpipe", ranks, microbatches), ranks // 2, microbatches // 2
    for rank in range(ranks):
        near = min(rank, ranks - 1 - rank)
        outer = half - near - 1
        pairs = ["FB01", "FB10"] * (each - ranks + near + 1)
        if outer == 0:
            pairs[:1] = ["F0", "B1"]
        backwards = [name if i <= near else name.replace("B", "I") for i, name in enumerate(["B1", "B0"] * (near + 1))]
        expected = [
            *["F0"] * (2 * outer), *["F0", "F1"] * (near + 1), *["I1", "W", "F1"] * outer, *pairs,
            *["B1", "FB10"] * outer, *backwards, *["W", "I0"] * outer, *["W"] * (near + 1),
        ]  # fmt: skip
        assert steps(schedule, rank).split() == expected


def test_operations_print_as_chunk_kind_microbatch():
    assert " ".join(map(str, make("dualpipe", 4, 8).ops(0))) == (
        "0F0 0F1 0F2 3F4 3I4 3W4 3F5 (0F3;3B5) (3F6;0B0) 3B6 (3F7;0B1) 3B7 0I2 0W2 0I3 0W3"
    )
    # The same microbatches from the other end: the second half of the batch enters at the last rank, as stage 0.
    assert " ".join(map(str, make("dualpipe", 4, 8).ops(3))) == (
        "0F4 0F5 0F6 3F0 3I0 3W0 3F1 (0F7;3B1) (3F2;0B4) 3B2 (3F3;0B5) 3B3 0I6 0W6 0I7 0W7"
    )
    assert str(Pair(Op("F", 0, 7, 0), Op("B", 7, 3, 1))) == "(0F7;7B3)"


def test_tables_are_those_of_pytorch():
    """Copied from what torch.distributed.pipelining 2.13 computes, whose notation is the same."""
    assert [" ".join(map(str, make("dualpipev", 2, 4).ops(rank))) for rank in range(2)] == [
        "0F0 0F1 0F2 3F0 3I0 3W0 3F1 (0F3;3B1) (3F2;0B0) 3B2 (3F3;0B1) 3B3 0I2 0W2 0I3 0W3",
        "1F0 2F0 1F1 2F1 1F2 2B0 (2F2;1B0) (1F3;2B1) (2F3;1B1) 2B2 1B2 2I3 1I3 2W3 1W3",
    ]
    assert " ".join(map(str, make("interleaved_1f1b", 2, 4).ops(0))) == (
        "0F0 0F1 2F0 2F1 0F2 2B0 0F3 2B1 2F2 0B0 2F3 0B1 2B2 2B3 0B2 0B3"
    )
    assert " ".join(map(str, make("zb1p", 2, 4).ops(1))) == "1F0 1I0 1F1 1I1 1W0 1F2 1I2 1W1 1F3 1I3 1W2 1W3"


def test_simple_schedules_in_full():
    assert " ".join(map(str, make("gpipe", 2, 3).ops(1))) == "1F0 1F1 1F2 1B0 1B1 1B2"
    assert " ".join(map(str, make("1f1b", 3, 4).ops(0))) == "0F0 0F1 0F2 0B0 0F3 0B1 0B2 0B3"
    assert " ".join(map(str, make("1f1b", 3, 4).ops(2))) == "2F0 2B0 2F1 2B1 2F2 2B2 2F3 2B3"


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    """Any kind on 2 to 16 ranks, with up to 64 microbatches that suit it."""
    kind, ranks = draw(st.sampled_from(KINDS)), draw(st.sampled_from([2, 4, 8, 16]))
    least, step = {
        "dualpipe": (2 * ranks, 2), "dualpipev": (2 * ranks, 1), "interleaved_1f1b": (ranks, ranks),
    }.get(kind, (2, 2) if kind in TWO_WAY else (1, 1))  # fmt: skip
    return make(kind, ranks, least + step * draw(st.integers(0, (64 - least) // step)))


@settings(max_examples=120, deadline=None)
@given(schedules())
def test_every_pass_runs_once_in_order_and_no_rank_waits_for_ever(schedule: Schedule):
    check(schedule)
    timeline = simulate(schedule, ChunkTimes())
    assert [len(row) for row in timeline.events] == [len(schedule.ops(rank)) for rank in range(schedule.ranks)]


@settings(max_examples=60, deadline=None)
@given(schedules())
def test_neighbours_send_and_expect_microbatches_in_the_same_order(schedule: Schedule):
    def order(kinds: str, rank: int, chunk: int, direction: int) -> list[int]:
        parts = (part for cell in schedule.ops(rank) for part in cell.parts)
        return [p.microbatch for p in parts if p.kind in kinds and (p.chunk, p.direction) == (chunk, direction)]

    for direction, ranks in enumerate(schedule.rank_of.tolist()):
        for chunk, (rank, after) in enumerate(itertools.pairwise(ranks)):
            if -1 not in (rank, after):
                for kinds in ("F", "IB"):
                    assert order(kinds, rank, chunk, direction) == order(kinds, after, chunk + 1, direction)


@settings(max_examples=60, deadline=None)
@given(schedules())
def test_activation_slots_are_bounded(schedule: Schedule):
    ranks, microbatches = schedule.ranks, schedule.microbatches
    bound = {
        "gpipe": microbatches, "1f1b": ranks, "zb1p": ranks, "interleaved_1f1b": 3 * ranks - 1, "dualpipe": ranks + 1,
        "dualpipev": 2 * ranks + 1, "dualpipe_lockstep": ranks + 1, "dualpipe_lockstep_late": 3 * ranks // 2 + 2,
    }[schedule.kind]  # fmt: skip
    assert max(peak_activations(schedule)) <= min(bound, microbatches * len(schedule.chunks(0)))


def test_the_table_is_plain_numpy_and_says_where_stages_live():
    schedule = make("dualpipev", 4, 8)
    assert schedule.cells.dtype == np.int32
    assert schedule.cells.shape == (4, max(len(schedule.ops(rank)) for rank in range(4)), 2, 4)
    assert (schedule.stages, schedule.copies, schedule.chunks(1)) == (8, 1, [1, 6])
    both = make("dualpipe", 4, 8)
    assert (both.stages, both.copies, both.chunks(1), both.chunks(3)) == (4, 2, [1, 2], [3, 0])


REFUSED = {
    ("gpipe2", 4, 8): "schedule='gpipe2': choose one of gpipe, 1f1b, interleaved_1f1b, zb1p, dualpipe",
    ("1f1b", 0, 8): "ranks=0: a 1f1b schedule needs at least 1",
    ("zb1p", 4, 0): "microbatches=0: a zb1p schedule needs at least 1",
    ("dualpipe", 3, 8): "ranks=3: dualpipe pairs each rank with its mirror image; use an even number",
    ("dualpipe", 4, 9): "microbatches=9: dualpipe sends half of them each way; use an even number",
    ("dualpipe", 4, 6): "microbatches=6: dualpipe on 4 ranks needs at least 2 x ranks = 8",
    ("dualpipev", 4, 7): "microbatches=7: dualpipev on 4 ranks needs at least 2 x ranks = 8",
    ("dualpipe_lockstep", 5, 8): "ranks=5: dualpipe_lockstep pairs each rank",
    ("interleaved_1f1b", 4, 6): "microbatches=6: interleaved_1f1b takes them in rounds of ranks=4; make it a multiple",
}


@pytest.mark.parametrize(("wanted", "message"), REFUSED.items(), ids=lambda value: str(value)[:24])
def test_what_no_schedule_can_do_is_refused_in_one_sentence(wanted, message):
    with pytest.raises(ValueError, match=message) as raised:
        make(*wanted)
    assert len(str(raised.value).splitlines()) == 1


def test_names_may_be_written_with_spaces():
    assert make("interleaved 1f1b", 2, 4).kind == make("interleaved-1f1b", 2, 4).kind == "interleaved_1f1b"


def test_a_rank_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="rank=4: this schedule has ranks 0 to 3"):
        make("1f1b", 4, 8).ops(4)


def changed(schedule: Schedule, rank: int, place: int, **fields: int) -> Schedule:
    """The schedule with one operation altered."""
    cells = schedule.cells.copy()
    for name, value in fields.items():
        cells[rank, place, 0, ["kind", "chunk", "microbatch", "direction"].index(name)] = value
    return dataclasses.replace(schedule, cells=cells)


def test_check_names_the_operation_that_is_wrong():
    schedule = make("1f1b", 2, 3)  # rank 0: 0F0 0F1 0B0 0F2 0B1 0B2
    with pytest.raises(ValueError, match="0F0 on rank 0: has run before, on rank 0"):
        check(changed(schedule, 0, 1, microbatch=0))
    with pytest.raises(ValueError, match="1F0 on rank 0: stage 1 does not live there"):
        check(changed(schedule, 0, 0, chunk=1))
    with pytest.raises(ValueError, match="0B2 on rank 0: comes before the F it needs"):
        check(changed(schedule, 0, 2, microbatch=2))
    with pytest.raises(ValueError, match="holds 17 passes where 18 are needed"):
        check(changed(schedule, 1, 5, kind=1))
