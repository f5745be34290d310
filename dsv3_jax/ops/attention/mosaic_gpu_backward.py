"""The Hopper kernel of causal attention's gradients: one pass over all pairs of a tile of keys and a tile of queries.

A persistent grid, one block an SM, each with its list of tiles of 128 keys. One warp of the last warpgroup brings the
tile's keys and values, then queries and output gradients, 64 at a time, into the next free slots. Two warpgroups hold
the gradients of 64 keys each in registers. With scores transposed, so that probabilities are left sides in registers:

    S^T = K Q^T - lse | dP^T = V dO^T - delta | P = exp2 S | dS = P dP | dV += P^T dO | dK += dS^T Q | dQ += dS K

dQ needs the dS of both warpgroups: they meet over a copy in shared memory, then each computes 64 or 128 of its 192
columns, turn about, and adds them to float32 in L2. So is the gradient of the rotary key, which all heads share: 32 KiB
a tile and head, 2% of what dQ adds, where a copy for each head would be written and read again (537 MB at 128 heads
and 4096 tokens with float32, 9% of the traffic of all other operands). lse and delta are what the accumulators of S and
dP start from, so they take neither registers nor instructions of their own.

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

from dsv3_jax.ops.attention.kernel_parts import LOG2_E, Segments, accumulate, following, preset, settled, unseen_zero, visible
from dsv3_jax.ops.attention.worklists import locate, worklists
from dsv3_jax.ops.hopper import WARPGROUP_ROWS, lowered_once, operand, producer_and_consumers

_WGMMA = plgpu.Layout.WGMMA
_QUERIES = 64
"""Of a tile."""
_CHUNK = 64
"""Columns of q and k in one piece of shared memory, and of dQ that a warpgroup computes at a time."""

Gradients = tuple[Array, Array, Array, Array, Array]


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


@lowered_once("scale", "config", "num_sms", "interpret")
def attention_backward(
    q_nope: Float[Array, "batch seq heads nope"],
    q_rope: Float[Array, "batch seq heads rope"],
    k_nope: Float[Array, "batch seq heads nope"],
    k_rope: Float[Array, "batch seq rope"],
    v: Float[Array, "batch seq heads v"],
    segments: Segments | None,
    out: Float[Array, "batch seq heads v"],
    log_sum_exp: Float[Array, "batch heads padded_seq"],
    d_out: Float[Array, "batch seq heads v"],
    *,
    scale: float,
    config: BackwardConfig,
    num_sms: int = 132,
    interpret: Any = None,
) -> Gradients:
    """Gradients of the five operands, from what the forward pass returned."""
    batch, seq, heads, nope = q_nope.shape
    rope, width, dtype = q_rope.shape[-1], v.shape[-1], q_nope.dtype
    chunks, nope_chunks = (nope + rope) // _CHUNK, nope // _CHUNK
    keys, stages = config.keys, config.stages
    tiles, query_tiles = pl.cdiv(seq, keys), pl.cdiv(seq, _QUERIES)
    diagonal = keys // _QUERIES  # tiles of queries from which some keys are hidden by position
    work = worklists(batch, heads, [query_tiles - i * diagonal + 2 for i in range(tiles)], num_sms, config.heads)
    lse, delta = _per_query(out, log_sum_exp, d_out, scale)
    # The interpreter cannot add on the way to global memory: it gets a place for each of the summands.
    summands = (1, 1) if interpret is None else (tiles, heads)
    how = None if interpret is not None else "add"
    dq_sum = jax.new_ref(jnp.zeros((summands[0], batch, seq, heads, nope + rope), jnp.float32))
    dkr_sum = jax.new_ref(jnp.zeros((summands[1], batch, seq, rope), jnp.float32))

    def body(tiles_ref, bounds_ref, *refs):
        seg, refs = Segments.take(refs, segments)
        qn_ref, qr_ref, kn_ref, kr_ref, v_ref, do_ref, lse_ref, delta_ref, dq_ref, dkr_ref, dkn_ref, dv_ref, *refs = refs
        q_s, do_s, lse_s, delta_s, k_s, v_s, ds_s, dq_s, kv_full, kv_empty, q_full, do_full, empty, *refs = refs
        ds_full, ds_empty, *seg_s = refs
        wg, sm = lax.axis_index("wg"), lax.axis_index("sm")

        def for_each_tile(f) -> None:
            """f(tile, its first and last tile of queries, slot) -> slot."""

            def one(i, slot):
                at = locate(tiles_ref[i], heads, tiles)
                last = jnp.int32(query_tiles - 1) if seg is None else seg.last_queries[at.batch, at.index]
                return f(at, at.index * diagonal, last, slot)

            lax.fori_loop(bounds_ref[sm], bounds_ref[sm + 1], one, jnp.int32(0))

        def load_tile(at, first, last, slot):
            those = pl.ds(at.index * keys, keys)

            def load_keys():
                plgpu.barrier_wait(kv_empty)
                for c in range(nope_chunks):
                    columns = pl.ds(c * _CHUNK, _CHUNK)
                    plgpu.copy_gmem_to_smem(kn_ref.at[at.batch, those, at.head, columns], k_s.at[c], kv_full)
                for c in range(nope_chunks, chunks):
                    columns = pl.ds((c - nope_chunks) * _CHUNK, _CHUNK)
                    plgpu.copy_gmem_to_smem(kr_ref.at[at.batch, those, columns], k_s.at[c], kv_full)
                plgpu.copy_gmem_to_smem(v_ref.at[at.batch, those, at.head], v_s, kv_full)
                if seg is not None:
                    plgpu.copy_gmem_to_smem(seg.ids.at[at.batch, those], seg_s[0], kv_full)

            def load_queries(i, slot):
                mine = pl.ds(i * _QUERIES, _QUERIES)
                plgpu.barrier_wait(empty.at[slot])
                for c in range(chunks):
                    part_ref, column = (qn_ref, c) if c < nope_chunks else (qr_ref, c - nope_chunks)
                    part_ref = part_ref.at[at.batch, mine, at.head, pl.ds(column * _CHUNK, _CHUNK)]
                    plgpu.copy_gmem_to_smem(part_ref, q_s.at[slot, c], q_full.at[slot])
                plgpu.copy_gmem_to_smem(lse_ref.at[at.batch, at.head, mine], lse_s.at[slot], q_full.at[slot])
                if seg is not None:
                    plgpu.copy_gmem_to_smem(seg.ids.at[at.batch, mine], seg_s[1].at[slot], q_full.at[slot])
                pl.when(i == first)(load_keys)
                plgpu.copy_gmem_to_smem(do_ref.at[at.batch, mine, at.head], do_s.at[slot], do_full.at[slot])
                plgpu.copy_gmem_to_smem(delta_ref.at[at.batch, at.head, mine], delta_s.at[slot], do_full.at[slot])
                return following(slot, stages)

            return lax.fori_loop(first, last + 1, load_queries, slot)

        def produce() -> None:
            for_each_tile(load_tile)
            plgpu.barrier_wait(kv_empty)
            for slot in range(stages):
                plgpu.barrier_wait(empty.at[slot])

        def compute_tile(at, first, last, slot):
            mine = pl.ds(wg * WARPGROUP_ROWS, WARPGROUP_ROWS)
            first_key = at.index * keys + wg * WARPGROUP_ROWS
            plgpu.barrier_wait(kv_full)
            seg_k = None if seg is None else plgpu.load(seg_s[0].at[mine], layout=_WGMMA.reduce(1))

            def probabilities(i, slot, mine, on_diagonal):
                """Of each key (row) and query, and the gradient of their logarithms, over the scale."""

                shape = (WARPGROUP_ROWS, _QUERIES)
                acc = plgpu.ACC(shape, jnp.float32)

                def start_from(ref):
                    return lax.broadcast_in_dim(plgpu.load(ref, layout=_WGMMA.reduce(0)), shape, [1])

                def scores(s_ref):
                    start = start_from(lse_s.at[slot])
                    preset(s_ref, start, interpret)
                    for c in range(chunks):
                        plgpu.wgmma(s_ref, k_s.at[c, mine], q_s.at[slot, c].transpose((1, 0)))
                    return settled(s_ref, start, interpret)

                def gradients(dp_ref):
                    start = start_from(delta_s.at[slot])
                    preset(dp_ref, start, interpret)
                    plgpu.wgmma(dp_ref, v_s.at[mine], do_s.at[slot].transpose((1, 0)))
                    return settled(dp_ref, start, interpret)

                plgpu.barrier_wait(q_full.at[slot])
                p = jnp.exp2(pl.run_scoped(scores, acc) * (scale * LOG2_E))
                seg_q = None if seg is None else plgpu.load(seg_s[1].at[slot], layout=_WGMMA.reduce(0))
                seen = visible(shape, i * _QUERIES, first_key if on_diagonal else None, seg_q, seg_k, queries=1)
                p = (p if seen is None else jnp.where(seen, p, 0.0)).astype(dtype)
                plgpu.barrier_wait(do_full.at[slot])
                return p, (p.astype(jnp.float32) * pl.run_scoped(gradients, acc)).astype(dtype)

            def add_dq(i, chunk, ds_ref):
                """Adds 64 columns of dQ to those in memory."""

                def product(acc_ref):
                    plgpu.wgmma(acc_ref, ds_ref.transpose((1, 0)), k_s.at[chunk])
                    return acc_ref[...]

                dq = pl.run_scoped(product, plgpu.ACC((_QUERIES, _CHUNK), jnp.float32))
                dq_s[chunk] = dq
                plgpu.commit_smem()
                place = 0 if interpret is None else at.index
                columns = pl.ds(chunk * _CHUNK, _CHUNK)
                target = dq_ref.at[place, at.batch, pl.ds(i * _QUERIES, _QUERIES), at.head, columns]
                plgpu.copy_smem_to_gmem(dq_s.at[chunk], target, reduction_op=how)

            def step(i, carry, on_diagonal):
                dk, dv, slot = carry
                zero = unseen_zero()
                mine, ds_ref = pl.ds((wg + zero) * WARPGROUP_ROWS, WARPGROUP_ROWS), ds_s.at[zero]
                p, ds = probabilities(i, slot, mine, on_diagonal)
                plgpu.barrier_wait(ds_empty)

                def products(dk_refs, dv_ref):
                    weighted = accumulate(dv_ref, dv, p, do_s.at[slot], interpret)
                    ds_ref[mine] = ds
                    plgpu.commit_smem()
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    plgpu.barrier_arrive(ds_full)
                    parts = [
                        accumulate(dk_refs[c], dk[c], ds, q_s.at[slot, c], interpret) for c in range(chunks)
                    ]
                    plgpu.barrier_wait(ds_full)
                    add_dq(i, lax.rem(i + wg, jnp.int32(2)), ds_ref)
                    result = [part(0) for part in parts], weighted(0)
                    plgpu.barrier_arrive(empty.at[slot])
                    return result

                acc = [plgpu.ACC((WARPGROUP_ROWS, _CHUNK), jnp.float32)] * chunks
                dk, dv = pl.run_scoped(products, acc, plgpu.ACC((WARPGROUP_ROWS, width), jnp.float32))
                pl.when(lax.rem(i + wg, jnp.int32(2)) == 0)(lambda: add_dq(i, zero + 2, ds_ref))
                plgpu.barrier_arrive(ds_empty)
                return dk, dv, following(slot, stages)

            zeros = [plgpu.layout_cast(jnp.zeros((64, n), jnp.float32), _WGMMA) for n in [_CHUNK] * chunks + [width]]
            masked = lax.min(first + diagonal, last + 1)
            carry = (zeros[:chunks], zeros[-1], slot)
            carry = lax.fori_loop(first, masked, lambda i, c: step(i, c, True), carry)
            dk, dv, slot = lax.fori_loop(masked, last + 1, lambda i, c: step(i, c, False), carry)
            # Once both warpgroups have used the keys and their dQ has left shared memory, gradients take its place.
            plgpu.barrier_wait(ds_empty)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_arrive(ds_full)
            plgpu.barrier_wait(ds_full)
            zero = unseen_zero()
            mine, those = pl.ds((wg + zero) * WARPGROUP_ROWS, WARPGROUP_ROWS), pl.ds(first_key, WARPGROUP_ROWS)
            for c in range(nope_chunks):
                k_s[zero + c, mine] = (dk[c] * scale).astype(dtype)
            v_s[mine] = dv.astype(dtype)
            dq_s[wg + zero] = dk[-1] * scale
            plgpu.commit_smem()
            for c in range(nope_chunks):
                target = dkn_ref.at[at.batch, those, at.head, pl.ds(c * _CHUNK, _CHUNK)]
                plgpu.copy_smem_to_gmem(k_s.at[zero + c, mine], target)
            plgpu.copy_smem_to_gmem(v_s.at[mine], dv_ref.at[at.batch, those, at.head])
            place = 0 if interpret is None else at.head
            plgpu.copy_smem_to_gmem(dq_s.at[wg + zero], dkr_ref.at[place, at.batch, those], reduction_op=how)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_arrive(ds_empty)
            plgpu.barrier_arrive(kv_empty)
            return slot

        def consume() -> None:
            plgpu.barrier_arrive(kv_empty)
            plgpu.barrier_arrive(ds_empty)
            for slot in range(stages):
                plgpu.barrier_arrive(empty.at[slot])
            for_each_tile(compute_tile)
            plgpu.barrier_wait(ds_empty)

        producer_and_consumers(config, produce, consume)

    workers, extra = config.warpgroups, 0 if segments is None else 1
    run = plgpu.kernel(
        body,
        out_type=(jax.ShapeDtypeStruct(k_nope.shape, dtype), jax.ShapeDtypeStruct(v.shape, dtype)),
        scratch_types=[
            operand((stages, chunks, _QUERIES, _CHUNK), dtype),
            operand((stages, _QUERIES, width), dtype),
            plgpu.SMEM((stages, _QUERIES), jnp.float32),
            plgpu.SMEM((stages, _QUERIES), jnp.float32),
            operand((chunks, keys, _CHUNK), dtype),
            operand((keys, width), dtype),
            operand((1, keys, _QUERIES), dtype),
            operand((chunks, _QUERIES, _CHUNK), jnp.float32),
            plgpu.Barrier(num_arrivals=chunks + 1 + extra),
            plgpu.Barrier(num_arrivals=workers),
            plgpu.Barrier(num_arrivals=chunks + 1 + extra, num_barriers=stages),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.Barrier(num_arrivals=workers, num_barriers=stages),
            plgpu.Barrier(num_arrivals=workers),
            plgpu.Barrier(num_arrivals=workers),
            *([] if segments is None else [plgpu.SMEM(s, jnp.int32) for s in ((keys,), (stages, _QUERIES))]),
        ],
        grid=(num_sms,),
        grid_names=("sm",),
        num_threads=workers + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        **({} if interpret is None else {"interpret": interpret}),
    )
    given = () if segments is None else segments
    operands = (q_nope, q_rope, k_nope, k_rope, v, d_out, lse, delta)
    dk_nope, dv = run(*map(jnp.asarray, work), *given, *operands, dq_sum, dkr_sum)
    dq = (jax.freeze(dq_sum).sum(0) * scale).astype(dtype)
    dk_rope = jax.freeze(dkr_sum).sum(0).astype(dtype)
    return dq[..., :nope], dq[..., nope:], dk_nope, dk_rope, dv


def _per_query(
    out: Array, log_sum_exp: Array, d_out: Array, scale: float
) -> tuple[Float[Array, "batch heads padded_seq"], Float[Array, "batch heads padded_seq"]]:
    """What the accumulators start from: -log_sum_exp in units of the unscaled scores, and -rowsum(dO * O)."""
    delta = jnp.einsum("bshv,bshv->bhs", out, d_out, preferred_element_type=jnp.float32)
    delta = jnp.pad(delta, ((0, 0), (0, 0), (0, log_sum_exp.shape[-1] - delta.shape[-1])))
    return -log_sum_exp / (scale * LOG2_E), -delta
