"""FP8 products at the sizes of the 671B model beside PyTorch's blockwise ones, taking turns: run on one Hopper GPU.

python -m dsv3_jax.ops.fp8_matmul.bench
"""

import importlib.util
import math
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")  # the other half is PyTorch's

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from dsv3_jax.ops.fp8_matmul import mosaic_gpu
from dsv3_jax.ops.fp8_matmul.tiles import SHAPES_671B, config_for
from dsv3_jax.ops.fp8_matmul.tune import Problem, compile_all, operands, product
from dsv3_jax.ops.quantize import TILE, Tiled, dequantize
from dsv3_jax.ops.timing import end_without_hopper, interleaved_medians, rotating, wait_for_all

ROWS, ROUTED_ROWS, GROUPS = SHAPES_671B.rows, SHAPES_671B.routed_rows, SHAPES_671B.groups
Row = tuple[str, dict[str, Callable[[], Any]], float]


def calc_diff(x: Array, y: Array) -> float:
    """1 - 2<x, y> / (<x, x> + <y, y>)."""
    x, y = (jnp.ravel(v).astype(jnp.float32) for v in (x, y))
    return float(1 - 2 * jnp.vdot(x, y) / (jnp.vdot(x, x) + jnp.vdot(y, y)))


def expected(problem: Problem, given: dict[str, Array]) -> Array:
    """The float32 product of the dequantized operands, group by group."""
    a = dequantize(Tiled(given["a"], given["a_scales"]))
    if problem[0] in ("wgrad", "grouped_wgrad"):
        b = dequantize(Tiled(given["b"], given["b_scales"]))
        return jnp.einsum("mgk,ngk->gmn", *(x.reshape(x.shape[0], problem[4], -1) for x in (a, b)))
    n = given["b"].shape[-2]
    scales = jnp.repeat(jnp.repeat(given["b_scales"], TILE, -2)[..., :n, :], TILE, -1)
    b = given["b"].astype(jnp.float32) * scales
    if problem[0] == "matmul":
        return a @ b.T
    return jnp.einsum("gmk,gnk->gmn", a.reshape(problem[4], -1, a.shape[1]), b).reshape(a.shape[0], n)


def dense_rows() -> Iterator[Row]:
    """Forward products beside PyTorch's."""
    from dsv3_jax.ops.fp8_matmul import torch_peer  # imports torch, which only this benchmark needs

    problems = {name: ("matmul", ROWS, n, k, 1) for name, (n, k) in SHAPES_671B.linears.items()}
    ours = compiled({name: (problem, product("matmul", config_for(*problem))) for name, problem in problems.items()})
    for name, problem in problems.items():
        _, m, n, k, _ = problem
        sets = [operands(problem, seed) for seed in range(2)]
        check(problem, ours[name], sets[0])
        contenders = {"ours": rotating(ours[name], sets), "torch": torch_peer.blockwise(m, n, k, False, 2)}
        yield f"forward {name} {n},{k}", contenders, 2 * m * n * k


def wgrad_rows() -> Iterator[Row]:
    """Weight gradients added to float32, beside PyTorch's with its bf16 result; grouped ones beside its dense one."""
    from dsv3_jax.ops.fp8_matmul import torch_peer

    shapes = [(k, n, ROWS) for n, k in SHAPES_671B.linears.values()]
    shapes += [(k, n, ROUTED_ROWS) for n, k in SHAPES_671B.experts.values()]
    problems = {f"wgrad {m},{n} tokens {k}": ("wgrad", m, n, k, 1) for m, n, k in shapes}
    problems |= {
        f"wgrad {k},{n} tokens {ROUTED_ROWS} in {GROUPS} groups": ("grouped_wgrad", k, n, ROUTED_ROWS // GROUPS, GROUPS)
        for n, k in SHAPES_671B.experts.values()
    }

    def adding(config: Any, total: Array, **given: Array) -> Array:
        return mosaic_gpu.wgrad(**given, config=config, total=total)

    for name, problem in problems.items():
        kind, m, n, k, groups = problem
        sets = [operands(problem, seed) for seed in range(2)]
        config = config_for(*problem)
        plain = jax.jit(product(kind, config))
        check(problem, plain, sets[0])
        add = jax.jit(partial(adding, config), donate_argnames="total")
        total = [jnp.zeros((groups, m, n), jnp.float32)]
        again = rotating(lambda add=add, total=total, **given: total.__setitem__(0, add(total=total[0], **given)), sets)
        yield (
            name,
            {
                "ours": lambda again=again, total=total: (again(), total[0])[1],
                "ours, storing": rotating(plain, sets),
                "torch": torch_peer.blockwise(m, n, groups * k, True, 2),
            },
            2 * m * n * k * groups,
        )


def grouped_rows() -> Iterator[Row]:
    """Grouped products beside our dense one on as many rows, and XLA's dense bf16 one."""
    skewed = jnp.asarray(np.repeat(np.arange(5), [100, 3, 129, 22, 2]), jnp.int32)  # the last two tiles hold nothing
    for shape in SHAPES_671B.experts.values():
        for n, k in (shape, shape[::-1]):
            problem = ("grouped_matmul", ROUTED_ROWS, n, k, GROUPS)
            given = operands(problem, 0)
            run = jax.jit(product("grouped_matmul", config_for(*problem)))
            check(problem, run, given)
            one = {key: value[0] if key in ("b", "b_scales") else value for key, value in given.items()}
            del one["tile_group"]
            dense = jax.jit(product("matmul", config_for("matmul", ROUTED_ROWS, n, k)))
            x, w = (given[key].astype(jnp.bfloat16) for key in ("a", "b"))
            bf16 = jax.jit(lambda x, w: x @ w.T)
            yield (
                f"grouped {n},{k}",
                {
                    "ours": lambda run=run, given=given: run(**given),
                    "ours, skewed": lambda run=run, given=given: run(**given | {"tile_group": skewed}),
                    "our dense": lambda dense=dense, one=one: dense(**one),
                    "XLA bf16": lambda bf16=bf16, x=x, w=w[0]: bf16(x, w),
                },
                2 * ROUTED_ROWS * n * k,
            )


def compiled(wanted: dict[str, tuple[Problem, Callable]]) -> dict[str, Callable]:
    """All products, compiled side by side."""
    shapes = {name: jax.eval_shape(partial(operands, problem, 0)) for name, (problem, _) in wanted.items()}
    return compile_all({name: f for name, (_, f) in wanted.items()}, shapes)


def check(problem: Problem, run: Callable, given: dict[str, Array]) -> None:
    """Raises RuntimeError where the product is not that of the dequantized operands."""
    diff = calc_diff(run(**given), expected(problem, given))
    if not diff < 1e-5:
        raise RuntimeError(f"{problem}: differs from the float32 product by {diff:.2e}")


def main() -> None:
    """Prints one markdown table."""
    end_without_hopper("this benchmark")
    if importlib.util.find_spec("torch") is None:
        sys.exit("this benchmark times PyTorch's products beside ours: pip install torch")
    device = jax.devices()[0].device_kind
    print(f"{device}, jax {jax.__version__}, torch {version('torch')}; medians of calls that take turns\n")
    print("| product | " + "us (TFLOP/s), the first over each of the others |\n|---|---|")
    ratios = []
    for rows in (dense_rows, grouped_rows, wgrad_rows):
        for name, contenders, flop in rows():
            seconds = interleaved_medians(contenders, wait_for_all, burst=0.06, rounds=5)
            ours = seconds["ours"]
            shown = [f"{who} {s * 1e6:.0f} ({flop / s / 1e12:.0f}) {s / ours:.2f}x" for who, s in seconds.items()]
            print(f"| {name} | {', '.join(shown)} |", flush=True)
            if rows is dense_rows:
                ratios.append(seconds["torch"] / ours)
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    print(f"\nforward against PyTorch: geometric mean {mean:.3f}, least {min(ratios):.3f}")


if __name__ == "__main__":
    main()
