"""Training tokens/s of our step against transformers' DeepSeek-V3, on the same CPU cores and the same main model.

Every measurement is a process of its own; ours and theirs alternate, so that a slow spell of the machine meets both.
"""

import argparse
import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from dsv3_jax.checkpoint.huggingface_config import config_to_hf
from dsv3_jax.cli import MALLOC, load_config
from dsv3_jax.config import BatchConfig, Config, ParallelConfig

HERE = Path(__file__).resolve().parent
CONFIG = HERE.parents[1] / "configs" / "tiny.py"
OURS = "dsv3_jax"
EAGER = "eager-eager-plain"
PEERS = (EAGER, "eager-grouped_mm-plain", "eager-grouped_mm-compile")


@dataclass(frozen=True)
class Contender:
    """One side of the comparison, in one precision."""

    name: str
    precision: str


@dataclass(frozen=True)
class Speed:
    """What one contender reached: the median step of each round, or why it did not run."""

    contender: Contender
    step_seconds: list[float]
    tokens_per_step: int
    error: str | None = None

    @property
    def tokens_per_second(self) -> float:
        """From the median over rounds."""
        return self.tokens_per_step / statistics.median(self.step_seconds)


CONTENDERS = [Contender(name, precision) for precision in ("bf16", "fp32") for name in (OURS, *PEERS)]


def our_config(precision: str, batch: int, seq: int) -> Config:
    """The tiny model without its MTP module, which transformers does not train, on one device; float32 moments and no
    recomputation, as the peer has them."""
    config = load_config(str(CONFIG))
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, num_mtp_modules=0),
        batch=BatchConfig(seq_len=seq, sequences=batch),
        optimizer=dataclasses.replace(config.optimizer, moments="float32", ema_decay=None),
        parallel=ParallelConfig(devices=1),
        precision=precision,
        recompute="none",
    )


def measure_ours(precision: str, batch: int, seq: int, steps: int, warmup: int) -> dict:
    """The record of our step, in this process, as the peer's record is."""
    import jax
    import jax.numpy as jnp

    from dsv3_jax.parallel.mesh import make_mesh
    from dsv3_jax.train.loss import LossWeights
    from dsv3_jax.train.state import init_state
    from dsv3_jax.train.step import Knobs, make_step

    config = our_config(precision, batch, seq)
    mesh = make_mesh(config)
    state, step = init_state(config, mesh), make_step(config, mesh)
    zero, loss = jnp.float32(0), config.loss
    weights = LossWeights(mtp=zero, sequence_balance=jnp.float32(loss.sequence_balance_weight), batch_balance=zero)
    knobs = Knobs(jnp.float32(2.2e-4), jnp.float32(loss.bias_update_speed), weights)
    shape = (warmup + steps, 1, batch, seq)
    rows = jax.device_get(jax.random.randint(jax.random.key(0), shape, 0, config.model.vocab_size))
    seconds, losses = [], []
    for tokens in rows:
        start = time.perf_counter()
        state, report = jax.block_until_ready(step(state, tokens, knobs))
        seconds.append(time.perf_counter() - start)
        if not report.applied:
            raise RuntimeError(f"step {len(seconds)} was not applied: loss {report.losses.loss}")
        losses.append(float(report.losses.loss))
    return {
        "step_seconds": seconds[warmup:],
        "losses": [losses[0], losses[-1]],
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("jax", "jaxlib", "flax")},
        },
    }


def command_of(contender: Contender, args: argparse.Namespace, config_json: Path) -> list[str]:
    """The process that measures a contender."""
    sizes = [f"--{name}={getattr(args, name)}" for name in ("batch", "seq", "steps", "warmup", "threads")]
    if contender.name == OURS:
        return [sys.executable, str(HERE / "run.py"), "--ours", contender.precision, *sizes]
    autocast = ["--autocast"] if contender.precision == "bf16" else []
    peer = [str(args.torch_python), str(HERE / "torch_peer.py"), "--config-json", str(config_json)]
    return [*peer, "--variant", contender.name, *autocast, *sizes]


def measure(contender: Contender, args: argparse.Namespace, config_json: Path) -> dict:
    """The record of one process. Raises RuntimeError where it ends without one."""
    environment = os.environ | {"GLIBC_TUNABLES": MALLOC, "OMP_NUM_THREADS": str(args.threads)}
    command = command_of(contender, args, config_json)
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode or not done.stdout.strip():
        raise RuntimeError(f"{' '.join(command)} ended with status {done.returncode}:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(args: argparse.Namespace) -> tuple[list[Speed], dict[str, str]]:
    """All contenders in turn, `rounds` times; their speeds, and the versions they ran with.

    Raises RuntimeError where the two sides do not train the same number of parameters.
    """
    records: dict[Contender, list[dict]] = {contender: [] for contender in CONTENDERS}
    with tempfile.TemporaryDirectory() as folder:
        config_json = Path(folder, "config.json")
        config_json.write_text(json.dumps(config_to_hf(our_config("fp32", args.batch, args.seq).model)))
        for turn in range(args.rounds):
            for contender in CONTENDERS if turn % 2 == 0 else reversed(CONTENDERS):
                record = measure(contender, args, config_json)
                records[contender].append(record)
                shown = record.get("error") or f"{statistics.median(record['step_seconds']) * 1e3:.1f} ms a step"
                print(f"round {turn + 1} {contender.precision} {contender.name}: {shown}", file=sys.stderr, flush=True)
    ran = [record for runs in records.values() for record in runs if "error" not in record]
    counts = {record["parameters"] for record in ran}
    if len(counts) != 1:
        raise RuntimeError(f"the sides train different numbers of parameters: {sorted(counts)}")
    versions = {name: number for record in ran for name, number in record["versions"].items() if name != "python"}
    return [speed_of(contender, runs, args.batch * args.seq) for contender, runs in records.items()], versions


def speed_of(contender: Contender, runs: list[dict], tokens_per_step: int) -> Speed:
    """The rounds of a contender together; one that failed in any round counts as failed."""
    errors = [run["error"] for run in runs if "error" in run]
    medians = [statistics.median(run["step_seconds"]) for run in runs if "error" not in run]
    return Speed(contender, medians, tokens_per_step, errors[0] if errors else None)


def table(speeds: list[Speed]) -> str:
    """Markdown: the speed of each contender, ours over each of theirs in the same precision, and best over best."""
    ours = {s.contender.precision: s for s in speeds if s.contender.name == OURS}
    lines = [
        "| precision | step | step time, median (range over rounds) | tokens/s | ours / this |",
        "|---|---|---:|---:|---:|",
    ]
    for speed in speeds:
        precision, name = speed.contender.precision, speed.contender.name
        if speed.error:
            lines.append(f"| {precision} | {name} | does not run: {_one_line(speed.error)} | | |")
            continue
        milliseconds = [1e3 * s for s in speed.step_seconds]
        spread = f"{statistics.median(milliseconds):.0f} ms ({min(milliseconds):.0f} to {max(milliseconds):.0f})"
        ratio = "" if name == OURS else f"{ours[precision].tokens_per_second / speed.tokens_per_second:.2f}"
        lines.append(f"| {precision} | {name} | {spread} | {speed.tokens_per_second:,.0f} | {ratio} |")
    ran = [speed for speed in speeds if not speed.error]
    lines.append("")
    for about, kept in (("bf16", ("bf16",)), ("fp32", ("fp32",)), ("any precision", ("bf16", "fp32"))):
        lines.append(best_over_best(about, [s for s in ran if s.contender.precision in kept]))
    eager = [s for s in ran if s.contender.name in (OURS, EAGER)]
    lines.append(best_over_best("any precision, against eager alone", eager))
    return "\n".join(lines)


def best_over_best(about: str, speeds: list[Speed]) -> str:
    """One line: the fastest of ours over the fastest of theirs."""
    ours = max((s for s in speeds if s.contender.name == OURS), key=lambda s: s.tokens_per_second)
    theirs = max((s for s in speeds if s.contender.name != OURS), key=lambda s: s.tokens_per_second, default=None)
    if theirs is None:
        return f"- {about}: none of theirs runs"
    ratio = ours.tokens_per_second / theirs.tokens_per_second
    names = [f"{s.contender.precision} {s.contender.name}" for s in (ours, theirs)]
    return f"- {about}, fastest over fastest: **{ratio:.2f}** ({names[0]} over {names[1]})"


def setting(args: argparse.Namespace, versions: dict[str, str]) -> str:
    """What was measured, on what."""
    numbers = ", ".join(f"{name} {number}" for name, number in versions.items())
    return (
        f"Batch {args.batch} x {args.seq} tokens, {args.threads} threads, {args.rounds} rounds of {args.steps} steps "
        f"after {args.warmup} of warmup.\n\nCPU: {cpu()}. {numbers}."
    )


def cpu() -> str:
    """The processor's name, and which instructions for narrow or wide products it has."""
    fields = dict(line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
    fields = {name.strip(): value.strip() for name, value in fields.items()}
    flags = fields.get("flags", "").split()
    known = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    return f"{fields.get('model name', platform.processor())} ({' '.join(known)})"


def _one_line(text: str) -> str:
    return text.splitlines()[0].replace("|", "/")[:160]


def main() -> None:
    """Reads the command line, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--torch-python", type=Path, help="a Python with torch and transformers")
    parser.add_argument("--output", type=Path, help="also write the table here, as markdown")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="cores that either side may use")
    parser.add_argument("--ours", choices=["bf16", "fp32"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.ours:
        print(json.dumps(measure_ours(args.ours, args.batch, args.seq, args.steps, args.warmup)))
        return
    if args.torch_python is None:
        parser.error("--torch-python is needed: a Python with torch and transformers")
    # Children inherit it; XLA takes as many threads as it has cores.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    speeds, versions = compare(args)
    text = f"{table(speeds)}\n\n{setting(args, versions)}\n"
    print(text)
    if args.output is not None:
        args.output.write_text(text)


if __name__ == "__main__":
    main()
