"""The plan of the report's own run beside the report, and plans that do not fit together."""

import dataclasses
from pathlib import Path

import pytest
from rich.console import Console

from dsv3_jax.cli import load_config
from dsv3_jax.config import BatchConfig, ConfigError
from dsv3_jax.planner.cluster import ClusterPlan, parse_mesh, plan_cluster, plan_extension
from dsv3_jax.planner.cluster_report import print_cluster_plan, usual_stage
from dsv3_jax.planner.devices import load_device
from dsv3_jax.planner.parameters import count_parameters
from dsv3_jax.planner.search import print_search, search
from dsv3_jax.planner.work import seconds

CONFIGS = Path(__file__).parents[2] / "configs"
V3 = load_config(str(CONFIGS / "v3_671b.py"))
H800 = load_device("h800")
REPORT_MESH = parse_mesh("pipe=16,data=2,node=8,gpu=8")


@pytest.fixture(scope="module")
def report() -> ClusterPlan:
    return plan_cluster(V3, H800, REPORT_MESH)


def test_it_predicts_the_published_pair(report):
    """129.0 ms for 4 MoE layers forward and backward, the compute stream busy for 118 (report's trace)."""
    stage = usual_stage(report)
    assert report.stages[stage].label == "4 MoE layers"
    times = report.chunk_times[stage]
    assert times.forward + times.backward == pytest.approx(129.0e-3, rel=0.1)
    assert seconds(report.stages[stage].work, H800, "FIW") * 4096 == pytest.approx(118e-3, rel=0.1)
    assert 2 * times.exchange < times.forward + times.backward  # the pair hides it


def test_it_predicts_the_published_cost(report):
    """180K GPU-hours for a trillion tokens and 2664K for all (report, table 1); 19.9 s a step (follow-up report)."""
    assert report.devices == 2048
    assert (report.schedule.kind, report.schedule.microbatches) == ("dualpipe", 120)
    assert report.gpu_hours_per_trillion == pytest.approx(180e3, rel=0.15)
    assert report.gpu_hours == pytest.approx(2664e3, rel=0.15)
    assert report.step_seconds == pytest.approx(19.9, rel=0.15)
    assert report.mfu() == pytest.approx(0.391, rel=0.15)


def test_a_step_is_the_sum_of_its_parts(report):
    assert sum(report.step_parts.values()) == pytest.approx(report.step_seconds)
    assert report.gpu_hours_per_trillion == pytest.approx(
        report.step_seconds * 2048 / 3600 * 1e12 / (15360 * 4096), rel=1e-12
    )


def test_the_reports_run_fits_and_activations_take_most(report):
    assert report.fits
    memory = report.memory[report.fullest]
    assert memory.largest == "activations"
    assert memory.total == sum(dataclasses.astuple(memory))


def test_ranks_together_hold_the_model_once_per_copy_and_the_optimizer_once(report):
    count = count_parameters(V3.model)
    experts = count.routed_experts + count.mtp_modules.routed_experts
    weights = sum(memory.weights for memory in report.memory)
    assert weights == pytest.approx(2 * 2 * (count.total - experts + experts / 64))  # both directions, BF16
    assert len({memory.optimizer for memory in report.memory}) == 1
    repeated = sum(memory.optimizer for memory in report.memory) * 128 - (4 + 2 + 2) * count.total
    # All but gains and router biases divides by 2048.
    vectors = (4 + 2 + 2) * (count.norms + count.mtp_modules.norms) + 4 * 59 * 256
    assert 0 < repeated < 2048 * vectors


def test_dualpipe_beats_1f1b_and_lockstep_costs(report):
    simple = plan_cluster(V3, H800, REPORT_MESH, "1f1b")
    assert report.step_seconds < 0.8 * simple.step_seconds
    assert report.lockstep_seconds > report.timeline.makespan
    ours = plan_cluster(V3, H800, REPORT_MESH, "dualpipe_lockstep")
    assert ours.lockstep_seconds < report.lockstep_seconds


def test_context_extension_takes_the_reports_tokens(report):
    extension = plan_extension(report)
    assert [plan.config.batch.seq_len for plan in extension] == [32768, 131072]
    assert [plan.config.total_tokens for plan in extension] == [1000 * 1920 * 32768, 1000 * 480 * 131072]
    assert report.step_seconds < extension[0].step_seconds < extension[1].step_seconds
    small = dataclasses.replace(report, tokens=10**9)
    assert plan_extension(small) == []


def test_a_growing_batch_pays_the_bubble_in_every_step(report):
    constant = BatchConfig(seq_len=4096, sequences=15360, microbatch=128)
    same_tokens = dataclasses.replace(V3, batch=constant, steps=round(V3.total_tokens / (15360 * 4096)))
    assert plan_cluster(same_tokens, H800, REPORT_MESH).gpu_hours < report.gpu_hours


def test_recomputation_trades_time_for_memory():
    plans = [
        plan_cluster(dataclasses.replace(V3, recompute=recompute), H800, REPORT_MESH)
        for recompute in ("none", "report", "layer")
    ]
    activations = [plan.memory[plan.fullest].activations for plan in plans]
    assert activations == sorted(activations, reverse=True)
    assert plans[0].step_seconds < plans[1].step_seconds < plans[2].step_seconds


def test_the_tables_name_inputs_and_results(report):
    console = Console(width=80)
    with console.capture() as captured:
        print_cluster_plan(report, console)
    text = captured.get()
    for part in (
        "2,048 H800: pipe 16 x data 2 x node 8 x gpu 8", "dualpipe with 120 microbatches", "1,007 TFLOP/s",
        "One F+B pair of 4 MoE layers", "the largest: activations", "exchange over node", "in lockstep",
        "GPU-hours / 1e12 tokens", "the whole run",
    ):  # fmt: skip
        assert part in text
    assert "…" not in text


def test_meshes_are_read_and_wrong_ones_refused():
    assert parse_mesh("gpu=8, pipe=4") == {"pipe": 4, "data": 1, "node": 1, "gpu": 8}
    for text in ("pipe", "pipe=0", "tensor=2", "pipe=two", ""):
        with pytest.raises(ConfigError, match="is not one of pipe, data, node, gpu with its size"):
            parse_mesh(text)


REFUSED = {
    "pipe=16,data=3,node=8,gpu=8": "batch.microbatch=128: must be a multiple of the 192 devices",
    "pipe=16,data=2,node=3,gpu=8": "model.num_experts=256: cannot be spread over node x gpu = 24 devices",
    "pipe=16,data=2,node=4,gpu=16": "--mesh gpu=16: H800 has 8 GPUs a node; raise node instead",
    "pipe=128,data=2,node=8,gpu=8": "--mesh pipe=128: the model has only 61 layers; lower it",
}


@pytest.mark.parametrize(("mesh", "message"), REFUSED.items())
def test_a_mesh_that_does_not_divide_is_refused(mesh, message):
    with pytest.raises(ConfigError, match=message):
        plan_cluster(V3, H800, parse_mesh(mesh))


def test_a_schedule_that_does_not_suit_the_mesh_is_refused():
    with pytest.raises(ConfigError, match="needs at least 2 x ranks = 64"):
        plan_cluster(
            dataclasses.replace(V3, batch=BatchConfig(seq_len=4096, sequences=1280, microbatch=128)), H800,
            parse_mesh("pipe=32,data=2,node=8,gpu=8"), "dualpipe",
        )  # fmt: skip
    with pytest.raises(ConfigError, match="schedule='zigzag': choose one of"):
        plan_cluster(V3, H800, REPORT_MESH, "zigzag")
    batch = dataclasses.replace(V3.batch, microbatch=64)
    with pytest.raises(ConfigError, match="a pipeline of 120 stages: the model has only 64 parts"):
        plan_cluster(
            dataclasses.replace(V3, batch=batch), H800, parse_mesh("pipe=60,node=8,gpu=8"), "dualpipev",
        )  # fmt: skip


def test_search_finds_plans_that_fit_fastest_first():
    config = load_config(str(CONFIGS / "moe_16b.py"))
    plans = search(config, load_device("h100"), 256)
    assert len(plans) == 10
    assert all(plan.fits and plan.devices == 256 for plan in plans)
    assert [plan.step_seconds for plan in plans] == sorted(plan.step_seconds for plan in plans)
    console = Console(width=80)
    with console.capture() as captured:
        print_search(plans, console)
    assert "The best on 256 H100" in captured.get()


def test_search_says_where_nothing_fits():
    with pytest.raises(ConfigError, match=r"nothing fits 8 x H800 of 80 GB, or no mesh divides .*; use more devices"):
        search(V3, H800, 8)


def test_the_readme_quotes_the_planner(report):
    text = (CONFIGS.parent / "README.md").read_text()
    stage = usual_stage(report)
    busy = seconds(report.stages[stage].work, H800, "FIW") * 4096
    extension = sum(plan.gpu_hours for plan in plan_extension(report))
    for planned, published in (
        (f"{1e3 * busy:.1f} ms", "118 ms"),
        (f"{1e3 * busy / H800.busy:.1f} ms", "129.0 ms"),
        (f"{report.step_seconds:.1f} s", "19.9 s"),
        (f"{report.mfu():.1%}", "39.1%, from the 19.9 s"),
        (f"{report.gpu_hours_per_trillion / 1e3:.0f}K", "180K"),
        (f"{report.gpu_hours / 1e3:.0f}K", "2664K"),
        (f"{extension / 1e3:.0f}K", "119K"),
        (f"{report.memory[report.fullest].total / 1e9:.1f} GB of 80", "fits"),
    ):
        assert f"| {planned} | {published} |" in text
