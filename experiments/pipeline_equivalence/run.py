"""Every pipeline schedule against the same step on one device, on emulated devices: losses, gradients, router bias.

    python experiments/pipeline_equivalence/run.py            one step on four meshes, seven schedules each
    python experiments/pipeline_equivalence/run.py --curve    50 steps

The test suite holds a few of these; all of them take minutes to compile.
"""

import argparse
import dataclasses
import os
from typing import Any

os.environ.setdefault("NPROC", "16")  # threads of XLA: with few, the emulated devices wait for each other

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from dsv3_jax.config import BatchConfig, Config, ModelConfig, OptimizerConfig, ParallelConfig
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.train.loss import LossWeights
from dsv3_jax.train.state import init_state
from dsv3_jax.train.step import Knobs, make_step

KINDS = ("gpipe", "1f1b", "interleaved_1f1b", "zb1p", "dualpipe", "dualpipev", "dualpipe_lockstep")
# Layers, microbatches, and the mesh.
MESHES = (
    (5, 4, {"pipe": 2}),
    (5, 4, {"pipe": 2, "gpu": 4}),
    (9, 8, {"pipe": 4}),
    (17, 16, {"pipe": 8}),
)
CURVES = (
    ({"gpu": 2}, None),
    ({"pipe": 2}, "dualpipev"),
    ({"pipe": 4}, "zb1p"),
    ({"pipe": 2, "gpu": 2}, "dualpipe"),
)
ROWS, SEQ, VOCAB = 4, 16, 64
MODEL = ModelConfig(
    vocab_size=VOCAB, d_model=16, num_layers=5, num_dense_layers=1, d_ff=32, num_heads=2, qk_nope_head_dim=4,
    qk_rope_head_dim=4, v_head_dim=4, q_lora_rank=8, kv_lora_rank=8, num_experts=8, num_groups=2, top_k_groups=1,
    top_k=2, d_ff_expert=8, max_length=64, init_std=0.2,
)  # fmt: skip


def config_of(layers: int, microbatches: int, mesh: dict[str, int], schedule: str | None) -> Config:
    """A model with uneven stages, in float32; without a mesh, on one device."""
    pipeline = {"schedule": schedule} if schedule else {}
    devices = int(np.prod(list(mesh.values()))) if mesh else 1
    return Config(
        model=dataclasses.replace(MODEL, num_layers=layers),
        batch=BatchConfig(seq_len=SEQ, sequences=microbatches * ROWS, microbatch=ROWS),
        # Without clipping the first moments are a tenth of the gradients.
        optimizer=OptimizerConfig(warmup_tokens=1, clip_norm=1e9, moments="float32"),
        parallel=ParallelConfig(expert_buffer_factor=4.0, devices=devices, **mesh, **pipeline),
        recompute="report",
        precision="fp32",
    )


def batches(steps: int, microbatches: int) -> Int[np.ndarray, "steps microbatches rows seq"]:
    """A rule that can be learnt: after t comes 3t + 1, but for one token in ten."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCAB, (steps, microbatches, ROWS, SEQ))
    for j in range(1, SEQ):
        follows = (3 * tokens[..., j - 1] + 1) % VOCAB
        tokens[..., j] = np.where(rng.random(follows.shape) < 0.1, tokens[..., j], follows)
    return tokens.astype(np.int32)


def train(config: Config, steps: int) -> tuple[np.ndarray, Any, Any]:
    """Losses of each step, the last report and the state."""
    mesh = make_mesh(config)
    state, step = init_state(config, mesh), make_step(config, mesh)
    weights = LossWeights(jnp.float32(0.3), jnp.float32(1e-2), jnp.float32(1e-2))
    knobs = Knobs(jnp.float32(5e-3), jnp.float32(1e-3), weights)
    losses = []
    for tokens in batches(steps, config.batch.sequences // ROWS):
        state, report = step(state, tokens, knobs)
        losses.append([float(report.losses.loss), *np.ravel(report.losses.mtp_loss)])
    return np.array(losses), jax.device_get(report), jax.device_get(state)


def equal(a: Any, b: Any) -> str:
    """Whether all arrays are."""
    return "equal" if jax.tree.all(jax.tree.map(np.array_equal, a, b)) else "differ"


def one_step(mesh: dict[str, int], kind: str, layers: int, microbatches: int, expected: tuple) -> str:
    """A row of the table."""
    losses, report, state = train(config_of(layers, microbatches, mesh, kind), 1)
    wanted_losses, wanted_report, wanted = expected
    relative = jax.tree.map(lambda x, y: np.abs(x - y).max() / np.abs(y).max(), state.moments.mu, wanted.moments.mu)
    counts = equal((report.losses.load, state.router_bias), (wanted_report.losses.load, wanted.router_bias))
    loss = np.abs(losses / wanted_losses - 1).max()
    return f"| {name(mesh)} | {kind} | {loss:.1e} | {max(jax.tree.leaves(relative)):.1e} | {counts} |"


def name(mesh: dict[str, int]) -> str:
    """pipe 2 x gpu 4."""
    return " x ".join(f"{axis} {size}" for axis, size in mesh.items())


def curves(steps: int) -> None:
    """Prints how far the losses of longer runs come apart."""
    layers, microbatches, _ = MESHES[0]
    expected, _, wanted = train(config_of(layers, microbatches, {}, None), steps)
    print(f"one device: loss {expected[0, 0]:.3f} to {expected[-1, 0]:.3f} in {steps} steps\n")
    print(
        "| mesh | schedule | largest difference in the first 10 steps | in all | router bias |\n|---|---|---|---|---|"
    )
    for mesh, kind in CURVES:
        losses, _, state = train(config_of(layers, microbatches, mesh, kind), steps)
        apart = np.abs(losses / expected - 1).max(axis=1)
        bias = equal(state.router_bias, wanted.router_bias)
        print(f"| {name(mesh)} | {kind or 'none'} | {apart[:10].max():.1e} | {apart.max():.1e} | {bias} |", flush=True)


def steps_of_all() -> None:
    """Prints the largest relative differences of one step."""
    print(
        "| mesh | schedule | losses | gradients, of each one's largest | load and router bias |\n|---|---|---|---|---|"
    )
    for layers, microbatches, mesh in MESHES:
        expected = train(config_of(layers, microbatches, {}, None), 1)
        for kind in KINDS:
            print(one_step(mesh, kind, layers, microbatches, expected), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--curve", action="store_true", help="50 steps instead of one")
    arguments = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", 8)
    curves(50) if arguments.curve else steps_of_all()
