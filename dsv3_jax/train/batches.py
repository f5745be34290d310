"""Batches on the devices."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from dsv3_jax.config import BatchConfig, ConfigError
from dsv3_jax.data.pipeline import TrainRows
from dsv3_jax.parallel.agreement import all_processes, local_part
from dsv3_jax.parallel.placement import batch_axes


@dataclass(frozen=True)
class Streams:
    """The streams of rows that a run's batches are made of."""

    mine: dict[int, TrainRows]
    """Those that this process reads, by number."""
    count: int
    """How many there are in all."""


def open_streams(
    open_stream: Callable[[int, int], TrainRows], config: BatchConfig, mesh: Mesh, count: int | None
) -> Streams:
    """The streams whose rows this process's devices hold; None is one for each part of a batch that a process holds.

    `open_stream` takes the number of a stream and how many there are. Raises ConfigError where processes or
    microbatches do not divide.
    """
    rows = config.rows_per_microbatch
    part, parts = local_part(_sharding(mesh), (1, rows), 1)
    count = parts if count is None else count
    if count % parts or rows % count:
        raise ConfigError(
            f"data.streams={count}: must be a multiple of the {parts} parts of a microbatch that the processes hold, "
            f"and a divisor of its {rows} sequences; change it, or the number of processes"
        )
    each = count // parts
    mine = range(part * each, (part + 1) * each)
    return Streams({number: open_stream(number, count) for number in mine}, count)


class Batches:
    """Makes rows of the streams part of the global batch.

    Stream i of n fills the i-th of n equal parts of every microbatch, whatever process reads it: the batches of a run
    depend on the number of streams, not on that of processes.
    """

    def __init__(self, streams: Streams, config: BatchConfig, mesh: Mesh, rows_taken: int = 0):
        """`rows_taken` counts the rows that each stream has given so far."""
        self.rows_taken = rows_taken
        self._streams, self._config, self._sharding = streams, config, _sharding(mesh)

    def states(self) -> list[dict[str, Any]]:
        """The place in the data after the last batch, by stream, in every process."""
        mine = [[number, rows.get_state()] for number, rows in self._streams.mine.items()]
        states = {number: state for process in all_processes(mine) for number, state in process}
        return [states[number] for number in sorted(states)]

    def take(self, sequences: int) -> Int[Array, "microbatches batch seq"]:
        """The next batch of `sequences` over all processes, split over the mesh."""
        each = sequences // self._streams.count
        shape = (sequences // self._config.rows_per_microbatch, -1, self._config.seq_len)
        parts = [np.stack([next(rows) for _ in range(each)]).reshape(shape) for rows in self._streams.mine.values()]
        self.rows_taken += each
        return jax.make_array_from_process_local_data(self._sharding, np.concatenate(parts, axis=1))


def _sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(None, batch_axes(mesh.shape)))
