"""A job on a real SLURM that is stopped and requeued in the middle of its run ends as one that was not."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest

pytestmark = pytest.mark.slurm

STEPS = 160
CONFIG = """
from dsv3_jax.config import *

def config():
    return Config(
        model=ModelConfig(
            vocab_size=300, d_model=16, num_layers=1, num_dense_layers=0, num_heads=1, qk_nope_head_dim=8,
            qk_rope_head_dim=8, v_head_dim=8, q_lora_rank=None, kv_lora_rank=8, num_experts=4, d_ff_expert=8, top_k=2,
            num_groups=2, top_k_groups=1, num_mtp_modules=0, num_shared_experts=0, max_length=64, init_std=0.05,
        ),
        data=DataConfig(source={source!r}, cache_dir={cache!r}, validation_share=0.2, shuffle_rows=16),
        batch=BatchConfig(seq_len=16, sequences=4),
        optimizer=OptimizerConfig(peak_lr=3e-3, warmup_tokens=512),
        parallel=ParallelConfig(devices=2, node=2, gpu=1, expert_buffer_factor=2.0),
        checkpoint=CheckpointConfig(every=20),
        log=LogConfig(tensorboard=False, validation_rows=4, sample_tokens=0),
        steps={steps},
        precision="fp32",
        recompute="none",
    )
"""


@pytest.fixture
def config_file(tmp_path):
    (tmp_path / "texts").mkdir()
    rng = np.random.default_rng(0)
    words = ["the", "router", "expert", "token", "latent", "head", "sends", "keeps", "balances", "(its)", "own.\n"]
    for i in range(60):
        (tmp_path / "texts" / f"{i}.txt").write_text(" ".join(rng.choice(words, 60)))
    file = tmp_path / "small.py"
    file.write_text(CONFIG.format(source=str(tmp_path / "texts"), cache=str(tmp_path / "cache"), steps=STEPS))
    return file


def rows(output):
    """metrics.jsonl without what may differ between identical runs."""
    rows = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in row.items() if key != "timing"} for row in rows]


def start(environment, *arguments):
    command = [sys.executable, "-m", "dsv3_jax.cli", "launch", *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


def test_requeued_job_ends_with_the_metrics_of_an_uninterrupted_one(cluster, config_file, tmp_path):
    environment = cluster.environment | {"JAX_PLATFORMS": "cpu"}
    whole, output = tmp_path / "whole", tmp_path / "run"

    options = ("--nodes", 2, "--gpus-per-node", 0, "--time", "00:30:00", "--submit", "--output-dir", output)
    told = finish(start(environment, "slurm", config_file, *options))
    job = re.search(r"as job (\d+);", told)[1]
    metrics, log = output / "metrics.jsonl", output / f"slurm-{job}.log"

    def state():
        return cluster.run("scontrol", "show", "job", job, "--oneliner").split("JobState=")[1].split()[0]

    def reaches(step):
        assert state() not in ("FAILED", "COMPLETED", "CANCELLED"), log.read_text()
        return metrics.exists() and metrics.read_text().count("\n") >= step

    def stops():
        return log.exists() and "stopped by SIGTERM" in log.read_text()

    def starts(times):
        # A requeued job waits until its old credentials have expired, see AuthInfo in conftest.py.
        assert state() not in ("FAILED", "CANCELLED"), log.read_text()
        return log.exists() and log.read_text().count("; steps to") >= times

    # As before the time limit: the run saves, exits, and the script puts the job back into the queue.
    cluster.wait_for(lambda: reaches(1), "the job never trains", 400)
    cluster.run("scancel", "--signal=TERM", job)
    cluster.wait_for(stops, "the job does not stop", 400)
    # While the job waits in the queue.
    uninterrupted = start(environment, "local", "--processes", 2, config_file, "--output-dir", whole)
    cluster.wait_for(lambda: starts(2), "the job does not come back", 400)
    stopped = int(re.search(r"stopped by SIGTERM after step (\d+)", log.read_text())[1])
    assert f"steps to {STEPS}, from step {stopped}" in log.read_text()

    # As at a preemption, or by an administrator: SLURM kills the job and puts it back itself.
    cluster.wait_for(lambda: reaches(stopped + 25), "the job does not go on", 400)
    cluster.run("scontrol", "requeue", job)
    cluster.wait_for(lambda: starts(3), "the job does not come back", 400)
    cluster.wait_for(lambda: state() == "COMPLETED", f"the job does not end: {os.fspath(log)}", 300)

    finish(uninterrupted)
    assert rows(output) == rows(whole)
    assert len(rows(output)) == STEPS
    assert log.read_text().count("validation loss") == 1
    cluster.wait_for(lambda: not cluster.run("squeue", "-h").strip(), "the job comes back after its end")
