"""The grouped product of the routed experts, with its gradients."""

import jax
from jaxtyping import Array, Float, Int

from dsv3_jax.ops.grouped_matmul.reference import grouped_dgrad, grouped_forward, grouped_wgrad
from dsv3_jax.ops.weights import MixedWeight, Weight


def grouped_matmul(
    x: Float[Array, "rows k"], weight: Weight, tile_group: Int[Array, " tiles"]
) -> Float[Array, "rows n"]:
    """Rows times the weight of their group, in the type of x.

    weight is [groups, k, n]; rows come as tiles of rows // tiles, sorted by group, each tile of the one group that
    `tile_group` says (see `ops.permute.assign_slots`), or of none where it says `groups`. Rows that hold nothing must
    be zero. The gradient of a `MixedWeight` is float32.
    """
    if isinstance(weight, MixedWeight):
        return _grouped(x, weight.value, weight.slot, tile_group)
    return _grouped(x, weight.astype(x.dtype), weight, tile_group)


@jax.custom_vjp
def _grouped(x: Array, value: Array, slot: Array, tile_group: Array) -> Array:
    return grouped_forward(x, value, tile_group)


def _grouped_fwd(x: Array, value: Array, slot: Array, tile_group: Array) -> tuple[Array, tuple[Array, ...]]:
    return grouped_forward(x, value, tile_group), (x, value, tile_group, slot[:, :0, :0])


def _grouped_bwd(residuals: tuple[Array, ...], dy: Array) -> tuple[Array | None, ...]:
    x, value, tile_group, like = residuals
    dx = grouped_dgrad(dy, value, tile_group)
    return dx, None, grouped_wgrad(x, dy, tile_group, value.shape[0]).astype(like.dtype), None


_grouped.defvjp(_grouped_fwd, _grouped_bwd)
