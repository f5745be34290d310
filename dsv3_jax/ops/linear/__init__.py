"""The matrix product of every linear, with a float32 weight gradient."""

from dsv3_jax.ops.linear.api import embedding_lookup, linear

__all__ = ["embedding_lookup", "linear"]
