"""Finds the fastest cut of every FP8 product of the 671B model and writes `tiles.json`: run on one Hopper GPU.

python -m dsv3_jax.ops.fp8_matmul.tune
"""

import argparse
import itertools
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from dsv3_jax.ops.fp8_matmul import mosaic_gpu
from dsv3_jax.ops.fp8_matmul.tiles import SHAPES_671B, Kind
from dsv3_jax.ops.hopper import Config
from dsv3_jax.ops.quantize import TILE
from dsv3_jax.ops.timing import interleaved_medians, rotating, wait_for_all

TOKENS = 4096
ROUTED_ROWS = 32768
GROUPS = 4

CANDIDATES = [Config(192, stages=4, band=band, cluster=cluster) for cluster in (1, 2) for band in (4, 8, 16)]
CANDIDATES += [Config(128, stages=4, cluster=cluster) for cluster in (1, 2)]
"""Weight gradients are never cut into clusters."""

Problem = tuple[Kind, int, int, int]


def problems() -> Iterator[Problem]:
    """Kind, rows, columns and reduction of every product of a forward and backward pass."""
    for name, (n, k) in SHAPES_671B.items():
        yield "matmul", TOKENS, n, k
        yield "matmul", TOKENS, k, n
        yield "wgrad", k, n, TOKENS
        if name in ("gate_up", "down"):
            yield "grouped_matmul", ROUTED_ROWS, n, k
            yield "grouped_matmul", ROUTED_ROWS, k, n
            yield "wgrad", k, n, ROUTED_ROWS // GROUPS


def product(kind: Kind, config: Config) -> Callable[..., Array]:
    """The kernel of a kind, of the operands that `operands` makes."""
    if kind == "wgrad":
        return partial(mosaic_gpu.wgrad, config=config)
    return partial(mosaic_gpu.matmul, config=config)


def operands(problem: Problem, seed: int) -> dict[str, Array]:
    """Random operands: values of all magnitudes, scales around one; groups of equal size."""
    kind, m, n, k = problem
    keys = iter(jax.random.split(jax.random.key(seed), 4))
    tiles = -(-k // TILE)
    groups = (GROUPS,) if kind == "grouped_matmul" else ()
    b_scales = (tiles, n) if kind == "wgrad" else (*groups, -(-n // TILE), tiles)
    found = {
        "a": values(next(keys), (m, k)),
        "a_scales": jax.random.uniform(next(keys), (tiles, m), minval=0.5, maxval=1.5),
        "b": values(next(keys), (*groups, n, k)),
        "b_scales": jax.random.uniform(next(keys), b_scales, minval=0.5, maxval=1.5),
    }
    if groups:
        found["tile_group"] = jnp.repeat(jnp.arange(GROUPS, dtype=jnp.int32), m // TILE // GROUPS)
    return found


def values(key: Array, shape: tuple[int, ...]) -> Array:
    """Normal numbers in e4m3, with zeros up to whole tiles, as `ops.fp8_matmul` pads them."""
    drawn = (64 * jax.random.normal(key, shape)).astype(jnp.float8_e4m3fn)
    return jnp.pad(drawn, [(0, 0)] * (len(shape) - 1) + [(0, -shape[-1] % TILE)])


def compile_all(functions: dict[Any, Callable], arguments: dict[Any, dict[str, Array]]) -> dict[Any, Callable]:
    """Every function compiled for its arguments, several at a time."""

    def one(name: Any) -> Callable:
        return jax.jit(functions[name]).lower(**arguments[name]).compile()

    with ThreadPoolExecutor(12) as pool:
        return dict(zip(functions, pool.map(one, functions), strict=True))


def main() -> None:
    """Tune every problem and write the fastest cuts."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("tiles.json"))
    args = parser.parse_args()
    tried = [
        (problem, config)
        for problem in dict.fromkeys(problems())
        for config in CANDIDATES
        if problem[0] != "wgrad" or config.cluster == 1
    ]
    shapes = {pair: jax.eval_shape(partial(operands, pair[0], 0)) for pair in tried}
    compiled = compile_all({pair: product(pair[0][0], pair[1]) for pair in tried}, shapes)
    best: dict[str, dict[str, int]] = {}
    for problem, pairs in itertools.groupby(tried, key=lambda pair: pair[0]):
        sets = [operands(problem, seed) for seed in range(2)]
        contenders = {config: rotating(compiled[problem, config], sets) for _, config in pairs}
        seconds = interleaved_medians(contenders, wait_for_all, burst=0.02, rounds=3)
        fastest = min(seconds, key=seconds.get)
        best[" ".join(map(str, problem))] = asdict(fastest)
        ranked = sorted(seconds.items(), key=lambda item: item[1])
        shown = (f"{c.rows} rows, band {c.band}, cluster {c.cluster}: {s * 1e6:.0f} us" for c, s in ranked)
        print(*problem, ":", "  ".join(shown), flush=True)
    args.output.write_text(json.dumps(best, indent=1) + "\n")


if __name__ == "__main__":
    main()
