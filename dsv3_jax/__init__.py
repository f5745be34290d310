"""The DeepSeek-V3 training system in JAX and Flax."""

from typing import Any


def __getattr__(name: str) -> Any:
    """`load_pretrained`, imported on first use, so that the command line answers at once."""
    if name == "load_pretrained":
        from dsv3_jax.checkpoint.pretrained import load_pretrained

        return load_pretrained
    raise AttributeError(f"module 'dsv3_jax' has no attribute {name!r}")


__all__ = ["load_pretrained"]
