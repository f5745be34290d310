"""The grouped product of the routed experts, with its gradients: picks an implementation."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax.ops.grouped_matmul import mosaic_gpu
from dsv3_jax.ops.grouped_matmul.reference import grouped_dgrad, grouped_forward, grouped_wgrad
from dsv3_jax.ops.hopper import Implementation, multiprocessors, takes_kernel
from dsv3_jax.ops.weights import MixedWeight, Weight


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
    value, slot = (weight.value, weight.slot) if isinstance(weight, MixedWeight) else (weight.astype(x.dtype), weight)
    kernel = takes_kernel(implementation, "grouped products", mosaic_gpu.unsupported(x, value, tile_group))
    return _grouped(x, value, slot, tile_group, kernel)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _grouped(x: Array, value: Array, slot: Array, tile_group: Array, kernel: bool) -> Array:
    if kernel:
        return mosaic_gpu.grouped_product(x, value, tile_group, num_sms=multiprocessors())
    return grouped_forward(x, value, tile_group)


def _grouped_fwd(x: Array, value: Array, slot: Array, tile_group: Array, kernel: bool) -> tuple:
    return _grouped(x, value, slot, tile_group, kernel), (x, value, tile_group, slot[:, :0, :0])


def _grouped_bwd(kernel: bool, residuals: tuple[Array, ...], dy: Array) -> tuple[Array | None, ...]:
    x, value, tile_group, like = residuals
    groups = value.shape[0]
    if kernel:
        bounds = jnp.searchsorted(tile_group, jnp.arange(groups + 1)).astype(jnp.int32)
        dx = mosaic_gpu.grouped_product(dy, value, tile_group, transposed=True, num_sms=multiprocessors())
        dw = mosaic_gpu.grouped_wgrad(x, dy, bounds, num_sms=multiprocessors())
    else:
        dx = grouped_dgrad(dy, value, tile_group)
        dw = grouped_wgrad(x, dy, tile_group, groups)
    return dx, None, dw.astype(like.dtype), None


_grouped.defvjp(_grouped_fwd, _grouped_bwd)
