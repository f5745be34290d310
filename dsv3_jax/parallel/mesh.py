"""The device mesh: `pipe` x `data` x `node` x `gpu`."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh
from jaxtyping import Array

from dsv3_jax.config import Config, ConfigError
from dsv3_jax.parallel.pipeline_stages import check_pipeline


def make_mesh(config: Config) -> Mesh:
    """The mesh of a run. Raises ConfigError where devices, experts or sequences do not divide, or where the schedule
    does not work with the ranks, layers and microbatches."""
    wanted, there = config.parallel.devices, jax.devices()
    if wanted is not None and wanted > len(there):
        raise ConfigError(
            f"parallel.devices={wanted}: only {len(there)} {there[0].platform} devices are visible; lower it, or on "
            f"CPU call jax.config.update('jax_num_cpu_devices', {wanted}) before jax is first used, as the command "
            "line does"
        )
    devices = there[: wanted or len(there)]
    idle = {device.process_index for device in there} - {device.process_index for device in devices}
    if idle:
        raise ConfigError(
            f"parallel.devices={wanted}: leaves process {min(idle)} of {jax.process_count()} without a device; start "
            f"fewer processes, or use all {len(there)} devices"
        )
    shape = config.parallel.shape(len(devices))
    check_shape(config, shape)
    grid = np.asarray(devices).reshape(tuple(shape.values()))
    return Mesh(grid, tuple(shape), axis_types=(AxisType.Auto,) * len(shape))


def check_shape(config: Config, shape: dict[str, int]) -> None:
    """Raises ConfigError where experts, sequences, layers or microbatches do not divide over a mesh of these sizes."""
    if shape["pipe"] > 1:
        check_pipeline(config)
    group = shape["node"] * shape["gpu"]
    if config.model.num_experts % group:
        raise ConfigError(
            f"model.num_experts={config.model.num_experts}: cannot be spread over parallel.node x parallel.gpu = "
            f"{group} devices; make it a multiple, or raise parallel.data instead"
        )
    total, rows = shape["data"] * group, config.batch.rows_per_microbatch
    if rows % total:
        raise ConfigError(
            f"{'batch.microbatch' if config.batch.microbatch else 'batch.sequences'}={rows}: must be a multiple of the "
            f"{total} devices that share a microbatch: all of parallel.data, parallel.node and parallel.gpu"
        )


def vary_over(x: Array, axes: tuple[str, ...]) -> Array:
    """Mark a value as differing between the devices along these axes, so that its gradient stays local."""
    missing = tuple(axis for axis in axes if axis not in jax.typeof(x).mat.varying)
    return jax.lax.pcast(x, missing, to="varying") if missing else x
