"""The loop around the step: a full expert buffer loses no token, and a run is only resumed as what it was."""

import dataclasses
import functools
import logging
import os
import signal
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from random_state import random_state
from rich.console import Console

from dsv3_jax.config import (
    BatchConfig,
    CheckpointConfig,
    Config,
    ConfigError,
    DataConfig,
    LogConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
)
from dsv3_jax.ops.permute import tile_rows
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.train import loop
from dsv3_jax.train.loss import LossReport
from dsv3_jax.train.report import NoReporter, read_metrics
from dsv3_jax.train.state import state_shardings
from dsv3_jax.train.step import StepReport

STEPS, SEQUENCES, SEQ_LEN, TOP_K = 3, 4, 32, 4


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loop")
    texts = folder / "texts"
    texts.mkdir()
    words = ["the", "router", "expert", "token", "latent", "head", "sends", "keeps", "balances", "(its)", "own.\n"]
    rng = np.random.default_rng(0)
    for i in range(40):
        (texts / f"{i}.txt").write_text(" ".join(rng.choice(words, 60)))
    return Config(
        model=ModelConfig(
            vocab_size=300, d_model=32, num_layers=1, num_dense_layers=0, d_ff=64, num_heads=2, qk_nope_head_dim=8,
            qk_rope_head_dim=8, v_head_dim=8, q_lora_rank=16, kv_lora_rank=16, num_experts=16, d_ff_expert=16,
            top_k=TOP_K, num_mtp_modules=0, max_length=64, init_std=0.05,
        ),
        data=DataConfig(source=str(texts), cache_dir=str(folder / "cache"), validation_share=0.2, shuffle_rows=8),
        batch=BatchConfig(seq_len=SEQ_LEN, sequences=SEQUENCES),
        optimizer=OptimizerConfig(peak_lr=3e-3, warmup_tokens=1),
        loss=LossConfig(bias_update_speed=0.01),
        parallel=ParallelConfig(devices=2, gpu=2),
        checkpoint=CheckpointConfig(every=STEPS),
        log=LogConfig(tensorboard=False, validation_rows=2),
        steps=STEPS,
        precision="fp32",
        recompute="none",
    )  # fmt: skip


def with_factor(config, output, factor):
    parallel = dataclasses.replace(config.parallel, expert_buffer_factor=factor)
    return dataclasses.replace(config, output_dir=str(output), parallel=parallel)


@dataclasses.dataclass(frozen=True)
class Run:
    config: Config
    finished: loop.Finished
    rows: list[dict]
    warnings: list[str]


class Listener(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


def run(config):
    listener = Listener()
    loop.logger.addHandler(listener)
    finished = loop.train(config, Console(quiet=True))
    loop.logger.removeHandler(listener)
    return Run(config, finished, read_metrics(Path(config.output_dir) / "metrics.jsonl"), listener.messages)


def small_and_large_buffer(config, folder, small, large):
    """Two runs whose tokens all want the first device: one buffer is too small for that, one is not."""
    state = jax.device_get(random_state(config, make_mesh(config)))
    bias = {kind: np.where(np.arange(b.shape[1]) < TOP_K, np.float32(10), b) for kind, b in state.router_bias.items()}
    state = dataclasses.replace(state, router_bias=bias)
    make_step = loop.make_step
    compiled = {}

    def biased_state(config, mesh):
        return jax.device_put(state, state_shardings(config, mesh))

    def make_step_once(config, mesh, factor):
        if factor not in compiled:
            compiled[factor] = make_step(config, mesh, factor)
        return compiled[factor]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "init_state", biased_state)
        patch.setattr(loop, "make_step", make_step_once)
        runs = [run(with_factor(config, folder / f"{factor}", factor)) for factor in (small, large)]
    assert sorted(compiled) == [small, large]
    return runs


@pytest.fixture(scope="module")
def overflowing_and_roomy(config, tmp_path_factory):
    """Two devices: one buffer holds a balanced load, one any load."""
    return small_and_large_buffer(config, tmp_path_factory.mktemp("runs"), 1.0, 2.0)


def test_full_buffer_of_the_hierarchical_exchange_loses_no_token(config, tmp_path):
    parallel = dataclasses.replace(config.parallel, devices=4, node=2, gpu=2, exchange="hierarchical")
    small, large = small_and_large_buffer(dataclasses.replace(config, parallel=parallel), tmp_path, 2.0, 4.0)
    assert [row["expert_buffer_reruns"] for row in small.rows] == [1] * STEPS
    assert not any(row["expert_buffer_reruns"] for row in large.rows)
    assert small.finished.progress.buffer_factor == 4
    for got, expected in zip(small.rows, large.rows, strict=True):
        assert got["applied"]
        assert (got["loss"], got["grad_norm"]) == (expected["loss"], expected["grad_norm"])
        assert np.sum(got["expert_load"]) == SEQUENCES * SEQ_LEN * TOP_K
    jax.tree.map(np.testing.assert_array_equal, *(jax.device_get(run.finished.state) for run in (small, large)))


def test_full_expert_buffer_loses_no_token(overflowing_and_roomy):
    overflowing, roomy = overflowing_and_roomy
    # The batch wants all its rows on one device, which has room for half of them, and for a tile more of each expert.
    choices, experts = SEQUENCES * SEQ_LEN * TOP_K, overflowing.config.model.num_experts // 2
    room = choices // 2 + experts * tile_rows(choices // 2, experts)
    assert [warning for warning in overflowing.warnings if "expert buffer" in warning] == [
        f"step 1: {choices - room} rows exceeded the expert buffer; run again with expert_buffer_factor=2"
    ]
    assert not [warning for warning in roomy.warnings if "expert buffer" in warning]
    assert overflowing.finished.progress.buffer_factor == 2
    assert [row["expert_buffer_reruns"] for row in overflowing.rows] == [1] * STEPS
    assert len(overflowing.rows) == len(roomy.rows) == STEPS
    for got, expected in zip(overflowing.rows, roomy.rows, strict=True):
        assert got["dropped_tokens"] == expected["dropped_tokens"] == 0
        assert got["applied"]
        for name in ("loss", "grad_norm", "sequence_balance_loss"):
            np.testing.assert_allclose(got[name], expected[name], rtol=1e-6, err_msg=name)
        assert got["tokens"] == expected["tokens"]
        assert got["expert_load"] == expected["expert_load"]
        assert np.sum(got["expert_load"]) == choices
        assert np.sum(np.asarray(got["expert_load"])[:, :TOP_K]) == choices
    assert roomy.rows[-1]["loss"] < roomy.rows[0]["loss"]
    assert overflowing.finished.rows_taken == roomy.finished.rows_taken == STEPS * SEQUENCES
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, *(jax.device_get(run.finished.state.params) for run in (overflowing, roomy)))


class Devices(NoReporter):
    """Stands in for the step and for the reporter: what was sent and what was reported, in order, and the rows and the
    overflow before of every step sent. Step `stop_at` is reported with a SIGTERM; the n-th sent overflows, if
    `overflows_at` is n."""

    def __init__(self, monkeypatch, stop_at=None, overflows_at=None):
        self.events, self.rows, self.overflows_before = [], [], []
        self.stop_at, self.overflows_at = stop_at, overflows_at
        monkeypatch.setattr(loop, "make_step", lambda config, mesh, factor: self.step)
        monkeypatch.setattr(loop, "_reporter", lambda *_: self)

    def step(self, state, tokens, knobs):
        self.events.append("sent")
        self.rows.append(np.asarray(tokens))
        self.overflows_before.append(int(knobs.overflow_before))
        overflow = np.int32(5 if len(self.rows) == self.overflows_at else 0)
        one, none = np.float32(1), np.zeros(0, np.float32)
        losses = LossReport(one, none, none, one, one, {"moe": np.ones((1, 16), np.int32)}, overflow)
        return state, StepReport(losses, one, np.bool_(True))

    def record(self, row):
        self.events.append(row["step"])
        if row["step"] == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)


def with_steps(config, output, steps, **changes):
    parallel = dataclasses.replace(config.parallel, devices=1, gpu=1)
    changes = {"checkpoint": CheckpointConfig(every=4), **changes}
    return dataclasses.replace(config, output_dir=str(output), parallel=parallel, steps=steps, **changes)


def test_devices_have_the_next_step_before_the_last_is_reported_but_not_past_a_checkpoint(
    config, tmp_path, monkeypatch
):
    devices = Devices(monkeypatch)
    loop.train(with_steps(config, tmp_path, 6))
    assert devices.events == ["sent", "sent", 1, "sent", 2, "sent", 3, 4, "sent", "sent", 5, 6]


def test_step_that_overflowed_and_the_one_sent_after_it_run_again_in_their_order(config, tmp_path, monkeypatch):
    whole = Devices(monkeypatch)
    loop.train(with_steps(config, tmp_path / "whole", 4))
    again = Devices(monkeypatch, overflows_at=2)
    finished = loop.train(with_steps(config, tmp_path / "again", 4))
    assert again.events == ["sent", "sent", 1, "sent", "sent", "sent", 2, "sent", 3, 4]
    # Step 3 was told of the overflow of step 2; neither was when they ran again.
    assert again.overflows_before == [0, 0, 5, 0, 0, 0]
    np.testing.assert_array_equal(again.rows, [whole.rows[i] for i in (0, 1, 2, 1, 2, 3)])
    assert finished.progress.reruns == 1
    assert finished.progress.buffer_factor == 2 * config.parallel.expert_buffer_factor


def test_no_step_is_sent_ahead_where_weights_are_averaged(config, tmp_path, monkeypatch):
    devices = Devices(monkeypatch)
    loop.train(with_steps(config, tmp_path, 3, optimizer=OptimizerConfig(ema_decay=0.9)))
    assert devices.events == ["sent", 1, "sent", 2, "sent", 3]


def test_a_stopped_run_saves_the_steps_under_way_and_continues_with_the_next_rows(config, tmp_path, monkeypatch):
    whole = Devices(monkeypatch)
    loop.train(with_steps(config, tmp_path / "whole", 6))
    stopped = Devices(monkeypatch, stop_at=2)
    finished = loop.train(with_steps(config, tmp_path / "stopped", 6))
    assert finished.interrupted
    assert stopped.events == ["sent", "sent", 1, "sent", 2, 3]
    rest = Devices(monkeypatch)
    loop.train(with_steps(config, tmp_path / "stopped", 6, resume="auto"))
    assert rest.events[-1] == 6
    np.testing.assert_array_equal(stopped.rows + rest.rows, whole.rows)


def resumed(run, **changes):
    return dataclasses.replace(run.config, resume="auto", steps=STEPS + 1, **changes)


def files(run):
    return {path: path.stat().st_mtime_ns for path in (Path(run.config.output_dir) / "checkpoints").rglob("*")}


def test_run_is_not_resumed_on_other_rows(overflowing_and_roomy, config):
    run = overflowing_and_roomy[0]
    with pytest.raises(ConfigError, match=r"saved with {'seed': 0} .* with {'seed': 5}: keep .* another output_dir"):
        loop.train(resumed(run, seed=5), Console(quiet=True))
    other = dataclasses.replace(config.data, shuffle_rows=1)
    with pytest.raises(ConfigError, match=r"{'data.shuffle_rows': 8} .* with {'data.shuffle_rows': 1}: keep"):
        loop.train(resumed(run, data=other), Console(quiet=True))
    with pytest.raises(ConfigError, match=r"^batch.seq_len=16: .* was made with 32"):
        loop.train(resumed(run, batch=dataclasses.replace(config.batch, seq_len=16)), Console(quiet=True))
    with pytest.raises(ConfigError, match="already holds a run at step 3; continue it with resume=auto"):
        loop.train(run.config, Console(quiet=True))


@pytest.mark.parametrize(
    "error", [MemoryError("no room"), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")], ids=repr
)
def test_lack_of_memory_is_not_taken_for_a_damaged_checkpoint(overflowing_and_roomy, monkeypatch, error):
    run = overflowing_and_roomy[0]
    before = files(run)

    def restore(*_, **__):
        raise error

    monkeypatch.setattr(ocp.CheckpointManager, "restore", restore)
    with pytest.raises(type(error), match=str(error)):
        loop.train(resumed(run), Console(quiet=True))
    assert files(run) == before
