"""Which experts a token passes."""

from dsv3_jax.ops.top_k.api import grouped_top_k

__all__ = ["grouped_top_k"]
