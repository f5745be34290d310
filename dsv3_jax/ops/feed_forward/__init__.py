"""SwiGLU feed-forwards between two FP8 products, dense and routed."""

from dsv3_jax.ops.feed_forward.api import Route, fp8_feed_forward, fp8_routed_feed_forward

__all__ = ["Route", "fp8_feed_forward", "fp8_routed_feed_forward"]
