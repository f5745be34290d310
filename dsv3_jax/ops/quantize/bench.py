"""Times the quantization kernels against the card's own copy and against XLA: `python -m dsv3_jax.ops.quantize.bench`.

Every row: GB/s of bytes read and written, that over the bandwidth of a large copy in the same process, the same for XLA
compiling the reference, and the share of the bytes of all results in which the two differ. Arguments name the
operations to time; without any, all are.
"""

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array

from dsv3_jax.ops.quantize import api, reference
from dsv3_jax.ops.quantize.formats import Tiled
from dsv3_jax.ops.timing import end_without_hopper

BYTES_OF_A_PROGRAM = 2e9
"""Moved by the calls of one program: many times L2, and long enough that starting programs takes no time."""
XLA_COPIES = 4
"""Calls in a program of XLA's, which takes long to compile."""
BURST_SECONDS = 0.07
"""Shorter bursts read too long when timed from the host."""
BURSTS = 7

SHAPES = [(32768, 7168), (32768, 2048), (4096, 7168), (4096, 16384)]
"""Tokens of a sequence or routed rows of a device, by the widths of the model's projections."""
GATHERED = [(4096, 33280, 7168), (16384, 106496, 2048)]
"""Tokens, the rows that their experts see, in whole tiles, and their width."""
NORM_SHAPES = [(32768, 7168), (4096, 7168), (4096, 1536)]
SWIGLU_SHAPES = [(32768, 2048), (4096, 18432)]
WEIGHT_SHAPES = [(7168, 16384), (4, 7168, 4096)]


def cases() -> Iterator[tuple[str, tuple[int, ...], Callable, Callable]]:
    """Name, shape, the function of (implementation, *inputs), and what makes inputs of a random key."""
    for shape in SHAPES:
        for name in ("quantize_rows", "quantize_columns", "quantize_both"):
            yield name, shape, partial(_implemented, getattr(api, name)), partial(_matrix, shape)
        yield "retile", shape, partial(_implemented, api.retile), partial(_tiles, shape)
    for shape in GATHERED:
        yield "retile of gathered rows", shape, partial(_implemented, api.retile), partial(_gathered, shape)
    for shape in NORM_SHAPES:
        norm = lambda implementation, x, gain: api.rms_norm_quantize(x, gain, 1e-6, implementation=implementation)  # noqa: E731
        yield "rms_norm_quantize", shape, norm, partial(_norm_inputs, shape)
    for shape in SWIGLU_SHAPES:
        yield "swiglu_quantize", shape, partial(_implemented, api.swiglu_quantize), partial(_swiglu_inputs, shape)
        backward = partial(_implemented, api.swiglu_quantize_backward)
        yield "swiglu_quantize_backward", shape, backward, partial(_backward_inputs, shape)
    for shape in WEIGHT_SHAPES:
        make = partial(_matrix, shape, dtype=jnp.float32)
        yield "quantize_blocks", shape, partial(_implemented, api.quantize_blocks), make


def _implemented(function: Callable, implementation: str, *inputs):
    return function(*inputs, implementation=implementation)


def _matrix(shape: tuple[int, ...], key: Array, dtype: jnp.dtype = jnp.bfloat16) -> tuple[Array]:
    return (jax.random.normal(key, shape, dtype),)


def _tiles(shape: tuple[int, int], key: Array) -> tuple[Tiled]:
    return (reference.quantize_rows(*_matrix(shape, key)),)


def _gathered(shape: tuple[int, int, int], key: Array) -> tuple[Tiled, Array]:
    tokens, rows, width = shape
    return *_tiles((tokens, width), key), jax.random.randint(key, (rows,), 0, tokens)


def _norm_inputs(shape: tuple[int, int], key: Array) -> tuple[Array, Array]:
    return *_matrix(shape, key), jax.random.uniform(key, shape[1:])


def _swiglu_inputs(shape: tuple[int, int], key: Array) -> tuple[Array, Array]:
    rows, ff = shape
    return *_matrix((rows, 2 * ff), key), jax.random.uniform(key, (rows,))


def _backward_inputs(shape: tuple[int, int], key: Array) -> tuple[Tiled, Array, Array]:
    hidden, weights = _swiglu_inputs(shape, key)
    return reference.quantize_rows(hidden), *_matrix(shape, jax.random.fold_in(key, 1)), weights


def seconds_per_call(function: Callable, inputs: list[tuple]) -> float:
    """Median over bursts of the time of one call, all inputs in turn within one program."""
    program = jax.jit(lambda inputs: [function(*each) for each in inputs])
    jax.block_until_ready(program(inputs))
    calls, times = 1, []
    while len(times) < BURSTS:
        started = time.perf_counter()
        for _ in range(calls):
            results = program(inputs)
        jax.block_until_ready(results)
        elapsed = time.perf_counter() - started
        if elapsed < BURST_SECONDS:
            calls = int(calls * max(1.2 * BURST_SECONDS / elapsed, 2))
        else:
            times.append(elapsed / calls)
    return statistics.median(times) / len(inputs)


def copy_bandwidth() -> float:
    """Bytes read and written a second by a copy of 2 GiB."""
    source = jax.random.bits(jax.random.key(0), (2**31,), jnp.uint8)
    return 2 * source.nbytes / seconds_per_call(jnp.copy, [(source,)])


def _bytes(tree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _share_of_different_bytes(a, b) -> float:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return sum(int((x.view(jnp.uint8) != y.view(jnp.uint8)).sum()) for x, y in pairs) / _bytes(a)


def main() -> None:
    """Prints the table."""
    chosen = sys.argv[1:]
    end_without_hopper("this benchmark")
    copy = copy_bandwidth()
    print(f"{jax.devices()[0].device_kind}: copy {copy / 1e9:.0f} GB/s")
    print(f"{'operation':26}{'shape':>18}{'us':>9}{'GB/s':>8}{'of copy':>9}{'XLA us':>9}{'of copy':>9}{'differ':>9}")
    for name, shape, function, make in cases():
        if chosen and name not in chosen:
            continue
        make = jax.jit(make)
        first = make(jax.random.key(0))
        kernel, xla = (partial(function, implementation) for implementation in ("mosaic_gpu", "reference"))
        moved = _bytes(first) + _bytes(jax.eval_shape(xla, *first))
        differ = _share_of_different_bytes(jax.jit(kernel)(*first), jax.jit(xla)(*first))
        copies = min(32, 1 + int(BYTES_OF_A_PROGRAM / moved))
        inputs = [first, *(make(jax.random.key(n)) for n in range(1, copies))]
        times = [seconds_per_call(kernel, inputs), seconds_per_call(xla, inputs[:XLA_COPIES])]
        fractions = [moved / seconds / copy for seconds in times]
        print(
            f"{name:26}{'x'.join(map(str, shape)):>18}{times[0] * 1e6:9.1f}{moved / times[0] / 1e9:8.0f}"
            f"{fractions[0]:9.2f}{times[1] * 1e6:9.1f}{fractions[1]:9.2f}{differ:9.1e}",
            flush=True,
        )


if __name__ == "__main__":
    main()
