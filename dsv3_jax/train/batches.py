"""Batches on the devices."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from dsv3_jax.config import BatchConfig
from dsv3_jax.data.pipeline import TrainRows
from dsv3_jax.parallel.mesh import batch_axes


class Batches:
    """Takes this process's rows and makes them part of the global batch."""

    def __init__(self, rows: TrainRows, config: BatchConfig, mesh: Mesh, rows_taken: int = 0):
        self.rows_taken = rows_taken
        self._rows, self._config = rows, config
        self._sharding = NamedSharding(mesh, PartitionSpec(None, batch_axes(mesh)))

    @property
    def state(self) -> dict[str, Any]:
        """The place in the data after the last batch."""
        return self._rows.get_state()

    def take(self, sequences: int) -> Int[Array, "microbatches batch seq"]:
        """The next batch of `sequences` over all processes, split over the mesh."""
        local = np.stack([next(self._rows) for _ in range(sequences // jax.process_count())])
        self.rows_taken += len(local)
        shape = (sequences // self._config.rows_per_microbatch, -1, self._config.seq_len)
        return jax.make_array_from_process_local_data(self._sharding, local.reshape(shape))
