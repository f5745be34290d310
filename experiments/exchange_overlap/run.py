"""Does the expert exchange of one microbatch run beside the products of the other? From the compiled step, and in time.

python experiments/exchange_overlap/run.py --node 2 --gpu 4      on 8 GPUs
"""

import argparse
import statistics
import time
from dataclasses import replace

import jax
import numpy as np
from jax.stages import Compiled

from dsv3_jax.config import BatchConfig, Config, ModelConfig, ParallelConfig
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.parallel.program import exchange_overlaps
from dsv3_jax.train.loss import LossWeights
from dsv3_jax.train.state import init_state
from dsv3_jax.train.step import Knobs, make_step

MODEL = ModelConfig(
    vocab_size=32768, d_model=2048, num_layers=4, num_dense_layers=0, num_heads=16, qk_nope_head_dim=128,
    qk_rope_head_dim=64, v_head_dim=128, q_lora_rank=768, kv_lora_rank=512, num_experts=64, num_groups=8,
    top_k_groups=4, top_k=8, d_ff_expert=1024, num_mtp_modules=0,
)  # fmt: skip
TINY = replace(
    MODEL, vocab_size=256, d_model=32, num_heads=2, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
    q_lora_rank=16, kv_lora_rank=16, num_experts=16, top_k=4, d_ff_expert=16,
)  # fmt: skip
KNOBS = Knobs(np.float32(1e-4), np.float32(1e-3), LossWeights(*[np.float32(0.0)] * 3))


def configuration(args: argparse.Namespace, overlap: bool) -> Config:
    """Four microbatches of one sequence a device."""
    devices = args.node * args.gpu
    return Config(
        model=TINY if args.tiny else MODEL,
        batch=BatchConfig(seq_len=64 if args.tiny else 4096, sequences=4 * devices, microbatch=devices),
        parallel=ParallelConfig(
            devices=devices, data=1, node=args.node, gpu=args.gpu, overlap_microbatches=overlap,
            expert_buffer_factor=4.0,
        ),
        precision=args.precision,
    )  # fmt: skip


def measure(config: Config, steps: int) -> tuple[Compiled, float]:
    """The compiled step, and the median of its times in seconds."""
    mesh, batch = make_mesh(config), config.batch
    shape = (batch.sequences // batch.microbatch, batch.microbatch, batch.seq_len)
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, shape).astype(np.int32)
    state = init_state(config, mesh)
    step, times = make_step(config, mesh).lower(state, tokens, KNOBS).compile(), []
    for _ in range(steps + 1):
        started = time.perf_counter()
        state, report = jax.block_until_ready(step(state, tokens, KNOBS))
        times.append(time.perf_counter() - started)
        if not report.applied:
            raise RuntimeError(f"{int(report.losses.overflow)} rows found no room: raise expert_buffer_factor")
    return step, statistics.median(times[1:])


def main() -> None:
    """Prints the table, and the text of each compiled step into a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--node", type=int, default=1)
    parser.add_argument("--gpu", type=int, default=4)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--tiny", action="store_true", help="sizes for emulated CPU devices")
    args = parser.parse_args()
    if args.tiny:
        jax.config.update("jax_num_cpu_devices", args.node * args.gpu)
    headers = ["microbatches", "exchanges", "products they could run beside", "asynchronous"]
    print(f"| {' | '.join([*headers, 'do run beside products', 'ms a step'])} |")
    print("|---|---:|---:|---:|---:|---:|")
    for overlap, name in ((False, "one after the other"), (True, "two side by side")):
        step, seconds = measure(configuration(args, overlap), args.steps)
        text = step.as_text()
        with open(f"step_{'overlapped' if overlap else 'plain'}.hlo", "w") as file:
            file.write(text)
        found = exchange_overlaps(text)
        could = statistics.mean(x.independent / x.products for x in found)
        started = [x for x in found if x.during is not None]
        do = sum(x.during > 0 for x in started)
        print(f"| {name} | {len(found)} | {could:.0%} | {len(started)} | {do} | {1e3 * seconds:.1f} |", flush=True)


if __name__ == "__main__":
    main()
