"""Which layers a stage runs and a rank holds."""

import itertools
import runpy
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_jax.config import BatchConfig, Config, ConfigError, ModelConfig, ParallelConfig
from dsv3_jax.parallel.mesh import check_shape
from dsv3_jax.parallel.pipeline_stages import check_pipeline, cut, layouts, schedule_of, stage_bounds, step_in_words
from dsv3_jax.parallel.pipeline_table import make_table
from dsv3_jax.parallel.schedule import check, make

CONFIGS = Path(__file__).parents[2] / "configs"


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=7), st.integers(1, 7))
def test_the_slowest_stage_is_as_fast_as_in_the_best_of_all_cuts(costs, stages):
    stages = min(stages, len(costs))
    bounds = cut(costs, stages)
    every = itertools.combinations(range(1, len(costs)), stages - 1)
    slowest = lambda b: max(sum(costs[i:j]) for i, j in itertools.pairwise(b))  # noqa: E731
    assert bounds[0] == 0
    assert bounds[-1] == len(costs)
    assert slowest(bounds) == min(slowest([0, *inner, len(costs)]) for inner in every)


@pytest.mark.parametrize("kind", ["1f1b", "interleaved_1f1b", "dualpipe", "dualpipev"])
def test_a_rank_holds_the_layers_of_its_stages_in_their_order(kind):
    model = runpy.run_path(str(CONFIGS / "v3_671b.py"))["config"]().model
    schedule = make(kind, 8, 16)
    found = layouts(model, schedule)
    bounds = stage_bounds(model, schedule.stages)
    for stage in range(schedule.stages):
        layers = range(bounds[stage], bounds[stage + 1])
        for rank in [rank for rank in range(8) if stage in schedule.chunks(rank)]:
            held = []
            for layout, offset in ((found["dense_layers"], 0), (found["moe_layers"], model.num_dense_layers)):
                first = layout.first[rank, stage]
                held += [layer + offset for layer in layout.held[rank, first : first + layout.count[stage]]]
            assert held == list(layers)


def test_671b_model_on_16_ranks_pads_no_rank_beyond_the_fullest_stage():
    model = runpy.run_path(str(CONFIGS / "v3_671b.py"))["config"]().model
    bounds = stage_bounds(model, 16)
    sizes = [b - a for a, b in itertools.pairwise(bounds)]
    assert sum(sizes) == model.num_layers
    assert max(sizes) == 4
    assert sizes[-1] < max(sizes), "the last stage runs the head and the MTP module too"
    # Both directions' stages of a rank, side by side.
    assert layouts(model, make("dualpipe", 16, 32))["moe_layers"].held.shape == (16, 8)
    assert layouts(model, make("dualpipe", 16, 32))["dense_layers"].held.shape == (16, 3)


@pytest.mark.parametrize(
    ("parallel", "batch", "remedy"),
    [
        ({"pipe": 3, "schedule": "dualpipe"}, {}, "parallel.pipe=3 with parallel.schedule='dualpipe'.*even number"),
        (
            {"pipe": 4, "schedule": "dualpipe"},
            {},
            "a step of 8 sequences has 4.*at least 2 x ranks = 8; change batch.microbatch=2 or batch.sequences$",
        ),
        ({"pipe": 8}, {}, "parallel.pipe=8.*model.num_layers=5; lower parallel.pipe$"),
        (
            {"pipe": 4, "schedule": "dualpipev"},
            {"sequences": 16},
            "model.num_layers=5; lower parallel.pipe, or .*one stage a rank",
        ),
        (
            {"pipe": 2, "schedule": "dualpipe"},
            {"sequences": 12, "start_sequences": 8, "ramp_tokens": 1e6},
            "a step of 10 sequences has 5.*even number; change .* or batch.ramp_microbatches$",
        ),
    ],
)
def test_a_pipeline_that_cannot_run_is_refused_with_its_remedy(parallel, batch, remedy):
    batch = {"sequences": 8, "microbatch": 2} | batch
    with pytest.raises(ConfigError, match=remedy):
        check_pipeline(Config(model=ModelConfig(), batch=BatchConfig(**batch), parallel=ParallelConfig(**parallel)))


def test_a_pipeline_that_mostly_waits_says_what_to_change():
    def words(microbatch, **parallel):
        batch = BatchConfig(sequences=8, microbatch=microbatch)
        return step_in_words(Config(batch=batch, parallel=ParallelConfig(**parallel)))

    assert words(None) == ""
    assert words(2, pipe=2, schedule="zb1p") == "zb1p of 4 microbatches"
    assert words(None, pipe=2) == "1f1b of 1 microbatches; 4 would keep its ranks busier: lower batch.microbatch"


def test_the_671b_run_works_on_2048_devices_with_every_batch_of_its_ramp():
    config = runpy.run_path(str(CONFIGS / "v3_671b.py"))["config"]()
    shape = config.parallel.shape(2048)
    assert shape == {"pipe": 16, "data": 2, "node": 8, "gpu": 8}
    check_shape(config, shape)
    batch, tokens, taken = config.batch, 0, []
    while not taken or taken[-1] < batch.sequences:
        taken.append(batch.sequences_at(tokens))
        tokens += taken[-1] * batch.seq_len
    assert sorted(set(taken)) == batch.sizes
    kinds = {}
    for sequences in batch.sizes:
        schedule = schedule_of(config, sequences // batch.microbatch)
        check(schedule)
        kinds.setdefault(schedule.kind, []).append(schedule.microbatches)
        assert schedule.rank_of.tolist() == make("dualpipe", 16, 32).rank_of.tolist()
    assert kinds == {"dualpipe_lockstep": [24, 26, 28, 30], "dualpipe": list(range(32, 121, 2))}
    for microbatches in (24, 120):
        assert len(make_table(schedule_of(config, microbatches)).columns["work"]) < 2 * microbatches + 40
