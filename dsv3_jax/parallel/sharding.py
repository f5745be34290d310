"""Which dimension of which parameter lives on which mesh axis: the one table of sharding rules.

Compute weights: routed experts are split over `node` x `gpu` along their expert dimension, all else is replicated.
ZeRO-1: master weights and moments are further split over the axes a parameter is replicated on (report 3.2).
"""

from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array

from dsv3_jax.ops.weights import Params
from dsv3_jax.parallel.mesh import BATCH_AXES, EXPERT_AXES, vary_over


@dataclass(frozen=True)
class Sharding:
    """Where one parameter lives."""

    expert_dim: int | None
    """Dimension split over the expert axes; None for a parameter that every device computes with."""
    zero_dim: int | None
    """Dimension of master weight and moments that is split over `zero_axes`; None where none divides."""
    zero_axes: tuple[str, ...]
    """Axes over which master weight and moments are split."""
    replica_axes: tuple[str, ...]
    """Axes over which the compute weight is replicated, and its gradient therefore summed."""
    ndim: int

    @property
    def spec(self) -> PartitionSpec:
        """Of master weight and moments."""
        dims: list[Any] = [None] * self.ndim
        if self.expert_dim is not None:
            dims[self.expert_dim] = EXPERT_AXES
        if self.zero_dim is not None:
            dims[self.zero_dim] = self.zero_axes
        return PartitionSpec(*dims)

    @property
    def sharded_axes(self) -> tuple[str, ...]:
        """Axes over which master weight and moments differ."""
        return self.zero_axes + (EXPERT_AXES if self.expert_dim is not None else ())

    def gather(self, shard: Array) -> Array:
        """The whole compute weight, or this device's experts, from the shards of all replicas."""
        if self.zero_dim is not None:
            shard = jax.lax.all_gather(shard, self.zero_axes, axis=self.zero_dim, tiled=True)
        return vary_over(shard, BATCH_AXES)

    def reduce(self, gradient: Array) -> Array:
        """Sum of the replicas' gradients, as this device's shard."""
        rest = tuple(axis for axis in self.replica_axes if axis not in self.zero_axes)
        if rest:
            gradient = jax.lax.psum(gradient, rest)
        if self.zero_dim is None:
            return gradient
        return jax.lax.psum_scatter(gradient, self.zero_axes, scatter_dimension=self.zero_dim, tiled=True)

    def total(self, x: Array) -> Array:
        """Sum of a per-shard number over all shards."""
        return jax.lax.psum(x, self.sharded_axes) if self.sharded_axes else x


def param_shardings(shapes: Params, mesh: Mesh) -> dict[str, Any]:
    """A `Sharding` for every parameter of a tree of shapes or arrays."""

    def rule(path: tuple[Any, ...], leaf: Any) -> Sharding:
        is_expert = any(entry.key == "experts" for entry in path)
        return _sharding(leaf.shape, len(leaf.shape) - 3 if is_expert else None, dict(mesh.shape))

    return jax.tree_util.tree_map_with_path(rule, shapes)


def _sharding(shape: tuple[int, ...], expert_dim: int | None, axes: dict[str, int]) -> Sharding:
    replicas = BATCH_AXES if expert_dim is None else tuple(a for a in BATCH_AXES if a not in EXPERT_AXES)
    for skipped in range(len(replicas)):
        candidates = replicas[skipped:]
        count = 1
        for axis in candidates:
            count *= axes[axis]
        for dim, size in enumerate(shape):
            if dim != expert_dim and size % count == 0:
                return Sharding(expert_dim, dim, candidates, replicas, len(shape))
    return Sharding(expert_dim, None, (), replicas, len(shape))
