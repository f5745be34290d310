"""Training speed of transformers' DeepSeek-V3 in PyTorch on CPU: the other side of the comparison.

Runs in an environment of its own with torch and transformers; it imports nothing of dsv3_jax. One JSON line a variant:
`{variant, precision, tokens_per_second, step_seconds, losses, parameters, threads, versions}`, or `{variant, precision,
error}` where the variant does not run. A variant is attention-experts-mode. Without `--variant` all run, one after the
other; a process of its own for each keeps them apart. Weights are float32; with `--autocast` the forward pass and the
loss run under bfloat16 autocast. The config's MTP modules are not trained: transformers builds the main model alone.
How the process allocates memory is for the caller to set, for both sides alike: `run.py` does.
"""

import argparse
import json
import resource
import statistics
import sys
import time
from itertools import product
from pathlib import Path

import torch
import transformers
from torch.nn import functional as F

ATTENTION = ("eager", "sdpa")
EXPERTS = ("eager", "grouped_mm", "batched_mm")
MODES = ("plain", "compile")
VARIANTS = tuple("-".join(parts) for parts in product(ATTENTION, EXPERTS, MODES))


def build(path: Path, attention: str, experts: str) -> transformers.DeepseekV3ForCausalLM:
    """The main model of a DeepSeek-V3 `config.json` with random float32 weights and zero router bias."""
    config = transformers.DeepseekV3Config.from_dict(json.loads(path.read_text()) | {"use_cache": False})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation=attention, experts_implementation=experts
    )
    return model.train()


def train(
    model: torch.nn.Module, compiled: bool, autocast: bool, batch: int, seq: int, steps: int
) -> tuple[list[float], list[float]]:
    """Trains on random tokens and returns each step's seconds and loss.

    A step is: forward, cross-entropy of `batch * seq` predicted tokens, backward, clipping to norm 1, AdamW.
    """
    vocab = model.config.vocab_size

    def loss_of(tokens: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
            # in float32, as transformers' own loss is
            return F.cross_entropy(logits.float().view(-1, vocab), tokens[:, 1:].reshape(-1))

    if compiled:
        loss_of = torch.compile(loss_of)
    parameters = list(model.parameters())
    adamw = torch.optim.AdamW(parameters, lr=2.2e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    rows = torch.randint(vocab, (steps, batch, seq + 1), generator=torch.Generator().manual_seed(0))
    seconds, losses = [], []
    for tokens in rows:
        start = time.perf_counter()
        loss = loss_of(tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - start)
        losses.append(loss.item())
    return seconds, losses


def measure(args: argparse.Namespace, variant: str) -> dict:
    """The record of one variant; a variant that cannot run gives its error instead."""
    attention, experts, mode = variant.split("-")
    record = {"variant": variant, "precision": "bf16" if args.autocast else "fp32"}
    torch.compiler.reset()
    try:
        model = build(args.config_json, attention, experts)
        steps = args.warmup + args.steps
        seconds, losses = train(model, mode == "compile", args.autocast, args.batch, args.seq, steps)
    except Exception as error:  # a variant this build of torch cannot run is a result, whatever it raises
        return record | {"error": f"{type(error).__name__}: {error}"}
    seconds = seconds[args.warmup :]
    return record | {
        "tokens_per_second": args.batch * args.seq / statistics.median(seconds),
        "step_seconds": [round(s, 5) for s in seconds],
        "losses": [losses[0], losses[-1]],
        "parameters": sum(p.numel() for p in model.parameters()),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def main() -> None:
    """Reads the command line, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config-json", type=Path, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--seq", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--warmup", type=int, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory-gib", type=int, default=12, help="a variant that needs more fails, and says so")
    parser.add_argument("--variant", choices=VARIANTS)
    parser.add_argument("--autocast", action="store_true", help="forward pass and loss under bfloat16 autocast")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    # batched_mm copies an expert's weights for every token: without a limit it takes the machine down
    resource.setrlimit(resource.RLIMIT_DATA, (args.memory_gib * 2**30,) * 2)
    for variant in [args.variant] if args.variant else VARIANTS:
        print(json.dumps(measure(args, variant)), flush=True)


if __name__ == "__main__":
    main()
