"""Which dimension of which parameter lives on which mesh axis: the one table of sharding rules.

Compute weights: routed experts are split over `node` x `gpu` along their expert dimension, all else is replicated.
ZeRO-1: master weights and moments are further split over the axes a parameter is replicated on (report 3.2).

`pipe`: master weights and moments are split over it too, along a dimension inside each layer and never along the
layers, so that the state is the same on any mesh whatever the stages, and every rank updates as much of it. A step
sends each rank the layers that its stages run, in every direction, and the gradients back; what is not a stack of
layers goes to all ranks.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Int
from numpy import ndarray

from dsv3_jax.ops.quantize import TILE, Blocked, blocked, quantize_blocks
from dsv3_jax.ops.weights import Params
from dsv3_jax.parallel.mesh import batch_axes, expert_axes, pipe_axes, vary_over


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
    pipe_dim: int | None = None
    """Dimension of master weight and moments that is split over `pipe`, before `zero_axes`; None where none divides."""
    pipe_axes: tuple[str, ...] = ()
    """`pipe`, where there is a pipeline."""
    held: tuple[tuple[int, ...], ...] | None = None
    """Of stacked layers, those that each rank of the pipeline computes with; None for all."""

    @property
    def spec(self) -> PartitionSpec:
        """Of master weight and moments."""
        dims: list[Any] = [None] * self.ndim
        if self.expert_dim is not None:
            dims[self.expert_dim] = self.expert_axes
        if self.pipe_dim is not None:
            dims[self.pipe_dim] = self.pipe_axes
        if self.zero_dim is not None:
            dims[self.zero_dim] = (dims[self.zero_dim] or ()) + self.zero_axes
        return PartitionSpec(*dims)

    @property
    def sharded_axes(self) -> tuple[str, ...]:
        """Axes over which master weight and moments differ."""
        split = () if self.pipe_dim is None else self.pipe_axes
        return split + self.zero_axes + self.expert_axes

    def gather(self, shard: Array) -> Array:
        """The whole compute weight, or this device's experts and layers, from the shards of all replicas."""
        if self.zero_dim is not None:
            shard = jax.lax.all_gather(shard, self.zero_axes, axis=self.zero_dim, tiled=True)
        return vary_over(self._to_ranks(shard), self.pipe_axes + self.expert_axes + self.replica_axes)

    def _to_ranks(self, x: Array) -> Array:
        """From a slice of all layers on each rank to all of the layers that each holds."""
        if self.held is None:
            return x if self.pipe_dim is None else jax.lax.all_gather(x, self.pipe_axes, axis=self.pipe_dim, tiled=True)
        if self.pipe_dim is None:
            return x[jnp.asarray(self.held)[jax.lax.axis_index(self.pipe_axes)]]
        chosen = x[jnp.asarray(self.held).reshape(-1)]
        return jax.lax.all_to_all(chosen, self.pipe_axes, split_axis=0, concat_axis=self.pipe_dim, tiled=True)

    def _from_ranks(self, gradient: Array) -> Array:
        """The way back: the sum of what all ranks have of each layer."""
        if self.held is None:
            if self.pipe_dim is None:
                return jax.lax.psum(gradient, self.pipe_axes) if self.pipe_axes else gradient
            return jax.lax.psum_scatter(gradient, self.pipe_axes, scatter_dimension=self.pipe_dim, tiled=True)
        held, layers = jnp.asarray(self.held), max(map(max, self.held)) + 1
        if self.pipe_dim is None:
            mine = held[jax.lax.axis_index(self.pipe_axes)]
            return jax.lax.psum(jnp.zeros((layers, *gradient.shape[1:])).at[mine].add(gradient), self.pipe_axes)
        slices = jax.lax.all_to_all(gradient, self.pipe_axes, split_axis=self.pipe_dim, concat_axis=0, tiled=True)
        return jnp.zeros((layers, *slices.shape[1:])).at[held.reshape(-1)].add(slices)

    def gather_fp8(self, shard: Array) -> Blocked:
        """`gather` of a float32 shard, quantized: the same blocks on any mesh.

        Where shards are made of whole blocks they are quantized first, and the network moves FP8.
        """
        if self._cuts_blocks(shard.shape):
            return quantize_blocks(self.gather(shard))
        blocks = quantize_blocks(shard)
        if self.zero_dim is None and self.pipe_dim is None:
            return jax.tree.map(self.gather, blocks)
        values = self.gather(blocks.values)
        return blocked(values, jnp.swapaxes(values, -1, -2), self.gather(blocks.scales))

    def _cuts_blocks(self, shard: tuple[int, ...]) -> bool:
        split = {self.zero_dim, self.pipe_dim} & {self.ndim - 2, self.ndim - 1}
        return any(shard[dim] % TILE != 0 for dim in split)

    def reduce(self, gradient: Array) -> Array:
        """Sum of the replicas' gradients, as this device's shard."""
        gradient = self._from_ranks(gradient)
        rest = tuple(axis for axis in self.replica_axes if axis not in self.zero_axes)
        if rest:
            gradient = jax.lax.psum(gradient, rest)
        if self.zero_dim is None:
            return gradient
        return jax.lax.psum_scatter(gradient, self.zero_axes, scatter_dimension=self.zero_dim, tiled=True)

    def total(self, x: Array) -> Array:
        """Sum of a per-shard number over all shards."""
        return jax.lax.psum(x, self.sharded_axes) if self.sharded_axes else x


def param_shardings(shapes: Params, mesh: Mesh, held: dict[str, Int[ndarray, "ranks most"]] | None = None) -> dict:
    """A `Sharding` for every parameter of a tree of shapes or arrays.

    `held` says which layers of each stack the ranks of a pipeline compute with; None: every device with all.
    """

    def rule(path: tuple[Any, ...], leaf: Any) -> Sharding:
        is_expert = any(entry.key == "experts" for entry in path)
        sharding = _sharding(leaf.shape, len(leaf.shape) - 3 if is_expert else None, mesh)
        rows = (held or {}).get(path[0].key)
        return sharding if rows is None else replace(sharding, held=tuple(map(tuple, rows.tolist())))

    return jax.tree_util.tree_map_with_path(rule, shapes)


def _sharding(shape: tuple[int, ...], expert_dim: int | None, mesh: Mesh) -> Sharding:
    experts, pipe = () if expert_dim is None else expert_axes(mesh), pipe_axes(mesh)
    replicas = tuple(axis for axis in batch_axes(mesh) if axis not in experts)
    base = Sharding(expert_dim, experts, None, (), replicas, len(shape), pipe_axes=pipe)
    if pipe:
        ranks, sizes = mesh.shape["pipe"], list(shape)
        # Dimension 0 of what is stacked are the layers. Whole FP8 blocks first: they travel quantized.
        inner = [d for d in range(min(1, len(shape) - 1), len(shape)) if d != expert_dim and shape[d] % ranks == 0]
        whole = [d for d in inner if shape[d] % (ranks * TILE) == 0]
        if inner:
            base = replace(base, pipe_dim=(whole or inner)[0])
            sizes[base.pipe_dim] //= ranks
        shape = tuple(sizes)
    for skipped in range(len(replicas)):
        candidates = replicas[skipped:]
        count = math.prod(mesh.shape[axis] for axis in candidates)
        for dim, size in enumerate(shape):
            if dim != expert_dim and size % count == 0:
                return replace(base, zero_dim=dim, zero_axes=candidates)
    return base
