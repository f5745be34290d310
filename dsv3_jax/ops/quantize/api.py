"""Fine-grained FP8 quantization: picks an implementation (report 3.3).

None takes the Hopper kernel where it can run and the reference elsewhere. A named implementation that cannot run raises
NotImplementedError saying why, an unknown name ValueError. The kernels give the reference's numbers bit for bit, but
for exponentials, roots and sums over rows, which differ in their last bits.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax.ops.hopper import Implementation, takes_kernel
from dsv3_jax.ops.quantize import (
    mosaic_gpu_blocks,
    mosaic_gpu_norm,
    mosaic_gpu_rows,
    mosaic_gpu_swiglu,
    mosaic_gpu_swiglu_backward,
    mosaic_gpu_tiles,
    reference,
)
from dsv3_jax.ops.quantize.formats import TILE, Blocked, SwiGLUBackward, Tiled
from dsv3_jax.ops.quantize.mosaic_gpu_pipeline import HALF


def quantize_rows(
    x: Float[Array, "rows k"], power_of_2: bool = False, implementation: Implementation | None = None
) -> Tiled:
    """1x128 tiles along the last axis: an operand of the forward product, or of the input gradient."""
    if not _takes_kernel(implementation, _type(x), _rows(x, 8), _width(x.shape[1], HALF)):
        return reference.quantize_rows(x, power_of_2)
    return mosaic_gpu_tiles.quantize(x, along_columns=False, power_of_2=power_of_2)[0]


def quantize_columns(
    x: Float[Array, "rows k"], power_of_2: bool = False, implementation: Implementation | None = None
) -> Tiled:
    """128x1 tiles, as tiles of the transpose [k, rows]: an operand of the weight gradient."""
    if not _takes_kernel(implementation, _type(x), _rows(x, TILE), _width(x.shape[1], HALF)):
        return reference.quantize_columns(x, power_of_2)
    return mosaic_gpu_tiles.quantize(x, along_rows=False, power_of_2=power_of_2)[0]


def quantize_columns_through_e5m6(x: Float[Array, "rows k"], implementation: Implementation | None = None) -> Tiled:
    """128x1 tiles with scales of powers of two, of x rounded to E5M6: what the weight gradient of the linear after
    attention reads (report 3.3.3)."""
    if not _takes_kernel(implementation, _type(x), _rows(x, TILE), _width(x.shape[1], HALF)):
        return reference.quantize_columns_through_e5m6(x)
    return mosaic_gpu_tiles.quantize(x, along_rows=False, power_of_2=True, through_e5m6=True)[0]


def quantize_both(x: Float[Array, "rows k"], implementation: Implementation | None = None) -> tuple[Tiled, Tiled]:
    """`quantize_rows` and `quantize_columns` of one reading of x, as an output gradient needs."""
    if not _takes_kernel(implementation, _type(x), _rows(x, TILE), _width(x.shape[1], HALF)):
        return reference.quantize_rows(x), reference.quantize_columns(x)
    return mosaic_gpu_tiles.quantize(x)


def quantize_blocks(weight: Float[Array, "*groups k n"], implementation: Implementation | None = None) -> Blocked:
    """A weight in 128x128 blocks, in both layouts."""
    k, n = weight.shape[-2:]
    if not _takes_kernel(implementation, _type(weight, jnp.bfloat16, jnp.float32), _width(k), _width(n, HALF)):
        return reference.quantize_blocks(weight)
    return mosaic_gpu_blocks.quantize_blocks(weight)


def retile(x: Tiled, rows: Int[Array, " rows"] | None = None, implementation: Implementation | None = None) -> Tiled:
    """From tiles along the features to tiles along the rows, [k, rows], as the weight gradient needs a kept input: of
    all rows of x, or of those that `rows` names, with zeros for an index out of range."""
    if rows is not None:
        return _retile_rows(x, rows, implementation)
    if not _takes_kernel(implementation, _rows(x.values, TILE), _width(x.values.shape[1])):
        return reference.retile(x)
    return mosaic_gpu_tiles.retile(x)


def rms_norm_quantize(
    x: Float[Array, "rows d"],
    gain: Float[Array, " d"],
    eps: float,
    power_of_2: bool = False,
    keep: bool = True,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "rows d"] | None, Tiled]:
    """RMSNorm of the rows in the type of x, where it is to `keep`, and that in 1x128 tiles."""
    d = x.shape[1]
    width = _width(d, 2 * TILE) or _fits(d)
    if not _takes_kernel(implementation, _type(x), _rows(x, mosaic_gpu_norm.ROWS), width):
        return reference.rms_norm_quantize(x, gain, eps, power_of_2, keep)
    return mosaic_gpu_norm.rms_norm_quantize(x, gain, eps, power_of_2, keep)


def swiglu_quantize(
    hidden: Float[Array, "rows two_ff"],
    weights: Float[Array, " rows"] | None,
    implementation: Implementation | None = None,
) -> tuple[Tiled, Tiled]:
    """`hidden` in 1x128 tiles, to keep, and its weighted SwiGLU in 1x128 tiles, for the down projection."""
    if not _takes_kernel(implementation, _type(hidden), _rows(hidden, 8), _width(hidden.shape[1] // 2)):
        return reference.swiglu_quantize(hidden, weights)
    return mosaic_gpu_swiglu.swiglu_quantize(hidden, weights)


def swiglu_quantize_backward(
    hidden: Tiled,
    d_out: Float[Array, "rows ff"],
    weights: Float[Array, " rows"] | None,
    implementation: Implementation | None = None,
) -> SwiGLUBackward:
    """What the backward pass of a SwiGLU between two FP8 products needs, from the kept `hidden`."""
    if not _takes_kernel(implementation, _type(d_out), _rows(d_out, TILE), _width(d_out.shape[1])):
        return reference.swiglu_quantize_backward(hidden, d_out, weights)
    return mosaic_gpu_swiglu_backward.swiglu_quantize_backward(hidden, d_out, weights)


def _retile_rows(x: Tiled, rows: Int[Array, " rows"], implementation: Implementation | None) -> Tiled:
    taken = lambda part: jnp.take(part, rows, axis=0, mode="fill", fill_value=0)  # noqa: E731
    scales = taken(x.scales.T).T
    width = _width(x.values.shape[1], mosaic_gpu_rows.STRIP)
    if not _takes_kernel(implementation, _rows(rows, TILE), width):
        return retile(Tiled(taken(x.values), scales), implementation=implementation)
    return mosaic_gpu_rows.retile_rows(x.values, scales, rows)


def _takes_kernel(implementation: Implementation | None, *refusals: str | None) -> bool:
    """Whether the kernel runs, given why not."""
    return takes_kernel(implementation, "quantization", *refusals)


def _fits(d: int) -> str | None:
    return None if mosaic_gpu_norm.warpgroups(d) else f"holds whole rows in shared memory, {d} elements do not fit"


def _type(x: Array, *taken: jnp.dtype) -> str | None:
    taken = taken or (jnp.bfloat16,)
    return None if x.dtype in taken else f"takes {' and '.join(jnp.dtype(t).name for t in taken)}, not {x.dtype}"


def _rows(x: Array, multiple: int) -> str | None:
    rows = x.shape[0]
    return None if rows and rows % multiple == 0 else f"takes rows in multiples of {multiple}, not {rows}"


def _width(width: int, multiple: int = TILE) -> str | None:
    return None if width and width % multiple == 0 else f"takes widths in multiples of {multiple}, not {width}"
