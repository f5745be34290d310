"""Tokens to expert-sorted rows and back."""

from dsv3_jax.ops.permute.api import Slots, assign_slots, permute, permute_choices, tile_rows, unpermute

__all__ = ["Slots", "assign_slots", "permute", "permute_choices", "tile_rows", "unpermute"]
