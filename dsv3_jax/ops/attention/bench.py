"""Causal attention at the sizes of the 671B model, by all who can, taking turns: run on one Hopper GPU.

python -m dsv3_jax.ops.attention.bench          ours, cuDNN through jax, and tokamax and PyTorch where installed
python -m dsv3_jax.ops.attention.bench --sweep  our kernels cut in other ways

TFLOP/s count the products of a causal pass, half of all pairs of tokens, at two operations for each multiplication:
640 a pair, head and forward pass (192 wide scores, 128 wide values), 1664 more for the backward pass, which computes
the scores again. Ours takes what the projections write and rotates queries, and their gradients back, in the time that
is shown; the others are given rotated queries and keys in one piece.
"""

import argparse
import importlib.util
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from dsv3_jax.ops.attention.api import queries_keys_values
from dsv3_jax.ops.attention.cudnn import cudnn_attention
from dsv3_jax.ops.attention.mosaic_gpu import Kernels, kernel_attention
from dsv3_jax.ops.attention.mosaic_gpu_backward import BackwardConfig
from dsv3_jax.ops.attention.mosaic_gpu_forward import ForwardConfig
from dsv3_jax.ops.attention.reference import blockwise_attention
from dsv3_jax.ops.hopper import multiprocessors
from dsv3_jax.ops.rotary import Rotations
from dsv3_jax.ops.timing import end_without_hopper, interleaved_medians, wait_for_all

HEADS, NOPE, ROPE, VALUE = 128, 128, 64, 128
SCALE = (NOPE + ROPE) ** -0.5
SHAPES = [(1, 4096), (2, 4096), (1, 32768)]
"""Sequences and tokens of each."""
CHECKED_HEADS = 4
FLOP_PER_PAIR = {"forward": 640, "forward and backward": 2304}

FORWARD_CONFIGS = [
    *(ForwardConfig(heads=heads) for heads in (8, 4, 16, 128)),
    ForwardConfig(keys=64, stages=4),
    ForwardConfig(warpgroups=3, keys=64, stages=3),
]
BACKWARD_CONFIGS = [BackwardConfig(heads=heads) for heads in (4, 2, 8, 32)]


def operands(batch: int, seq: int, heads: int) -> tuple[list[Array], Array]:
    """The three operands and the gradient of the output."""
    shapes = [(heads, NOPE + ROPE), (heads, NOPE + VALUE), (ROPE,), (heads, VALUE)]

    @jax.jit
    def make() -> list[Array]:
        keys = jax.random.split(jax.random.key(0), len(shapes))
        return [jax.random.normal(keys[i], (batch, seq, *s), jnp.bfloat16) for i, s in enumerate(shapes)]

    *inputs, d_out = make()
    return inputs, d_out


def rotations(seq: int) -> Rotations:
    """Of positions 0 to seq, with RoPE's base."""
    angles = jnp.arange(seq)[:, None] * 10000.0 ** -(jnp.arange(0, ROPE, 2) / ROPE)
    return jnp.cos(angles), jnp.sin(angles)


def joined(q: Array, kv: Array, k_rope: Array) -> tuple[Array, Array, Array]:
    """q, k and v as others take them."""
    return queries_keys_values(q, kv, k_rope, rotations(q.shape[1]))


def parts(out: Array, q: Array, kv: Array, k_rope: Array) -> list[Array]:
    """An output and gradients, those of either part of packed operands apart: the larger would hide the smaller."""
    return [out, q[..., :NOPE], q[..., NOPE:], kv[..., :NOPE], k_rope, kv[..., NOPE:]]


def both_passes(attention: Callable) -> Callable:
    """(operands, d_out) -> output and gradients."""

    def run(inputs: list[Array], d_out: Array) -> tuple[Array, ...]:
        out, pullback = jax.vjp(attention, *inputs)
        return out, *pullback(d_out)

    return run


def ours(forward: ForwardConfig, backward: BackwardConfig) -> Callable:
    """Our kernels as a function of the three operands."""
    kernels = Kernels(multiprocessors(), forward, backward)
    return lambda *inputs: kernel_attention(*inputs, rotations(inputs[0].shape[1]), None, SCALE, kernels)


def cudnn(q: Array, k: Array, v: Array) -> Array:
    """cuDNN, through jax."""
    return cudnn_attention(q, k, v, SCALE)


def tokamax_attention(q: Array, k: Array, v: Array) -> Array:
    """tokamax's Hopper kernel."""
    import tokamax  # a peer, not a dependency

    return tokamax.dot_product_attention(q, k, v, scale=SCALE, is_causal=True, implementation="mosaic")


def exact(q: Array, kv: Array, k_rope: Array) -> Array:
    """In float32, by the blockwise reference."""
    heads_first = [jnp.swapaxes(x, 1, 2) for x in joined(q, kv, k_rope)]
    return jnp.swapaxes(blockwise_attention(*heads_first, None, SCALE), 1, 2)


def compiled(functions: dict[Any, tuple[Callable, tuple]]) -> dict[Any, Callable[[], Any]]:
    """Calls of functions on arguments, all compiled at the same time. One that cannot be is named and left out."""

    def one(name: Any) -> Callable[[], Any] | None:
        function, arguments = functions[name]
        try:
            run = jax.jit(function).lower(*arguments).compile()
        except Exception as e:  # a peer that refuses these shapes is no reason to time none
            print(f"{name}: {type(e).__name__}: {str(e).splitlines()[0][:150]}", flush=True)
            return None
        return lambda: run(*arguments)

    with ThreadPoolExecutor(8) as pool:
        calls = dict(zip(functions, pool.map(one, functions), strict=True))
    return {name: call for name, call in calls.items() if call is not None}


def print_times(shape: tuple[int, int], what: str, contenders: dict[Any, Callable[[], Any]]) -> None:
    """One line of the table."""
    batch, seq = shape
    flop = batch * HEADS * seq * seq / 2 * FLOP_PER_PAIR[what]
    rounds = 5 if seq < 10000 else 3
    seconds = interleaved_medians(contenders, wait_for_all, burst=0.06, rounds=rounds)
    first = next(iter(seconds.values()))
    shown = [f"{who} {s * 1e3:.3f} ({flop / s / 1e12:.0f}) {s / first:.2f}x" for who, s in seconds.items()]
    print(f"| {batch} x {seq} {what} | {', '.join(shown)} |", flush=True)


def errors() -> None:
    """Relative errors (of the norm, and of the largest element) against float32 on a few heads."""
    inputs, d_out = operands(1, 4096, CHECKED_HEADS)
    wide = [x.astype(jnp.float32) for x in inputs]

    def through_joined(*inputs: Array) -> Array:
        return cudnn(*joined(*inputs))

    wanted = {
        "ours": (both_passes(ours(ForwardConfig(), BackwardConfig())), (inputs, d_out)),
        "cuDNN": (both_passes(through_joined), (inputs, d_out)),
        "exact": (both_passes(exact), (wide, d_out.astype(jnp.float32))),
    }
    results = {name: parts(*call()) for name, call in compiled(wanted).items()}
    names = ["out", "q_nope", "q_rope", "k_nope", "k_rope", "v"]
    print("\n| error | " + " | ".join(names) + " |\n|---|" + "---|" * len(names))
    for who in [name for name in results if name != "exact"]:
        cells = []
        for x, e in zip(results[who], results["exact"], strict=True):
            off = jnp.abs(x.astype(jnp.float32) - e)
            norm = jnp.sqrt((off**2).mean() / (e**2).mean())
            cells.append(f"{float(norm):.1e}, {float(off.max() / jnp.abs(e).max()):.1e}")
        print(f"| {who} | " + " | ".join(cells) + " |", flush=True)


def compare() -> None:
    """Ours beside all others."""
    have = {name: importlib.util.find_spec(name) is not None for name in ("tokamax", "torch")}
    attentions: dict[str, Callable] = {"ours": ours(ForwardConfig(), BackwardConfig()), "cuDNN in jax": cudnn}
    if have["tokamax"]:
        attentions["tokamax"] = tokamax_attention
    print("| sequences | " + "ms (TFLOP/s), time over that of the first |\n|---|---|")
    for shape in SHAPES:
        inputs, d_out = operands(*shape, HEADS)
        others = jax.jit(joined)(*inputs)
        given = {name: inputs if name == "ours" else others for name in attentions}
        peer = peer_calls(*shape) if have["torch"] else {}
        wanted = {("forward", name): (attention, tuple(given[name])) for name, attention in attentions.items()}
        for name, attention in attentions.items():
            wanted["forward and backward", name] = both_passes(attention), (given[name], d_out)
        calls = compiled(wanted)
        for what in FLOP_PER_PAIR:
            mine = {name: call for (of, name), call in calls.items() if of == what}
            print_times(shape, what, mine | peer.get(what, {}))


def peer_calls(batch: int, seq: int) -> dict[str, dict[str, Callable[[], Any]]]:
    """PyTorch's, by what they compute."""
    from dsv3_jax.ops.attention import torch_peer  # imports torch

    calls = torch_peer.calls(batch, seq, HEADS, NOPE + ROPE, VALUE, SCALE)
    return {what: {"cuDNN in PyTorch": call} for what, call in zip(FLOP_PER_PAIR, calls, strict=True)}


def variants() -> Iterator[tuple[str, str, Callable]]:
    """What is timed, the cut's name, the attention."""
    for config in FORWARD_CONFIGS:
        yield "forward", str(config), ours(config, BackwardConfig())
    for config in BACKWARD_CONFIGS:
        yield "forward and backward", str(config), both_passes(ours(ForwardConfig(), config))


def sweep() -> None:
    """Our kernels at the first shape, cut in all ways."""
    inputs, d_out = operands(*SHAPES[0], HEADS)
    wanted = {
        (what, name): (run, tuple(inputs) if what == "forward" else (inputs, d_out)) for what, name, run in variants()
    }
    calls = compiled(wanted)
    for what in FLOP_PER_PAIR:
        seconds = interleaved_medians({n: c for (of, n), c in calls.items() if of == what}, wait_for_all, 0.03, 3)
        flop = SHAPES[0][0] * HEADS * SHAPES[0][1] ** 2 / 2 * FLOP_PER_PAIR[what]
        for name, s in sorted(seconds.items(), key=lambda item: item[1]):
            print(f"{what}: {s * 1e3:.3f} ms, {flop / s / 1e12:.0f} TFLOP/s, {name}", flush=True)


def main() -> None:
    """Prints markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sweep", action="store_true", help="time our kernels cut in other ways")
    args = parser.parse_args()
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.6")  # the rest is PyTorch's
    end_without_hopper("this benchmark")
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}; medians of calls that take turns\n", flush=True)
    if args.sweep:
        sweep()
        return
    errors()
    print()
    compare()


if __name__ == "__main__":
    main()
