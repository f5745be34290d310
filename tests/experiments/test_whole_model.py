"""The comparison with transformers on one GPU: that ours runs, that both would train the same model, how it refuses."""

import importlib
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import jax
import pytest

from dsv3_jax.checkpoint.huggingface_config import config_to_hf
from dsv3_jax.ops.fp8_matmul.tiles import TUNED
from dsv3_jax.ops.quantize import E4M3
from dsv3_jax.ops.weights import weight_type
from dsv3_jax.planner.parameters import count_parameters
from dsv3_jax.train.state import model_structure

RUN = Path(__file__).parents[2] / "experiments" / "whole_model" / "run.py"
PEER = "sdpa-grouped_mm-compile-bf16"


@pytest.fixture(scope="module")
def experiment():
    path = sys.path.copy()
    sys.path.insert(0, str(RUN.parent))
    spec = importlib.util.spec_from_file_location("whole_model", RUN)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    sys.path[:] = path
    return module


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Both precisions of ours, beside a Python that has no torch."""
    lacking = tmp_path_factory.mktemp("bin") / "python"
    lacking.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    lacking.chmod(0o755)
    output = lacking.with_name("table.md")
    names = f"{PEER},dsv3_jax-bf16-none,dsv3_jax-fp8-report"
    places = ("--torch-python", str(lacking), "--output", str(output))
    short = ("--sizes", "tiny", "--rounds", "1", "--steps", "2", "--warmup", "1", "--only", names)
    command = [sys.executable, str(RUN), *short, *places]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stderr
    assert output.read_text() == done.stdout.removesuffix("\n")
    return done.stdout


def transformers_parameters(config):
    """Of DeepseekV3ForCausalLM, module by module, from its config.json alone."""
    d, heads = config["hidden_size"], config["num_attention_heads"]
    nope, rope, v = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    latent, q_rank = config["kv_lora_rank"], config["q_lora_rank"]
    q_width = heads * (nope + rope)
    q = d * q_width if q_rank is None else d * q_rank + q_rank + q_rank * q_width
    kv = d * (latent + rope) + latent + latent * heads * (nope + v)
    attention = q + kv + heads * v * d

    def mlp(width):
        return 3 * d * width

    width, experts = config["moe_intermediate_size"], config["n_routed_experts"]
    moe = experts * mlp(width) + mlp(config["n_shared_experts"] * width) + experts * d
    layers, dense = config["num_hidden_layers"], config["first_k_dense_replace"]
    feed_forward = dense * mlp(config["intermediate_size"]) + (layers - dense) * moe
    return 2 * config["vocab_size"] * d + layers * (attention + 2 * d) + feed_forward + d


@pytest.mark.parametrize("sizes", ["full", "tiny"])
def test_transformers_has_as_many_parameters_as_we_count(experiment, sizes):
    model = experiment.SIZES[sizes].model
    assert transformers_parameters(config_to_hf(model)) == count_parameters(model).main


def test_the_model_is_as_large_as_was_asked(experiment):
    task = experiment.SIZES["full"]
    assert 2.2e9 < count_parameters(task.model).main < 2.5e9
    assert task.sequences * task.seq_len == 4 * 4096
    assert task.model.d_ff_expert % 128 == 0, "FP8 kernels would not run"


def test_the_readme_counts_as_the_planner_does(experiment):
    count = count_parameters(experiment.SIZES["full"].model)
    shown = f"| parameters | {count.main:,}; a token passes {count.active:,} |"
    assert shown in RUN.with_name("README.md").read_text()


def test_both_precisions_train_and_what_fails_is_said(measured, experiment):
    pattern = r"\| (dsv3_jax-\S+) \| ([\d.]+) \([^|]+\| ([\d,]+) \| - \| - \| (\S+) and \S+ \| - \|"
    rows = re.findall(pattern, measured)
    assert [name for name, *_ in rows] == ["dsv3_jax-bf16-none", "dsv3_jax-fp8-report"]
    task = experiment.SIZES["tiny"]
    for _, milliseconds, speed, first in rows:
        tokens = float(speed.replace(",", "")) * float(milliseconds) / 1e3
        assert tokens == pytest.approx(task.sequences * task.seq_len, rel=0.01)  # both are rounded
        # The logarithm of the vocabulary: small weights predict nothing yet.
        assert float(first) == pytest.approx(5.545, abs=0.02)
    assert f"| {PEER} | does not run: ModuleNotFoundError: No module named 'torch' |" in measured
    assert "None of theirs was measured." in measured
    assert f"{count_parameters(task.model).main:,} parameters on both sides" in measured


def speeds(experiment):
    return [
        experiment.Speed("dsv3_jax-bf16-none", [0.1, 0.2, 0.12], 40_000_000_000, [10.4, 10.3]),
        experiment.Speed("dsv3_jax-fp8-none", [], None, [], "OutOfMemory: 80 | GB\nand more"),
        experiment.Speed("causal_sdpa-grouped_mm-compile-bf16", [0.24], 50_000_000_000, [10.4, 10.2]),
        experiment.Speed("sdpa-eager-plain-bf16", [0.5], 60_000_000_000, [10.4, 10.2]),
    ]


def test_the_table_compares_with_the_fastest_of_theirs(experiment):
    task = experiment.SIZES["full"]
    shown = experiment.table(speeds(experiment), task, "NVIDIA H100 80GB HBM3")
    # 3,374,579,712 FLOPs a token, 16384 tokens in 0.12 s, of 989.4e12.
    assert (
        "| dsv3_jax-bf16-none | 120.0 (100.0 to 200.0) | 136,533 | 46.6% | 40.0 | 10.400 and 10.300 | 2.00 |" in shown
    )
    assert "| dsv3_jax-fp8-none | does not run: OutOfMemory: 80 / GB |" in shown
    against_all, against_their_own = shown.splitlines()[-2:]
    assert against_all == f"- dsv3_jax-bf16-none: **2.00** times causal_{PEER}, with 0.80 of its peak memory"
    own = "sdpa-eager-plain-bf16"
    assert against_their_own == f"- dsv3_jax-bf16-none: **4.17** times {own}, with 0.67 of its peak memory"
    assert "| - |" in experiment.table(speeds(experiment), task, "cpu"), "no peak is known"


def test_rounds_are_joined_and_a_failure_in_one_counts(experiment):
    ran = [{"step_seconds": [3.0, 1.0, 2.0], "peak_bytes": peak, "losses": [2.0, peak]} for peak in (5, 4)]
    joined = experiment.speed_of("x", ran, 1)
    assert (joined.step_seconds, joined.peak_bytes, joined.losses, joined.error) == ([2.0, 2.0], 5, [2.0, 4], None)
    assert experiment.speed_of("x", [ran[0], {"error": "no"}], 1).error == "no"
    assert experiment.speed_of("x", [], 1.5).error == "not within 1.5 minutes"


def test_contenders_take_turns_and_what_failed_does_not_run_again(experiment, monkeypatch):
    asked = []

    def measure(command, *_):
        name = command[1]
        asked.append(name)
        return {"error": "no"} if name == "b" else {"step_seconds": [1.0]}

    monkeypatch.setattr(experiment, "measure", measure)
    monkeypatch.setattr(experiment, "command_of", lambda name, *_: ["", name])
    records = experiment.compare(Namespace(sizes="tiny", only=["a", "b", "c"], rounds=2, minutes=1))
    assert asked == ["a", "b", "c", "c", "a"]
    assert [len(runs) for runs in records.values()] == [2, 1, 2]


def test_unequal_sides_are_not_compared(experiment):
    task = experiment.SIZES["tiny"]
    with pytest.raises(RuntimeError, match="x trains 1,000 parameters and the model has 1,001,344: the sides would"):
        experiment.check_parameters("x", {"parameters": 1000}, task)


def test_a_process_that_takes_too_long_is_ended(experiment, tmp_path):
    with pytest.raises(TimeoutError):
        experiment.measure(["sleep", "60"], tmp_path, 0.1)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--only", "dsv3_jax-bf16"], "'dsv3_jax-bf16' is no contender, which is dsv3_jax-bf16|fp8-layer|none|report"),
        (["--only", "sdpa-grouped_mm-fast-bf16"], "'sdpa-grouped_mm-fast-bf16' is no contender"),
        (["--steps", "0"], "--steps: '0' must be a whole number above 0"),
        (["--torch-python", "/nowhere/python"], "--torch-python /nowhere/python: is no Python; name one that has"),
        (["--sizes", "tiny", "--minutes", "0"], "no contender ran; of the first it is said: not within 0 minutes"),
    ],
)
def test_wrong_input_ends_in_a_sentence(experiment, monkeypatch, capsys, arguments, says):
    monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        experiment.main()
    said = ended.value.code if isinstance(ended.value.code, str) else capsys.readouterr().err
    assert says in said.splitlines()[-1]


def test_fp8_products_are_tuned_for_the_shapes_it_trains(experiment):
    task, tuned = experiment.SIZES["full"], TUNED["2b"]
    weights = jax.tree_util.tree_leaves_with_path(model_structure(task.model)[1])
    fp8 = {leaf.shape[:0:-1][:2] for path, leaf in weights if weight_type(path, "fp8") == E4M3}
    assert {*tuned.linears.values(), *tuned.experts.values()} == fp8
    assert tuned.rows == task.sequences * task.seq_len
    assert tuned.groups == task.model.num_experts
    # Every expert may need a tile of 128 rows more.
    assert tuned.routed_rows == task.model.top_k * tuned.rows + 128 * tuned.groups
