"""Exponential moving average of the weights, kept in host memory and updated beside the next step (report 3.2.3)."""

from concurrent.futures import Future, ThreadPoolExecutor

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding
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

    @property
    def nbytes(self) -> int:
        """Bytes of the average in this process."""
        return sum(shard.nbytes for shards in self._averages for shard in shards)

    def update(self, params: Params) -> None:
        """Take in new weights, which may be donated as soon as this returns.

        They are copied to pinned host memory while the device goes on with the next step; the arithmetic follows in the
        thread. Waits only for the update before, so that one copy at a time takes memory.
        """
        copies = [_pinned_shards(leaf) for leaf in jax.tree.leaves(params)]
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

    def _average(self, copies: list[list[Array]]) -> None:
        for averages, news in zip(self._averages, copies, strict=True):
            for average, new in zip(averages, news, strict=True):
                step = np.subtract(new, average)
                step *= np.float32(1 - self.decay)
                average += step

    def _wait(self) -> None:
        if self._pending is not None:
            self._pending.result()
            self._pending = None


def _devices(sharding: jax.sharding.Sharding) -> list[jax.Device]:
    return sorted(sharding.addressable_devices, key=lambda device: device.id)


def _host_shards(leaf: Array) -> Shards:
    return [np.array(shard, copy=True) for shard in _shards(leaf).values()]


def _pinned_shards(leaf: Array) -> list[Array]:
    """The shards on their way to pinned host memory, which a device writes to by itself."""
    pinned = {device: SingleDeviceSharding(device, memory_kind="pinned_host") for device in _devices(leaf.sharding)}
    return [jax.device_put(shard, pinned[device]) for device, shard in _shards(leaf).items()]


def _shards(leaf: Array) -> dict[jax.Device, Array]:
    by_device = {shard.device: shard.data for shard in leaf.addressable_shards}
    return {device: by_device[device] for device in _devices(leaf.sharding)}
