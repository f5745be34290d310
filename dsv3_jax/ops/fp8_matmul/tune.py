"""Finds the fastest cut of every FP8 product of the models in `tiles.TUNED` and writes `tiles.json`: run on one Hopper
GPU.

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
from dsv3_jax.ops.fp8_matmul.tiles import TUNED, Kind, Shapes, tiles_key
from dsv3_jax.ops.hopper import Config
from dsv3_jax.ops.quantize import TILE
from dsv3_jax.ops.timing import end_without_hopper, interleaved_medians, rotating, wait_for_all

Problem = tuple[Kind, int, int, int, int]
"""Kind, rows, columns, reduction and groups, as `config_for` takes them."""


def problems(shapes: Shapes) -> Iterator[Problem]:
    """Every product of a forward and backward pass."""
    for n, k in shapes.linears.values():
        yield "matmul", shapes.rows, n, k, 1
        yield "matmul", shapes.rows, k, n, 1
        yield "wgrad", k, n, shapes.rows, 1
    for n, k in shapes.experts.values():
        yield "grouped_matmul", shapes.routed_rows, n, k, shapes.groups
        yield "grouped_matmul", shapes.routed_rows, k, n, shapes.groups
        yield "grouped_wgrad", k, n, shapes.routed_rows // shapes.groups, shapes.groups


def candidates(kind: Kind) -> list[Config]:
    """The cuts that are tried: weight gradients refuse clusters."""
    clusters = (1,) if kind in ("wgrad", "grouped_wgrad") else (1, 2)
    three = [Config(192, band=band, cluster=cluster) for cluster in clusters for band in (4, 8, 16)]
    return three + [Config(128, cluster=cluster) for cluster in clusters]


def product(kind: Kind, config: Config) -> Callable[..., Array]:
    """The kernel of a kind, of the operands that `operands` makes."""
    return partial(mosaic_gpu.matmul if kind in ("matmul", "grouped_matmul") else mosaic_gpu.wgrad, config=config)


def operands(problem: Problem, seed: int) -> dict[str, Array]:
    """Random operands: values of all magnitudes, scales around one; groups of equal size."""
    kind, m, n, k, groups = problem
    keys = iter(jax.random.split(jax.random.key(seed), 4))
    leading = (groups,) if kind == "grouped_matmul" else ()
    k = k * groups if kind == "grouped_wgrad" else k
    tiles = -(-k // TILE)
    b_scales = (tiles, n) if kind in ("wgrad", "grouped_wgrad") else (*leading, -(-n // TILE), tiles)
    found = {
        "a": values(next(keys), (m, k)),
        "a_scales": jax.random.uniform(next(keys), (tiles, m), minval=0.5, maxval=1.5),
        "b": values(next(keys), (*leading, n, k)),
        "b_scales": jax.random.uniform(next(keys), b_scales, minval=0.5, maxval=1.5),
    }
    if kind == "grouped_matmul":
        found["tile_group"] = jnp.repeat(jnp.arange(groups, dtype=jnp.int32), m // TILE // groups)
    if kind == "grouped_wgrad":
        found["bounds"] = jnp.arange(groups + 1, dtype=jnp.int32) * (tiles // groups)
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


def fastest(wanted: list[Problem]) -> Iterator[tuple[Problem, Config]]:
    """Of each problem; prints what each candidate took."""
    tried = [(problem, config) for problem in wanted for config in candidates(problem[0])]
    shapes = {pair: jax.eval_shape(partial(operands, pair[0], 0)) for pair in tried}
    compiled = compile_all({pair: product(pair[0][0], pair[1]) for pair in tried}, shapes)
    for problem, pairs in itertools.groupby(tried, key=lambda pair: pair[0]):
        sets = [operands(problem, seed) for seed in range(2)]
        contenders = {config: rotating(compiled[problem, config], sets) for _, config in pairs}
        heat = interleaved_medians(contenders, wait_for_all, burst=0.02, rounds=3)
        # The two first ones again: a cut of a few percent more has won a short heat.
        leaders = {config: contenders[config] for config in sorted(heat, key=heat.get)[:2]}
        final = interleaved_medians(leaders, wait_for_all, burst=0.02, rounds=9)
        ranked = sorted(heat | final, key=lambda config: (config not in final, (heat | final)[config]))
        shown = (f"{c.rows} rows, band {c.band}, cluster {c.cluster}: {(heat | final)[c] * 1e6:.0f} us" for c in ranked)
        print(*problem, ":", "  ".join(shown), flush=True)
        yield problem, ranked[0]


def main() -> None:
    """Tune every problem and write the fastest cuts."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("tiles.json"))
    args = parser.parse_args()
    end_without_hopper("tuning")
    wanted = list(dict.fromkeys(itertools.chain.from_iterable(map(problems, TUNED.values()))))
    best = {tiles_key(*problem[:4]): asdict(config) for problem, config in fastest(wanted)}
    args.output.write_text(json.dumps(best, indent=1) + "\n")


if __name__ == "__main__":
    main()
