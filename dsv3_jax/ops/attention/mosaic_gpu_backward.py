"""The Hopper kernel of causal attention's gradients: one pass over all pairs of a tile of keys and a tile of queries.

A block for each tile of 128 keys, the longest first. One warp of its last warpgroup brings the tile's keys and values,
then queries and output gradients, 64 at a time, into the next free slots. Two warpgroups hold the gradients of 64 keys
each in registers. With scores transposed, so that probabilities are left sides in registers:

    S^T = K Q^T - lse | dP^T = V dO^T - delta | P = exp2 S | dS = P dP | dV += P^T dO | dK += dS^T Q | dQ += dS K

dQ needs the dS of both warpgroups: they meet over a copy in shared memory, then one computes 128 and the other 64 of
its 192 columns, by turns, and adds them to float32 in L2. The gradient of the rotary key, which all heads share, is
added in the same way: 32 KiB a tile and head, at 4096 tokens 2% of what dQ adds. A copy for each head would be 134 MB
in float32 at 128 heads and 4096 tokens, written and read again 268 MB. lse and delta are what the accumulators of S
and dP start from, so they take neither registers nor instructions of their own.

A tile of 128 x 64 costs 3328 cycles of the tensor cores (S 768, dP 512, dV 512, dK 768, dQ 768) and about as many of
shared memory. Registers of a thread, of 240: dV 64, dK 96, S 32, dP 32. Shared memory, in KiB: k and v 80, which the
gradients take at the end, 2 slots of q and dO 2 x 40, dS 16, dQ in float32 48: 224 of 227.
"""

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
    preset,
    settled,
    unseen_zero,
)
from dsv3_jax.ops.attention.worklists import locate, worklists
from dsv3_jax.ops.hopper import WARPGROUP_ROWS, lowered_once, operand, producer_and_consumers

_WGMMA = plgpu.Layout.WGMMA
QUERIES = 64
"""Of a tile."""
_CHUNK = 64
"""Columns of q and k in one piece of shared memory, and of dQ that a warpgroup computes at a time."""


@dataclass(frozen=True)
class BackwardConfig:
    """How the backward pass is cut."""

    stages: int = 2
    """Slots in shared memory for tiles of queries and output gradients."""
    heads: int = 4
    """Whose tiles are handed out together, so that what they share stays in L2."""

    @property
    def warpgroups(self) -> int:
        """Compute warpgroups, of 64 keys each: registers allow no more."""
        return 2

    @property
    def registers(self) -> tuple[int, int]:
        """Of a thread of a compute warpgroup, and of the producer."""
        return (240, 24)

    @property
    def keys(self) -> int:
        """Of a tile."""
        return self.warpgroups * WARPGROUP_ROWS


@lowered_once("scale", "config", "interpret")
def attention_backward(
    q: Float[Array, "batch seq heads nope+rope"],
    q_rope: Float[Array, "batch seq heads rope"],
    kv: Float[Array, "batch seq heads nope+v"],
    k_rope: Float[Array, "batch seq rope"],
    segments: Segments | None,
    out: Float[Array, "batch seq heads v"],
    log_sum_exp: Float[Array, "batch heads padded_seq"],
    d_out: Float[Array, "batch seq heads v"],
    *,
    scale: float,
    config: BackwardConfig,
    interpret: Any = None,
) -> tuple[
    Float[Array, "batch seq heads nope+rope"], Float[Array, "batch seq heads nope+v"], Float[Array, "batch seq rope"]
]:
    """Gradients of the queries, their last columns rotated, over the scale and in float32; of keys and values side by
    side; and of the rotary key. From what the forward pass took and returned."""
    batch, seq, heads, rope = q_rope.shape
    nope, dtype = q.shape[-1] - rope, q.dtype
    width = kv.shape[-1] - nope
    chunks, nope_chunks = (nope + rope) // _CHUNK, nope // _CHUNK
    keys, stages = config.keys, config.stages
    tiles, query_tiles = pl.cdiv(seq, keys), pl.cdiv(seq, QUERIES)
    diagonal = keys // QUERIES  # tiles of queries from which some keys are hidden by position
    order = worklists(batch, heads, [query_tiles - i * diagonal for i in range(tiles)], 1, config.heads).tiles
    lse, delta = _per_query(out, log_sum_exp, d_out, scale)
    # The interpreter cannot add on the way to global memory: it gets a place for each of the summands.
    summands = (1, 1) if interpret is None else (tiles, heads)
    how = None if interpret is not None else "add"
    dq_sum = jax.new_ref(jnp.zeros((summands[0], batch, seq, heads, nope + rope), jnp.float32))
    dkr_sum = jax.new_ref(jnp.zeros((summands[1], batch, seq, rope), jnp.float32))

    def body(tiles_ref, *refs):
        seg, refs = Segments.take(refs, segments)
        q_ref, qr_ref, kv_ref, kr_ref, do_ref, lse_ref, delta_ref, dq_ref, dkr_ref, dkv_ref, *refs = refs
        qn_s, qr_s, do_s, per_query_s, k_s, v_s, ds_s, dq_s, kv_full, q_full, do_full, empty, *refs = refs
        ds_full, ds_empty, *seg_s = refs
        value_columns = pl.ds(nope, width)
        wg = lax.axis_index("wg")

        at = locate(tiles_ref[lax.axis_index("tile")], heads, tiles)
        first = at.index * diagonal
        last = jnp.int32(query_tiles - 1) if seg is None else seg.bounds[at.batch, at.index]

        def produce() -> None:
            those = pl.ds(at.index * keys, keys)

            def load_keys():
                for c in range(nope_chunks):
                    columns = pl.ds(c * _CHUNK, _CHUNK)
                    plgpu.copy_gmem_to_smem(kv_ref.at[at.batch, those, at.head, columns], k_s.at[c], kv_full)
                for c in range(nope_chunks, chunks):
                    columns = pl.ds((c - nope_chunks) * _CHUNK, _CHUNK)
                    plgpu.copy_gmem_to_smem(kr_ref.at[at.batch, those, columns], k_s.at[c], kv_full)
                plgpu.copy_gmem_to_smem(kv_ref.at[at.batch, those, at.head, value_columns], v_s, kv_full)
                if seg is not None:
                    plgpu.copy_gmem_to_smem(seg.ids.at[at.batch, those], seg_s[0].at[pl.ds(0, keys)], kv_full)

            def load_queries(i, slot):
                mine = pl.ds(i * QUERIES, QUERIES)
                plgpu.barrier_wait(empty.at[slot])
                plgpu.copy_gmem_to_smem(
                    q_ref.at[at.batch, mine, at.head, pl.ds(0, nope)], qn_s.at[slot], q_full.at[slot]
                )
                plgpu.copy_gmem_to_smem(qr_ref.at[at.batch, mine, at.head], qr_s.at[slot], q_full.at[slot])
                plgpu.copy_gmem_to_smem(lse_ref.at[at.batch, at.head, mine], per_query_s.at[0, slot], q_full.at[slot])
                if seg is not None:
                    plgpu.copy_gmem_to_smem(
                        seg.ids.at[at.batch, mine], seg_s[0].at[pl.ds(keys + slot * QUERIES, QUERIES)], q_full.at[slot]
                    )
                pl.when(i == first)(load_keys)
                plgpu.copy_gmem_to_smem(do_ref.at[at.batch, mine, at.head], do_s.at[slot], do_full.at[slot])
                plgpu.copy_gmem_to_smem(
                    delta_ref.at[at.batch, at.head, mine], per_query_s.at[1, slot], do_full.at[slot]
                )
                return following(slot, stages)

            lax.fori_loop(first, last + 1, load_queries, jnp.int32(0))
            for slot in range(stages):
                plgpu.barrier_wait(empty.at[slot])

        def consume() -> None:
            plgpu.barrier_arrive(ds_empty)
            for slot in range(stages):
                plgpu.barrier_arrive(empty.at[slot])
            mine = pl.ds(wg * WARPGROUP_ROWS, WARPGROUP_ROWS)
            first_key = at.index * keys + wg * WARPGROUP_ROWS
            plgpu.barrier_wait(kv_full)
            seg_k = None if seg is None else plgpu.load(seg_s[0].at[mine], layout=_WGMMA.reduce(1))

            def probabilities(i, slot, mine):
                """Of each key (row) and query, and the gradient of their logarithms, over the scale."""

                shape = (WARPGROUP_ROWS, QUERIES)
                acc = plgpu.ACC(shape, jnp.float32)

                def start_from(ref):
                    return lax.broadcast_in_dim(plgpu.load(ref, layout=_WGMMA.reduce(0)), shape, [1])

                def scores(s_ref):
                    start = start_from(per_query_s.at[0, slot])
                    preset(s_ref, start, interpret)
                    for c in range(chunks):
                        part = qn_s.at[slot, :, pl.ds(c * _CHUNK, _CHUNK)] if c < nope_chunks else qr_s.at[slot]
                        plgpu.wgmma(s_ref, k_s.at[c, mine], part.transpose((1, 0)))
                    return settled(s_ref, start, interpret)

                def gradients(dp_ref):
                    start = start_from(per_query_s.at[1, slot])
                    preset(dp_ref, start, interpret)
                    plgpu.wgmma(dp_ref, v_s.at[mine], do_s.at[slot].transpose((1, 0)))
                    return settled(dp_ref, start, interpret)

                plgpu.barrier_wait(q_full.at[slot])
                p = jnp.exp2(pl.run_scoped(scores, acc) * (scale * LOG2_E))
                p = lax.cond(
                    i < first + diagonal,
                    lambda p: jnp.where(not_after(shape, first_key, i * QUERIES, keys=0), p, 0.0),
                    lambda p: p,
                    p,
                )
                if seg is not None:
                    seg_q = plgpu.load(seg_s[0].at[pl.ds(keys + slot * QUERIES, QUERIES)], layout=_WGMMA.reduce(0))
                    p = jnp.where(of_one_segment(shape, seg_q, seg_k, keys=0), p, 0.0)
                plgpu.barrier_wait(do_full.at[slot])
                return p.astype(dtype), (p * pl.run_scoped(gradients, acc)).astype(dtype)

            def add_dq(i, chunk, ds_ref):
                """Adds 64 columns of dQ to those in memory."""

                def product(acc_ref):
                    plgpu.wgmma(acc_ref, ds_ref.transpose((1, 0)), k_s.at[chunk])
                    return acc_ref[...]

                dq = pl.run_scoped(product, plgpu.ACC((QUERIES, _CHUNK), jnp.float32))
                dq_s[chunk] = dq
                plgpu.commit_smem()
                place = 0 if interpret is None else at.index
                columns = pl.ds(chunk * _CHUNK, _CHUNK)
                target = dq_ref.at[place, at.batch, pl.ds(i * QUERIES, QUERIES), at.head, columns]
                plgpu.copy_smem_to_gmem(dq_s.at[chunk], target, reduction_op=how)

            def step(i, carry):
                dkn, dkr, dv, slot = carry
                zero = unseen_zero()
                mine, ds_ref = pl.ds((wg + zero) * WARPGROUP_ROWS, WARPGROUP_ROWS), ds_s.at[zero]
                p, ds = probabilities(i, slot, mine)
                plgpu.barrier_wait(ds_empty)

                def products(dkn_ref, dkr_ref, dv_ref):
                    weighted = accumulate(dv_ref, dv, p, do_s.at[slot], interpret)
                    ds_ref[mine] = ds
                    plgpu.commit_smem()
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    plgpu.barrier_arrive(ds_full)
                    preset(dkn_ref, dkn, interpret)
                    plgpu.wgmma(dkn_ref, ds_ref.at[mine], qn_s.at[slot])
                    preset(dkr_ref, dkr, interpret)
                    plgpu.wgmma(dkr_ref, ds_ref.at[mine], qr_s.at[slot])
                    plgpu.barrier_wait(ds_full)
                    odd = lax.rem(i + wg, jnp.int32(2))  # one computes chunks 0 and 2, the other chunk 1
                    lax.fori_loop(0, 2 - odd, lambda j, _: add_dq(i, odd + 2 * j, ds_ref), None)
                    result = settled(dkn_ref, dkn, interpret), settled(dkr_ref, dkr, interpret), weighted(0)
                    plgpu.barrier_arrive(empty.at[slot])
                    return result

                results = pl.run_scoped(products, *sums)
                plgpu.barrier_arrive(ds_empty)
                return *results, following(slot, stages)

            sums = [plgpu.ACC((WARPGROUP_ROWS, n), jnp.float32) for n in (nope, rope, width)]
            zeros = [plgpu.layout_cast(jnp.zeros(acc.shape, jnp.float32), _WGMMA) for acc in sums]
            dkn, dkr, dv, _ = lax.fori_loop(first, last + 1, step, (*zeros, jnp.int32(0)))
            # Once both warpgroups have used the keys and their dQ has left shared memory, gradients take its place.
            plgpu.barrier_wait(ds_empty)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_arrive(ds_full)
            plgpu.barrier_wait(ds_full)
            zero = unseen_zero()
            mine, those = pl.ds((wg + zero) * WARPGROUP_ROWS, WARPGROUP_ROWS), pl.ds(first_key, WARPGROUP_ROWS)
            for c in range(nope_chunks):
                k_s[zero + c, mine] = (dkn[:, c * _CHUNK : (c + 1) * _CHUNK] * scale).astype(dtype)
            v_s[mine] = dv.astype(dtype)
            dq_s[wg + zero] = dkr * scale
            plgpu.commit_smem()
            for c in range(nope_chunks):
                target = dkv_ref.at[at.batch, those, at.head, pl.ds(c * _CHUNK, _CHUNK)]
                plgpu.copy_smem_to_gmem(k_s.at[zero + c, mine], target)
            plgpu.copy_smem_to_gmem(v_s.at[mine], dkv_ref.at[at.batch, those, at.head, value_columns])
            place = 0 if interpret is None else at.head
            plgpu.copy_smem_to_gmem(dq_s.at[wg + zero], dkr_ref.at[place, at.batch, those], reduction_op=how)

        producer_and_consumers(config, produce, consume)

    workers, extra = config.warpgroups, 0 if segments is None else 1
    run = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(kv.shape, dtype),
        scratch_types=[
            operand((stages, QUERIES, nope), dtype),
            operand((stages, QUERIES, rope), dtype),
            operand((stages, QUERIES, width), dtype),
            plgpu.SMEM((2, stages, QUERIES), jnp.float32),
            operand((chunks, keys, _CHUNK), dtype),
            operand((keys, width), dtype),
            operand((1, keys, QUERIES), dtype),
            operand((chunks, QUERIES, _CHUNK), jnp.float32),
            plgpu.Barrier(num_arrivals=chunks + 1 + extra),
            plgpu.Barrier(num_arrivals=3 + extra, num_barriers=stages),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.Barrier(num_arrivals=workers, num_barriers=stages),
            plgpu.Barrier(num_arrivals=workers),
            plgpu.Barrier(num_arrivals=workers),
            *([] if segments is None else [plgpu.SMEM((keys + stages * QUERIES,), jnp.int32)]),
        ],
        grid=(order.size,),
        grid_names=("tile",),
        num_threads=workers + 1,
        thread_name="wg",
        kernel_name="attention_backward",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **({} if interpret is None else {"interpret": interpret}),
    )
    given = () if segments is None else segments
    d_kv = run(jnp.asarray(order), *given, q, q_rope, kv, k_rope, d_out, lse, delta, dq_sum, dkr_sum)
    return jax.freeze(dq_sum).sum(0), d_kv, jax.freeze(dkr_sum).sum(0).astype(dtype)


def _per_query(
    out: Array, log_sum_exp: Array, d_out: Array, scale: float
) -> tuple[Float[Array, "batch heads padded_seq"], Float[Array, "batch heads padded_seq"]]:
    """What the accumulators start from: -log_sum_exp in units of the unscaled scores, and -rowsum(dO * O)."""
    delta = jnp.einsum("bshv,bshv->bhs", out, d_out, preferred_element_type=jnp.float32)
    delta = jnp.pad(delta, ((0, 0), (0, 0), (0, log_sum_exp.shape[-1] - delta.shape[-1])))
    return -log_sum_exp / (scale * LOG2_E), -delta
