"""Real processes that train together: the losses of one, a stop and a restart without a trace, and no hanging."""

import functools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

STEPS = 4
ENVIRONMENT = os.environ | {"JAX_PLATFORMS": "cpu"}
CONFIG = """
from dsv3_jax.config import *

def config():
    return Config(
        model=ModelConfig(
            vocab_size=300, d_model=16, num_layers=1, num_dense_layers=0, num_heads=1, qk_nope_head_dim=8,
            qk_rope_head_dim=8, v_head_dim=8, q_lora_rank=None, kv_lora_rank=8, num_experts=8, d_ff_expert=8, top_k=2,
            num_groups=2, top_k_groups=1, num_mtp_modules=0, num_shared_experts=0, max_length=64, init_std=0.05,
        ),
        data=DataConfig(source={source!r}, cache_dir={cache!r}, validation_share=0.2, shuffle_rows=16, streams=4),
        batch=BatchConfig(seq_len=32, sequences=8),
        optimizer=OptimizerConfig(peak_lr=3e-3, warmup_tokens=512, ema_decay=0.9),
        loss=LossConfig(bias_update_speed=0.01),
        parallel=ParallelConfig(devices=4, node=2, gpu=2, expert_buffer_factor=4.0),
        checkpoint=CheckpointConfig(every=2),
        log=LogConfig(tensorboard=False, validation_rows=8, sample_tokens=0),
        steps={steps},
        precision="fp32",
        recompute="none",
    )
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    (folder / "texts").mkdir()
    words = ["the", "router", "expert", "token", "latent", "head", "sends", "keeps", "balances", "(its)", "own.\n"]
    rng = np.random.default_rng(0)
    for i in range(60):
        (folder / "texts" / f"{i}.txt").write_text(" ".join(rng.choice(words, 60)))
    text = CONFIG.format(source=str(folder / "texts"), cache=str(folder / "cache"), steps=STEPS)
    (folder / "small.py").write_text(text)
    return folder


def command(folder, output, *settings, launcher=("train",)):
    words = [sys.executable, "-m", "dsv3_jax.cli", *launcher, folder / "small.py", "--output-dir", output]
    return list(map(str, [*words, "--resume", "auto", *settings]))


def start(folder, output, *settings):
    """Two plain processes, told their place."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        told = {"JAX_COORDINATOR_ADDRESS": f"localhost:{probe.getsockname()[1]}", "JAX_NUM_PROCESSES": "2"}
    return [
        subprocess.Popen(
            command(folder, output, "--stopped-status", 75, *settings),
            env=ENVIRONMENT | told | {"JAX_PROCESS_ID": str(index)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]


def wait_for_step(processes, output, step):
    file = output / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not file.exists() or file.read_text().count("\n") < step:
        assert all(process.poll() is None for process in processes), [process.communicate() for process in processes]
        assert time.monotonic() < deadline, f"step {step} was never reached"
        time.sleep(0.01)


def rows(output):
    """metrics.jsonl without what may differ between identical runs."""
    rows = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in row.items() if key != "timing"} for row in rows]


def saved_steps(output):
    return sorted(int(path.name) for path in (output / "checkpoints").iterdir() if path.name.isdigit())


OVERFLOWING = ("--parallel.expert-buffer-factor", 1)
"""Buffers that two processes have to double in the first step."""


@pytest.fixture(scope="module")
def launched(folder):
    """Uninterrupted runs, by their number of processes; buffers of two overflow at first."""

    def launch(count):
        output = folder / f"of {count}"
        launcher = ("launch", "local", "--processes", count) if count > 1 else ("train",)
        argv = command(folder, output, *(OVERFLOWING if count == 2 else ()), launcher=launcher)
        done = subprocess.run(argv, env=ENVIRONMENT, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stderr
        return output, done

    return functools.cache(launch)


@pytest.mark.parametrize("count", [2, 4])
def test_processes_have_the_losses_of_one_and_process_0_alone_reports(launched, count):
    expected, (output, done) = rows(launched(1)[0]), launched(count)
    got = rows(output)
    assert len(got) == STEPS
    np.testing.assert_allclose([r["loss"] for r in got], [r["loss"] for r in expected], rtol=0, atol=1e-6)
    assert [r["expert_load"] for r in got] == [r["expert_load"] for r in expected]
    summaries = [json.loads((run / "summary.json").read_text()) for run in (output, launched(1)[0])]
    for name in ("validation_loss", "validation_loss_of_average"):
        np.testing.assert_allclose(summaries[0][name], summaries[1][name], rtol=0, atol=1e-6)
    assert done.stdout.count(f"step {STEPS}/{STEPS} ") == 1
    assert done.stdout.count("validation loss") == 1
    overflows = re.findall("rows exceeded the expert buffer; run again", done.stderr)
    assert len(overflows) == (1 if count == 2 else 0)
    names = {path.name for path in output.iterdir()}
    assert names == {"checkpoints", "metrics.jsonl", "summary.json", "tokenizer.json", "curves.png", "expert_load.png"}


def test_run_that_is_stopped_and_killed_and_damaged_goes_on_as_if_it_were_not(folder, launched, tmp_path):
    output, endless = tmp_path / "run", (*OVERFLOWING, "--steps", 100000)

    processes = start(folder, output, *endless, "--checkpoint.every", 100000)
    wait_for_step(processes, output, 1)
    processes[1].send_signal(signal.SIGTERM)
    told = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [75, 75], told
    count = len(rows(output))
    assert saved_steps(output) == [count], "both stop after the same step and save it, though one got the signal"
    assert f"stopped by SIGTERM after step {count}" in told[0][0]

    processes = start(folder, output, *endless)
    # The third that is saved, so that the first is complete, and what was saved above is left when the newest is
    # damaged.
    target = (count // 2 + 3) * 2
    wait_for_step(processes, output, target)
    processes[1].kill()
    killed = time.monotonic()
    out, err = processes[0].communicate(timeout=100)
    assert time.monotonic() - killed < 60
    processes[1].communicate()
    assert processes[0].returncode == 1, out
    sentence = f"dsv3: process 1 on host {socket.gethostname()} was killed, ran out of memory or crashed; the run stops"
    assert sentence in err.splitlines()
    assert "Traceback" not in err

    *_, before, newest = saved_steps(output)
    truncate_largest_file(output / "checkpoints" / str(newest))
    steps = max(STEPS, target + 2)
    processes = start(folder, output, *OVERFLOWING, "--steps", steps)
    told = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], told
    assert "does not read back" in told[0][1]
    assert f"from step {before}" in told[0][0], "both have seen the damage"
    got = rows(output)
    assert len(got) == steps
    assert got[:STEPS] == rows(launched(2)[0])


def truncate_largest_file(folder):
    largest = max((file for file in folder.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)


def test_one_process_goes_on_with_what_two_began(folder, launched, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(launched(2)[0], output)
    shutil.rmtree(output / "checkpoints" / str(STEPS))
    alone = subprocess.run(command(folder, output), env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert alone.returncode == 0, alone.stderr
    assert f"from step {STEPS - 2}" in alone.stdout
    losses = [[row["loss"] for row in rows(run)] for run in (output, launched(1)[0])]
    np.testing.assert_allclose(*losses, rtol=0, atol=1e-6)
