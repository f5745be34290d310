"""The Hopper kernel of group-limited selection: 64 tokens' scores in the registers of a warpgroup, and a maximum for
each expert that is selected.

XLA sorts: 54 us for 4096 tokens of 256 experts on an H100, and 37 more for the groups.
"""

from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dsv3_jax.ops.hopper import WARPGROUP_ROWS, lowered_once

MOST = 256
"""Experts whose scores fit into registers."""
_WGMMA = plgpu.Layout.WGMMA


def unsupported(scores: Array, num_groups: int) -> str | None:
    """Why the kernel cannot take scores of [tokens, experts]; None where it can."""
    tokens, experts = scores.shape
    if scores.dtype != jnp.float32:
        return f"takes float32, not {scores.dtype}"
    if experts > MOST or experts % (8 * num_groups):
        return f"takes at most {MOST} experts in groups of a multiple of 8, not {experts} in {num_groups}"
    return None if tokens and tokens % WARPGROUP_ROWS == 0 else f"takes tokens in multiples of 64, not {tokens}"


@lowered_once("top_k", "num_groups", "top_k_groups", "interpret")
def grouped_top_k(
    scores: Float[Array, "tokens experts"], top_k: int, num_groups: int, top_k_groups: int, *, interpret: Any = None
) -> Int[Array, "tokens top_k"]:
    """See `ops.top_k.grouped_top_k`. Scores that are not numbers may select any expert, but always one there is."""
    tokens, experts = scores.shape
    width = experts // num_groups
    shape = (WARPGROUP_ROWS, width)

    def body(scores_ref, out_ref):
        mine = pl.ds(lax.axis_index("tile") * WARPGROUP_ROWS, WARPGROUP_ROWS)
        index = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=_WGMMA).astype(jnp.float32)

        def of_rows(x):
            return lax.broadcast_in_dim(x, shape, [0])

        def place_of(part, value):
            """The first place that holds each row's value, from the end."""
            return jnp.where(part == of_rows(value), width - index, 0.0).max(axis=1)

        def without(part, place):
            return jnp.where(width - index == of_rows(place), -jnp.inf, part)

        def best_two(part):
            best = part.max(axis=1)
            return best + without(part, place_of(part, best)).max(axis=1)

        def rank(i, values):
            """How many of the values come before the i-th."""
            before = [(v >= values[i]) if j < i else (v > values[i]) for j, v in enumerate(values) if j != i]
            return sum(jnp.where(b, 1.0, 0.0) for b in before)

        def load(group):
            part = scores_ref.at[mine, pl.ds(group * width, width)]
            return plgpu.load(part, layout=_WGMMA, optimized=False)

        parts = [load(group) for group in range(num_groups)]
        if top_k_groups < num_groups:
            values = [best_two(part) for part in parts]
            ranks = [rank(i, values) for i in range(num_groups)]
            parts = [
                jnp.where(of_rows(place) < top_k_groups, part, -jnp.inf)
                for part, place in zip(parts, ranks, strict=True)
            ]
        for j in range(top_k):
            best = [part.max(axis=1) for part in parts]
            largest = best[0]
            for value in best[1:]:
                largest = jnp.maximum(largest, value)
            places = [place_of(part, largest) for part in parts]
            # Counted from the end of all groups, so that the first place is the largest number.
            ends = [
                jnp.where(place > 0, place + (num_groups - 1 - group) * width, 0.0)
                for group, place in enumerate(places)
            ]
            first = ends[0]
            for end in ends[1:]:
                first = jnp.maximum(first, end)
            parts = [
                jnp.where(width - index + (num_groups - 1 - group) * width == of_rows(first), -jnp.inf, part)
                for group, part in enumerate(parts)
            ]
            out_ref[j, mine] = jnp.minimum(experts - first, experts - 1.0).astype(jnp.int32)

    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((top_k, tokens), jnp.int32),
        grid=(tokens // WARPGROUP_ROWS,),
        grid_names=("tile",),
        kernel_name="grouped_top_k",
        **({} if interpret is None else {"interpret": interpret}),
    )
    return kernel(scores).T
