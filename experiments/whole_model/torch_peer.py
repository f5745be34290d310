"""Training speed of transformers' DeepSeek-V3 in PyTorch: the other side of the comparison, in a process of its own.

Runs in any Python with torch and transformers; it imports nothing of dsv3_jax. Prints one JSON line: `{step_seconds,
losses, parameters, peak_bytes, device, versions}`, or `{error}` where the setting does not run. Works on CPU too, in
small sizes.
"""

import argparse
import itertools
import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
import transformers
from torch.nn import functional as F
from transformers.integrations.sdpa_attention import sdpa_attention_forward

# The first two are one function under names for which transformers builds no mask: when it is compiled it cannot see
# that its mask is only causal, and PyTorch's fast kernels do not take one.
UNMASKED = ("causal_sdpa", "causal_cudnn")
COMPILE = {"plain": None, "compile": "default", "autotune": "max-autotune-no-cudagraphs"}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def build(path: Path, attention: str, experts: str) -> transformers.DeepseekV3ForCausalLM:
    """The model of a DeepSeek-V3 `config.json` with random float32 weights and zero router bias."""
    for name in UNMASKED:
        transformers.AttentionInterface.register(name, sdpa_attention_forward)
    if attention == "causal_cudnn":
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.enable_mem_efficient_sdp(False)
        torch.backends.cuda.enable_math_sdp(False)
    config = transformers.DeepseekV3Config.from_dict(json.loads(path.read_text()) | {"use_cache": False})
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation=attention, experts_implementation=experts
        )
    return model.train()


def optimizer_step(parameters: list[torch.nn.Parameter], weights: str) -> Callable[[], None]:
    """Clipping to norm 1, then fused AdamW with float32 weights and moments.

    With weights="bf16" the parameters become bfloat16 copies of float32 weights that only the optimizer holds.
    """
    masters = [p.detach().clone() for p in parameters] if weights == "bf16" else parameters
    if weights == "bf16":
        for parameter, master in zip(parameters, masters, strict=True):
            parameter.data = master.bfloat16()
    adamw = torch.optim.AdamW(masters, lr=2.2e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    @torch.no_grad()
    def step() -> None:
        if weights == "bf16":
            for parameter, master in zip(parameters, masters, strict=True):
                master.grad, parameter.grad = parameter.grad.float(), None
        torch.nn.utils.clip_grad_norm_(masters, 1.0, foreach=True)
        adamw.step()
        adamw.zero_grad(set_to_none=True)
        if weights == "bf16":
            torch._foreach_copy_(parameters, masters)

    return step


def train(model: torch.nn.Module, args: argparse.Namespace) -> tuple[list[float], list[float]]:
    """Trains on random tokens and returns each step's seconds and loss: of `batch * seq` predicted tokens."""
    vocab = model.config.vocab_size

    def loss_of(tokens: torch.Tensor) -> torch.Tensor:
        autocast = torch.autocast(DEVICE, torch.bfloat16) if args.weights == "autocast" else nullcontext()
        with autocast:
            logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
            # in float32, as transformers' own loss is
            return F.cross_entropy(logits.float().view(-1, vocab), tokens[:, 1:].reshape(-1))

    if COMPILE[args.mode]:
        loss_of = torch.compile(loss_of, mode=COMPILE[args.mode], dynamic=False)
    update = optimizer_step(list(model.parameters()), args.weights)
    shape = (args.warmup + args.steps, args.batch, args.seq + 1)
    rows = torch.randint(vocab, shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    ends, losses, done = [time.perf_counter()], [], []
    for tokens in rows:
        loss = loss_of(tokens)
        loss.backward()
        update()
        losses.append(loss.detach())
        if DEVICE == "cpu":
            ends.append(time.perf_counter())
            continue
        done.append(torch.cuda.Event())
        done[-1].record()
        if len(done) > 1:  # one step ahead of the device, as a training loop may be
            done[-2].synchronize()
            ends.append(time.perf_counter())
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        ends.append(time.perf_counter())
    return [end - start for start, end in itertools.pairwise(ends)], [loss.item() for loss in losses]


def measure(args: argparse.Namespace) -> dict:
    """The record of the setting; one that cannot run gives its error instead."""
    try:
        model = build(args.config_json, args.attention, args.experts)
        seconds, losses = train(model, args)
    except Exception as error:  # a setting this build of torch cannot run is a result, whatever it raises
        return {"error": f"{type(error).__name__}: {error}"}
    return {
        "step_seconds": seconds[args.warmup :],
        "losses": [losses[0], losses[-1]],
        "parameters": sum(p.numel() for p in model.parameters()),
        "peak_bytes": torch.cuda.max_memory_allocated() if DEVICE == "cuda" else None,
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def main() -> None:
    """Reads the command line, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config-json", type=Path, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--seq", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--warmup", type=int, required=True)
    parser.add_argument("--attention", required=True, help=f"of transformers' own, or {', '.join(UNMASKED)}")
    parser.add_argument("--experts", required=True, help="of transformers' own: eager, grouped_mm, batched_mm")
    parser.add_argument("--mode", choices=COMPILE, required=True)
    parser.add_argument("--weights", choices=["bf16", "autocast"], required=True)
    args = parser.parse_args()
    # Products in float32, of which the router has one, may take the matrix units.
    torch.set_float32_matmul_precision("high")
    print(json.dumps(measure(args)), flush=True)


if __name__ == "__main__":
    main()
