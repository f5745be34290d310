"""Attention by a softmax over the whole score matrix, and rotations to give it and others."""

import jax
import jax.numpy as jnp
import numpy as np


def turns(seq: int, rope: int) -> tuple[jax.Array, jax.Array]:
    """cos and sin, times a factor as of YaRN: turning back is then not the transpose of turning."""
    angles = np.arange(seq)[:, None] * 100.0 ** -(np.arange(0, rope, 2) / rope)
    return jnp.asarray(1.25 * np.cos(angles), np.float32), jnp.asarray(1.25 * np.sin(angles), np.float32)


def full_softmax(q, kv, k_rope, rotations, scale: float, segment_ids=None):
    """What `causal_attention` computes, in the operands' type."""
    nope = q.shape[-1] - k_rope.shape[-1]
    cos, sin = (jnp.repeat(x, 2, axis=-1)[:, None] for x in rotations)
    pairs = q[..., nope:].reshape(*q.shape[:3], -1, 2)
    across = jnp.stack([-pairs[..., 1], pairs[..., 0]], axis=-1).reshape(*q.shape[:3], -1)
    q_rope = q[..., nope:] * cos + across * sin
    scores = jnp.einsum("bqhd,bkhd->bhqk", q[..., :nope], kv[..., :nope]) + jnp.einsum("bqhd,bkd->bhqk", q_rope, k_rope)
    seen = jnp.tril(jnp.ones(scores.shape[2:], bool))
    if segment_ids is not None:
        seen &= (segment_ids[:, :, None] == segment_ids[:, None])[:, None]
    probabilities = jax.nn.softmax(jnp.where(seen, scores * scale, -jnp.inf), axis=-1)
    return jnp.einsum("bhqk,bkhd->bqhd", probabilities, kv[..., nope:])


def parts(nope: int, out, q, kv, k_rope) -> dict[str, jax.Array]:
    """An output and gradients, those of either part of packed operands apart: the larger would hide the smaller."""
    named = {"out": out, "q_nope": q[..., :nope], "q_rope": q[..., nope:], "k_nope": kv[..., :nope]}
    return named | {"k_rope": k_rope, "v": kv[..., nope:]}
