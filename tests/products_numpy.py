"""Operands of FP8 products in numpy, and how to compare results with it."""

import numpy as np


def calc_diff(x, y) -> float:
    """1 - 2<x, y> / (<x, x> + <y, y>)."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    return 1 - 2 * (x * y).sum() / ((x * x).sum() + (y * y).sum())


def numpy_rows(x) -> np.ndarray:
    """Values of a `Tiled` times their scales."""
    values, scales = np.asarray(x.values).astype(np.float64), np.asarray(x.scales, np.float64)
    row, column = np.indices(values.shape)
    return values * scales[column // 128, row]


def numpy_blocks(weight) -> np.ndarray:
    """Values of a `Blocked` times their scales."""
    values, scales = np.asarray(weight.values).astype(np.float64), np.asarray(weight.scales, np.float64)
    index = np.indices(values.shape[-2:]) // 128
    return values * scales[..., index[0], index[1]]
