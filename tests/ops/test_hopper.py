"""Kernels under shard_map take operands that vary between devices.

On one device: the interpreter's memory is one for all, so that two kernels at a time disturb each other.
"""

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from dsv3_jax.ops.grouped_matmul import mosaic_gpu
from dsv3_jax.ops.quantize import mosaic_gpu_norm, reference

INTERPRET = plgpu.InterpretGPUParams()


def on_mesh(device):
    """Compiled, its first operand varying over the mesh and the result too."""
    mesh, spec = Mesh(np.asarray(jax.devices()[:1]), ("gpu",)), PartitionSpec("gpu")
    return jax.jit(jax.shard_map(device, mesh=mesh, in_specs=spec, out_specs=spec))


def test_a_kernel_with_a_producers_warp_runs():
    """Pallas refuses a warp's references that vary."""
    rng = np.random.default_rng(0)
    x, weight = (jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in ((128, 64), (1, 64, 128)))

    def device(x, weight):
        groups, config = jnp.zeros(1, jnp.int32), mosaic_gpu.Config(rows=128, cols=128)
        return mosaic_gpu.grouped_product(x, weight, groups, config=config, num_sms=1, interpret=INTERPRET)

    wanted = np.float32(x) @ np.float32(weight[0])
    np.testing.assert_allclose(np.float32(on_mesh(device)(x, weight)), wanted, rtol=2**-7, atol=2**-7)


def test_settings_may_be_given_by_place():
    rows = jnp.asarray(np.random.default_rng(0).standard_normal((16, 512)), jnp.bfloat16)

    def device(x):
        return mosaic_gpu_norm.rms_norm_quantize(x, jnp.ones(512), 1e-6, blocks=1, interpret=INTERPRET)[0]

    wanted = reference.rms_norm_quantize(rows, jnp.ones(512), 1e-6)[0]
    np.testing.assert_allclose(np.float32(on_mesh(device)(rows)), np.float32(wanted), rtol=2.0**-7)
