"""What all processes of a run have to know alike. Every process calls these, in the same order."""

import functools
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool

_PADDED_TO = 1024


def ask_any_process(flag: bool) -> bool | Bool[Array, ""]:
    """Whether the flag is set in any process: an answer that the devices give after what they were given before."""
    if jax.process_count() == 1:
        return flag
    devices = sorted(jax.devices(), key=lambda device: device.process_index)
    mesh = Mesh(np.reshape(devices, (jax.process_count(), -1)), ("process", "local"))
    flags = jax.make_array_from_process_local_data(NamedSharding(mesh, PartitionSpec("process")), np.asarray([flag]))
    return _any(NamedSharding(mesh, PartitionSpec()))(flags)


def runs_in_order() -> bool:
    """Whether devices run what they are given in its order. CPUs run side by side what does not depend on each other,
    and collectives between processes must not meet."""
    return jax.default_backend() != "cpu" or jax.process_count() == 1


def all_processes(value: Any) -> list[Any]:
    """Every process's value, by process; values are what JSON can hold."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(text)))
    # Of few lengths, each of which is a program to compile.
    length = -(-int(sizes.max()) // _PADDED_TO) * _PADDED_TO
    rows = multihost_utils.process_allgather(np.pad(text, (0, length - len(text))))
    return [json.loads(bytes(row[:size])) for row, size in zip(rows, sizes, strict=True)]


def local_part(sharding: NamedSharding, shape: tuple[int, ...], dim: int) -> tuple[int, int]:
    """(part, parts) of a dimension that this process's devices hold together: part 1 of 4 is its second quarter.

    Several processes may hold the same part. Raises ValueError where what they hold is not one of equal parts.
    """
    slices = [index[dim].indices(shape[dim])[:2] for index in sharding.addressable_devices_indices_map(shape).values()]
    start, stop = min(a for a, _ in slices), max(b for _, b in slices)
    size = stop - start
    held = sum(b - a for a, b in set(slices))
    if shape[dim] % size or start % size or held != size:
        raise ValueError(f"the devices of a process hold {sorted(set(slices))} of {shape[dim]}: not one of equal parts")
    return start // size, shape[dim] // size


@functools.cache
def _any(sharding: NamedSharding) -> Callable[[Array], Array]:
    return jax.jit(jnp.any, out_shardings=sharding)
