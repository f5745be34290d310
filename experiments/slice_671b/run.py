"""One GPU's share of a pipeline rank of the 671B model: time of a forward beside a backward, by class of kernel.

python experiments/slice_671b/run.py               measures, on one Hopper GPU
python experiments/slice_671b/run.py --report      writes table.md, device.toml and slice.png of what was measured
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
from classes import MEMORY, Row, achieved, markdown, rows
from jax.stages import Lowered
from share import Share, microbatches, share_functions, share_weights

from dsv3_jax.cli import load_config
from dsv3_jax.parallel.trace import read_kernels
from dsv3_jax.planner.cluster import plan_cluster
from dsv3_jax.planner.devices import Device, load_device

HERE = Path(__file__).parent
CONFIG = HERE.parents[1] / "configs" / "v3_671b.py"
MEASURED = HERE / "measured.json"
REPORTED = 129.0
"""Milliseconds of such a pair in the trace that DeepSeek published of its training, exchange included (H800)."""
PROFILED = 3
"""Pairs in a profile."""


def main() -> None:
    """Measures, or reports."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--report", action="store_true", help="write table.md, device.toml and slice.png")
    parser.add_argument("--measured", type=Path, default=MEASURED, help="where the measurement is written and read")
    parser.add_argument("--rounds", type=int, default=20, help="timed turns of 5 pairs")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error(f"--rounds {args.rounds}: must be at least 1")
    if args.report:
        report(args.measured)
        return
    if jax.default_backend() != "gpu":
        sys.exit("needs a Hopper GPU; --report shows what was measured on one")
    args.measured.write_text(json.dumps(measure(Share(load_config(str(CONFIG)).model), args.rounds), indent=1) + "\n")
    print(f"{args.measured}: written; --report makes a table and a picture of it")


def measure(share: Share, rounds: int) -> dict[str, Any]:
    """Milliseconds of a pair and of a forward alone, and of each class of kernel in a profile of the pair."""
    functions, weights = share_functions(share), share_weights(share, "fp8")
    x, x_before, dy = microbatches(share, 3)
    forward = functions.forward.lower(weights, x_before)
    pair = functions.pair.lower(weights, x, forward.out_info.kept, dy)
    with ThreadPoolExecutor() as pool:
        forward, pair = pool.map(Lowered.compile, (forward, pair))
    kept = forward(weights, x_before).kept
    calls = {"pair": lambda: pair(weights, x, kept, dy), "forward": lambda: forward(weights, x)}
    times = {}
    for name, call in calls.items():
        found = times[name] = _milliseconds(call, rounds)
        low, high = min(found), max(found)
        print(f"{name}: {statistics.median(found):.2f} ms ({low:.2f} to {high:.2f}), {rounds} turns of 5", flush=True)
    kind = jax.devices()[0].device_kind
    device = load_device("h200" if "h200" in kind.lower() else "h100")
    table = rows(_profile(calls["pair"]), PROFILED, share, device)
    print(markdown(table, statistics.median(times["pair"])))
    return {
        "device": kind,
        "device_file": device.name,
        "jax": jax.__version__,
        "milliseconds": times,
        "rows": [asdict(row) for row in table],
    }


def _milliseconds(call: Callable[[], Any], rounds: int) -> list[float]:
    """Of a call, over turns of five that follow each other without a pause."""
    jax.block_until_ready(call())
    found = []
    for _ in range(rounds):
        started = time.perf_counter()
        for _ in range(5):
            result = call()
        jax.block_until_ready(result)
        found.append(1e3 * (time.perf_counter() - started) / 5)
        del result
    return found


def _profile(call: Callable[[], Any]) -> list[Any]:
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(PROFILED):
                result = call()
            jax.block_until_ready(result)
        return next(iter(read_kernels(Path(folder)).values()), [])


def report(measured: Path) -> None:
    """Writes the table, a device file of its rates, and the picture."""
    if not measured.is_file():
        sys.exit(f"{measured}: no such file; measure first, without --report, on a Hopper GPU")
    try:
        found = json.loads(measured.read_text())
        table = [Row(**row) for row in found["rows"]]
        pair = statistics.median(found["milliseconds"]["pair"])
    except (ValueError, KeyError, TypeError) as error:
        sys.exit(f"{measured}: is not what this script measured ({error!r}); measure again, without --report")
    share = Share(load_config(str(CONFIG)).model)
    rates = achieved(table, share)
    device_file = measured.with_name("device.toml")
    device_file.write_text(_device_file(found["device_file"], rates))
    text = f"{_heading(found)}\n\n{markdown(table, pair)}\n\n{_cluster(load_device(str(device_file)))}\n"
    measured.with_name("table.md").write_text(text)
    draw(table, pair, found["device"], measured.with_name("slice.png"))
    print(text)


def _heading(found: dict[str, Any]) -> str:
    medians = {name: statistics.median(values) for name, values in found["milliseconds"].items()}
    turns = found["milliseconds"]["pair"]
    return (
        f"{found['device']}, jax {found['jax']}: a pair takes **{medians['pair']:.1f} ms** ({min(turns):.1f} to "
        f"{max(turns):.1f} over {len(turns)} turns of 5 pairs), a forward alone {medians['forward']:.1f} ms. "
        f"DeepSeek's published trace has {REPORTED} ms for the pair on an H800, 20 of whose 132 multiprocessors run "
        "the exchange, which here is left out."
    )


def _device_file(name: str, rates: dict[str, float]) -> str:
    """The shipped file of this device, with the rates that were measured."""
    shipped = Path(sys.modules[load_device.__module__].__file__).with_name("devices") / f"{name.lower()}.toml"
    others, heading, achieved_lines = shipped.read_text().partition("[achieved]\n")
    lines = []
    for line in achieved_lines.splitlines():
        rate = line.partition("=")[0].strip()
        lines.append(f"{rate} = {rates[rate]:.4g} # experiments/slice_671b" if rate in rates else line)
    return f"{others}{heading}" + "\n".join(lines) + "\n"


def _cluster(device: Device) -> str:
    """What the planner makes of the rates."""
    plan = plan_cluster(load_config(str(CONFIG)), device, {"pipe": 16, "data": 2, "node": 8, "gpu": 8})
    return (
        "With these rates, 112 of 132 multiprocessors computing, an exchange over "
        f"{device.achieved['network'] / 1e9:.0f} GB/s and DualPipe's bubble, the planner says of 2048 GPUs: "
        f"{plan.gpu_hours_per_trillion / 1e3:.0f}K GPU-hours for a trillion tokens (report: 180K), a step of "
        f"{plan.step_seconds:.1f} s. `dsv3 plan configs/v3_671b.py --device experiments/slice_671b/device.toml` shows "
        "the plan."
    )


def draw(table: list[Row], pair: float, device: str, out: Path) -> None:
    """Bars of each class, measured and at the peaks."""
    from matplotlib.figure import Figure  # not on every GPU machine

    shown = [row for row in table if row.name != MEMORY]
    figure = Figure(figsize=(9, 4), layout="constrained")
    ax = figure.subplots()
    names = [row.name for row in shown]
    ax.barh(names, [row.milliseconds for row in shown], color="#a8c8ec", label="measured")
    ax.barh(names, [row.roofline for row in shown], color="#5b93cf", height=0.4, label="at the data sheet's peak")
    for row in shown:
        ax.text(row.milliseconds, row.name, f" {row.milliseconds:.1f}", va="center", fontsize="small")
    ax.invert_yaxis()
    ax.spines[["top", "right"]].set_visible(False)
    ax.set(xlabel="ms", title=f"A forward and a backward of 4 MoE layers on one {device}: {pair:.1f} ms")
    ax.legend(frameon=False, loc="lower right")
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main()
