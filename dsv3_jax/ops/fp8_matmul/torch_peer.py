"""PyTorch's blockwise FP8 product (cuBLASLt), which the benchmark times beside ours; imports torch."""

from collections.abc import Callable

import torch

E4M3 = torch.float8_e4m3fn


def blockwise(m: int, n: int, k: int, b_tiles: bool, sets: int) -> Callable[[], torch.Tensor]:
    """A call of [m, k] @ [n, k]^T in bf16, of operands that rotate among `sets`: 1x128 tiles of the first, and of the
    second 128x128 blocks, or with `b_tiles` 1x128 tiles too."""
    operands = [_operands(m, n, k, b_tiles) for _ in range(sets)]
    state = {"next": 0}

    def call() -> torch.Tensor:
        a, b, a_scale, b_scale = operands[state["next"]]
        state["next"] = (state["next"] + 1) % sets
        return torch._scaled_mm(a, b.t(), a_scale, b_scale.t(), out_dtype=torch.bfloat16)

    return call


def bf16(m: int, n: int, k: int, sets: int) -> Callable[[], torch.Tensor]:
    """The dense product in bf16."""
    operands = [(_random(m, k).bfloat16(), _random(n, k).bfloat16()) for _ in range(sets)]
    state = {"next": 0}

    def call() -> torch.Tensor:
        a, b = operands[state["next"]]
        state["next"] = (state["next"] + 1) % sets
        return a @ b.t()

    return call


def _operands(m: int, n: int, k: int, b_tiles: bool) -> tuple[torch.Tensor, ...]:
    b_scale = _tile_scales(n, k) if b_tiles else _block_scales(n, k)
    return _random(m, k).to(E4M3), _random(n, k).to(E4M3), _tile_scales(m, k), b_scale


def _random(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, device="cuda")


def _tile_scales(rows: int, k: int) -> torch.Tensor:
    """[rows, tiles], rows next to each other in memory, as cuBLASLt wants them."""
    return torch.rand(-(-k // 128), rows, device="cuda").t()


def _block_scales(n: int, k: int) -> torch.Tensor:
    """[n blocks, k blocks], each row padded to a multiple of four."""
    blocks = -(-k // 128)
    return torch.rand(-(-n // 128), -(-blocks // 4) * 4, device="cuda")[:, :blocks]
