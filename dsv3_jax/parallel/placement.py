"""Which dimension of which parameter lives on which mesh axis: the one table of sharding rules, plain numbers.

Compute weights: routed experts are split over `node` x `gpu` along their expert dimension, all else is replicated.
ZeRO-1: master weights and moments are further split over the axes a parameter is replicated on (report 3.2).

`pipe`: master weights and moments are split over it too, along a dimension inside each layer and never along the
layers, so that the state is the same on any mesh whatever the stages, and every rank updates as much of it.

The step shards the state by this table, and the planner counts its bytes by it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from dsv3_jax.ops.tile import TILE

Sizes = Mapping[str, int]
"""Devices along each mesh axis, as `mesh.shape` has them. An axis of one device needs no collective: it is left out."""


def batch_axes(sizes: Sizes) -> tuple[str, ...]:
    """Axes the batch is split over."""
    return _active(sizes, ("data", "node", "gpu"))


def pipe_axes(sizes: Sizes) -> tuple[str, ...]:
    """The axis over which the model's layers are cut into stages, if there is more than one."""
    return _active(sizes, ("pipe",))


def expert_axes(sizes: Sizes) -> tuple[str, ...]:
    """Axes of one expert-parallel group; `node` is the slow link."""
    return _active(sizes, ("node", "gpu"))


def _active(sizes: Sizes, axes: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(axis for axis in axes if sizes.get(axis, 1) > 1)


@dataclass(frozen=True)
class Placement:
    """Where one parameter lives."""

    expert_dim: int | None
    """Dimension split over `expert_axes`; None for a parameter that every device computes with."""
    expert_axes: tuple[str, ...]
    """Axes over which compute weights differ."""
    zero_dim: int | None
    """Dimension of master weight and moments that is split over `zero_axes`; None where none divides."""
    zero_axes: tuple[str, ...]
    """Axes over which master weight and moments are split."""
    replica_axes: tuple[str, ...]
    """Axes over which the compute weight is replicated, and its gradient therefore summed."""
    ndim: int
    pipe_dim: int | None = None
    """Dimension of master weight and moments that is split over `pipe`, before `zero_axes`; None where none divides."""
    pipe_axes: tuple[str, ...] = ()
    """`pipe`, where there is a pipeline."""

    @property
    def dims(self) -> tuple[tuple[str, ...], ...]:
        """The axes that each dimension of master weight and moments is split over."""
        dims: list[tuple[str, ...]] = [()] * self.ndim
        if self.expert_dim is not None:
            dims[self.expert_dim] = self.expert_axes
        if self.pipe_dim is not None:
            dims[self.pipe_dim] = self.pipe_axes
        if self.zero_dim is not None:
            dims[self.zero_dim] += self.zero_axes
        return tuple(dims)

    @property
    def sharded_axes(self) -> tuple[str, ...]:
        """Axes over which master weight and moments differ."""
        split = () if self.pipe_dim is None else self.pipe_axes
        return split + self.zero_axes + self.expert_axes


def place(path: tuple[str, ...], shape: tuple[int, ...], sizes: Sizes) -> Placement:
    """Where the parameter at a path of the parameter tree lives: over as many devices as its dimensions divide."""
    expert_dim = len(shape) - 3 if "experts" in path else None
    experts, pipe = () if expert_dim is None else expert_axes(sizes), pipe_axes(sizes)
    replicas = tuple(axis for axis in batch_axes(sizes) if axis not in experts)
    base = Placement(expert_dim, experts, None, (), replicas, len(shape), pipe_axes=pipe)
    if not pipe:
        return _split_over_replicas(base, shape, sizes)
    ranks = sizes["pipe"]
    # Dimension 0 of what is stacked are the layers.
    inner = [d for d in range(min(1, len(shape) - 1), len(shape)) if d != expert_dim and shape[d] % ranks == 0]
    if not inner:
        return _split_over_replicas(base, shape, sizes)
    left = [tuple(n // ranks if i == d else n for i, n in enumerate(shape)) for d in inner]
    found = [_split_over_replicas(replace(base, pipe_dim=d), rest, sizes) for d, rest in zip(inner, left, strict=True)]

    def order(placement: Placement) -> tuple[int, bool]:
        # Of equals one that cuts no FP8 block: whole ones travel quantized.
        pieces = math.prod(sizes[axis] for axis in placement.sharded_axes)
        return pieces, shape[placement.pipe_dim] % (ranks * TILE) == 0

    return max(found, key=order)


def shard_elements(placement: Placement, shape: tuple[int, ...], sizes: Sizes) -> int:
    """Elements of master weight, or of a moment, on each device: all hold as many."""
    return math.prod(shape) // math.prod(sizes[axis] for axis in placement.sharded_axes)


def _split_over_replicas(base: Placement, shape: tuple[int, ...], sizes: Sizes) -> Placement:
    """ZeRO-1 over all replicas, or the last axes of them that some dimension divides by."""
    for skipped in range(len(base.replica_axes)):
        axes = base.replica_axes[skipped:]
        count = math.prod(sizes[axis] for axis in axes)
        for dim, size in enumerate(shape):
            if dim != base.expert_dim and size % count == 0:
                return replace(base, zero_dim=dim, zero_axes=axes)
    return base
