"""Inference from the latent cache."""
