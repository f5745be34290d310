"""Causal attention by cuDNN."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float


def cudnn_attention(
    q: Float[Array, "batch seq heads qk"],
    k: Float[Array, "batch seq heads qk"],
    v: Float[Array, "batch seq heads v"],
    scale: float,
) -> Float[Array, "batch seq heads v"]:
    """softmax(scale * q k^T) v, causal.

    jax's public entry wants values as wide as keys, which cuDNN does not. What lies beneath it is private, so where it
    is gone, values are padded: at widths of 192 and 128 that costs a tenth of the forward pass, and of both passes
    together a third.
    """
    entry = unpadded_entry()
    if entry is not None:
        return checkpoint_name(entry(q, k, v, scale), "attention")
    padded = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, q.shape[-1] - v.shape[-1])))
    out = jax.nn.dot_product_attention(q, k, padded, scale=scale, is_causal=True, implementation="cudnn")
    return checkpoint_name(out[..., : v.shape[-1]], "attention")


def unpadded_entry() -> Callable[[Array, Array, Array, float], Array] | None:
    """(q, k, v, scale) -> output, by jax's private entry to cuDNN; None where this jax has none."""
    try:
        from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention
    except ImportError:
        return None

    def run(q: Array, k: Array, v: Array, scale: float) -> Array:
        return dot_product_attention(q, k, v, scale=scale, mask_type=MaskType.CAUSAL, qkv_layout="BTNH")

    return run


def unsupported(dtype: jnp.dtype, keys: int, values: int, segmented: bool) -> str | None:
    """Why cuDNN cannot take operands of these widths; None where it can."""
    if jax.default_backend() != "gpu":
        return f"needs a GPU, the backend is {jax.default_backend()}"
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"takes 16-bit operands, not {dtype}"
    if values > keys:
        return f"needs values no wider than keys, not {values} against {keys}"
    return "takes no segment ids" if segmented else None
