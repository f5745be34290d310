"""What one microbatch costs each part of a model, item by item: products, attention, memory traffic, exchange.

Every amount is for one token, so that the items of a plan can be checked against the model's sizes by hand.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from dsv3_jax.config import ModelConfig
from dsv3_jax.planner.devices import Device

type Products = Literal["fp8", "bf16"]
type Recompute = Literal["none", "report", "layer"]


@dataclass(frozen=True)
class Work:
    """Something a token costs."""

    name: str
    passes: str
    """F, I or W: the forward, the input gradient, the weight gradients."""
    flops: float = 0
    rate: str = "memory"
    """Name of the device's achieved rate: of a product, or of its memory."""
    bytes: float = 0
    """Traffic with the device's own memory, of what is not a product."""

    def seconds(self, device: Device) -> float:
        """Time of one token's share."""
        return (self.flops or self.bytes) / device.achieved[self.rate]


def layer_work(model: ModelConfig, is_moe: bool, seq_len: int, products: Products, recompute: Recompute) -> list[Work]:
    """One layer over a sequence of `seq_len`, exchange excluded (report 2.1, 3.2, 3.3).

    Every product costs three: the output, the input's gradient, the weights' gradient. What the backward pass computes
    again is part of I: nothing; MLA's up-projections, the norms and SwiGLU (report 3.2.3); or the whole layer.
    """
    routed, dense, full = _layer_weights(model, is_moe)
    work = [
        *_product("attention and dense products", dense, f"dense_{products}", products),
        *_product("router", full, "dense_bf16", "bf16"),
        *_product("routed experts' products", routed, f"grouped_{products}", products),
        *_attention(model, seq_len),
        Work("norms, quantization, RoPE, SwiGLU", "F", bytes=_forward_traffic(model, is_moe, products)),
        Work("norms, quantization, RoPE, SwiGLU", "I", bytes=_backward_traffic(model, is_moe, products)),
    ]
    if is_moe:
        work += [
            Work("routed rows, sorted and summed", part, bytes=_row_traffic(model, part, products)) for part in "FI"
        ]
    return work + _recomputed(work, model, products, recompute)


def head_work(model: ModelConfig) -> list[Work]:
    """Output head and cross-entropy in BF16, logits in float32 (report 3.3.1)."""
    weights = model.d_model * model.vocab_size
    # The gradient is computed beside the loss: logits are written, read for the softmax, and their gradient written.
    logits = Work("output heads", "F", bytes=3 * 4 * model.vocab_size)
    return [*_product("output heads", weights, "dense_bf16", "bf16"), logits]


def embedding_work(model: ModelConfig) -> list[Work]:
    """A row looked up, and its float32 gradient added."""
    row = 2 * model.d_model
    return [Work("embedding", "F", bytes=2 * row), Work("embedding", "I", bytes=row + 8 * model.d_model)]


def mtp_work(model: ModelConfig, seq_len: int, products: Products, recompute: Recompute) -> list[Work]:
    """One multi-token prediction module: projection, block, and one more pass of the head (report 2.2)."""
    projection = _product("MTP projection", 2 * model.d_model**2, "dense_bf16", "bf16")
    block = layer_work(model, True, seq_len, products, recompute)
    return [*embedding_work(model), *projection, *block, *head_work(model)]


def seconds(work: Iterable[Work], device: Device, passes: str) -> float:
    """Time of one token, of these passes."""
    return sum(item.seconds(device) for item in work if item.passes in passes)


def operand_bytes(products: Products) -> float:
    """Bytes of an operand of a product; FP8 with a float32 scale for 128."""
    return 1 + 4 / 128 if products == "fp8" else 2


def saved_bytes(model: ModelConfig, is_moe: bool, products: Products, recompute: Recompute) -> dict[str, float]:
    """What a layer keeps of a token from its forward to its backward pass, in bytes, by what it is (report 3.3.3).

    Rows of experts at a balanced load: a rank that receives more keeps more.
    """
    d, heads, e = model.d_model, model.num_heads, operand_bytes(products)
    if recompute == "layer":
        return {"residual stream": 2 * d}
    copies, width = (model.top_k, model.d_ff_expert) if is_moe else (0, 0)
    shared = model.num_shared_experts * model.d_ff_expert if is_moe else model.d_ff
    attended = heads * model.v_head_dim
    saved = {
        "residual stream": 2 * 2 * d,  # the input of each half
        "attention latents": 2 * _latent_width(model),
        # E5M6 in 12 bits, as the report has it, where ours are 16; and log-sum-exp.
        "attention output": attended * (1.5 if products == "fp8" else 2) + 4 * heads,
        "dispatched rows": copies * d * e,
        "SwiGLU inputs": 2 * (copies * width + shared) * e,
    }
    if recompute == "none":
        saved["normed inputs"] = (2 * d + (model.q_lora_rank or 0) + model.kv_lora_rank) * e
        saved["queries, keys and values"] = 2 * heads * (2 * model.qk_head_dim + model.v_head_dim)
        saved["SwiGLU outputs"] = (copies * width + shared) * e
    return saved


def _layer_weights(model: ModelConfig, is_moe: bool) -> tuple[int, int, int]:
    """Weights that a token passes: of routed experts, of the other products, and of those in BF16."""
    d = model.d_model
    attention = _up_weights(model) + d * (model.kv_lora_rank + model.qk_rope_head_dim)
    attention += model.num_heads * model.v_head_dim * d
    attention += d * model.q_lora_rank if model.q_lora_rank else 0
    if not is_moe:
        return 0, attention + 3 * d * model.d_ff, 0
    expert = 3 * d * model.d_ff_expert
    return model.top_k * expert, attention + model.num_shared_experts * expert, d * model.num_experts


def _up_weights(model: ModelConfig) -> int:
    """MLA's projections up from the latents (of queries from the input, where they have no latent)."""
    queries = (model.q_lora_rank or model.d_model) * model.num_heads * model.qk_head_dim
    return queries + model.kv_lora_rank * model.num_heads * (model.qk_nope_head_dim + model.v_head_dim)


def _product(name: str, weights: int, rate: str, products: Products) -> list[Work]:
    """The three products of a weight matrix. Accumulating the float32 gradient is part of the third's rate."""
    if not weights:
        return []
    rates = {"F": rate, "I": rate, "W": f"weight_gradient_{products}"}
    return [Work(name if part != "W" else "weight gradients", part, 2 * weights, rates[part]) for part in "FIW"]


def _attention(model: ModelConfig, seq_len: int) -> list[Work]:
    """The attention core: a token sees seq_len / 2 others on average; backward, five products instead of two."""
    qk, v = model.qk_head_dim, model.v_head_dim
    pairs = seq_len * model.num_heads
    return [
        Work("attention core", "F", pairs * (qk + v), "attention_forward"),
        Work("attention core", "I", pairs * (3 * qk + 2 * v), "attention_backward"),
    ]


def _recomputed(work: list[Work], model: ModelConfig, products: Products, recompute: Recompute) -> list[Work]:
    if recompute == "none":
        return []
    if recompute == "layer":
        return [replace(item, name="recomputation", passes="I") for item in work if item.passes == "F"]
    traffic = _norm_traffic(model, products) + _rope_traffic(model)
    return [
        Work("recomputation", "I", 2 * _up_weights(model), f"dense_{products}"),
        Work("recomputation", "I", bytes=traffic),
    ]


def _latent_width(model: ModelConfig) -> int:
    return (model.q_lora_rank or 0) + model.kv_lora_rank + model.qk_rope_head_dim


def _norm_traffic(model: ModelConfig, products: Products) -> float:
    """Reading BF16 and writing the operand: the norms before attention and FFN, and those of the latents."""
    return (2 + operand_bytes(products)) * (2 * model.d_model + _latent_width(model))


def _rope_traffic(model: ModelConfig) -> float:
    """Rotating the queries' rope part in place, and assembling keys from their two parts."""
    heads = model.num_heads
    return 2 * heads * (2 * model.qk_rope_head_dim + model.qk_nope_head_dim + model.qk_head_dim)


def _swiglu_widths(model: ModelConfig, is_moe: bool) -> int:
    if not is_moe:
        return model.d_ff
    return model.d_ff_expert * (model.top_k + model.num_shared_experts)


def _forward_traffic(model: ModelConfig, is_moe: bool, products: Products) -> float:
    d, e, attended = model.d_model, operand_bytes(products), model.num_heads * model.v_head_dim
    quantized = (2 + e) * attended if products == "fp8" else 0
    residuals = 2 * (3 + 3 + is_moe) * d  # read the stream and each half's output(s), write the sum
    router = 2 * d + 12 * model.num_experts if is_moe else 0
    swiglu = (2 * 2 + e) * _swiglu_widths(model, is_moe)
    return _norm_traffic(model, products) + _rope_traffic(model) + quantized + residuals + router + swiglu


def _backward_traffic(model: ModelConfig, is_moe: bool, products: Products) -> float:
    d, e, heads = model.d_model, operand_bytes(products), model.num_heads
    attended, latents = heads * model.v_head_dim, _latent_width(model)
    # A norm's backward reads its input, the output's gradient and the residual's, and writes one.
    norms = 2 * (4 * 2 * d + 3 * latents)
    # Attention's: dO x O is summed first; then the rotation is undone and keys are taken apart.
    attention = 2 * 2 * attended + _rope_traffic(model)
    swiglu = (2 * e + 2 + 2 * 2) * _swiglu_widths(model, is_moe)  # cached inputs, dy; gradients of both inputs
    if products == "bf16":
        return norms + attention + swiglu
    # FP8 operands along tokens as well, for the weights' gradients: each gradient is written twice, inputs once more.
    gradients = (2 + 2 * e) * (
        2 * d + heads * (model.qk_head_dim + model.qk_nope_head_dim + model.v_head_dim) + latents
    )
    swiglu_twice = (2 * 2 * e - 2 * 2 + e) * _swiglu_widths(model, is_moe)
    inputs = 2 * e * (2 * d + latents) + (1.5 + e) * attended
    return norms + attention + swiglu + gradients + swiglu_twice + inputs


def _row_traffic(model: ModelConfig, passes: str, products: Products) -> float:
    """Received rows are sorted by expert, and experts' rows summed before they return; backward, the same once more,
    and in FP8 both the rows and their gradients are written along tokens too."""
    d, copies, e = model.d_model, model.top_k, operand_bytes(products)
    once = copies * d * (2 * e + 2 * 2)
    if passes == "F" or products == "bf16":
        return once
    return once + 2 * copies * d * 2 * e
