"""Does training in FP8 lose anything against BF16, and do the report's two controls? One arm a process.

run.py --prepare            once, with the whole package installed: writes the tokens
run.py --arm fp8            one arm, on the device: needs neither grain nor tyro
run.py --report             joins the arms there are into table.md and loss.png
"""

import argparse
import hashlib
import json
import math
import os
import runpy
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, UInt16

from dsv3_jax.config import Config, ConfigError, to_dict
from dsv3_jax.ops.fp8_matmul.study import NEVER_PROMOTED
from dsv3_jax.ops.recipe import Recipe
from dsv3_jax.ops.weights import Params
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.planner.parameters import count_parameters
from dsv3_jax.train.loss import LossWeights
from dsv3_jax.train.schedules import bias_update_speed, learning_rate, mtp_weight
from dsv3_jax.train.state import TrainState, init_state
from dsv3_jax.train.step import Evaluation, Knobs, make_evaluation, make_step

HERE = Path(__file__).resolve().parent
TOKENS, RESULTS = HERE / "tokens.npz", HERE / "results"


@dataclass(frozen=True)
class Arm:
    """One way to train; what an arm does not say is the same for all."""

    about: str
    precision: str = "fp8"
    recipe: Recipe | None = None
    nudge: float = 0.0
    """Standard deviation of a relative change of every initial weight."""
    draw: int = 0
    """Which change, of those of one size."""


ARMS = {
    "bf16": Arm("BF16 products", precision="bf16"),
    # Far below the resolution of BF16: what remains is how far two equal runs drift apart.
    "bf16_nudged": Arm("BF16, initial weights changed by 0.01%", precision="bf16", nudge=1e-4, draw=1),
    "bf16_nudged_2": Arm("the same, changed otherwise", precision="bf16", nudge=1e-4, draw=2),
    "fp8": Arm("the FP8 recipe"),
    "fp8_nudged": Arm("FP8, initial weights changed as those of bf16_nudged", nudge=1e-4, draw=1),
    "block_gradients": Arm("FP8, activation gradients in 128x128 blocks", recipe=Recipe(gradient_tiles="blocks")),
    "short_accumulator": Arm(
        "FP8, sums of 14 bits, never promoted to float32", recipe=Recipe(accumulator=NEVER_PROMOTED)
    ),
}
BASE = "bf16"


@dataclass(frozen=True)
class Tokens:
    """What all arms read."""

    train: UInt16[np.ndarray, "rows seq"]
    held_out: UInt16[np.ndarray, "rows seq"]

    @classmethod
    def read(cls, path: Path) -> "Tokens":
        """From the file that `prepare` wrote."""
        with np.load(path) as file:
            return cls(file["train"], file["held_out"])

    def batch(self, step: int, sequences: int, seed: int) -> Int[np.ndarray, "1 sequences seq"]:
        """Rows of a step, counted from 0. Every pass over the rows has an order of its own."""
        places = range(step * sequences, (step + 1) * sequences)
        orders = {p // len(self.train): None for p in places}
        orders = {n: np.random.default_rng([seed, n]).permutation(len(self.train)) for n in orders}
        rows = [orders[p // len(self.train)][p % len(self.train)] for p in places]
        return self.train[rows][None].astype(np.int32)


def load_config(tiny: bool = False) -> Config:
    """The run of all arms, from config.py; `tiny` is that of the tests."""
    return runpy.run_path(str(HERE / "config.py"))["tiny" if tiny else "config"]()


def prepare(config: Config, path: Path) -> Tokens:
    """Rows of the project's own data pipeline, written for machines that lack it: as many as the run reads, or what the
    source has, which the run then passes over more than once."""
    from dsv3_jax.data.pipeline import train_rows, validation_rows
    from dsv3_jax.data.sources import open_source
    from dsv3_jax.data.tokenizer import load_or_train

    source = open_source(config.data)
    tokenizer = load_or_train(config.data, source, config.model.vocab_size)
    seq_len = config.batch.seq_len
    held_out, _ = validation_rows(config.data, source, tokenizer, seq_len=seq_len, count=config.log.validation_rows)
    rows = train_rows(config.data, source, tokenizer, seq_len=seq_len, seed=config.seed, epochs=1)
    train = np.stack(list(islice(rows, config.steps * config.batch.sequences)))
    tokens = Tokens(train.astype(np.uint16), held_out.astype(np.uint16))
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, train=tokens.train, held_out=tokens.held_out)
    return tokens


@dataclass(frozen=True)
class Limits:
    """When an arm evaluates, and when it stops before the schedule's end."""

    evaluate_every: int = 100
    stop_after: int | None = None
    minutes: float = math.inf


def run_arm(name: str, config: Config, tokens: Tokens, results: Path, limits: Limits) -> dict[str, Any]:
    """Trains one arm and keeps its record in `results`/NAME.json; returns the record at once where it is complete."""
    path, last = results / f"{name}.json", min(limits.stop_after or config.steps, config.steps)
    fingerprint = fingerprint_of(config, tokens)
    if path.exists():
        old = json.loads(path.read_text())
        if old["fingerprint"] == fingerprint and len(old["losses"]) >= last:
            return old
    results.mkdir(parents=True, exist_ok=True)
    record = {
        "arm": name,
        "fingerprint": fingerprint,
        "planned_steps": config.steps,
        "warmup_steps": math.ceil(config.optimizer.warmup_tokens / (config.batch.sequences * config.batch.seq_len)),
        "tokens_per_step": config.batch.sequences * config.batch.seq_len,
        "held_out_tokens": tokens.held_out.size,
        "parameters": count_parameters(config.model).total,
        "device": jax.devices()[0].device_kind,
        "losses": [],
        "grad_norms": [],
        "evaluations": [],
        "skipped_steps": 0,
        "seconds": 0.0,
    }
    for _ in _train(ARMS[name], config, tokens, record, last, limits):
        _write(path, record)
    return record


def _train(
    arm: Arm, config: Config, tokens: Tokens, record: dict[str, Any], last: int, limits: Limits
) -> Iterator[None]:
    """Takes the steps, and yields after each evaluation."""
    config = replace(config, precision=arm.precision)
    mesh = make_mesh(config)
    step_fn, evaluate = make_step(config, mesh, recipe=arm.recipe), make_evaluation(config, mesh)
    state = nudged(init_state(config, mesh), arm)
    started, times, bad = time.perf_counter(), [], 0
    for step in range(last):
        before = time.perf_counter()
        batch = jnp.asarray(tokens.batch(step, config.batch.sequences, config.seed))
        state, report = step_fn(state, batch, knobs_of(config, step))
        loss, norm, applied = jax.device_get((report.losses.loss, report.grad_norm, report.applied))
        now = time.perf_counter()
        times.append(now - before)
        record["losses"].append(_number(loss))
        record["grad_norms"].append(_number(norm))
        record["skipped_steps"] += int(not applied)
        bad = 0 if applied else bad + 1
        stop = now - started > 60 * limits.minutes or bad >= config.max_bad_steps or step + 1 == last
        if stop or (step + 1) % limits.evaluate_every == 0:
            held_out = held_out_loss(evaluate, state, tokens.held_out, config.batch.sequences)
            record["evaluations"].append([step + 1, _number(held_out)])
            record["seconds"] = time.perf_counter() - started
            record["step_seconds"] = statistics.median(times)
            print(f"step {step + 1}: training {loss:.4f}, held out {held_out:.4f}, {now - started:.0f} s", flush=True)
            yield
        if stop:
            return


def fingerprint_of(config: Config, tokens: Tokens) -> str:
    """Changes with anything that the arms have in common."""
    digest = hashlib.sha256(json.dumps(to_dict(config), sort_keys=True).encode())
    digest.update(tokens.train.tobytes())
    digest.update(tokens.held_out.tobytes())
    return digest.hexdigest()[:16]


def nudged(state: TrainState, arm: Arm) -> TrainState:
    """The state with every weight times 1 + the arm's `nudge` times a random number."""
    if not arm.nudge:
        return state

    @jax.jit  # op by op, each shape of a weight would compile programs of its own
    def move(params: Params) -> Params:
        leaves, tree = jax.tree.flatten(params)
        keys = jax.random.split(jax.random.key(arm.draw), len(leaves))
        moved = [w * (1 + arm.nudge * jax.random.normal(key, w.shape)) for w, key in zip(leaves, keys, strict=True)]
        return jax.tree.unflatten(tree, moved)

    return replace(state, params=move(state.params))


def knobs_of(config: Config, step: int) -> Knobs:
    """The schedules' values for a step, counted from 0: as the training loop sets them."""
    size = config.batch.sequences * config.batch.seq_len
    loss = LossWeights(
        jnp.float32(mtp_weight(config.loss, step * size)),
        jnp.float32(config.loss.sequence_balance_weight),
        jnp.float32(config.loss.batch_balance_weight),
    )
    rate = learning_rate(config.optimizer, (step + 1) * size)
    return Knobs(jnp.float32(rate), jnp.float32(bias_update_speed(config.loss, step * size)), loss)


def held_out_loss(evaluate: Evaluation, state: TrainState, rows: UInt16[np.ndarray, "rows seq"], at_once: int) -> float:
    """Mean next-token loss of the rows, in nats."""
    total = 0.0
    for start in range(0, len(rows), at_once):
        part = rows[start : start + at_once].astype(np.int32)
        weights = np.full(at_once, 1 / len(rows), np.float32) * (np.arange(at_once) < len(part))
        padded = np.pad(part, ((0, at_once - len(part)), (0, 0)))
        total += float(evaluate(state.params, state.router_bias, jnp.asarray(padded), jnp.asarray(weights)))
    return total


def _number(x: Any) -> float | None:
    """For JSON, which has no NaN."""
    return float(x) if math.isfinite(x) else None


def _write(path: Path, record: dict[str, Any]) -> None:
    """Whole or not at all: the process may be stopped at any time."""
    whole = path.with_suffix(".part")
    whole.write_text(json.dumps(record))
    os.replace(whole, path)


def read_records(results: Path) -> dict[str, dict[str, Any]]:
    """What arms there are, in the order of ARMS; raises ValueError for arms that did not train on the same."""
    records = {name: json.loads(path.read_text()) for name in ARMS if (path := results / f"{name}.json").exists()}
    if BASE not in records:
        raise ValueError(f"{results}: has no {BASE}.json, which all arms are compared with; run --arm {BASE}")
    other = [name for name, r in records.items() if r["fingerprint"] != records[BASE]["fingerprint"]]
    if other:
        raise ValueError(f"{results}: {', '.join(other)} had other settings or tokens than {BASE}; run them again")
    return records


def held_out_differences(record: dict[str, Any], base: dict[str, Any]) -> dict[int, float]:
    """Held-out loss relative to the base arm's, by step, after warm-up; NaN where a loss is not finite."""
    reference = dict(base["evaluations"])
    return {
        step: _relative(loss, reference[step])
        for step, loss in record["evaluations"]
        if step in reference and step > record["warmup_steps"]
    }


def training_differences(record: dict[str, Any], base: dict[str, Any], window: int) -> dict[int, float]:
    """The same of training losses, each the mean over the `window` steps that end there, on the same batches."""
    first = -(-record["warmup_steps"] // window) * window
    last = min(len(record["losses"]), len(base["losses"]))
    means = {}
    for end in range(first + window, last + 1, window):
        ours, theirs = (r["losses"][end - window : end] for r in (record, base))
        whole = None not in ours + theirs
        means[end] = _relative(sum(ours), sum(theirs)) if whole else math.nan
    return means


def table(records: dict[str, dict[str, Any]], window: int) -> str:
    """Markdown: a row for each arm, and the held-out losses by step."""
    base = records[BASE]
    lines = [
        f"{base['parameters']:,} parameters, {base['tokens_per_step']:,} tokens a step, "
        f"{base['held_out_tokens']:,} tokens held out. Differences are relative to {BASE}, after "
        f"{base['warmup_steps']} steps of warm-up: of the held-out loss at every evaluation, and of the training loss "
        f"averaged over {window} steps.",
        "",
        "| arm | | steps | ms a step | last held-out loss | worst held-out | mean held-out | worst training |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, record in records.items():
        held_out = list(held_out_differences(record, base).values())
        training = list(training_differences(record, base, window).values())
        mean = _percent(sum(held_out) / len(held_out)) if held_out else ""
        worst = [_percent(max(d, key=lambda x: (math.isnan(x), abs(x)))) if d else "" for d in (held_out, training)]
        shown = ["", "", ""] if name == BASE else [worst[0], mean, worst[1]]
        taken = f"{len(record['losses'])} of {record['planned_steps']}"
        skipped = f", {record['skipped_steps']} not finite" if record["skipped_steps"] else ""
        cells = [name, ARMS[name].about, taken + skipped, f"{1e3 * record['step_seconds']:.0f} ({record['device']})"]
        lines.append("| " + " | ".join([*cells, _loss(record["evaluations"][-1][1]), *shown]) + " |")
    lines += ["", "| step | " + " | ".join(records) + " |", "|---:|" + "---:|" * len(records)]
    for step, loss in base["evaluations"]:
        cells = [_loss(loss)]
        for record in list(records.values())[1:]:
            found = dict(record["evaluations"])
            cells.append(_percent(_relative(found[step], loss)) if step in found else "")
        lines.append(f"| {step} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(records: dict[str, dict[str, Any]], window: int, out: Path) -> None:
    """Held-out loss, and both differences, over the steps; the dotted lines are the report's 0.25%."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    base = records[BASE]
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    loss, held_out, training = figure.subplots(1, 3)
    for color, (name, record) in zip(mpl.color_sequences["tab10"], records.items(), strict=False):
        steps, values = zip(*record["evaluations"], strict=True)
        loss.plot(steps, [math.nan if v is None else v for v in values], color=color, label=name)
        if name != BASE:
            for ax, found in (
                (held_out, held_out_differences(record, base)),
                (training, training_differences(record, base, window)),
            ):
                ax.plot(list(found), [100 * x for x in found.values()], color=color, marker=".", label=name)
    loss.set(title="Held-out loss", xlabel="step", ylabel="nats a token", yscale="log")
    held_out.set(title=f"Held-out loss against {BASE}", xlabel="step", ylabel="difference, %")
    training.set(title=f"Training loss against {BASE}, means of {window} steps", xlabel="step", ylabel="difference, %")
    for ax in (held_out, training):
        ax.axhline(0, color="0.6", linewidth=0.8)
        for bound in (-0.25, 0.25):
            ax.axhline(bound, color="0.4", linestyle=":")
    loss.legend()
    figure.savefig(out, dpi=110)


def _relative(loss: float | None, base: float | None) -> float:
    return math.nan if loss is None or base is None else loss / base - 1


def _percent(x: float) -> str:
    return "not finite" if math.isnan(x) else f"{100 * x:+.3f}%"


def _loss(x: float | None) -> str:
    return "not finite" if x is None else f"{x:.4f}"


def main(argv: list[str] | None = None) -> None:
    """Reads the command line, does one thing, and prints the table of the arms there are."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    todo = parser.add_mutually_exclusive_group(required=True)
    todo.add_argument("--prepare", action="store_true", help="write the tokens")
    todo.add_argument("--arm", choices=list(ARMS), help="train one arm, or do nothing if it is complete")
    todo.add_argument("--report", action="store_true", help="write table.md and loss.png beside the results")
    parser.add_argument("--source", help="of --prepare: a folder of text in place of the standard library")
    parser.add_argument("--tokens", type=Path, default=TOKENS)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the arms' records")
    parser.add_argument("--tiny", action="store_true", help="the sizes of the tests")
    parser.add_argument("--every", type=int, default=100, help="steps between evaluations")
    parser.add_argument("--stop-after", type=int, help="take fewer steps of the same schedule")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop cleanly with what there is by then")
    args = parser.parse_args(argv)
    config = load_config(args.tiny)
    if args.source and not args.prepare:
        parser.error("--source: the tokens of an arm are those of --tokens; give it with --prepare")
    if args.prepare:
        source = args.source or config.data.source
        try:
            tokens = prepare(replace(config, data=replace(config.data, source=source)), args.tokens)
        except ConfigError as error:
            parser.error(str(error))
        passes = config.steps * config.batch.sequences / len(tokens.train)
        sizes = f"{tokens.train.size:,} tokens, and {tokens.held_out.size:,} held out"
        print(f"{args.tokens}: {sizes}; an arm passes over them {passes:.1f} times")
        return
    if args.arm:
        limits = Limits(args.every, args.stop_after, args.minutes)
        run_arm(args.arm, config, Tokens.read(args.tokens), args.results, limits)
    records = read_records(args.results) if args.report or (args.results / f"{BASE}.json").exists() else {}
    if args.report:
        draw(records, args.every, args.results.parent / "loss.png")
        (args.results.parent / "table.md").write_text(table(records, args.every))
    if records:
        print(table(records, args.every))


if __name__ == "__main__":
    main()
