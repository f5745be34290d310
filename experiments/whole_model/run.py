"""Training tokens/s, MFU and memory of our step beside transformers' DeepSeek-V3, on one GPU and the same model.

Every measurement is a process of its own, which has the whole GPU; contenders take turns, so that a slow spell of the
machine meets all.
"""

import argparse
import json
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ours import PRECISIONS, RECOMPUTE, SIZES, Task

from dsv3_jax.checkpoint.huggingface_config import config_to_hf
from dsv3_jax.planner.devices import load_device
from dsv3_jax.planner.flops import training_flops_per_token
from dsv3_jax.planner.parameters import count_parameters

HERE = Path(__file__).resolve().parent
OURS = "dsv3_jax"
# UNMASKED of torch_peer.py, which needs torch.
ADDED_ATTENTION = ("causal_cudnn", "causal_sdpa")
# What a contender's name is made of, ours and theirs.
PARTS = ({OURS}, {*PRECISIONS}, {*RECOMPUTE})
PEER_PARTS = (
    {*ADDED_ATTENTION, "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "eager"},
    {"grouped_mm", "batched_mm", "eager", "sonicmoe", "deepgemm"},
    {"compile", "autotune", "plain"},
    {"bf16", "autocast"},
)
DEFAULT = (
    "dsv3_jax-bf16-none",
    "dsv3_jax-fp8-none",
    "causal_cudnn-grouped_mm-compile-bf16",
    "flex_attention-grouped_mm-compile-bf16",
)


@dataclass(frozen=True)
class Speed:
    """What a contender reached: the median step of each round, the largest peak, the last round's losses; or why it did
    not run."""

    name: str
    step_seconds: list[float]
    peak_bytes: int | None
    losses: list[float]
    error: str | None = None

    @property
    def seconds(self) -> float:
        """Median over rounds."""
        return statistics.median(self.step_seconds)

    @property
    def is_ours(self) -> bool:
        """Whether the step is ours."""
        return self.name.startswith(OURS)

    @property
    def is_transformers_own(self) -> bool:
        """Whether the step is theirs without an attention function that torch_peer.py adds."""
        return not self.is_ours and not self.name.startswith(ADDED_ATTENTION)


def contenders(text: str) -> list[str]:
    """Those named between commas. Raises ArgumentTypeError for a name that is none."""
    names = text.split(",")
    for name in names:
        parts = name.split("-")
        form = PARTS if parts[0] == OURS else PEER_PARTS
        if len(parts) != len(form) or any(part not in known for part, known in zip(parts, form, strict=True)):
            forms = " or ".join("-".join("|".join(sorted(known)) for known in form) for form in (PARTS, PEER_PARTS))
            raise argparse.ArgumentTypeError(f"{name!r} is no contender, which is {forms}")
    return names


def positive(text: str) -> int:
    """A number above 0. Raises ArgumentTypeError for another."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number above 0")
    return int(text)


def command_of(name: str, args: argparse.Namespace, config_json: Path) -> list[str]:
    """The process that measures a contender."""
    task, parts = SIZES[args.sizes], name.split("-")
    steps = [f"--steps={args.steps}", f"--warmup={args.warmup}"]
    if parts[0] == OURS:
        ours = [sys.executable, str(HERE / "ours.py"), f"--sizes={args.sizes}"]
        return [*ours, f"--precision={parts[1]}", f"--recompute={parts[2]}", *steps]
    settings = [f"--{of}={part}" for of, part in zip(("attention", "experts", "mode", "weights"), parts, strict=True)]
    peer = [str(args.torch_python), str(HERE / "torch_peer.py"), f"--config-json={config_json}", *settings]
    return [*peer, f"--batch={task.sequences}", f"--seq={task.seq_len}", *steps]


def environment(caches: Path) -> dict[str, str]:
    """Of every process. Ours takes nearly all memory at once, of which the peak is what was in use; a later round finds
    what an earlier one compiled."""
    wanted = {
        "XLA_PYTHON_CLIENT_PREALLOCATE": "true",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92",
        "JAX_COMPILATION_CACHE_DIR": str(caches / "jax"),
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "TRITON_CACHE_DIR": str(caches / "triton"),
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    }
    return os.environ | wanted


def measure(command: Sequence[str], folder: Path, seconds: float) -> dict:
    """The record of one process; its error where it ends without one. Raises TimeoutError after so many seconds."""
    out, err = folder / "stdout", folder / "stderr"
    with out.open("w") as stdout, err.open("w") as stderr:
        process = subprocess.Popen(
            command, env=environment(folder), stdout=stdout, stderr=stderr, start_new_session=True
        )
        try:
            status = process.wait(max(seconds, 0))
        except subprocess.TimeoutExpired:
            raise TimeoutError from None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    shown = [line for line in out.read_text().splitlines() if line.startswith("{")]
    if status == 0 and shown:
        return json.loads(shown[-1])
    said = [line for line in err.read_text().splitlines() if line.strip()]
    return {"error": said[-1] if said else f"ended with status {status} and said nothing"}


def compare(args: argparse.Namespace) -> dict[str, list[dict]]:
    """The records of all contenders, which take turns; in every second round in reverse order.

    One that has failed does not run again, and none runs after `minutes`. Raises RuntimeError where the sides do not
    train the same number of parameters.
    """
    task = SIZES[args.sizes]
    records: dict[str, list[dict]] = {name: [] for name in args.only}
    end = time.monotonic() + 60 * args.minutes
    with tempfile.TemporaryDirectory() as folder:
        config_json = Path(folder, "config.json")
        config_json.write_text(json.dumps(config_to_hf(task.model)))
        for turn in range(args.rounds):
            for name in args.only if turn % 2 == 0 else reversed(args.only):
                if any("error" in record for record in records[name]):
                    continue
                started = time.monotonic()
                try:
                    record = measure(command_of(name, args, config_json), Path(folder), end - started)
                except TimeoutError:
                    print(f"{args.minutes:g} minutes are over, in round {turn + 1} at {name}", file=sys.stderr)
                    return records
                records[name].append(record)
                check_parameters(name, record, task)
                took = f"{time.monotonic() - started:.0f} s in all"
                print(f"round {turn + 1} {name} ({took}): {_summary(record)}", file=sys.stderr, flush=True)
    return records


def check_parameters(name: str, record: dict, task: Task) -> None:
    """Raises RuntimeError where a side trains another number of parameters than the planner counts."""
    planned = count_parameters(task.model).main
    if record.get("parameters", planned) != planned:
        raise RuntimeError(
            f"{name} trains {record['parameters']:,} parameters and the model has {planned:,}: the sides would not be "
            "equal; nothing is compared"
        )


def speed_of(name: str, runs: Sequence[dict], minutes: float) -> Speed:
    """The rounds of a contender together; one that failed in any counts as failed."""
    ran = [run for run in runs if "error" not in run]
    errors = [run["error"] for run in runs if "error" in run] or ([] if ran else [f"not within {minutes:g} minutes"])
    peaks = [run["peak_bytes"] for run in ran if run["peak_bytes"]]
    medians = [statistics.median(run["step_seconds"]) for run in ran]
    losses = ran[-1]["losses"] if ran else []
    return Speed(name, medians, max(peaks, default=None), losses, errors[0] if errors else None)


def table(speeds: Sequence[Speed], task: Task, device: str) -> str:
    """Markdown: what each contender reached, and ours over the fastest of theirs."""
    theirs = fastest_of_theirs(speeds)
    lines = [
        "| step | ms a step, median (range over rounds) | tokens/s | MFU of the bf16 peak | peak memory, GB | "
        "loss, first and last | over their fastest |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for speed in speeds:
        if speed.error:
            lines.append(f"| {speed.name} | does not run: {_one_line(speed.error)} | | | | | |")
            continue
        times = [1e3 * s for s in speed.step_seconds]
        ratio = f"{theirs.seconds / speed.seconds:.2f}" if theirs else "-"
        cells = [
            speed.name,
            f"{1e3 * speed.seconds:.1f} ({min(times):.1f} to {max(times):.1f})",
            f"{task.sequences * task.seq_len / speed.seconds:,.0f}",
            utilization(speed, task, device),
            "-" if speed.peak_bytes is None else f"{speed.peak_bytes / 1e9:.1f}",
            " and ".join(f"{loss:.3f}" for loss in speed.losses),
            ratio,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    their_own = fastest_of_theirs([s for s in speeds if s.is_transformers_own])
    rivals = [theirs] if their_own in (None, theirs) else [theirs, their_own]
    drawn = conclusions([s for s in speeds if s.is_ours and not s.error], rivals if theirs else [])
    return "\n".join([*lines, "", *drawn]) if drawn else "\n".join(lines)


def fastest_of_theirs(speeds: Sequence[Speed]) -> Speed | None:
    """None where none ran."""
    return min((s for s in speeds if not s.is_ours and not s.error), key=lambda s: s.seconds, default=None)


def conclusions(ours: Sequence[Speed], rivals: Sequence[Speed]) -> list[str]:
    """A line for each of ours and each rival: speed and memory over the rival's."""
    if not rivals:
        return ["None of theirs was measured."]
    lines = []
    for speed in ours:
        for theirs in rivals:
            memory = ""
            if speed.peak_bytes and theirs.peak_bytes:
                memory = f", with {speed.peak_bytes / theirs.peak_bytes:.2f} of its peak memory"
            lines.append(f"- {speed.name}: **{theirs.seconds / speed.seconds:.2f}** times {theirs.name}{memory}")
    return lines


def utilization(speed: Speed, task: Task, device: str) -> str:
    """The planner's FLOPs over the bf16 peak of the device; a dash where there is no device file."""
    file = next((name for name in ("h100", "h200", "h800") if name in device.lower()), None)
    if file is None:
        return "-"
    flops = training_flops_per_token(task.model, task.seq_len) * task.sequences * task.seq_len
    return f"{flops / speed.seconds / load_device(file).peak['bf16']:.1%}"


def setting(args: argparse.Namespace, records: Sequence[dict]) -> str:
    """What was measured, on what, and how to measure it again."""
    task = SIZES[args.sizes]
    count = count_parameters(task.model)
    versions = {name: number for record in records for name, number in record["versions"].items()}
    numbers = ", ".join(f"{name} {number}" for name, number in versions.items())
    only = [] if tuple(args.only) == DEFAULT else ["--only", ",".join(args.only)]
    numbered = [f"--{name}={getattr(args, name)}" for name in ("rounds", "steps", "warmup", "sizes")]
    command = shlex.join(["python", "experiments/whole_model/run.py", *numbered, *only])
    return (
        f"{count.main:,} parameters on both sides, {count.active:,} of them for a token; {task.sequences} x "
        f"{task.seq_len} tokens a step; {args.rounds} x {args.steps} steps, each time after "
        f"{args.warmup} of warmup.\n\n"
        f"{records[-1]['device']}, {numbers}.\n\n`{command}`"
    )


def _summary(record: dict) -> str:
    if "error" in record:
        return record["error"][:1500]
    return f"{1e3 * statistics.median(record['step_seconds']):.1f} ms a step"


def _one_line(text: str) -> str:
    return text.splitlines()[0].replace("|", "/")[:200]


def main() -> None:
    """Reads the command line, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", choices=SIZES, default="full", help="tiny is for a CPU")
    parser.add_argument("--only", type=contenders, default=DEFAULT, help="contenders, by default " + ",".join(DEFAULT))
    parser.add_argument("--rounds", type=positive, default=2)
    parser.add_argument("--steps", type=positive, default=8)
    parser.add_argument("--warmup", type=positive, default=3, help="the first compiles")
    parser.add_argument("--minutes", type=float, default=30, help="after which nothing more is measured")
    parser.add_argument("--torch-python", type=Path, default=Path(sys.executable), help="has torch and transformers")
    parser.add_argument("--output", type=Path, help="also write the table here, as markdown")
    args = parser.parse_args()
    if shutil.which(args.torch_python) is None:
        parser.error(f"--torch-python {args.torch_python}: is no Python; name one that has torch and transformers")
    try:
        records = compare(args)
    except (RuntimeError, OSError) as error:
        sys.exit(str(error))
    ran = [record for runs in records.values() for record in runs if "error" not in record]
    speeds = [speed_of(name, runs, args.minutes) for name, runs in records.items()]
    if not ran:
        sys.exit(f"no contender ran; of the first it is said: {_one_line(speeds[0].error)}")
    text = f"{table(speeds, SIZES[args.sizes], ran[-1]['device'])}\n\n{setting(args, ran)}\n"
    print(text)
    if args.output is not None:
        args.output.write_text(text)


if __name__ == "__main__":
    main()
