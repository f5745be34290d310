"""The arms of the FP8 experiment at sizes a CPU can afford, without the packages that its device lacks."""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

RUN = Path(__file__).parents[2] / "experiments" / "fp8_vs_bf16" / "run.py"
# Every line of the input is a command line of run.py, on a machine that lacks some packages, whatever imports them.
WITHOUT = """
import runpy, shlex, sys
class Absent:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in ("grain", "tyro", "array_record", "pyarrow", "tensorboardX"):
            raise ModuleNotFoundError(f"No module named {name!r}")
sys.meta_path.insert(0, Absent())
for line in sys.stdin:
    runpy.run_path(sys.argv[1])["main"](shlex.split(line))
"""


@pytest.fixture(scope="module")
def experiment():
    spec = importlib.util.spec_from_file_location("fp8_vs_bf16", RUN)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fp8_vs_bf16")
    rng = np.random.default_rng(0)
    walk = np.cumsum(rng.integers(1, 4, (40, 64)), axis=1) % 512
    np.savez_compressed(folder / "tokens.npz", train=walk[:32].astype(np.uint16), held_out=walk[32:].astype(np.uint16))
    return folder


def run(folder, *todo):
    """In one process, which start-up makes dear."""
    places = f"--tiny --every 4 --tokens {folder / 'tokens.npz'} --results {folder / 'results'}"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(RUN.parents[2]), os.environ.get("PYTHONPATH", "")])}
    lines = "".join(f"{places} {what}\n" for what in todo)
    command = [sys.executable, "-c", WITHOUT, str(RUN)]
    done = subprocess.run(command, input=lines, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def records(folder, experiment):
    # Second runs of two arms start from other weights, and differ in nothing else.
    names = [arm for arm in experiment.ARMS if arm not in ("bf16_nudged_2", "fp8_nudged")]
    arms = (f"--arm {arm}" for arm in names)
    stopped = f"--results {folder / 'stopped'}"
    run(folder, *arms, f"{stopped} --arm bf16 --minutes 0", f"{stopped} --arm bf16_nudged --stop-after 2")
    return {arm: json.loads((folder / "results" / f"{arm}.json").read_text()) for arm in names}


def test_every_arm_learns_and_fp8_stays_near_bf16(records):
    for record in records.values():
        assert len(record["losses"]) == record["planned_steps"]
        assert record["skipped_steps"] == 0
        assert [step for step, _ in record["evaluations"]] == [4, 8, 12]
        assert record["losses"][-1] < record["losses"][0] - 0.3
    base = np.array(records["bf16"]["losses"])
    for name in ("fp8", "bf16_nudged"):
        assert np.abs(np.array(records[name]["losses"]) / base - 1).max() < 0.01


def test_the_arms_start_equal_and_then_differ(records):
    first = [record["losses"][0] for record in records.values()]
    np.testing.assert_allclose(first, first[0], rtol=2e-3)
    last = [record["losses"][-1] for record in records.values()]
    assert len(set(last)) == len(last)
    # Gradients by block change nothing before the first update.
    assert records["block_gradients"]["losses"][0] == records["fp8"]["losses"][0]
    assert records["block_gradients"]["grad_norms"][0] != records["fp8"]["grad_norms"][0]


def test_a_complete_arm_is_not_run_again_and_the_report_joins_all(experiment, folder, records):
    written = (folder / "results" / "fp8.json").stat().st_mtime_ns
    places = ["--tiny", "--every=4", f"--tokens={folder / 'tokens.npz'}", f"--results={folder / 'results'}"]
    experiment.main([*places, "--arm=fp8"])
    experiment.main([*places, "--report"])
    assert (folder / "results" / "fp8.json").stat().st_mtime_ns == written
    shown = (folder / "table.md").read_text()
    assert all(f"| {arm} |" in shown for arm in records)
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_an_arm_stops_in_time_or_where_it_is_told(experiment, folder, records):
    stopped = experiment.read_records(folder / "stopped")
    assert [len(record["losses"]) for record in stopped.values()] == [1, 2]
    assert [record["evaluations"][-1][0] for record in stopped.values()] == [1, 2]
    assert "| 2 of 12 |" in experiment.table(stopped, 4)
    assert stopped["bf16_nudged"]["losses"] == records["bf16_nudged"]["losses"][:2], "the whole run's schedule"


def test_arms_with_other_settings_are_not_compared(experiment, records, tmp_path):
    for name, print_of in (("bf16", "a"), ("fp8", "b")):
        (tmp_path / f"{name}.json").write_text(json.dumps(records[name] | {"fingerprint": print_of}))
    with pytest.raises(ValueError, match="fp8 had other settings"):
        experiment.read_records(tmp_path)


def test_a_loss_that_is_not_finite_is_said_to_be_so(experiment, records):
    broken = records["fp8"] | {"losses": [None] * 12, "evaluations": [[4, None]], "skipped_steps": 12}
    shown = experiment.table({"bf16": records["bf16"], "fp8": broken}, 4)
    assert "12 of 12, 12 not finite" in shown
    assert shown.count("| not finite |") >= 3


def test_tokens_of_each_pass_are_all_rows_once(experiment):
    tokens = experiment.Tokens(np.arange(10, dtype=np.uint16)[:, None], np.zeros((1, 1), np.uint16))
    taken = np.concatenate([tokens.batch(step, 4, seed=0)[0, :, 0] for step in range(5)])
    assert sorted(taken[:10]) == sorted(taken[10:]) == list(range(10))
    assert list(taken[:10]) != list(taken[10:])


def test_prepared_tokens_are_those_of_the_pipeline(experiment, tmp_path):
    (tmp_path / "texts").mkdir()
    for i in range(40):
        (tmp_path / "texts" / f"{i}.py").write_text(f"def add_{i}(x):\n    return x + {i}\n" * 20)
    config = experiment.load_config(tiny=True)
    data = replace(config.data, source=str(tmp_path / "texts"), cache_dir=str(tmp_path), validation_share=0.2)
    few = replace(config, data=data, steps=2, batch=replace(config.batch, sequences=3))
    written = experiment.prepare(few, tmp_path / "tokens.npz")
    read = experiment.Tokens.read(tmp_path / "tokens.npz")
    assert read.train.shape == (6, 64)
    assert read.train.dtype == np.uint16
    np.testing.assert_array_equal(read.train, written.train)
    assert 1 <= len(read.held_out) <= 8
    many = experiment.prepare(replace(few, steps=1000), tmp_path / "tokens.npz")
    assert len(many.train) < 3000, "rows are those of one pass"


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--arm", "fp8", "--source", "texts"], "give it with --prepare"),
        (["--prepare", "--source", "nowhere"], "nowhere"),
    ],
)
def test_a_source_that_cannot_be_read_is_refused_in_one_sentence(experiment, argv, sentence, capsys):
    with pytest.raises(SystemExit):
        experiment.main(argv)
    assert sentence in capsys.readouterr().err.splitlines()[-1]


def test_the_model_is_as_large_as_was_asked(experiment):
    config = experiment.load_config()
    assert experiment.count_parameters(config.model).total >= 100_000_000
    assert config.model.num_mtp_modules == 1
    assert config.steps >= 2000
    assert config.batch.sequences * config.batch.seq_len == 16 * 1024
