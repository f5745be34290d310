"""What a part of the model costs, against figures worked out by hand and against the model's FLOPs."""

import dataclasses
import itertools
from pathlib import Path

import pytest

from dsv3_jax.cli import load_config
from dsv3_jax.config import ModelConfig
from dsv3_jax.planner.devices import load_device
from dsv3_jax.planner.flops import training_flops_per_token, training_flops_per_token_with_mtp
from dsv3_jax.planner.parameters import count_parameters
from dsv3_jax.planner.stages import model_parts, split
from dsv3_jax.planner.work import layer_work, saved_bytes, seconds

V3 = load_config(str(Path(__file__).parents[2] / "configs/v3_671b.py")).model


def test_parts_hold_every_parameter_and_nothing_twice():
    for model in (V3, ModelConfig(), ModelConfig(num_mtp_modules=0), ModelConfig(q_lora_rank=None, num_mtp_modules=3)):
        parts = model_parts(model, 64, "fp8", "none")
        count = count_parameters(model)
        assert sum(part.experts + part.others for part in parts) == count.total
        assert sum(part.exchanges for part in parts) == model.num_moe_layers + model.num_mtp_modules


def test_work_without_recomputation_is_the_models_flops():
    """But for the attention's backward, which computes the scores once more: 5 products instead of 4."""
    for model in (V3, ModelConfig(), ModelConfig(q_lora_rank=None, num_mtp_modules=2)):
        flops = sum(item.flops for part in model_parts(model, 4096, "fp8", "none") for item in part.work)
        again = 4096 * model.num_heads * model.qk_head_dim * (model.num_layers + model.num_mtp_modules)
        assert flops - again == training_flops_per_token_with_mtp(model, 4096)
    without = dataclasses.replace(V3, num_mtp_modules=0)
    assert training_flops_per_token_with_mtp(without, 4096) == training_flops_per_token(V3, 4096)


def test_recomputation_adds_to_the_backward_pass_only():
    device = load_device("h800")
    none, report, layer = (layer_work(V3, True, 4096, "fp8", recompute) for recompute in ("none", "report", "layer"))
    for passes in ("F", "W"):
        assert seconds(none, device, passes) == seconds(report, device, passes) == seconds(layer, device, passes)
    again = seconds(report, device, "I") - seconds(none, device, "I")
    assert 0 < again < seconds(none, device, "F")
    assert seconds(layer, device, "I") == pytest.approx(seconds(none, device, "FI"))


def test_bf16_is_slower_and_moves_less():
    device = load_device("h800")
    fp8, bf16 = (layer_work(V3, True, 4096, products, "report") for products in ("fp8", "bf16"))
    assert seconds(bf16, device, "FIW") > 1.2 * seconds(fp8, device, "FIW")


def test_what_is_kept_shrinks_with_recomputation():
    kept = [sum(saved_bytes(V3, True, "fp8", recompute).values()) for recompute in ("none", "report", "layer")]
    assert kept == sorted(kept, reverse=True)
    assert kept[-1] == 2 * 7168


def test_stages_are_cut_where_the_slowest_is_fastest():
    device = load_device("h800")
    parts = model_parts(V3, 4096, "fp8", "report")
    for count in (1, 2, 5, 16, 64):
        stages = split(parts, count, device)
        assert len(stages) == count
        assert [part for stage in stages for part in stage.parts] == parts
        assert all(stage.parts for stage in stages)
    small = model_parts(ModelConfig(num_layers=3, num_dense_layers=0, num_mtp_modules=0), 64, "fp8", "none")
    times = [seconds(part.work, device, "FIW") for part in small]
    cuts = itertools.combinations(range(1, len(small)), 2)
    slowest = [max(sum(times[:a]), sum(times[a:b]), sum(times[b:])) for a, b in cuts]
    assert max(seconds(stage.work, device, "FIW") for stage in split(small, 3, device)) == pytest.approx(min(slowest))
