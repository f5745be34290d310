"""The table of sharding rules: who holds what of the 671B model, and that shards make up the whole."""

import math
import runpy
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from dsv3_jax.config import BatchConfig, Config, ConfigError, ModelConfig, ParallelConfig
from dsv3_jax.ops.quantize import quantize_blocks
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.parallel.sharding import param_shardings
from dsv3_jax.train.state import model_structure

CONFIGS = Path(__file__).parents[2] / "configs"
DATA, NODE, GPU = 4, 8, 8


def leaves_of(shapes, mesh):
    shardings = jax.tree.leaves(param_shardings(shapes, mesh))
    paths = jax.tree_util.tree_leaves_with_path(shapes)
    return [(jax.tree_util.keystr(path), leaf, s) for (path, leaf), s in zip(paths, shardings, strict=True)]


def test_671b_is_split_over_every_replica_and_its_experts_over_nodes_and_gpus():
    model = runpy.run_path(str(CONFIGS / "v3_671b.py"))["config"]().model
    mesh = AbstractMesh((DATA, NODE, GPU), ("data", "node", "gpu"))
    held = total = 0
    for name, leaf, s in leaves_of(model_structure(model)[1], mesh):
        is_expert = "experts" in name
        assert s.expert_axes == (("node", "gpu") if is_expert else ()), name
        if is_expert:
            assert leaf.shape[s.expert_dim] == model.num_experts, name
        pieces = math.prod(mesh.shape[axis] for axis in s.sharded_axes)
        size = math.prod(leaf.shape)
        if size > 2**20:
            assert set(s.sharded_axes) == {"data", "node", "gpu"}, name
        # shard_shape raises where a dimension does not divide.
        assert math.prod(NamedSharding(mesh, s.spec).shard_shape(leaf.shape)) == size // pieces, name
        held, total = held + size // pieces, total + size
    assert held * DATA * NODE * GPU < 1.01 * total, "what is not split over all devices is negligible"


def test_shards_gather_to_the_whole_and_gradients_reduce_to_shards():
    mesh = Mesh(np.asarray(jax.devices()[:8]).reshape(2, 2, 2), ("data", "node", "gpu"))
    shapes = {"mlp": {"kernel": (16, 6)}, "experts": {"down": (8, 6, 5)}, "norm": {"scale": (5,)}}
    shapes = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, np.float32), shapes, is_leaf=lambda s: type(s) is tuple)
    rng = np.random.default_rng(0)
    whole = jax.tree.map(lambda s: rng.standard_normal(s.shape).astype(np.float32), shapes)
    shardings = param_shardings(shapes, mesh)
    specs = jax.tree.map(lambda s: s.spec, shardings)

    def device(shards):
        compute = jax.tree.map(lambda x, s: s.gather(x), shards, shardings)
        assert compute["mlp"]["kernel"].shape == (16, 6)
        assert compute["experts"]["down"].shape == (2, 6, 5), "an expert-parallel device computes with its own only"
        shared = jax.tree.map(lambda x, s: s.reduce(x), compute, shardings)
        squares = jax.tree.map(lambda x, s: s.total((x * x).sum()), shards, shardings)
        return compute["experts"]["down"], shared, squares

    out_specs = (PartitionSpec(("node", "gpu")), specs, PartitionSpec())
    run = jax.shard_map(device, mesh=mesh, in_specs=(specs,), out_specs=out_specs, check_vma=False)
    experts, summed, squares = jax.jit(run)(whole)
    np.testing.assert_array_equal(experts, whole["experts"]["down"])
    replicas = {"mlp": {"kernel": 8}, "experts": {"down": 2}, "norm": {"scale": 8}}
    jax.tree.map(lambda got, x, n: np.testing.assert_allclose(got, n * x, rtol=1e-6), summed, whole, replicas)
    jax.tree.map(lambda got, x: np.testing.assert_allclose(got, (x * x).sum(), rtol=1e-5), squares, whole)


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        (ParallelConfig(devices=9), "parallel.devices=9: only 8"),
        (ParallelConfig(devices=3), "model.num_experts=16: cannot be spread"),
        (ParallelConfig(devices=8, data=3, gpu=2), "is 6 devices, and there are 8"),
        (ParallelConfig(devices=8), "batch.sequences=12: must be a multiple of the 8 devices"),
    ],
)
def test_mesh_that_cannot_be_is_refused_by_name(parallel, message):
    config = Config(model=ModelConfig(num_experts=16), batch=BatchConfig(sequences=12), parallel=parallel)
    with pytest.raises(ConfigError, match=message):
        make_mesh(config)


@pytest.mark.parametrize(("shape", "moved"), [((1024, 6), "f8_e4m3fn"), ((16, 6), "f32")], ids=["whole", "cut"])
def test_fp8_blocks_are_those_of_the_whole_weight_whatever_the_shards(shape, moved):
    mesh = Mesh(np.asarray(jax.devices()[:8]).reshape(2, 2, 2), ("data", "node", "gpu"))
    weight = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    sharding = param_shardings({"kernel": jax.ShapeDtypeStruct(shape, np.float32)}, mesh)["kernel"]
    assert sharding.zero_dim == 0
    gather = jax.shard_map(
        sharding.gather_fp8, mesh=mesh, in_specs=sharding.spec, out_specs=PartitionSpec(), check_vma=False
    )
    got, want = jax.jit(gather)(weight), jax.jit(quantize_blocks)(weight)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.float32(a), np.float32(b)), got, want)
    gathered = [line for line in str(jax.make_jaxpr(gather)(weight)).splitlines() if "all_gather[" in line]
    assert f"{moved}[{shape[0]},{shape[1]}]" in gathered[0]


def test_ranks_of_a_pipeline_get_the_layers_they_hold_and_give_back_the_sum_of_their_gradients():
    mesh = Mesh(np.asarray(jax.devices()[:8]).reshape(2, 2, 1, 2), ("pipe", "data", "node", "gpu"))
    shapes = {
        "layers": {"kernel": (3, 8, 6), "experts": {"down": (3, 4, 12, 5)}, "odd": {"scale": (3, 5)}},
        "head": {"kernel": (8, 6)},
    }
    shapes = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, np.float32), shapes, is_leaf=lambda s: type(s) is tuple)
    rng = np.random.default_rng(0)
    whole = jax.tree.map(lambda s: rng.standard_normal(s.shape).astype(np.float32), shapes)
    held = np.array([[0, 2, 1], [1, 0, 0]])  # layers 0 and 1 on both ranks; the last of rank 1 only fills
    shardings, everywhere = param_shardings(shapes, mesh, {"layers": held}), param_shardings(shapes, mesh)
    specs = jax.tree.map(lambda s: s.spec, shardings)
    assert specs["layers"]["experts"]["down"] == PartitionSpec(None, "gpu", ("pipe", "data"), None)

    def device(shards):
        filled = jax.numpy.asarray(held)[jax.lax.axis_index("pipe")]
        unused = (jax.lax.axis_index("pipe") == 1) & (jax.numpy.arange(3) == 2)
        compute = jax.tree.map(lambda x, s: s.gather(x), shards, shardings)
        expected = jax.tree.map(lambda x, s: s.gather(x), shards, everywhere)["layers"]
        wrong = jax.tree.map(lambda x, y: jax.numpy.abs(x - y[filled]).max(), compute["layers"], expected)
        used = lambda x: x * ~unused.reshape(-1, *[1] * (x.ndim - 1))  # noqa: E731
        gradients = {"layers": jax.tree.map(used, compute["layers"]), "head": compute["head"]}
        summed = jax.tree.map(lambda x, s: s.reduce(x), gradients, shardings)
        return summed, jax.lax.pmax(jax.numpy.max(jax.numpy.stack(jax.tree.leaves(wrong))), ("pipe", "data", "gpu"))

    sums, wrong = jax.jit(jax.shard_map(device, mesh=mesh, in_specs=(specs,), out_specs=(specs, PartitionSpec())))(
        whole
    )
    assert wrong == 0
    copies = np.array([2, 2, 1])
    for name, got in (("kernel", sums["layers"]["kernel"]), ("scale", sums["layers"]["odd"]["scale"])):
        want = whole["layers"]["kernel"] if name == "kernel" else whole["layers"]["odd"]["scale"]
        want = want * 4 * copies.reshape(-1, *[1] * (want.ndim - 1))  # data x gpu replicas compute the same here
        np.testing.assert_allclose(got, want, rtol=1e-6)
    experts = whole["layers"]["experts"]["down"]
    np.testing.assert_allclose(sums["layers"]["experts"]["down"], experts * 2 * copies[:, None, None, None], rtol=1e-6)
    np.testing.assert_allclose(sums["head"]["kernel"], whole["head"]["kernel"] * 8, rtol=1e-6)
