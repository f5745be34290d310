"""Training speed of our step on one device: one side of the comparison, in a process of its own.

Prints one JSON line: `{step_seconds, losses, parameters, peak_bytes, device, versions}`, or `{error}`.
"""

import argparse
import json
import time
from dataclasses import dataclass
from importlib.metadata import version

import jax
import numpy as np

from dsv3_jax.config import BatchConfig, Config, LossConfig, ModelConfig, OptimizerConfig, ParallelConfig
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.train.loss import LossWeights
from dsv3_jax.train.state import init_state
from dsv3_jax.train.step import Knobs, make_step

PRECISIONS = ("bf16", "fp8")
RECOMPUTE = ("none", "report", "layer")
KNOBS = Knobs(np.float32(2.2e-4), np.float32(1e-3), LossWeights(np.float32(0), np.float32(1e-4), np.float32(0)))


@dataclass(frozen=True)
class Task:
    """What both sides train, a step at a time."""

    model: ModelConfig
    sequences: int
    seq_len: int


SIZES = {
    # DeepSeek-V2-Lite's width, heads and latents, cut to what one GPU trains. FP8 needs experts of a multiple of 128.
    "full": Task(
        ModelConfig(
            vocab_size=32000, d_model=2048, num_layers=8, num_dense_layers=1, d_ff=6144, num_heads=16,
            qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, q_lora_rank=None, kv_lora_rank=512,
            num_experts=64, num_shared_experts=2, d_ff_expert=768, top_k=6, num_groups=8, top_k_groups=4,
            num_mtp_modules=0, max_length=4096,
        ),
        sequences=4,
        seq_len=4096,
    ),
    "tiny": Task(
        ModelConfig(
            vocab_size=256, d_model=128, num_layers=2, num_dense_layers=1, d_ff=256, num_heads=2, qk_nope_head_dim=128,
            qk_rope_head_dim=64, v_head_dim=128, q_lora_rank=None, kv_lora_rank=128, num_experts=8,
            num_shared_experts=2, d_ff_expert=128, top_k=2, num_groups=4, top_k_groups=2, num_mtp_modules=0,
            max_length=64,
        ),
        sequences=2,
        seq_len=64,
    ),
}  # fmt: skip


def our_config(task: Task, precision: str, recompute: str) -> Config:
    """The task on one device; master weights and moments in float32, as the peer has them."""
    return Config(
        model=task.model,
        batch=BatchConfig(seq_len=task.seq_len, sequences=task.sequences),
        optimizer=OptimizerConfig(moments="float32"),
        loss=LossConfig(logits_tokens=task.sequences * task.seq_len),  # all at once, as the peer
        parallel=ParallelConfig(devices=1),
        precision=precision,
        recompute=recompute,
        unroll_layers=task.model.num_layers,
    )


def measure(config: Config, steps: int, warmup: int) -> dict:
    """The record of so many steps on random tokens, after those of warmup. Raises RuntimeError where a step was not
    applied."""
    mesh = make_mesh(config)
    shape = (warmup + steps, 1, config.batch.sequences, config.batch.seq_len)
    rows = np.random.default_rng(0).integers(0, config.model.vocab_size, shape).astype(np.int32)
    # Before there is a state: what the compiler tries kernels on is not part of the peak.
    shapes = jax.eval_shape(lambda: init_state(config, mesh))
    step = make_step(config, mesh).lower(shapes, rows[0], KNOBS).compile()
    state = init_state(config, mesh)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    ends, reports = [time.perf_counter()], []
    for tokens in jax.block_until_ready([jax.device_put(row) for row in rows]):
        state, report = step(state, tokens, KNOBS)
        reports.append(report)
        if len(reports) > 1:  # one step ahead of the devices, as the training loop is
            jax.block_until_ready(reports[-2])
            ends.append(time.perf_counter())
    jax.block_until_ready((state, reports))
    ends.append(time.perf_counter())
    reports = jax.device_get(reports)
    for number, report in enumerate(reports, 1):
        if not report.applied:
            raise RuntimeError(f"step {number} was not applied: its loss is {report.losses.loss}")
    device = jax.devices()[0]
    memory = device.memory_stats()  # None on CPU
    return {
        "step_seconds": np.diff(ends)[warmup:].tolist(),
        "losses": [float(report.losses.loss) for report in (reports[0], reports[-1])],
        "parameters": parameters,
        "peak_bytes": memory and memory["peak_bytes_in_use"],
        "device": device.device_kind,
        "versions": {name: version(name) for name in ("jax", "jaxlib", "flax")},
    }


def main() -> None:
    """Reads the command line, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", choices=SIZES, default="full")
    parser.add_argument("--precision", choices=PRECISIONS, required=True)
    parser.add_argument("--recompute", choices=RECOMPUTE, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--warmup", type=int, required=True)
    args = parser.parse_args()
    config = our_config(SIZES[args.sizes], args.precision, args.recompute)
    try:
        record = measure(config, args.steps, args.warmup)
    except Exception as error:  # too little memory is a result, whatever is raised for it
        record = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(record))


if __name__ == "__main__":
    main()
