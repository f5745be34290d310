"""A model cut into pipeline stages: what each holds, computes and keeps."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

from dsv3_jax.config import ConfigError, ModelConfig
from dsv3_jax.parallel.pipeline_stages import cut
from dsv3_jax.planner.devices import Device
from dsv3_jax.planner.parameters import count_parameters
from dsv3_jax.planner.work import (
    Products,
    Recompute,
    Work,
    embedding_work,
    head_work,
    layer_work,
    mtp_work,
    saved_bytes,
    seconds,
)


@dataclass(frozen=True)
class Part:
    """A piece of the model that is not cut: embedding, a layer, the head, an MTP module."""

    name: str
    experts: int
    """Parameters of routed experts."""
    others: int
    """All other parameters of its own."""
    work: list[Work] = field(repr=False)
    """What a token costs, exchange excluded."""
    exchanges: int = 0
    """MoE layers in it."""
    saved: float = 0
    """Bytes that a token keeps from forward to backward."""


@dataclass(frozen=True)
class Stage:
    """Consecutive parts, which one rank runs."""

    parts: list[Part]

    @property
    def experts(self) -> int:
        """Parameters of routed experts, of the whole expert-parallel group."""
        return sum(part.experts for part in self.parts)

    @property
    def others(self) -> int:
        """All other parameters."""
        return sum(part.others for part in self.parts)

    @property
    def exchanges(self) -> int:
        """MoE layers."""
        return sum(part.exchanges for part in self.parts)

    @property
    def saved(self) -> float:
        """Bytes that a token keeps from forward to backward."""
        return sum(part.saved for part in self.parts)

    @property
    def work(self) -> list[Work]:
        """What a token costs, exchange excluded."""
        return [item for part in self.parts for item in part.work]

    @property
    def label(self) -> str:
        """Its parts, equal neighbours counted: `1 MoE layer + head + MTP 1`."""
        names = [part.name for part in self.parts]
        found = [(name, names.count(name)) for name in dict.fromkeys(names)]
        return " + ".join(f"{n} {name}{'s' * (n > 1)}" if "layer" in name else name for name, n in found)


def model_parts(model: ModelConfig, seq_len: int, products: Products, recompute: Recompute) -> list[Part]:
    """The model in the order that data passes it, MTP modules last. Their embedding and head are the main model's."""
    count, d, moe = count_parameters(model), model.d_model, max(1, model.num_moe_layers)
    per_layer = (count.attention + count.norms - d) // model.num_layers
    layer_experts = count.routed_experts // moe
    moe_others = per_layer + (count.shared_experts + count.router) // moe
    dense_others = per_layer + count.dense_ffn // max(1, model.num_dense_layers)

    def saved(is_moe: bool) -> float:
        return sum(saved_bytes(model, is_moe, products, recompute).values())

    dense_work, moe_work = (layer_work(model, is_moe, seq_len, products, recompute) for is_moe in (False, True))
    dense = Part("dense layer", 0, dense_others, dense_work, 0, saved(False))
    expert = Part("MoE layer", layer_experts, moe_others, moe_work, 1, saved(True))
    modules, mtp = model.num_mtp_modules, count.mtp_modules
    later = [
        Part(
            f"MTP {k + 1}",
            mtp.routed_experts // modules,
            (mtp.total - mtp.routed_experts) // modules,
            mtp_work(model, seq_len, products, recompute),
            1,
            saved(True) + 2 * 3 * d,  # both halves of the projection's input, and the head's input
        )
        for k in range(modules)
    ]
    return [
        Part("embedding", 0, count.embedding, embedding_work(model)),
        *[dense] * model.num_dense_layers,
        *[expert] * model.num_moe_layers,
        Part("head", 0, count.head + d, head_work(model), 0, 2 * d),
        *later,
    ]


def split(parts: Sequence[Part], stages: int, device: Device) -> list[Stage]:
    """Cuts the parts, in order, into stages so that the slowest takes as little time as can be.

    Raises:
        ConfigError: there are more stages than parts.
    """
    if stages > len(parts):
        raise ConfigError(
            f"a pipeline of {stages} stages: the model has only {len(parts)} parts to spread (embedding, layers, head "
            "and MTP); lower pipe"
        )
    times = [seconds(part.work, device, "FIW") for part in parts]
    cuts = cut(times, stages)
    return [Stage(list(parts[a:b])) for a, b in itertools.pairwise(cuts)]
