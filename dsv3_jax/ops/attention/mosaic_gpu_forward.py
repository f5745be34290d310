"""The Hopper kernel of causal attention: softmax(scale * q k^T) v and the log-sum-exp of each query's scores.

A persistent grid, one block an SM, each with its list of tiles of queries. One warp of a block's last warpgroup
produces: it brings each tile's queries, then keys and values into the next free slots of shared memory, the latest
keys first. The others compute, 64 queries each:

    compute 0  | S0 | softmax 0 | S1, O += P0 V0   | softmax 1 | S2, O += P1 V1 | ...
    compute 1       | S0        | softmax 0        | S1, O += P0 V0 | softmax 1 | ...

A warpgroup starts its two products together and turns to the next softmax as soon as S is there. One's softmax runs
under the other's products without barriers that make them take turns at the tensor cores, which cost 5% of the time
(H100, 4096 tokens, 128 heads). q k^T is the sum of two products, so that the rotary keys, which all heads share, are
never copied. Only the tiles on the diagonal, which come first, are masked. Queries, keys and values are read from the
columns in which their projections wrote them; of the queries, only the rotated columns are an array of their own.

Shared memory with 128 queries and 2 slots of 128 keys, in KiB: q 48, of which the output takes 32 when its tile is
done, k 2 x 48, v 2 x 32: 208 of 227. Registers of a thread, of 240: output 64, scores 64, probabilities in bf16 32.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from dsv3_jax.ops.attention.kernel_parts import (
    LOG2_E,
    Segments,
    accumulate,
    following,
    not_after,
    of_one_segment,
)
from dsv3_jax.ops.attention.worklists import locate, worklists
from dsv3_jax.ops.hopper import MULTIPROCESSORS, WARPGROUP_ROWS, lowered_once, operand, producer_and_consumers

_WGMMA, _ROW = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1)


@dataclass(frozen=True)
class ForwardConfig:
    """How the forward pass is cut."""

    warpgroups: int = 2
    """Compute warpgroups, of 64 queries each."""
    keys: int = 128
    """Of a tile."""
    stages: int = 2
    """Slots in shared memory for tiles of keys and values."""
    heads: int = 8
    """Whose tiles are handed out together, so that keys and values stay in L2."""

    @property
    def queries(self) -> int:
        """Of a tile."""
        return self.warpgroups * WARPGROUP_ROWS

    @property
    def registers(self) -> tuple[int, int]:
        """Of a thread of a compute warpgroup, and of the producer."""
        return (240, 24) if self.warpgroups == 2 else (160, 24)


@lowered_once("scale", "config", "num_sms", "interpret")
def attention_forward(
    q: Float[Array, "batch seq heads nope+rope"],
    q_rope: Float[Array, "batch seq heads rope"],
    kv: Float[Array, "batch seq heads nope+v"],
    k_rope: Float[Array, "batch seq rope"],
    segments: Segments | None,
    *,
    scale: float,
    config: ForwardConfig,
    num_sms: int = MULTIPROCESSORS,
    interpret: Any = None,
) -> tuple[Float[Array, "batch seq heads v"], Float[Array, "batch heads padded_seq"]]:
    """Output, and the log-sum-exp of the scaled scores in units of log 2, padded to whole tiles.

    Of q, only the first columns are read: `q_rope` are the others, rotated.
    """
    batch, seq, heads, rope = q_rope.shape
    nope, dtype = q.shape[-1] - rope, q.dtype
    width = kv.shape[-1] - nope
    rows, keys, stages = config.queries, config.keys, config.stages
    tiles = pl.cdiv(seq, rows)
    diagonal = pl.cdiv(rows, keys)  # tiles of keys of which some are hidden from some queries by position
    key_tiles = [pl.cdiv(min((tile + 1) * rows, seq), keys) for tile in range(tiles)]
    work = worklists(batch, heads, [count + 1 for count in key_tiles], num_sms, config.heads)

    def body(tiles_ref, bounds_ref, *refs):
        seg, (q_ref, qr_ref, kv_ref, kr_ref, out_ref, lse_ref, *refs) = Segments.take(refs, segments)
        qn_s, qr_s, kn_s, kr_s, v_s, lse_s, q_full, q_empty, k_full, k_empty, v_full, v_empty, *seg_s = refs
        key_columns, value_columns = pl.ds(0, nope), pl.ds(nope, width)
        wg, sm = lax.axis_index("wg"), lax.axis_index("sm")

        def for_each_tile(f: Callable) -> None:
            """f(tile, its first and last tile of keys, slot) -> slot."""

            def one(i, slot):
                at = locate(tiles_ref[i], heads, tiles)
                last = lax.div(lax.min((at.index + 1) * rows, jnp.int32(seq)) - 1, jnp.int32(keys))
                first = jnp.int32(0) if seg is None else seg.bounds[at.batch, at.index]
                return f(at, first, last, slot)

            lax.fori_loop(bounds_ref[sm], bounds_ref[sm + 1], one, jnp.int32(0))

        def load_tile(at, first, last, slot):
            for w in range(config.warpgroups):
                mine = pl.ds(at.index * rows + w * WARPGROUP_ROWS, WARPGROUP_ROWS)
                plgpu.barrier_wait(q_empty.at[w])
                plgpu.copy_gmem_to_smem(q_ref.at[at.batch, mine, at.head, pl.ds(0, nope)], qn_s.at[w], q_full.at[w])
                plgpu.copy_gmem_to_smem(qr_ref.at[at.batch, mine, at.head], qr_s.at[w], q_full.at[w])
                if seg is not None:
                    plgpu.copy_gmem_to_smem(seg.ids.at[at.batch, mine], seg_s[0].at[w], q_full.at[w])

            def load_keys(i, slot):
                those = pl.ds((last - i) * keys, keys)
                plgpu.barrier_wait(k_empty.at[slot])
                plgpu.copy_gmem_to_smem(
                    kv_ref.at[at.batch, those, at.head, key_columns], kn_s.at[slot], k_full.at[slot]
                )
                plgpu.copy_gmem_to_smem(kr_ref.at[at.batch, those], kr_s.at[slot], k_full.at[slot])
                if seg is not None:
                    plgpu.copy_gmem_to_smem(seg.ids.at[at.batch, those], seg_s[1].at[slot], k_full.at[slot])
                plgpu.barrier_wait(v_empty.at[slot])
                plgpu.copy_gmem_to_smem(
                    kv_ref.at[at.batch, those, at.head, value_columns], v_s.at[slot], v_full.at[slot]
                )
                return following(slot, stages)

            return lax.fori_loop(0, last - first + 1, load_keys, slot)

        def produce() -> None:
            for_each_tile(load_tile)
            for w in range(config.warpgroups):
                plgpu.barrier_wait(q_empty.at[w])
            for slot in range(stages):
                plgpu.barrier_wait(k_empty.at[slot])
                plgpu.barrier_wait(v_empty.at[slot])

        def compute_tile(at, first, last, slot):
            row = at.index * rows + wg * WARPGROUP_ROWS
            plgpu.barrier_wait(q_full.at[wg])
            seg_q = None if seg is None else plgpu.load(seg_s[0].at[wg], layout=_ROW)

            def start_scores(s_ref, slot):
                plgpu.wgmma(s_ref, qn_s.at[wg], kn_s.at[slot].transpose((1, 0)))
                plgpu.wgmma(s_ref, qr_s.at[wg], kr_s.at[slot].transpose((1, 0)))

            def mask(s, key_tile, slot, on_diagonal):
                if on_diagonal:
                    s = jnp.where(not_after(s.shape, key_tile * keys, row, keys=1), s, -jnp.inf)
                if seg is not None:
                    seg_k = plgpu.load(seg_s[1].at[slot], layout=_WGMMA.reduce(0))
                    s = jnp.where(of_one_segment(s.shape, seg_q, seg_k, keys=1), s, -jnp.inf)
                return s

            def weights(s, largest, on_diagonal):
                """exp(scale * s - largest), and zeros where all keys of a row are hidden."""
                if on_diagonal or seg is not None:
                    largest = jnp.where(largest == -jnp.inf, 0.0, largest)
                return jnp.exp2(s * (scale * LOG2_E) - lax.broadcast_in_dim(largest, s.shape, [0])), largest

            def first_probabilities(s_ref):
                start_scores(s_ref, slot)
                s = mask(plgpu.wgmma_accumulator_load(s_ref), last, slot, True)
                plgpu.barrier_arrive(k_empty.at[slot])
                largest = s.max(axis=1) * (scale * LOG2_E)
                return largest, weights(s, largest, True)[0]

            plgpu.barrier_wait(k_full.at[slot])
            scores_type = plgpu.ACC((WARPGROUP_ROWS, keys), jnp.float32)
            out_type = plgpu.ACC((WARPGROUP_ROWS, width), jnp.float32)
            largest, p = pl.run_scoped(first_probabilities, scores_type)
            total = p.sum(axis=1)
            out = plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS, width), jnp.float32), _WGMMA)

            def step(i, carry, on_diagonal):
                """Adds what the probabilities before weigh, under which the next are computed."""
                out, largest, total, p, before = carry
                slot = following(before, stages)
                plgpu.barrier_wait(k_full.at[slot])

                def products(s_ref, out_ref):
                    start_scores(s_ref, slot)
                    plgpu.barrier_wait(v_full.at[before])
                    weighted = accumulate(out_ref, out, p, v_s.at[before], interpret)
                    s = mask(plgpu.wgmma_accumulator_load(s_ref, wait_n=1), last - i, slot, on_diagonal)
                    plgpu.barrier_arrive(k_empty.at[slot])
                    larger = jnp.maximum(largest, s.max(axis=1) * (scale * LOG2_E))
                    next_p, base = weights(s, larger, on_diagonal)
                    shrink = jnp.exp2(largest - base)
                    next_total = total * shrink + next_p.sum(axis=1)
                    next_out = weighted(0)
                    plgpu.barrier_arrive(v_empty.at[before])
                    next_out = next_out * lax.broadcast_in_dim(shrink, next_out.shape, [0])
                    return next_out, larger, next_total, next_p.astype(dtype), slot

                return pl.run_scoped(products, scores_type, out_type)

            carry = (out, largest, total, p.astype(dtype), slot)
            count = last - first + 1
            masked = lax.min(count, jnp.int32(diagonal))
            if diagonal > 1:
                carry = lax.fori_loop(1, masked, lambda i, c: step(i, c, True), carry)
            carry = lax.fori_loop(masked, count, lambda i, c: step(i, c, False), carry)
            out, largest, total, p, slot = carry
            plgpu.barrier_wait(v_full.at[slot])
            out = pl.run_scoped(lambda out_ref: accumulate(out_ref, out, p, v_s.at[slot], interpret)(0), out_type)
            plgpu.barrier_arrive(v_empty.at[slot])
            # The queries have been used, and their place is as large as the output's.
            qn_s[wg] = (out * lax.broadcast_in_dim(1 / total, out.shape, [0])).astype(dtype)
            lse_s[wg] = largest + jnp.log(total) * LOG2_E
            plgpu.commit_smem()
            mine = pl.ds(row, WARPGROUP_ROWS)
            plgpu.copy_smem_to_gmem(qn_s.at[wg], out_ref.at[at.batch, mine, at.head])
            plgpu.copy_smem_to_gmem(lse_s.at[wg], lse_ref.at[at.batch, at.head, mine])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_arrive(q_empty.at[wg])
            return following(slot, stages)

        def consume() -> None:
            plgpu.barrier_arrive(q_empty.at[wg])
            for slot in range(stages):
                plgpu.barrier_arrive(k_empty.at[slot])
                plgpu.barrier_arrive(v_empty.at[slot])
            for_each_tile(compute_tile)

        producer_and_consumers(config, produce, consume)

    workers = config.warpgroups
    run = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((batch, seq, heads, width), dtype),
            jax.ShapeDtypeStruct((batch, heads, tiles * rows), jnp.float32),
        ),
        scratch_types=[
            operand((workers, WARPGROUP_ROWS, nope), dtype),
            operand((workers, WARPGROUP_ROWS, rope), dtype),
            operand((stages, keys, nope), dtype),
            operand((stages, keys, rope), dtype),
            operand((stages, keys, width), dtype),
            plgpu.SMEM((workers, WARPGROUP_ROWS), jnp.float32),
            plgpu.Barrier(num_arrivals=2 if segments is None else 3, num_barriers=workers),
            plgpu.Barrier(num_barriers=workers),
            plgpu.Barrier(num_arrivals=2 if segments is None else 3, num_barriers=stages),
            plgpu.Barrier(num_arrivals=workers, num_barriers=stages),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_arrivals=workers, num_barriers=stages),
            *([] if segments is None else [plgpu.SMEM((n, m), jnp.int32) for n, m in ((workers, 64), (stages, keys))]),
        ],
        grid=(num_sms,),
        grid_names=("sm",),
        num_threads=workers + 1,
        thread_name="wg",
        kernel_name="attention_forward",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **({} if interpret is None else {"interpret": interpret}),
    )
    given = () if segments is None else segments
    return run(*map(jnp.asarray, work), *given, q, q_rope, kv, k_rope)
