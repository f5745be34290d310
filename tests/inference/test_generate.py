"""Sampling, stopping and bf16 decoding from the latent cache, and models read from a run's folder."""

import dataclasses
import logging
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_state import random_state

from dsv3_jax import cli
from dsv3_jax.checkpoint.pretrained import PretrainedModel, load_pretrained
from dsv3_jax.checkpoint.training import Checkpoints
from dsv3_jax.config import Config, ConfigError, ModelConfig, OptimizerConfig, ParallelConfig
from dsv3_jax.data.tokenizer import train_bpe
from dsv3_jax.inference.generate import generate
from dsv3_jax.inference.load import convert_to_hf, load_model
from dsv3_jax.parallel.mesh import make_mesh

CONFIG = Config(
    model=ModelConfig(
        vocab_size=300, d_model=32, num_layers=2, d_ff=64, num_heads=2, qk_nope_head_dim=8, qk_rope_head_dim=8,
        v_head_dim=8, q_lora_rank=16, kv_lora_rank=16, num_experts=16, d_ff_expert=16, max_length=256, init_std=0.15,
    ),
    optimizer=OptimizerConfig(ema_decay=0.9),
    parallel=ParallelConfig(devices=1),
)  # fmt: skip


@pytest.fixture(scope="module")
def state():
    """As after training: a router bias that routes, and weights that differ from their average."""
    state = random_state(CONFIG, make_mesh(CONFIG))
    rng = np.random.default_rng(1)
    bias = jax.tree.map(lambda b: jnp.asarray(0.1 * rng.standard_normal(b.shape), b.dtype), state.router_bias)
    return dataclasses.replace(state, router_bias=bias)


def times(factor, params):
    return jax.tree.map(lambda x: np.float32(factor) * np.asarray(x), params)


@pytest.fixture(scope="module")
def average(state):
    return times(1.5, state.params)


@pytest.fixture
def run_folder(state, average, tmp_path):
    """What a run leaves, with checkpoints at steps 1 and 2, the first of other weights."""
    folder = tmp_path / "run"
    checkpoints = Checkpoints(folder, CONFIG.checkpoint)
    halved = jax.tree.map(jax.device_put, times(0.5, state.params))
    earlier = dataclasses.replace(state, params=halved)
    checkpoints.save(1, CONFIG, earlier, average, {})
    checkpoints.save(2, CONFIG, state, average, {})
    checkpoints.close()
    train_bpe(["the router sends tokens to experts"] * 5, 300).save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def model(state):
    """Its MoE layer alone, over 8 tokens so that each soon appears."""
    small = dataclasses.replace(CONFIG.model, vocab_size=8, num_layers=1, num_dense_layers=0)
    params = {name: leaves for name, leaves in state.params.items() if name != "dense_layers"}
    params["embed"] = {"embedding": np.asarray(params["embed"]["embedding"])[:8]}
    params["head"] = {"kernel": np.asarray(params["head"]["kernel"])[:, :8]}
    return PretrainedModel(small, params, state.router_bias)


PROMPT = np.array([[1], [2], [3]])
NEW = 32


@pytest.fixture(scope="module")
def sampled(model):
    return generate(model, PROMPT, NEW, temperature=1.0, seed=0)


def assert_same(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(np.testing.assert_array_equal, left, right)


def test_another_seed_gives_other_tokens(model, sampled):
    assert sampled.shape == (len(PROMPT), 1 + NEW)
    np.testing.assert_array_equal(sampled[:, :1], PROMPT)
    other = generate(model, PROMPT, NEW, temperature=1.0, seed=1)
    assert (other != sampled).any(axis=1).all()


def test_the_same_seed_gives_the_same_tokens_and_a_stop_token_ends_rows(model, sampled):
    new = sampled[:, 1:]
    # Rows stop at different places, and the last of them before the end.
    places = {token: [np.flatnonzero(row == token)[:1].tolist() for row in new] for token in range(8)}
    stop, first = next(
        (token, np.concatenate(rows))
        for token, rows in places.items()
        if all(rows) and len(np.unique(rows)) == len(PROMPT) and np.max(rows) < NEW - 1
    )
    length = int(first.max()) + 1
    expected = np.where(np.arange(length) > first[:, None], stop, new[:, :length])
    tokens = generate(model, PROMPT, NEW, temperature=1.0, seed=0, stop_token=stop)
    np.testing.assert_array_equal(tokens, np.concatenate([PROMPT, expected], axis=1))


def test_no_new_tokens_is_the_prompt(model):
    np.testing.assert_array_equal(generate(model, [[1, 2, 3]], 0), [[1, 2, 3]])


@pytest.mark.parametrize(
    ("prompt", "new_tokens", "temperature", "message"),
    [
        ([[]], 5, 0.0, "give at least one token"),
        ([1, 2], 5, 0.0, r"shape \(2,\)"),
        ([[1, 8]], 5, 0.0, "between 0 and 7"),
        ([[1, -1]], 5, 0.0, "between 0 and 7"),
        ([[1]], -1, 0.0, "new_tokens=-1: cannot be negative"),
        ([[1]], 5, -0.5, "temperature=-0.5: cannot be negative"),
        ([[1] * 6], 251, 0.0, "6 prompt tokens and 251 new ones exceed model.max_length=256"),
    ],
)
def test_what_cannot_be_continued_is_refused(model, prompt, new_tokens, temperature, message):
    with pytest.raises(ValueError, match=message):
        generate(model, prompt, new_tokens, temperature=temperature)


def test_bf16_decoding_follows_the_bf16_forward_pass(run_folder):
    model = load_model(run_folder)
    assert model.params["head"]["kernel"].dtype == jnp.bfloat16
    prompt = np.random.default_rng(0).integers(0, CONFIG.model.vocab_size, (4, 8))
    tokens = generate(model, prompt, 16)
    logits = np.asarray(model.apply(tokens).logits[:, 7:-1], np.float32)
    chosen = np.take_along_axis(logits, tokens[:, 8:, None], axis=-1)[..., 0]
    # By how much the likeliest token of the whole forward pass beats the decoded one, in spreads of the logits.
    behind = (logits.max(axis=-1) - chosen) / logits.std(axis=-1)
    assert behind.max() < 0.1
    assert (behind == 0).mean() > 0.9


def test_converted_run_computes_the_same(run_folder, state, tmp_path):
    convert_to_hf(run_folder, tmp_path / "hf", "float32")
    converted = load_pretrained(tmp_path / "hf", jnp.float32)
    assert_same(converted.params, state.params)
    assert_same(converted.router_bias, state.router_bias)
    assert dataclasses.replace(converted.config, init_std=0.15) == CONFIG.model
    tokens = np.random.default_rng(0).integers(0, CONFIG.model.vocab_size, (2, 24))
    ours = PretrainedModel(CONFIG.model, state.params, state.router_bias).apply(tokens)
    theirs = converted.apply(tokens)
    np.testing.assert_allclose(theirs.logits, ours.logits, atol=1e-6)
    np.testing.assert_allclose(theirs.mtp_logits[0], ours.mtp_logits[0], atol=1e-6)
    assert (tmp_path / "hf/tokenizer.json").read_bytes() == (run_folder / "tokenizer.json").read_bytes()
    with pytest.raises(FileExistsError, match="is not empty"):
        convert_to_hf(run_folder, tmp_path / "hf", "float32")


def test_average_takes_the_averaged_weights(run_folder, average, state, tmp_path, capsys):
    command = ["convert", str(run_folder), str(tmp_path / "hf"), "--to", "hf", "--dtype", "float32", "--average"]
    assert cli.main(command) == 0
    assert str(tmp_path / "hf") in capsys.readouterr().out
    converted = load_pretrained(tmp_path / "hf", jnp.float32)
    assert_same(converted.params, average)
    assert_same(converted.router_bias, state.router_bias)


def test_average_of_a_run_that_kept_none_is_refused(state, tmp_path):
    config = dataclasses.replace(CONFIG, optimizer=OptimizerConfig())
    checkpoints = Checkpoints(tmp_path, config.checkpoint)
    checkpoints.save(1, config, state, None, {})
    checkpoints.close()
    with pytest.raises(ConfigError, match="kept no averaged weights; train with"):
        load_model(tmp_path, average=True)


def test_reading_skips_a_damaged_checkpoint_and_moves_nothing(run_folder, state, caplog):
    newest = run_folder / "checkpoints/2/state"
    largest = max((file for file in newest.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    before = sorted(run_folder.rglob("*"))
    with caplog.at_level(logging.WARNING, "dsv3_jax"):
        model = load_model(run_folder, "float32")
    assert_same(model.params, times(0.5, state.params))
    assert [record for record in caplog.messages if str(Path("checkpoints/2")) in record and "does not read" in record]
    assert sorted(run_folder.rglob("*")) == before
