"""Kernels under shard_map: each device runs its own, on operands that differ between devices."""

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from dsv3_jax.ops.grouped_matmul import mosaic_gpu


def test_a_kernel_under_shard_map_gives_each_device_its_own_product():
    """Through the producer's warp, whose references Pallas would not let vary."""
    rng = np.random.default_rng(0)
    x, weight = (jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in ((2, 128, 64), (2, 1, 64, 128)))
    interpret = plgpu.InterpretGPUParams()
    config = mosaic_gpu.Config(rows=128, cols=128)

    def device(x, weight):
        groups = jnp.zeros(1, jnp.int32)
        product = mosaic_gpu.grouped_product(x[0], weight[0], groups, config=config, num_sms=1, interpret=interpret)
        return product[None]

    mesh, spec = Mesh(np.asarray(jax.devices()[:2]), ("gpu",)), PartitionSpec("gpu")
    got = jax.jit(jax.shard_map(device, mesh=mesh, in_specs=spec, out_specs=spec))(x, weight)
    wanted = np.einsum("dmk,dkn->dmn", np.float32(x), np.float32(weight[:, 0]))
    np.testing.assert_allclose(np.float32(got), wanted, rtol=2**-7, atol=2**-7)
