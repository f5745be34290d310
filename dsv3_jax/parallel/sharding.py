"""What a device does by the table of sharding rules: gathers compute weights from shards of the state, and reduces
gradients to them.

A step sends each rank of a pipeline the layers that its stages run, in every direction, and the gradients back; what is
not a stack of layers goes to all ranks.
"""

from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Int
from numpy import ndarray

from dsv3_jax.ops.quantize import TILE, Blocked, blocked, quantize_blocks
from dsv3_jax.ops.weights import Params
from dsv3_jax.parallel.mesh import vary_over
from dsv3_jax.parallel.placement import Placement, place


@dataclass(frozen=True)
class Sharding(Placement):
    """Where one parameter lives, and its ways there."""

    held: tuple[tuple[int, ...], ...] | None = None
    """Of stacked layers, those that each rank of the pipeline computes with; None for all."""

    @property
    def spec(self) -> PartitionSpec:
        """Of master weight and moments."""
        return PartitionSpec(*(axes or None for axes in self.dims))

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

    @property
    def is_whole(self) -> bool:
        """Whether a device has all of a gradient, or of its experts', before `reduce`."""
        return not self.pipe_axes and not self.replica_axes

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
        names = tuple(entry.key for entry in path)
        rows = (held or {}).get(names[0])
        placement = place(names, leaf.shape, mesh.shape)
        return Sharding(**asdict(placement), held=None if rows is None else tuple(map(tuple, rows.tolist())))

    return jax.tree_util.tree_map_with_path(rule, shapes)
