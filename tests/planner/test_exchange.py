"""The exchange of the 671B model: what the plan says is what a router's tokens send."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv3_jax.cli import load_config
from dsv3_jax.model.moe import Router
from dsv3_jax.parallel.traffic import rows_sent_flat, rows_sent_hierarchical
from dsv3_jax.planner.exchange import exchange_bytes, row_bytes, rows_per_token

V3 = load_config(str(Path(__file__).parents[2] / "configs" / "v3_671b.py")).model
TOKENS = 64


@pytest.fixture(scope="module")
def experts():
    """Of the tokens of 8 nodes of 8 GPUs, as a new router of the model's size chooses them."""
    x = jax.random.normal(jax.random.key(0), (64, TOKENS, V3.d_model))
    chosen = jax.jit(Router(V3, nnx.Rngs(0)))(x, jnp.zeros(V3.num_experts)).experts
    return np.asarray(chosen).reshape(8, 8, TOKENS, V3.top_k)


@pytest.mark.parametrize(
    ("exchange", "count"), [("hierarchical", rows_sent_hierarchical), ("flat", rows_sent_flat)], ids=["h", "flat"]
)
def test_planned_rows_are_those_of_a_routers_tokens(experts, exchange, count):
    planned, sent = rows_per_token(V3, 8, 8, exchange), count(experts, V3.num_experts)
    # A token's rows vary by about 1, so that the mean of 4096 is known to 0.02.
    assert planned["node"] == pytest.approx(sent.node.mean() / TOKENS, abs=0.06)
    assert planned["gpu"] == pytest.approx(sent.gpu.mean() / TOKENS, abs=0.06)


def test_routing_limits_how_far_a_token_travels():
    """8 of 256 experts from 4 of 8 groups; a group lives on one node of 8, on two of 16."""
    eight, sixteen = rows_per_token(V3, 8, 8), rows_per_token(V3, 16, 8)
    assert 3.4 < eight["node"] < 4 * 7 / 8
    assert eight["gpu"] < 8 * 7 / 8
    assert 4 < sixteen["node"] < 8 * 15 / 16
    flat = rows_per_token(V3, 8, 8, "flat")
    assert eight["node"] < flat["node"] < 8 * 7 / 8
    # On one node of 8 GPUs a group lives on one of them: as far as on 8 nodes of one.
    assert rows_per_token(V3, 1, 8)["gpu"] == rows_per_token(V3, 8, 1)["node"] == eight["node"]
    assert rows_per_token(V3, 1, 8) == rows_per_token(V3, 1, 8, "flat")
    assert rows_per_token(V3, 1, 1) == {"node": 0, "gpu": 0}


def test_bytes_are_those_of_fp8_there_and_bf16_back():
    assert row_bytes(V3, "fp8") == {"dispatch": 7168 + 7168 // 128 * 4 + 8 * 8, "combine": 2 * 7168}
    assert row_bytes(V3, "bf16") == {"dispatch": 2 * 7168 + 8 * 8, "combine": 2 * 7168}
    row = 7168 + 7168 // 128 * 4 + 8 * 8 + 2 * 7168
    assert exchange_bytes(V3, 8, 8, "fp8")["network"] == rows_per_token(V3, 8, 8)["node"] * row


def test_the_experiment_quotes_what_the_plan_says():
    text = (Path(__file__).parents[2] / "experiments" / "expert_exchange" / "README.md").read_text()
    rows = [line.split("|") for line in text.splitlines() if " GB/s |" in line]
    measured = {(row[1].strip(), row[2].split("`")[1]): float(row[3]) for row in rows}
    for exchange in ("flat", "hierarchical"):
        for axis, planned in rows_per_token(V3, 8, 8, exchange).items():
            assert measured[exchange, axis] == pytest.approx(planned, rel=0.01, abs=0.01)
