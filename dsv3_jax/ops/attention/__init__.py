"""Causal attention of MLA's training form."""

from dsv3_jax.ops.attention.api import causal_attention

__all__ = ["causal_attention"]
