"""Cross-entropy over a large vocabulary."""

from dsv3_jax.ops.cross_entropy.api import CrossEntropy, chunked_cross_entropy

__all__ = ["CrossEntropy", "chunked_cross_entropy"]
