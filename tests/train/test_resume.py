"""Runs of the real command line that are killed, stopped, moved to another mesh, or find a checkpoint damaged."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

STEPS = 8
CONFIG = """
from dsv3_jax.config import *

def config():
    return Config(
        model=ModelConfig(
            vocab_size=300, d_model=16, num_layers=1, num_dense_layers=0, num_heads=1, qk_nope_head_dim=8,
            qk_rope_head_dim=8, v_head_dim=8, q_lora_rank=None, kv_lora_rank=8, num_experts=8, d_ff_expert=8, top_k=2,
            num_groups=2, top_k_groups=1, num_mtp_modules=0, num_shared_experts=0, max_length=64, init_std=0.05,
        ),
        data=DataConfig(source={source!r}, cache_dir={cache!r}, validation_share=0.2, shuffle_rows=16),
        batch=BatchConfig(seq_len=32, sequences=8),
        optimizer=OptimizerConfig(
            peak_lr=3e-3, warmup_tokens=512, decay_start_tokens=1024, decay_end_tokens=2048, final_start_tokens=2048,
            ema_decay=0.9,
        ),
        loss=LossConfig(bias_update_speed=0.01),
        parallel=ParallelConfig(expert_buffer_factor=4.0),
        checkpoint=CheckpointConfig(every=2),
        log=LogConfig(tensorboard=False, validation_rows=8, sample_tokens=0),
        steps={steps},
        precision="fp32",
        recompute="none",
    )
"""


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    texts = folder / "texts"
    texts.mkdir()
    rng = np.random.default_rng(0)
    words = ["the", "router", "expert", "token", "latent", "head", "sends", "keeps", "balances", "(its)", "own.\n"]
    for i in range(60):
        (texts / f"{i}.txt").write_text(" ".join(rng.choice(words, 60)))
    file = folder / "small.py"
    file.write_text(CONFIG.format(source=str(texts), cache=str(folder / "cache"), steps=STEPS))
    return file


def start(config_file, output, *settings):
    command = [sys.executable, "-m", "dsv3_jax.cli", "train", config_file, "--output-dir", output, *settings]
    return subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def train(config_file, output, *settings):
    process = start(config_file, output, *settings)
    out, err = process.communicate(timeout=240)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def metrics(output):
    """The text of metrics.jsonl, line by line, without what may differ between identical runs."""
    rows = [json.loads(line) for line in (Path(output) / "metrics.jsonl").read_text().splitlines()]
    return [json.dumps({key: value for key, value in row.items() if key != "timing"}) for row in rows]


def saved_steps(output):
    return sorted(int(path.name) for path in (Path(output) / "checkpoints").iterdir() if path.name.isdigit())


def signal_after(process, output, step, number):
    """Send a signal as soon as the step stands in metrics.jsonl."""
    file = Path(output) / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not file.exists() or file.read_text().count("\n") < step:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline, f"step {step} was never reached"
        time.sleep(0.005)
    os.kill(process.pid, number)
    out, err = process.communicate(timeout=100)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@pytest.fixture(scope="module")
def uninterrupted(config_file, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "whole"
    done = train(config_file, output)
    assert done.returncode == 0, done.stderr
    assert len(metrics(output)) == STEPS
    return output


def test_run_stopped_and_killed_ends_as_one_that_was_not(config_file, uninterrupted, tmp_path):
    output = tmp_path / "run"
    # Many more steps than it gets to take, so that the signals cannot come too late. The schedules count tokens.
    endless = ("--steps", "100000", "--resume", "auto")

    stopped = signal_after(
        start(config_file, output, *endless, "--checkpoint.every", "1000"), output, 1, signal.SIGTERM
    )
    assert stopped.returncode == 0, stopped.stderr
    rows = len(metrics(output))
    assert saved_steps(output) == [rows], "the step at which SIGTERM came is saved"
    assert f"after step {rows}" in stopped.stdout

    # At once after a step that is saved: most likely while it is being written.
    target = (rows // 2 + 1) * 2
    killed = signal_after(start(config_file, output, *endless), output, target, signal.SIGKILL)
    assert killed.returncode == -signal.SIGKILL
    assert len(metrics(output)) >= target

    steps = max(STEPS, target + 2)
    done = train(config_file, output, "--resume", "auto", "--steps", steps)
    assert done.returncode == 0, done.stderr
    assert "from step" in done.stdout
    assert len(metrics(output)) == steps
    assert metrics(output)[:STEPS] == metrics(uninterrupted)
    summary = json.loads((output / "summary.json").read_text())
    assert np.isfinite([summary["validation_loss"], summary["validation_loss_of_average"]]).all()


def test_resume_on_another_mesh_shape(config_file, uninterrupted, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(uninterrupted, output)
    for step in (6, 8):
        shutil.rmtree(output / "checkpoints" / str(step))
    mesh = ("--parallel.devices", 8, "--parallel.node", 2, "--parallel.gpu", 2)
    done = train(config_file, output, "--resume", "auto", *mesh)
    assert done.returncode == 0, done.stderr
    assert "data 2 x node 2 x gpu 2" in done.stdout
    assert "from step 4" in done.stdout
    rows, expected = (list(map(json.loads, metrics(run))) for run in (output, uninterrupted))
    np.testing.assert_allclose([row["loss"] for row in rows], [row["loss"] for row in expected], rtol=1e-5)
    assert [row["expert_load"] for row in rows] == [row["expert_load"] for row in expected]
    summaries = [json.loads((run / "summary.json").read_text()) for run in (output, uninterrupted)]
    for name in ("validation_loss", "validation_loss_of_average"):
        np.testing.assert_allclose(summaries[0][name], summaries[1][name], rtol=1e-5)


def test_truncated_checkpoint_is_named_and_the_one_before_used(config_file, uninterrupted, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(uninterrupted, output)
    newest = output / "checkpoints" / str(STEPS)
    largest = max((file for file in newest.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    done = train(config_file, output, "--resume", "auto")
    assert done.returncode == 0, done.stderr
    assert str(newest) in done.stderr
    assert "does not read back" in done.stderr
    assert "Traceback" not in done.stderr
    assert f"from step {STEPS - 2}" in done.stdout
    assert (output / "unreadable" / str(STEPS)).is_dir()
    assert saved_steps(output)[-1] == STEPS, "the step is saved anew"
    assert metrics(output) == metrics(uninterrupted)


def test_folder_that_holds_a_run_is_not_overwritten(config_file, uninterrupted):
    before = {file: file.read_bytes() for file in uninterrupted.rglob("*") if file.is_file()}
    refused = train(config_file, uninterrupted)
    assert refused.returncode == 2
    assert len(refused.stderr.strip().splitlines()) == 1, refused.stderr
    assert f"already holds a run at step {STEPS}" in refused.stderr
    assert {file: file.read_bytes() for file in uninterrupted.rglob("*") if file.is_file()} == before


def test_steps_that_stay_non_finite_stop_the_run(config_file, tmp_path):
    settings = ("--optimizer.peak-lr", "1e38", "--optimizer.warmup-tokens", "0", "--max-bad-steps", "3")
    failed = train(config_file, tmp_path / "run", *settings)
    assert failed.returncode == 2
    assert "Traceback" not in failed.stderr
    sentences = [line for line in failed.stderr.splitlines() if line.startswith("dsv3: ")]
    assert len(sentences) == 1
    assert "3 steps in a row up to step 4 had a non-finite loss or gradient" in sentences[0]
    assert "lower optimizer.peak_lr=1e+38" in sentences[0]
    rows = [json.loads(row) for row in metrics(tmp_path / "run")]
    assert [row["applied"] for row in rows] == [True, False, False, False]
