"""The grouped product of the routed experts, with its gradients: picks an implementation."""

from dataclasses import replace
from functools import partial

import jax
from jaxtyping import Array, Float, Int

from dsv3_jax.ops.grouped_matmul import mosaic_gpu
from dsv3_jax.ops.grouped_matmul.reference import grouped_dgrad, grouped_forward, grouped_wgrad
from dsv3_jax.ops.groups import group_bounds
from dsv3_jax.ops.hopper import Implementation, multiprocessors, takes_kernel
from dsv3_jax.ops.weights import Logs, MixedWeight, Weight, WeightProduct, conclude


def grouped_matmul(
    x: Float[Array, "rows k"],
    weight: Weight,
    tile_group: Int[Array, " tiles"],
    implementation: Implementation | None = None,
) -> Float[Array, "rows n"]:
    """Rows times the weight of their group, in the type of x.

    weight is [groups, k, n]; rows come as tiles of rows // tiles, sorted by group, each tile of the one group that
    `tile_group` says (see `ops.permute.assign_slots`), or of none where it says `groups`: such a tile may hold anything
    in the result. Rows that hold nothing must be zero. The gradient of a `MixedWeight` is float32.

    None takes the Hopper kernel where it can run and the reference elsewhere. A named implementation that cannot run
    raises NotImplementedError, an unknown name ValueError.
    """
    mixed = weight if isinstance(weight, MixedWeight) else MixedWeight(weight.astype(x.dtype), weight)
    kernel = takes_kernel(implementation, "grouped products", mosaic_gpu.unsupported(x, mixed.value, tile_group))
    return _grouped(x, mixed, tile_group, kernel)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _grouped(x: Array, weight: MixedWeight, tile_group: Array, kernel: bool) -> Array:
    if kernel:
        return mosaic_gpu.grouped_product(x, weight.value, tile_group, num_sms=multiprocessors())
    return grouped_forward(x, weight.value, tile_group)


def _grouped_fwd(x: Array, weight: MixedWeight, tile_group: Array, kernel: bool) -> tuple:
    # A slot of a plain weight may be narrower than float32.
    like = None if weight.slot is None or weight.measured else weight.slot[:, :0, :0]
    return _grouped(x, weight, tile_group, kernel), (x, replace(weight, slot=None), tile_group, like)


def _grouped_bwd(kernel: bool, residuals: tuple, dy: Array) -> tuple[tuple[Array, MixedWeight, None], Logs]:
    x, weight, tile_group, like = residuals
    if kernel:
        dx = mosaic_gpu.grouped_product(dy, weight.value, tile_group, transposed=True, num_sms=multiprocessors())
    else:
        dx = grouped_dgrad(dy, weight.value, tile_group)
    settings = (weight.value.shape[0], kernel)
    product = WeightProduct(
        (x, dy, tile_group), _grouped_wgrad, settings, with_squares=_with_squares if kernel else None
    )
    dw, logs = conclude(weight, product)
    return (dx, dw if like is None else replace(dw, slot=dw.slot.astype(like.dtype)), None), logs


def _grouped_wgrad(groups: int, kernel: bool, x: Array, dy: Array, tile_group: Array) -> Array:
    if not kernel:
        return grouped_wgrad(x, dy, tile_group, groups)
    return mosaic_gpu.grouped_wgrad(x, dy, group_bounds(tile_group, groups), num_sms=multiprocessors())


def _with_squares(groups: int, _: bool, x: Array, dy: Array, tile_group: Array) -> tuple[Array, Array]:
    bounds = group_bounds(tile_group, groups)
    return mosaic_gpu.grouped_wgrad(x, dy, bounds, squares=True, num_sms=multiprocessors())


_grouped.defvjp_with_logs(_grouped_fwd, _grouped_bwd)
