"""Group-limited selection of the best experts: picks an implementation (report 2.1.2)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax.ops.hopper import Implementation, takes_kernel
from dsv3_jax.ops.top_k import mosaic_gpu


def grouped_top_k(
    scores: Float[Array, "*batch experts"],
    top_k: int,
    num_groups: int = 1,
    top_k_groups: int = 1,
    implementation: Implementation | None = None,
) -> Int[Array, "*batch top_k"]:
    """The `top_k` best experts of the `top_k_groups` groups whose two best sum highest, best first; the lower index
    wins a tie.

    None takes the Hopper kernel where it can run, which sorts nothing, and the reference elsewhere. A named
    implementation that cannot run raises NotImplementedError, an unknown name ValueError.
    """
    rows = scores.reshape(-1, scores.shape[-1])
    if takes_kernel(implementation, "selection", mosaic_gpu.unsupported(rows, num_groups)):
        experts = mosaic_gpu.grouped_top_k(rows, top_k, num_groups, min(top_k_groups, num_groups))
        return experts.reshape(*scores.shape[:-1], top_k)
    return reference(scores, top_k, num_groups, top_k_groups)


def reference(
    scores: Float[Array, "*batch experts"], top_k: int, num_groups: int, top_k_groups: int
) -> Int[Array, "*batch top_k"]:
    """By sorting."""
    if top_k_groups < num_groups:
        groups = scores.reshape(*scores.shape[:-1], num_groups, -1)
        group_score = jax.lax.top_k(groups, 2)[0].sum(axis=-1)
        kept = jax.lax.top_k(group_score, top_k_groups)[1]
        reachable = (kept[..., None] == jnp.arange(num_groups)).any(axis=-2)
        scores = jnp.where(reachable[..., None], groups, -jnp.inf).reshape(scores.shape)
    return jax.lax.top_k(scores, top_k)[1]
