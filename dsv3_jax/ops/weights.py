"""How a weight is stored for the matrix products, and where its gradient goes (report 3.3).

Training keeps float32 master weights. Once per optimizer step they are cast to what the products read; the gradient
must not be rounded to that type on its way back. So a cast weight travels as a `MixedWeight`: the cast value, and a
float32 slot of the same shape that is never read. Differentiating with respect to the slot gives the float32
gradient. An `FP8Weight` is the same for a value in FP8 blocks.

Where a gradient is final when it is written, the kernel that writes it sums its squares too, for its norm: such a
weight's slot is `Measured`.

A pipeline computes weight gradients later than those of inputs. Its weights have a name instead of a slot: the
backward pass logs, under that name, the `WeightProduct` that is the gradient (`jax.vjp(...)[1].with_logs`).
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax.config import ConfigError
from dsv3_jax.ops.quantize import E4M3, Blocked, Tiled, quantize_blocks
from dsv3_jax.ops.recipe import Recipe

Params = dict[str, Any]

# Norm gains and the router stay in float32 whatever the policy; of the other weights the embedding, the output head
# and the MTP projection, which the released checkpoint does not quantize either, are no FP8 linears (report 3.3.1).
_FLOAT32_LEAVES = {"scale", "router"}
_BF16_LEAVES = {"embed", "head", "projection"}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Measured:
    """A float32 gradient, and the sum of the squares of each of its matrices."""

    gradient: Float[Array, "*groups k n"]
    squares: Float[Array, "*groups"]


Slot = Array | Measured


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MixedWeight:
    """A weight in the type the products read, and the float32 slot that its gradient lands in, or its name."""

    value: Float[Array, "*shape"]
    slot: Float[Array, "*shape"] | Measured | None = None
    name: str | None = field(default=None, metadata={"static": True})
    measured: bool = field(default=False, metadata={"static": True})
    """Whether the slot is `Measured`, which a backward pass must know that does not keep the slot."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FP8Weight:
    """A weight in FP8 blocks, in both layouts, the float32 slot that its gradient lands in, and how it is used.

    Without a slot or a name it can be computed with, but not differentiated.
    """

    value: Blocked
    slot: Float[Array, "*groups k n"] | Measured | None = None
    recipe: Recipe = field(default=Recipe(), metadata={"static": True})
    name: str | None = field(default=None, metadata={"static": True})
    measured: bool = field(default=False, metadata={"static": True})
    """Whether the slot is `Measured`."""


Weight = Array | MixedWeight | FP8Weight


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class WeightProduct:
    """The gradient of a weight, before it is computed."""

    operands: tuple[Any, ...]
    product: Callable[..., Array] = field(metadata={"static": True})
    """A module's function, so that equal products are equal."""
    settings: tuple[Any, ...] = field(default=(), metadata={"static": True})
    """Arguments of the product before the operands."""
    add: Callable[..., Array] | None = field(default=None, metadata={"static": True})
    """Like `product`, with a total and the index of what is added to between settings and operands. None where nothing
    is faster than the product and then the sum."""
    with_squares: Callable[..., tuple[Array, Array]] | None = field(default=None, metadata={"static": True})
    """Like `product`, and returns the sums of the squares of its matrices too. None where nothing is faster than the
    product and then these."""

    def compute(self) -> Float[Array, "*shape"]:
        """The gradient, in float32."""
        return self.product(*self.settings, *self.operands)

    def measure(self) -> Measured:
        """The gradient and its squares."""
        if self.with_squares is not None:
            return Measured(*self.with_squares(*self.settings, *self.operands))
        gradient = self.compute()
        return Measured(gradient, jnp.sum(gradient * gradient, axis=(-2, -1)))

    def add_to(self, total: Float[Array, "layers ..."], layer: Int[Array, ""]) -> Float[Array, "layers ..."]:
        """`total`, with the gradient added to one of its elements."""
        if self.add is None:
            return total.at[layer].add(self.compute().astype(total.dtype))
        return self.add(*self.settings, total, layer, *self.operands)


Logs = dict[str, WeightProduct]


def conclude(weight: MixedWeight | FP8Weight, gradient: WeightProduct) -> tuple[MixedWeight | FP8Weight, Logs]:
    """What a backward pass returns for a weight, and what it logs: the gradient now, or only what it is made of."""
    if weight.name is not None:
        return dataclasses.replace(weight, value=None, slot=None), {weight.name: gradient}
    slot = gradient.measure() if weight.measured else gradient.compute()
    return dataclasses.replace(weight, value=None, slot=slot), {}


def conclude_fp8(
    weight: FP8Weight, x_columns: Tiled, dy_columns: Tiled, tile_group: Int[Array, " tiles"] | None = None
) -> tuple[FP8Weight, Logs]:
    """`conclude` for a weight in FP8; with a `tile_group` for the weights of all groups, from rows sorted by group."""
    groups = None if tile_group is None else weight.value.values.shape[0]
    by_kernels = weight.recipe.accumulator is None
    add = Recipe.add_wgrad if by_kernels else None
    with_squares = Recipe.wgrad_with_squares if by_kernels and groups else None
    operands, settings = (x_columns, dy_columns, tile_group), (weight.recipe, groups)
    return conclude(weight, WeightProduct(operands, Recipe.wgrad, settings, add, with_squares))


def weight_type(path: Sequence[Any], precision: str) -> jnp.dtype:
    """What the weight at a path of the parameter tree is cast to; float8_e4m3fn says: to an `FP8Weight`.

    Raises ConfigError for another precision than "bf16", "fp32" and "fp8".
    """
    dtypes = {"bf16": jnp.bfloat16, "fp32": jnp.float32, "fp8": E4M3}
    if precision not in dtypes:
        raise ConfigError(f"precision={precision!r}: choose one of {', '.join(map(repr, dtypes))}")
    names = {entry.key for entry in path}
    if _FLOAT32_LEAVES & names:
        return jnp.dtype(jnp.float32)
    if precision == "fp8" and _BF16_LEAVES & names:
        return jnp.dtype(jnp.bfloat16)
    return jnp.dtype(dtypes[precision])


def cast_weights(params: Params, precision: str, recipe: Recipe | None = None) -> Params:
    """The compute copy of float32 master weights: bf16 but for norm gains and the router, or float32 throughout, or
    fp8: every linear an `FP8Weight`, the embedding, the head and the MTP projection in bf16.

    Raises what `weight_type` raises.
    """

    def cast(path: tuple[Any, ...], leaf: Array) -> Array | FP8Weight:
        dtype = weight_type(path, precision)
        if dtype == E4M3:
            return FP8Weight(quantize_blocks(leaf), recipe=recipe or Recipe())
        return leaf.astype(dtype)

    return jax.tree_util.tree_map_with_path(cast, params)


def cast_for_inference(params: Params, precision: str) -> Params:
    """`cast_weights` as evaluation harnesses and decoding read them: in bf16 for a run in fp8, since decoding absorbs
    up-projections into the query and so has other products than the ones that training quantizes."""
    return cast_weights(params, "bf16" if precision == "fp8" else precision)


def gradient_slots(compute: Params, measured: Params | None = None) -> Params:
    """What to differentiate with respect to: float32 weights themselves, zeros in the shape of the others.

    `measured` says of each weight whether its slot is `Measured`: None of none, and a float32 weight's never is.
    """

    def slot(w: Array | FP8Weight, measured: bool) -> Slot:
        if not is_fp8(w) and w.dtype == jnp.float32:
            return w
        shape = w.value.values.shape if is_fp8(w) else w.shape
        zeros = jnp.zeros(shape, jnp.float32)
        return Measured(zeros, jnp.zeros(shape[:-2])) if measured else zeros

    measured = jax.tree.map(lambda _: False, compute, is_leaf=is_fp8) if measured is None else measured
    return jax.tree.map(slot, compute, measured, is_leaf=is_fp8)


def attach_slots(compute: Params, slots: Params) -> Params:
    """The tree a model is applied to, from the compute copy and what `gradient_slots` returned for it."""

    def attach(w: Array | FP8Weight, slot: Slot) -> Weight:
        measured = is_measured(slot)
        if isinstance(w, FP8Weight):
            return dataclasses.replace(w, slot=slot, measured=measured)
        return slot if w.dtype == jnp.float32 else MixedWeight(w, slot, measured=measured)

    return jax.tree.map(attach, compute, slots, is_leaf=is_fp8)


def is_measured(slot: Slot) -> bool:
    """Whether a slot, or the gradient in it, has its squares beside it."""
    return isinstance(slot, Measured)


def name_weights(compute: Params) -> dict[str, Array | MixedWeight | FP8Weight]:
    """The compute copy as a flat dict by path, in which the weights of linears have their path as name.

    Norm gains and the router stay arrays: their gradients are small, and not worth keeping their products for.
    """

    def named(path: tuple[Any, ...], w: Array | FP8Weight) -> Array | MixedWeight | FP8Weight:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if isinstance(w, FP8Weight):
            return dataclasses.replace(w, name=name)
        return w if _FLOAT32_LEAVES & {entry.key for entry in path} else MixedWeight(w, name=name)

    leaves = jax.tree_util.tree_flatten_with_path(compute, is_leaf=is_fp8)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): named(path, w) for path, w in leaves}


def is_fp8(weight: Any) -> bool:
    """Whether products with this weight are FP8 products."""
    return isinstance(weight, FP8Weight)
