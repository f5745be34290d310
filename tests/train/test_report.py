import io
import json
import math
import os
import signal
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.image import imread
from rich.console import Console

from dsv3_jax.config import Config, ConfigError, LogConfig
from dsv3_jax.train.pictures import draw_curves, draw_expert_load
from dsv3_jax.train.report import MetricsLog, Reporter, plain, read_metrics, scalars

STEPS, LAYERS, EXPERTS = 12, 4, 16


def row(step: int, **extra) -> dict:
    rng = np.random.default_rng(step)
    speed = 3000 + 100 * rng.random()
    return {
        "step": step,
        "tokens": step * 2048,
        "loss": np.float32(8 / step**0.5 + rng.random()),
        "mtp_loss": np.asarray([8.3 / step**0.5], np.float32),
        "mtp_accuracy": np.asarray([0.01 * step], np.float32),
        "sequence_balance": np.float32(1.01),
        "expert_load_max_over_mean": np.asarray(1 + rng.random(LAYERS), np.float32),
        "grad_norm": np.float32(1 / step),
        "lr": 2.2e-4 * step / STEPS,
        "timing": {"tokens_per_second": speed, "seconds": 2048 / speed, "mfu": None},
    } | extra


def write(path: Path, rows, resume_step: int | None = None) -> None:
    log = MetricsLog(path, resume_step)
    for r in rows:
        log.write(r)
    log.close()


def quiet() -> Console:
    return Console(file=io.StringIO(), force_terminal=False)


def run_config(folder: Path, **log) -> Config:
    return replace(Config(), steps=STEPS, output_dir=str(folder), log=LogConfig(**log))


def without_timing(path: Path) -> list[str]:
    return [
        json.dumps({k: v for k, v in json.loads(x).items() if k != "timing"}) for x in path.read_text().splitlines()
    ]


@settings(deadline=None, max_examples=200)
@given(st.floats(width=32, allow_nan=False))
def test_float32_reads_back_exactly_and_equal_values_give_equal_text(x):
    text = json.dumps(plain(np.float32(x)))
    assert np.float32(json.loads(text)) == np.float32(x)
    assert text == json.dumps(plain(np.asarray(x, np.float32)))


def test_every_kind_of_number_a_step_reports_becomes_pythons_own():
    values = {"a": np.int32(3), "b": np.ones((2, 2), np.float32), "c": np.bool_(True), "d": ml_dtypes.bfloat16(0.1)}
    assert plain(values) == {"a": 3, "b": [[1.0, 1.0], [1.0, 1.0]], "c": True, "d": 0.100097656}
    with pytest.raises(TypeError, match="type object"):
        plain({"x": object()})


def test_identical_runs_write_identical_text_apart_from_timing(tmp_path):
    for name, speed in (("a", 1.0), ("b", 2.0)):
        config = run_config(tmp_path / name, tensorboard=False)
        with Reporter(config, console=quiet()) as reporter:
            for step in range(1, STEPS + 1):
                reporter.record(row(step, timing={"tokens_per_second": speed, "seconds": 1 / speed}))
    a, b = tmp_path / "a/metrics.jsonl", tmp_path / "b/metrics.jsonl"
    assert without_timing(a) == without_timing(b)
    assert a.read_text() != b.read_text()


@settings(deadline=None, max_examples=30)
@given(done=st.integers(1, 8), resume=st.integers(0, 8), half=st.integers(0, 60))
def test_a_run_killed_anywhere_and_resumed_leaves_the_file_of_a_run_that_was_not(tmp_path_factory, done, resume, half):
    folder = tmp_path_factory.mktemp("log")
    path, whole = folder / "killed.jsonl", folder / "whole.jsonl"
    resume = min(resume, done)
    write(whole, map(row, range(1, 10)))
    write(path, map(row, range(1, done + 1)))
    with path.open("a") as file:
        file.write(whole.read_text().splitlines()[done][:half])
    write(path, map(row, range(resume + 1, 10)), resume)
    assert path.read_bytes() == whole.read_bytes()
    assert {file.name for file in folder.iterdir()} == {path.name, whole.name}


def test_an_unreadable_line_before_the_last_is_named_and_nothing_is_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, map(row, range(1, 4)))
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + lines[1][:20] + "\n" + lines[2])
    before = path.read_bytes()
    with pytest.raises(ValueError, match="line 2"):
        MetricsLog(path, 3)
    assert path.read_bytes() == before


def test_a_kill_loses_no_row_whose_write_returned(tmp_path):
    path = tmp_path / "metrics.jsonl"
    code = (
        "import os, signal, sys; from pathlib import Path; from dsv3_jax.train.report import MetricsLog\n"
        "log = MetricsLog(Path(sys.argv[1]))\n"
        "for step in range(5): log.write({'step': step, 'tokens': 0, 'loss': 0.5})\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], env={**os.environ}, check=False)
    assert done.returncode == -signal.SIGKILL
    assert [r["step"] for r in read_metrics(path)] == [0, 1, 2, 3, 4]


def test_non_finite_numbers_stay_valid_json_and_are_said_on_the_terminal(tmp_path):
    console = quiet()
    with Reporter(run_config(tmp_path, tensorboard=False), console=console, print_every=100) as reporter:
        reporter.record(row(1))
        reporter.record(row(2, loss=np.float32("nan"), grad_norm=math.inf, mtp_loss=[np.float32("-inf")]))

    def refuse(constant):
        raise AssertionError(constant)

    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1], parse_constant=refuse)
    assert (last["loss"], last["grad_norm"], last["mtp_loss"]) == (None, None, [None])
    assert "loss nan" in console.file.getvalue()


def test_a_row_without_its_step_is_refused(tmp_path):
    with pytest.raises(ValueError, match="lacks step"):
        write(tmp_path / "metrics.jsonl", [{"tokens": 1, "loss": 1.0}])


def test_off_a_terminal_only_due_steps_are_printed_and_on_one_a_bar_shows_all(tmp_path):
    plain_lines = quiet()
    bar = Console(file=io.StringIO(), force_terminal=True, width=120)
    for name, console in (("plain", plain_lines), ("bar", bar)):
        with Reporter(run_config(tmp_path / name, tensorboard=False), console=console, print_every=5) as reporter:
            for step in range(1, STEPS + 1):
                reporter.record(row(step))
    printed = plain_lines.file.getvalue().splitlines()
    assert [line.split()[1] for line in printed] == ["1/12", "5/12", "10/12", "12/12"]
    assert "tokens/s" in printed[0]
    assert "left" in printed[0]
    assert "12/12" in bar.file.getvalue()
    assert "\x1b[" in bar.file.getvalue()


def test_tensorboard_holds_every_scalar_of_a_resumed_run_at_its_step(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    for resume, steps in ((None, range(1, 8)), (4, range(5, 10))):
        with Reporter(run_config(tmp_path), resume, console=quiet()) as reporter:
            for step in steps:
                reporter.record(row(step))
    events, purges = {}, []
    for file in sorted((tmp_path / "tensorboard").iterdir()):
        data = file.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            event, data = Event.FromString(data[12 : 12 + size]), data[16 + size :]
            if event.session_log.status:
                purges.append(event.step)
            for value in event.summary.value:
                events[value.tag, event.step] = value.simple_value
    assert sorted(purges) == [1, 5]
    assert {step for _, step in events} == set(range(1, 10))
    named = scalars(plain(row(9)))
    assert {tag for tag, _ in events} == set(named)
    assert events["expert_load_max_over_mean/4", 9] == pytest.approx(named["expert_load_max_over_mean/4"], rel=1e-6)


def test_a_missing_wandb_is_one_clear_error_before_any_file_is_touched(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"log\.wandb_project='mine'.*pip install"):
        Reporter(run_config(tmp_path / "run", wandb_project="mine"), console=quiet())
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_continues_its_own_wandb_run_and_a_failed_one_says_so(tmp_path, monkeypatch):
    calls = []

    def init(**settings):
        run = types.SimpleNamespace(id=settings["id"] or "abc", define_metric=lambda *a, **k: None)
        run.log = lambda named: calls.append(named["step"])
        run.finish = lambda exit_code: calls.append(("exit", exit_code))
        calls.append((settings["project"], settings["id"], settings["config"]["steps"]))
        return run

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    config = run_config(tmp_path, tensorboard=False, wandb_project="mine")

    def fail():
        with Reporter(config, console=quiet()) as reporter:
            reporter.record(row(1))
            raise RuntimeError("lost a device")

    with pytest.raises(RuntimeError, match="lost a device"):
        fail()
    with Reporter(config, 1, console=quiet()) as reporter:
        reporter.record(row(2))
    assert calls == [("mine", None, STEPS), 1, ("exit", 1), ("mine", "abc", STEPS), 2, ("exit", 0)]


@pytest.mark.parametrize("steps", [1, 200])
def test_pictures_are_drawn_and_have_ink_even_with_gaps_in_the_rows(tmp_path, steps):
    path, curves, load = tmp_path / "metrics.jsonl", tmp_path / "curves.png", tmp_path / "load.png"
    rows = [row(s) for s in range(1, steps + 1)]
    rows[steps // 2] |= {"loss": math.nan if steps > 1 else 1.0, "grad_norm": math.inf}
    write(path, rows)
    draw_curves(path, curves, bigram_loss=5.0, validation_loss=4.0)
    draw_expert_load(path, load)
    without_matrix = imread(load).shape
    write(path, [*rows, row(steps + 1, expert_load=np.random.default_rng(0).poisson(512, (LAYERS, EXPERTS)))])
    draw_expert_load(path, load)
    assert imread(load).shape[0] > without_matrix[0]
    for picture in (curves, load):
        assert 0.01 < (imread(picture)[..., :3].min(-1) < 0.9).mean() < 0.6


def test_pictures_of_a_dense_model_without_mtp_leave_those_panels_out_and_no_rows_are_an_error(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [row(s, mtp_loss=[], mtp_accuracy=[], expert_load_max_over_mean=[]) for s in (1, 2)])
    draw_curves(path, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="no MoE layers"):
        draw_expert_load(path, tmp_path / "load.png")
    write(path, [])
    with pytest.raises(ValueError, match="no rows"):
        draw_curves(path, tmp_path / "curves.png")
