"""Tokens to expert-sorted rows and back."""

from dsv3_jax.ops.permute.api import (
    Slots,
    assign_slots,
    permute,
    permute_choices,
    tile_rows,
    unpermute,
    unpermute_choices,
)

__all__ = ["Slots", "assign_slots", "permute", "permute_choices", "tile_rows", "unpermute", "unpermute_choices"]
