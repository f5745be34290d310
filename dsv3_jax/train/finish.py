"""What a run shows at its end: held-out loss beside a bigram's, a sample, and pictures."""

import json
import math
from itertools import chain
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console

from dsv3_jax.checkpoint.pretrained import PretrainedModel
from dsv3_jax.config import Config
from dsv3_jax.evaluate.bigram import fit_bigram
from dsv3_jax.inference.generate import generate
from dsv3_jax.ops.weights import Params, cast_for_inference
from dsv3_jax.parallel.agreement import all_processes
from dsv3_jax.parallel.placement import batch_axes
from dsv3_jax.train.loop import Finished
from dsv3_jax.train.pictures import draw_curves, draw_expert_load
from dsv3_jax.train.step import Evaluation, make_evaluation
from dsv3_jax.train.text import Text, open_stream

# More rows than this say nothing new about a bigram.
_BIGRAM_TOKENS = 50_000_000
_PROMPT_TOKENS = 32


def finish(config: Config, run: Finished, console: Console) -> dict[str, float | int | str | None]:
    """Evaluate, sample, draw; print it all and write summary.json. Every process must call it, process 0 reports."""
    text = run.text
    evaluate = make_evaluation(config, run.mesh)
    loss = validation_loss(config, run, evaluate, run.state.params)
    summary = {
        "steps": run.progress.step,
        "tokens": run.progress.tokens,
        "validation_loss": loss,
        "validation_bits_per_byte": bits_per_byte(loss, text),
        "validation_loss_of_average": None
        if run.average is None
        else validation_loss(config, run, evaluate, run.average.params()),
        "bad_documents": len(set(chain(*all_processes(list(text.source.bad_documents))))),
    }
    sample = _sample(config, run) if config.log.sample_tokens else None
    if jax.process_index() == 0:
        summary |= _bigram(config, run)
        folder = Path(config.output_dir)
        (folder / "summary.json").write_text(json.dumps(summary | {"sample": sample}, indent=2) + "\n")
        draw_curves(folder / "metrics.jsonl", folder / "curves.png", summary["bigram_loss"], loss)
        if config.model.num_moe_layers or config.model.num_mtp_modules:
            draw_expert_load(folder / "metrics.jsonl", folder / "expert_load.png")
        _print(summary, sample, folder, console)
    return summary


def validation_loss(config: Config, run: Finished, evaluate: Evaluation, params: Params) -> float:
    """Mean next-token loss in nats over the held-out rows."""
    sharding = NamedSharding(run.mesh, PartitionSpec(batch_axes(run.mesh.shape)))

    def put(x: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    rows, total = run.text.validation, 0.0
    size = config.batch.rows_per_microbatch
    if config.parallel.pipe > 1:
        size *= -(-len(rows) // size)  # all at once, so that the pipeline fills but once
    for start in range(0, len(rows), size):
        batch = rows[start : start + size]
        # A short last batch is filled up with rows that weigh nothing.
        weights = (np.arange(size) < len(batch)).astype(np.float32)
        batch = np.resize(batch, (size, rows.shape[1]))
        total += float(evaluate(params, run.state.router_bias, put(batch), put(weights)))
    return total / len(rows)


def bits_per_byte(loss: float, text: Text) -> float:
    """A loss in nats per token as bits per byte of the held-out text."""
    rows, seq_len = text.validation.shape
    return loss * rows * (seq_len - 1) / math.log(2) / text.validation_bytes


def _bigram(config: Config, run: Finished) -> dict[str, float | int]:
    """An interpolated bigram fitted on the rows that process 0 trained on, and scored on the held-out ones."""
    text, streams = run.text, run.text.streams
    count = min(run.rows_taken, _BIGRAM_TOKENS // config.batch.seq_len // len(streams.mine))
    rows = []
    for number in streams.mine:
        again = open_stream(config, text.source, text.tokenizer, number, streams.count)
        rows += [next(again) for _ in range(count)]
    rows = np.stack(rows)
    loss = fit_bigram(rows, config.model.vocab_size).loss(text.validation)
    return {"bigram_loss": loss, "bigram_bits_per_byte": bits_per_byte(loss, text), "bigram_tokens": rows.size}


def _sample(config: Config, run: Finished) -> dict[str, str] | None:
    """A completion of the beginning of a held-out row, in process 0; the others give their part of the weights."""
    everywhere = NamedSharding(run.mesh, PartitionSpec())
    cast = jax.jit(lambda p: cast_for_inference(p, config.precision), out_shardings=everywhere)
    params, bias = jax.device_get((cast(run.state.params), run.state.router_bias))
    if jax.process_index() != 0:
        return None
    model = PretrainedModel(config.model, params, bias)
    prompt = run.text.validation[:1, : min(_PROMPT_TOKENS, config.batch.seq_len // 2)]
    new_tokens = min(config.log.sample_tokens, config.model.max_length - prompt.shape[1])
    tokens = generate(model, prompt, new_tokens, temperature=0.7, seed=config.seed, stop_token=run.text.tokenizer.eos)
    decode = run.text.tokenizer.decode
    return {"prompt": decode(prompt[0]), "completion": decode(tokens[0, prompt.shape[1] :])}


def _print(summary: dict, sample: dict[str, str] | None, folder: Path, console: Console) -> None:
    def line(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    line(
        f"validation loss {summary['validation_loss']:.4f} nats a token, "
        f"{summary['validation_bits_per_byte']:.4f} bits a byte"
    )
    if summary["validation_loss_of_average"] is not None:
        line(f"with averaged weights {summary['validation_loss_of_average']:.4f}")
    line(
        f"bigram, fitted on the same {summary['bigram_tokens']:,} training tokens: {summary['bigram_loss']:.4f} nats, "
        f"{summary['bigram_bits_per_byte']:.4f} bits a byte"
    )
    if summary["bad_documents"]:
        line(f"{summary['bad_documents']} documents could not be used; the log names them")
    if sample is not None:
        line(f"sample, after a held-out beginning:\n{sample['prompt']}|{sample['completion']}")
    line(f"written to {folder}: metrics.jsonl, summary.json, curves.png, expert_load.png, checkpoints")
