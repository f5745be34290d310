"""PyTorch's causal attention by cuDNN, which the benchmark times beside ours; imports torch."""

from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention


def calls(batch: int, seq: int, heads: int, qk: int, v: int, scale: float) -> tuple[Callable, Callable]:
    """A call of the forward pass, and one of both passes, on random bf16 operands."""
    q, k, value, d_out = (
        torch.randn(batch, seq, heads, width, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        for width in (qk, qk, v, v)
    )
    needing = [x.detach().requires_grad_() for x in (q, k, value)]

    def forward(*operands: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):
            return scaled_dot_product_attention(*operands, is_causal=True, scale=scale)

    def both() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(forward(*needing), needing, d_out)

    def only_forward() -> torch.Tensor:
        with torch.no_grad():
            return forward(q, k, value)

    return only_forward, both
