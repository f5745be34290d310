"""What the expert exchange sends over each link, and how long that takes (report 3.2.2)."""

from functools import cache

import jax
import numpy as np

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.moe import select_experts
from dsv3_jax.parallel.traffic import rows_sent_flat, rows_sent_hierarchical
from dsv3_jax.planner.devices import Device
from dsv3_jax.planner.work import Products, operand_bytes

LINKS = {"node": "network", "gpu": "nvlink"}
"""The link of each axis of an expert-parallel group, as device files call it."""

_SAMPLE = 16384
"""Tokens that the mean is taken over: it is then known to about 0.2%."""


@cache
def rows_per_token(model: ModelConfig, node: int, gpu: int, exchange: str = "hierarchical") -> dict[str, float]:
    """Rows that a token sends over `node` and over `gpu` in a dispatch, on average; a combine takes them back.

    Counted from tokens that the group-limited choice of a new router spreads over all experts alike.

    Args:
        model: whose experts live on `node` x `gpu` devices.
        node: nodes of an expert-parallel group.
        gpu: devices of a node.
        exchange: as `ParallelConfig.exchange`.
    """
    tokens = max(1, _SAMPLE // (node * gpu))
    logits = np.random.default_rng(0).standard_normal((node, gpu, tokens, model.num_experts), np.float32)
    scores = jax.nn.sigmoid(logits * model.init_std * model.d_model**0.5)
    experts = np.asarray(jax.jit(select_experts, static_argnums=1)(scores, model))
    count = rows_sent_hierarchical if is_hierarchical(node, gpu, exchange) else rows_sent_flat
    sent = count(experts, model.num_experts)
    return {axis: float(getattr(sent, axis).mean() / tokens) for axis in LINKS}


def is_hierarchical(node: int, gpu: int, exchange: str) -> bool:
    """Whether rows cross two links, one after the other; `exchange` as in `ParallelConfig`."""
    return node > 1 and gpu > 1 and exchange == "hierarchical"


def row_bytes(model: ModelConfig, products: Products) -> dict[str, float]:
    """Bytes of a row on its way there and back in a forward pass; a backward pass sends as many but for the experts.

    Dispatch sends FP8 and its scales where products are FP8, combine BF16. The weights of all the token's experts
    travel along, and which these are.
    """
    return {"dispatch": model.d_model * operand_bytes(products) + 8 * model.top_k, "combine": 2 * model.d_model}


def exchange_bytes(
    model: ModelConfig, node: int, gpu: int, products: Products, exchange: str = "hierarchical"
) -> dict[str, float]:
    """Bytes that a device sends per token and MoE layer in a pass, by link; there and back together."""
    row = sum(row_bytes(model, products).values())
    return {LINKS[axis]: rows * row for axis, rows in rows_per_token(model, node, gpu, exchange).items()}


def exchange_seconds(
    model: ModelConfig, node: int, gpu: int, products: Products, device: Device, exchange: str = "hierarchical"
) -> float:
    """Time of one token and MoE layer in a pass: the slower link's, since the two are used at once."""
    sent = exchange_bytes(model, node, gpu, products, exchange)
    return max(sent[link] / device.achieved[link] for link in sent)
