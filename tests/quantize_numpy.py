"""Fine-grained FP8 quantization in numpy and ml_dtypes, written apart from the package, and how to compare with it."""

import ml_dtypes
import numpy as np

E4M3 = ml_dtypes.float8_e4m3fn


def scale_and_inverse(amax, largest, power_of_2):
    amax = np.maximum(amax.astype(np.float32), np.float32(2.0**-100))
    with np.errstate(all="ignore"):
        scale, inverse = amax * np.float32(1 / largest), np.float32(largest) / amax
        if power_of_2:
            finite = np.isfinite(amax)
            exponent = np.ceil(np.log2(scale.astype(np.float64)))
            scale = np.where(finite, np.exp2(exponent), scale)
            inverse = np.where(finite, np.exp2(-exponent), inverse)
    return scale.astype(np.float32), inverse.astype(np.float32)


def to_e4m3(x):
    x = np.where(np.isnan(x), x, np.clip(x, -448, 448))
    return x.astype(E4M3)


def rows(x, power_of_2=False):
    """(values [rows, k], scales [tiles, rows]) of tiles along the last axis."""
    x = np.asarray(x).astype(np.float32)
    values, scales = [], []
    for start in range(0, x.shape[1], 128):
        tile = x[:, start : start + 128]
        scale, inverse = scale_and_inverse(np.abs(tile).max(axis=1), 448, power_of_2)
        with np.errstate(invalid="ignore"):
            values.append(to_e4m3(tile * inverse[:, None]))
        scales.append(scale)
    return np.concatenate(values, axis=1), np.stack(scales)


def columns(x, power_of_2=False):
    return rows(np.asarray(x).T, power_of_2)


def dequantize(values, scales):
    return values.astype(np.float32) * np.repeat(scales.T, 128, axis=1)[:, : values.shape[1]]


def blocks(weight):
    """(values, transposed, scales) of a [k, n] weight."""
    weight = np.asarray(weight).astype(np.float32)
    k, n = weight.shape
    values = np.zeros((k, n), E4M3)
    scales = np.zeros((-(-k // 128), -(-n // 128)), np.float32)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            at = np.s_[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128]
            scale, inverse = scale_and_inverse(np.abs(weight[at]).max(), 448, False)
            values[at], scales[i, j] = to_e4m3(weight[at] * inverse), scale
    return values, values.T, scales


def assert_identical(actual, expected):
    """The same bits, but for which NaN it is."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    bits = np.dtype(f"u{actual.dtype.itemsize}")
    same = np.ascontiguousarray(actual).view(bits) == np.ascontiguousarray(expected).view(bits)
    nan = np.isnan(actual.astype(np.float32)) & np.isnan(expected.astype(np.float32))
    assert (same | nan).all(), f"{(~(same | nan)).sum()} of {same.size} differ"


def assert_tiled(actual, expected):
    """A `Tiled` has these values and scales."""
    assert_identical(actual.values, expected[0])
    assert_identical(actual.scales, expected[1])


def assert_close(actual, values, scales, share=1e-3, rounded=False):
    """What follows from exponentials, roots or long sums: their last bits may round a value to its neighbour.

    `rounded` to bf16 before it was quantized, a tile's largest magnitude may be the neighbour of the expected one too,
    2^-7 of it away at most, in as few tiles.
    """
    np.testing.assert_allclose(actual.scales, scales, rtol=2.0**-7 if rounded else 1e-5)
    assert (~np.isclose(actual.scales, scales, rtol=1e-5, atol=0)).mean() < share
    ours, theirs = (np.asarray(v).astype(np.float32) for v in (actual.values, values))
    np.testing.assert_allclose(ours, theirs, rtol=2.0**-3, atol=2.0**-9)
    assert (ours != theirs).mean() < share


def wide(seed, shape, dtype=ml_dtypes.bfloat16):
    """Numbers whose magnitudes spread over many powers of two, so that tiles hold subnormals too."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) * np.exp(3 * rng.standard_normal(shape))).astype(dtype)


def hard(shape, nan=True):
    """`wide`, with a tile of zeros, of tiny numbers, of exact ties, and tiles that hold inf and NaN.

    Without NaN for kernels in interpret mode, where XLA's maximum on the CPU, which may lose one, stands in for the
    GPU's.
    """
    x = wide(1, shape).astype(np.float32)
    x[3, :128] = 0
    x[4, :128] = 1e-38
    steps = np.arange(0, 0x7F, dtype=np.uint8).view(E4M3).astype(np.float32)
    ties = (steps[:-1] + steps[1:]) / 2
    x[5, :128] = 0
    x[5, : len(ties)], x[5, 127] = ties, 448  # a largest magnitude of 448 leaves the others as they are
    x[6, :128] = -x[5, :128]
    x[7, 5], x[8, 6], x[9, 7] = np.inf, -np.inf, np.nan if nan else 1
    return x.astype(ml_dtypes.bfloat16)
