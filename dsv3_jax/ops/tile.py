"""The grain of FP8 scales, for those who plan without jax."""

TILE = 128
"""Elements that share a scale, along the axis a product reduces; a weight's blocks have as many along both."""
