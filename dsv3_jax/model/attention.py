"""Multi-head latent attention, MLA (report 2.1.1)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.layers import Linear, RMSNorm
from dsv3_jax.model.rope import softmax_scale
from dsv3_jax.ops.attention import causal_attention
from dsv3_jax.ops.linear import FP8Rows, linear_after_attention
from dsv3_jax.ops.products import matmul_f32
from dsv3_jax.ops.rotary import Rotations, rotate, rotate_heads


class LatentCache(NamedTuple):
    """All that decoding keeps of the past: kv_lora_rank + qk_rope_head_dim numbers a token and layer."""

    latent: Float[Array, "*layer batch length kv_lora_rank"]
    k_rope: Float[Array, "*layer batch length rope"]


class MLA(nnx.Module):
    """Attention through low-rank latents, with a decoupled rotary key shared by all heads."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        std, heads = config.init_std, config.num_heads
        if config.q_lora_rank is None:
            self.q = Linear(config.d_model, heads * config.qk_head_dim, std, rngs)
        else:
            self.q_down = Linear(config.d_model, config.q_lora_rank, std, rngs)
            self.q_norm = RMSNorm(config.q_lora_rank, config.rms_norm_eps)
            self.q_up = Linear(config.q_lora_rank, heads * config.qk_head_dim, std, rngs)
        self.kv_down = Linear(config.d_model, config.kv_lora_rank + config.qk_rope_head_dim, std, rngs)
        self.kv_norm = RMSNorm(config.kv_lora_rank, config.rms_norm_eps)
        self.kv_up = Linear(config.kv_lora_rank, heads * (config.qk_nope_head_dim + config.v_head_dim), std, rngs)
        self.out = Linear(heads * config.v_head_dim, config.d_model, std, rngs)

    def __call__(
        self, x: Float[Array, "batch seq d_model"] | FP8Rows, rotations: Rotations
    ) -> Float[Array, "batch seq d_model"]:
        """Causal attention over whole sequences; `rotations` are cos and sin of the positions, [seq, pairs]."""
        config = self.config
        q = self.queries(x)
        cache = self.latents(x, rotations)
        batch = q.shape[:2]
        kv = self.kv_up(cache.latent).reshape(*batch, config.num_heads, -1)
        heads = causal_attention(q, kv, cache.k_rope, rotations, softmax_scale(config))
        return linear_after_attention(heads.reshape(*batch, -1), self.out.kernel.get_value())

    def queries(self, x: Float[Array, "batch seq d_model"] | FP8Rows) -> Float[Array, "batch seq heads nope+rope"]:
        """Each head's query, of which the last columns are still to be rotated."""
        config = self.config
        if config.q_lora_rank is None:
            q = self.q(x)
        else:
            q = self.q_up(self.q_norm.into(self.q_up, checkpoint_name(self.q_down(x), "latent")))
        return q.reshape(*q.shape[:2], config.num_heads, config.qk_head_dim)

    def latents(self, x: Float[Array, "batch seq d_model"] | FP8Rows, rotations: Rotations) -> LatentCache:
        """The normalized latent, as the up-projection reads it, and the rotated shared key of each token: what a cache
        holds."""
        down = checkpoint_name(self.kv_down(x), "latent")
        latent, k_rope = jnp.split(down, [self.config.kv_lora_rank], axis=-1)
        return LatentCache(self.kv_norm.into(self.kv_up, latent), rotate(k_rope, *rotations))

    def decode(
        self,
        x: Float[Array, "batch new d_model"],
        rotations: Rotations,
        cache: LatentCache,
        start: Int[Array, ""],
    ) -> tuple[Float[Array, "batch new d_model"], LatentCache]:
        """Attention of new tokens, at positions start.., over the cache, into which they are written.

        The up-projections are absorbed: the query is taken into the latent space and the weighted latents out of it,
        so no per-head key or value of the past is ever made.
        """
        config = self.config
        q_nope, q_rope = jnp.split(self.queries(x), [config.qk_nope_head_dim], axis=-1)
        q_rope = rotate_heads(q_rope, rotations)
        new = self.latents(x, rotations)
        cache = LatentCache(*(_write(old, part, start) for old, part in zip(cache, new, strict=True)))
        kernel = self.kv_up.kernel.get_value().astype(x.dtype)
        up = kernel.reshape(config.kv_lora_rank, config.num_heads, -1)
        k_up, v_up = jnp.split(up, [config.qk_nope_head_dim], axis=-1)
        q_latent = jnp.einsum("bqhd,chd->bqhc", q_nope, k_up)
        scores = _shared_key_scores(q_latent, cache.latent) + _shared_key_scores(q_rope, cache.k_rope)
        hidden = jnp.arange(cache.latent.shape[1]) > start + jnp.arange(x.shape[1])[:, None]
        probs = jax.nn.softmax(jnp.where(hidden[:, None], -jnp.inf, scores * softmax_scale(config)), axis=-1)
        rows = probs.reshape(len(x), -1, probs.shape[-1]).astype(x.dtype)
        mixed = jnp.matmul(rows, cache.latent).reshape(q_latent.shape)
        heads = jnp.einsum("bqhc,chd->bqhd", mixed, v_up)
        return self.out(heads.reshape(*x.shape[:2], -1)), cache


def _shared_key_scores(
    q: Float[Array, "batch new heads width"], k: Float[Array, "batch length width"]
) -> Float[Array, "batch new heads length"]:
    """Products of all heads' queries with the one key of each position, as multi-query attention has them."""
    batch, new, heads, width = q.shape
    return matmul_f32(q.reshape(batch, -1, width), jnp.swapaxes(k, 1, 2)).reshape(batch, new, heads, -1)


def _write(old: Array, new: Array, start: Int[Array, ""]) -> Array:
    return jnp.asarray(old).at[:, start + jnp.arange(new.shape[1])].set(new.astype(old.dtype))
