"""Exponential moving average of the weights, kept in host memory and updated beside the next step (report 3.2.3)."""

from concurrent.futures import Future, ThreadPoolExecutor

import jax
import numpy as np
from jaxtyping import Array, Float

from dsv3_jax.ops.weights import Params

Shards = list[Float[np.ndarray, "..."]]


class HostAverage:
    """average += (1 - decay) * (weights - average), on this process's shards, in a thread of its own."""

    def __init__(self, params: Params, decay: float):
        """Starts from these weights."""
        self.decay = decay
        leaves, self._structure = jax.tree.flatten(params)
        self._shardings = [(leaf.shape, leaf.sharding) for leaf in leaves]
        self._averages = [_host_shards(leaf) for leaf in leaves]
        self._thread = ThreadPoolExecutor(1, "ema")
        self._pending: Future | None = None

    def update(self, params: Params) -> None:
        """Take in new weights. They are copied before this returns, the arithmetic is done later."""
        leaves = jax.tree.leaves(params)
        for leaf in leaves:
            leaf.copy_to_host_async()
        copies = [_host_shards(leaf) for leaf in leaves]
        self._wait()
        self._pending = self._thread.submit(self._average, copies)

    def params(self) -> Params:
        """The average, sharded as the weights are."""
        self._wait()
        # Copied, since on CPU an array can share the memory of an aligned x, which the next update changes.
        leaves = [
            jax.make_array_from_single_device_arrays(
                shape, sharding, [jax.device_put(x.copy(), d) for x, d in zip(shards, _devices(sharding), strict=True)]
            )
            for (shape, sharding), shards in zip(self._shardings, self._averages, strict=True)
        ]
        return jax.tree.unflatten(self._structure, leaves)

    def _average(self, copies: list[Shards]) -> None:
        for averages, news in zip(self._averages, copies, strict=True):
            for average, new in zip(averages, news, strict=True):
                new -= average
                new *= np.float32(1 - self.decay)
                average += new

    def _wait(self) -> None:
        if self._pending is not None:
            self._pending.result()
            self._pending = None


def _devices(sharding: jax.sharding.Sharding) -> list[jax.Device]:
    return sorted(sharding.addressable_devices, key=lambda device: device.id)


def _host_shards(leaf: Array) -> Shards:
    by_device = {shard.device: shard.data for shard in leaf.addressable_shards}
    return [np.array(by_device[device], copy=True) for device in _devices(leaf.sharding)]
