"""One GPU's share of a rank: that its two passes are the layers', and that the table counts all of it."""

import importlib
import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv3_jax.cli import load_config
from dsv3_jax.model.rope import rotations
from dsv3_jax.model.transformer import DecoderLayer
from dsv3_jax.ops.weights import attach_slots, gradient_slots
from dsv3_jax.parallel.trace import Kernel
from dsv3_jax.planner.devices import load_device

HERE = Path(__file__).parents[2] / "experiments" / "slice_671b"


@pytest.fixture(scope="module")
def modules():
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(str(HERE))
    yield {name: importlib.import_module(name) for name in ("share", "classes", "run")}
    patch.undo()


@pytest.fixture(scope="module")
def model():
    return load_config(str(HERE.parents[1] / "configs" / "v3_671b.py")).model


def tiny(modules, model):
    share = modules["share"]
    return share.Share(share.tiny(model), layers=2, local_experts=4, seq_len=128)


def test_a_pair_is_the_forward_of_one_microbatch_and_the_gradients_of_another(modules, model):
    """Against differentiating both layers at once, nothing computed again; in float32, where sums differ in order."""
    share, case = modules["share"], tiny(modules, model)
    functions, weights = share.share_functions(case), share.share_weights(case, "fp32")
    x, before, dy = (value.astype(jnp.float32) for value in share.microbatches(case, 3))
    first = functions.forward(weights, before)
    done, gradients = functions.pair(weights, x, first.kept, dy)

    exchange = share.EvenExchange(case.local_experts)
    graphdef = nnx.split(nnx.eval_shape(lambda: DecoderLayer(case.model, True, nnx.Rngs(0))))[0]
    turns, bias = rotations(case.model, jnp.arange(case.seq_len)), jnp.zeros(case.model.num_experts)

    @jax.jit
    def plain(slots, x):
        for params in map(attach_slots, weights, slots):
            x = nnx.merge(graphdef, params)(x, turns, bias, exchange)[0]
        return x

    slots = [gradient_slots(of_layer) for of_layer in weights]
    close = partial(jax.tree.map, partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6))
    close(done.y, plain(slots, x))
    close(first.y, plain(slots, before))
    close(gradients, jax.jit(lambda x, dy: jax.vjp(plain, slots, x)[1](dy))(before, dy))


def test_what_is_kept_holds_no_weight(modules, model):
    share, case = modules["share"], tiny(modules, model)
    weights = jax.eval_shape(lambda: share.share_weights(case, "fp8"))
    kept = jax.eval_shape(share.share_functions(case).forward, weights, share.microbatches(case, 1)[0]).kept
    shapes = {w.shape for w in jax.tree.leaves(weights) if w.size > case.seq_len * case.model.d_model}
    assert shapes
    assert not shapes & {value.shape for value in kept.values}


def test_loads_are_even(modules, model):
    case = tiny(modules, model)
    exchange = modules["share"].EvenExchange(case.local_experts)
    choices = jax.random.randint(jax.random.key(0), (case.seq_len, case.model.top_k), 0, case.model.num_experts)
    sizes = exchange.route(choices, case.model.num_experts, 128)[0].slots.sizes
    assert sizes.tolist() == [choices.size // case.local_experts] * case.local_experts


def kernels():
    """A profile of one pair, in which every kernel runs for a millisecond."""
    names = [
        "fp8_grouped_matmul", "fp8_matmul", "fp8_grouped_wgrad", "fp8_wgrad", "attention_forward", "attention_backward",
        "swiglu_quantize_backward", "retile", "take_rows",
    ]  # fmt: skip
    found = [f"{name}_mosaic_gpu_kernel" for name in names] + ["nvjet_sm90_tss_128x192", "loop_add_fusion_6"]
    return [Kernel(name, 1e-3 * i, 1e-3 * (i + 1)) for i, name in enumerate(found)]


def test_the_table_holds_every_kernel_and_all_work(modules, model):
    share, classes = modules["share"].Share(model), modules["classes"]
    table = {row.name: row for row in classes.rows(kernels(), 1, share, load_device("h100"))}
    assert {name: row.milliseconds for name, row in table.items()} == pytest.approx(
        dict.fromkeys(table, 1.0) | {"weight gradients": 2, "quantization": 2, classes.MEMORY: 4}
    )
    weights = 8 * 3 * 7168 * 2048 + 3 * 7168 * 2048 + 7168 * (1536 + 576) + 1536 * 24576 + 512 * 32768 + 16384 * 7168
    recomputed = 1536 * 24576 + 512 * 32768
    attention = 4096 * 128 * (192 + 128 + 3 * 192 + 2 * 128)
    expected = 4 * 4096 * (3 * 2 * (weights + 7168 * 256) + 2 * recomputed + attention)
    assert sum(row.flops for row in table.values()) == pytest.approx(expected, rel=1e-9)


def test_every_kernel_of_the_library_has_a_class(modules):
    """Profiles name kernels as the library does."""
    ops = HERE.parents[1] / "dsv3_jax" / "ops"
    source = "".join(file.read_text() for file in ops.rglob("mosaic_gpu*.py"))
    for name in (kernel.name.removesuffix("_mosaic_gpu_kernel") for kernel in kernels()[:9]):
        assert f'"{name}"' in source


def test_report_makes_a_table_a_device_and_a_picture(modules, model, tmp_path, capsys):
    share, classes, run = modules["share"].Share(model), modules["classes"], modules["run"]
    table = classes.rows(kernels(), 1, share, load_device("h100"))
    measured = {
        "device": "a GPU", "device_file": "H100", "jax": "0", "rows": [vars(row) for row in table],
        "milliseconds": {"pair": [20.0, 12.0, 13.0], "forward": [5.0]},
    }  # fmt: skip
    (tmp_path / "measured.json").write_text(json.dumps(measured))
    run.report(tmp_path / "measured.json")
    assert "a pair takes **13.0 ms** (12.0 to 20.0" in capsys.readouterr().out
    flops = {row.name: row.flops for row in table}
    device, shipped = load_device(str(tmp_path / "device.toml")), load_device("h100")
    assert device.achieved["grouped_fp8"] == pytest.approx(1e3 * flops["grouped products"] * 112 / 132, rel=1e-3)
    assert device.achieved["nvlink"] == shipped.achieved["nvlink"]
    assert (tmp_path / "slice.png").stat().st_size > 10_000


def test_refusals_are_one_sentence(modules, tmp_path):
    run = modules["run"]
    with pytest.raises(SystemExit, match="no such file; measure first"):
        run.report(tmp_path / "measured.json")
    for text in ("{", "{}", '{"rows": 1}'):
        (tmp_path / "measured.json").write_text(text)
        with pytest.raises(SystemExit, match=r"measured.json: is not what this script measured .*; measure again"):
            run.report(tmp_path / "measured.json")
