"""Batches on the devices, the next one gathered while the devices work on this one."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from dsv3_jax.config import BatchConfig
from dsv3_jax.data.pipeline import TrainRows
from dsv3_jax.parallel.mesh import batch_axes


class Batches:
    """Takes this process's rows and makes them part of the global batch.

    `state` and `rows_taken` are those after the last batch that was taken, whatever has been gathered since: what a
    checkpoint must hold.
    """

    def __init__(self, rows: TrainRows, config: BatchConfig, mesh: Mesh, rows_taken: int = 0):
        self.state: dict[str, Any] = rows.get_state()
        self.rows_taken = rows_taken
        self._rows, self._config = rows, config
        self._sharding = NamedSharding(mesh, PartitionSpec(None, batch_axes(mesh)))
        self._ahead: tuple[Int[np.ndarray, "rows seq"], dict[str, Any]] | None = None

    @property
    def is_ahead(self) -> bool:
        """Whether the next batch has been read."""
        return self._ahead is not None

    def take(self, sequences: int) -> Int[Array, "microbatches batch seq"]:
        """The next batch of `sequences` over all processes, split over the mesh."""
        if self._ahead is None:
            self.gather(sequences)
        (local, self.state), self._ahead = self._ahead, None
        self.rows_taken += len(local)
        shape = (sequences // self._config.rows_per_microbatch, -1, self._config.seq_len)
        return jax.make_array_from_process_local_data(self._sharding, local.reshape(shape))

    def gather(self, sequences: int) -> None:
        """Read the rows of the next batch now."""
        local = np.stack([next(self._rows) for _ in range(sequences // jax.process_count())])
        self._ahead = local, self._rows.get_state()
