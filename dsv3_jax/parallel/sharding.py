"""Which dimension of which parameter lives on which mesh axis: the one table of sharding rules.

Compute weights: routed experts are split over `node` x `gpu` along their expert dimension, all else is replicated.
ZeRO-1: master weights and moments are further split over the axes a parameter is replicated on (report 3.2).
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array

from dsv3_jax.ops.quantize import TILE, Blocked, blocked, quantize_blocks
from dsv3_jax.ops.weights import Params
from dsv3_jax.parallel.mesh import batch_axes, expert_axes, vary_over


@dataclass(frozen=True)
class Sharding:
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

    @property
    def spec(self) -> PartitionSpec:
        """Of master weight and moments."""
        dims: list[Any] = [None] * self.ndim
        if self.expert_dim is not None:
            dims[self.expert_dim] = self.expert_axes
        if self.zero_dim is not None:
            dims[self.zero_dim] = self.zero_axes
        return PartitionSpec(*dims)

    @property
    def sharded_axes(self) -> tuple[str, ...]:
        """Axes over which master weight and moments differ."""
        return self.zero_axes + self.expert_axes

    def gather(self, shard: Array) -> Array:
        """The whole compute weight, or this device's experts, from the shards of all replicas."""
        if self.zero_dim is not None:
            shard = jax.lax.all_gather(shard, self.zero_axes, axis=self.zero_dim, tiled=True)
        return vary_over(shard, self.expert_axes + self.replica_axes)

    def gather_fp8(self, shard: Array) -> Blocked:
        """`gather` of a float32 shard, quantized: the same blocks on any mesh.

        Where shards are made of whole blocks they are quantized first, and the network moves FP8.
        """
        if self._cuts_blocks(shard.shape):
            return quantize_blocks(self.gather(shard))
        blocks = quantize_blocks(shard)
        if self.zero_dim is None:
            return jax.tree.map(self.gather, blocks)
        values = self.gather(blocks.values)
        return blocked(values, jnp.swapaxes(values, -1, -2), self.gather(blocks.scales))

    def _cuts_blocks(self, shard: tuple[int, ...]) -> bool:
        return self.zero_dim is not None and self.zero_dim >= self.ndim - 2 and shard[self.zero_dim] % TILE != 0

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
        return _sharding(leaf.shape, len(leaf.shape) - 3 if is_expert else None, mesh)

    return jax.tree_util.tree_map_with_path(rule, shapes)


def _sharding(shape: tuple[int, ...], expert_dim: int | None, mesh: Mesh) -> Sharding:
    experts = () if expert_dim is None else expert_axes(mesh)
    replicas = tuple(axis for axis in batch_axes(mesh) if axis not in experts)
    for skipped in range(len(replicas)):
        candidates = replicas[skipped:]
        count = math.prod(mesh.shape[axis] for axis in candidates)
        for dim, size in enumerate(shape):
            if dim != expert_dim and size % count == 0:
                return Sharding(expert_dim, experts, dim, candidates, replicas, len(shape))
    return Sharding(expert_dim, experts, None, (), replicas, len(shape))
