"""Exact parameter counts, from the sizes alone."""

import dataclasses
from dataclasses import dataclass

from dsv3_jax.config import ModelConfig


@dataclass(frozen=True)
class MTPParameterCount:
    """What the multi-token prediction modules add to the main model, all modules together (report 2.2).

    Embedding and head are the main model's own, so neither is counted.
    """

    projection: int
    """Matrices that join the embedding half and the hidden half."""
    attention: int
    """MLA's projections."""
    routed_experts: int
    """Every routed expert."""
    shared_experts: int
    """Every shared expert."""
    router: int
    """Router matrices, biases excluded."""
    norms: int
    """RMSNorm gains."""

    @property
    def total(self) -> int:
        """All parameters of the modules."""
        return sum(dataclasses.astuple(self))


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model: the main model by kind, and the MTP modules.

    The router's balancing bias is state that no gradient reaches, and is not counted.
    """

    embedding: int
    """Token embedding."""
    attention: int
    """MLA's projections, of all layers."""
    dense_ffn: int
    """FFNs of the dense layers."""
    routed_experts: int
    """Every routed expert of every MoE layer."""
    shared_experts: int
    """Every shared expert of every MoE layer."""
    router: int
    """Router matrices, biases excluded."""
    norms: int
    """RMSNorm gains, those of MLA's latents included."""
    head: int
    """Output head."""
    mtp_modules: MTPParameterCount
    """What the MTP modules add."""
    active: int
    """Parameters of the main model that one token passes: the routed experts it selects, and all else except the
    embedding, where it only looks up a row."""

    @property
    def main(self) -> int:
        """Parameters of the main model."""
        return (
            self.embedding + self.attention + self.dense_ffn + self.routed_experts + self.shared_experts
            + self.router + self.norms + self.head
        )  # fmt: skip

    @property
    def mtp(self) -> int:
        """The MTP modules' own parameters."""
        return self.mtp_modules.total

    @property
    def total(self) -> int:
        """Parameters that training holds: the main model and the MTP modules."""
        return self.main + self.mtp


def count_parameters(model: ModelConfig) -> ParameterCount:
    """Counts the parameters of `model` exactly (report 4.2: 671B in all, 37B of them active).

    Linear layers have no biases, and the router's balancing bias is excluded.
    """
    d, modules = model.d_model, model.num_mtp_modules
    attention, block_norms = _attention_parameters(model), _block_norm_parameters(model)
    expert = 3 * d * model.d_ff_expert  # SwiGLU: gate, up and down
    unused = model.num_moe_layers * (model.num_experts - model.top_k) * expert
    mtp = MTPParameterCount(
        projection=modules * 2 * d * d,
        attention=modules * attention,
        routed_experts=modules * model.num_experts * expert,
        shared_experts=modules * model.num_shared_experts * expert,
        router=modules * d * model.num_experts,
        norms=modules * (block_norms + 3 * d),  # of the embedding, of the hidden state, and the final one
    )
    count = ParameterCount(
        embedding=model.vocab_size * d,
        attention=model.num_layers * attention,
        dense_ffn=model.num_dense_layers * 3 * d * model.d_ff,
        routed_experts=model.num_moe_layers * model.num_experts * expert,
        shared_experts=model.num_moe_layers * model.num_shared_experts * expert,
        router=model.num_moe_layers * d * model.num_experts,
        norms=model.num_layers * block_norms + d,
        head=d * model.vocab_size,
        mtp_modules=mtp,
        active=0,
    )
    return dataclasses.replace(count, active=count.main - count.embedding - unused)


def _attention_parameters(model: ModelConfig) -> int:
    """MLA's projections in one layer (report 2.1.1)."""
    d, heads, rank = model.d_model, model.num_heads, model.q_lora_rank
    q_width = heads * model.qk_head_dim
    query = d * q_width if rank is None else d * rank + rank * q_width
    kv_down = d * (model.kv_lora_rank + model.qk_rope_head_dim)
    kv_up = model.kv_lora_rank * heads * (model.qk_nope_head_dim + model.v_head_dim)
    return query + kv_down + kv_up + heads * model.v_head_dim * d


def _block_norm_parameters(model: ModelConfig) -> int:
    """RMSNorm gains in one layer: before attention, before the FFN, and on MLA's latents."""
    return 2 * model.d_model + (model.q_lora_rank or 0) + model.kv_lora_rank
