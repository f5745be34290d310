"""What the matrix kernels for Hopper share: operands in shared memory, who produces and consumes, walk and store."""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, Literal, Protocol, get_args

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.extend.core import jaxpr_as_fun
from jaxtyping import Array

WARPGROUP_ROWS = 64
MULTIPROCESSORS = 132
"""Of an H100 or H200. On a card with another number kernels are correct, and work may be shared out less evenly."""


@dataclass(frozen=True)
class Config:
    """How a product is cut."""

    rows: int = 128
    """Rows of an output tile, 64 for each compute warpgroup: 128 or 192."""
    cols: int = 128
    """Columns of an output tile."""
    stages: int = 4
    """Slots in shared memory for parts of both operands."""
    band: int = 8
    """Tiles are walked in bands of so many rows of tiles, so that operands are still in L2."""
    cluster: int = 1
    """Blocks that work side by side on tiles of the same rows, each bringing a part of these rows for all of them."""

    @property
    def warpgroups(self) -> int:
        """Compute warpgroups."""
        return self.rows // WARPGROUP_ROWS

    @property
    def registers(self) -> tuple[int, int]:
        """Of a thread of a compute warpgroup, and of the producer."""
        return (232, 40) if self.warpgroups == 2 else (160, 24)


Implementation = Literal["reference", "mosaic_gpu"]


def lowered_once(*static: str) -> Callable:
    """A decorator for what launches a kernel: a program that calls it many times with operands of one shape holds, and
    compiles, it once. `static` names the arguments that are no arrays.

    Under `shard_map` the kernel is traced apart: operands that vary between devices would make its references vary too,
    which Pallas refuses. Its results vary as the operands do.
    """

    def decorate(launch: Callable) -> Callable:
        compiled, parameters = jax.jit(launch, static_argnames=static), inspect.signature(launch)

        @wraps(launch)
        def run(*args: Any, **named: Any) -> Any:
            given = parameters.bind(*args, **named).arguments
            settings = {name: given.pop(name) for name in static if name in given}
            leaves, tree = jax.tree.flatten(dict(given))
            axes = frozenset().union(*(jax.typeof(x).mat.varying for x in leaves))
            if not axes:
                return compiled(*args, **named)

            def flat(*leaves: Array) -> Any:
                return compiled(**jax.tree.unflatten(tree, leaves), **settings)

            like = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves]
            traced, out = jax.make_jaxpr(flat, return_shape=True)(*like)
            results = jaxpr_as_fun(traced)(*leaves)
            return jax.tree.unflatten(jax.tree.structure(out), [_vary(x, axes) for x in results])

        return run

    return decorate


def _vary(x: Array, axes: frozenset[str]) -> Array:
    return lax.pcast(x, tuple(axes - jax.typeof(x).mat.varying), to="varying")


def takes_kernel(implementation: Implementation | None, what: str, *refusals: str | None) -> bool:
    """Whether the Hopper kernel of an operation runs, given why its operands refuse; None takes it where it can.

    Raises NotImplementedError where a kernel is asked for that cannot run, ValueError for an unknown name.
    """
    if implementation not in (None, *get_args(Implementation)):
        choices = ", ".join(map(repr, get_args(Implementation)))
        raise ValueError(f"implementation={implementation!r}: choose one of {choices}, or None")
    why = next((r for r in (*refusals, device_refusal()) if r is not None), None)
    if implementation == "mosaic_gpu" and why is not None:
        raise NotImplementedError(f"the Hopper kernel of {what} {why}: use implementation='reference'")
    return why is None and implementation != "reference"


def device_refusal() -> str | None:
    """Why the default backend cannot run Hopper kernels; None where it can."""
    if jax.default_backend() != "gpu":
        return f"needs a Hopper GPU, the backend is {jax.default_backend()}"
    capability = jax.devices()[0].compute_capability
    return None if capability == "9.0" else f"needs a Hopper GPU (compute capability 9.0), not {capability}"


def multiprocessors() -> int:
    """Of the GPU that kernels run on."""
    return jax.devices()[0].core_count


def operand(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory that wgmma reads: rows of 128 bytes in the layout it wants."""
    columns = 128 // jnp.dtype(dtype).itemsize
    transforms = (plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(128))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def walk(index: Array, grid: tuple[int, int], band: int) -> tuple[Array, Array]:
    """Row and column of the index-th output tile: bands of rows, back and forth."""
    return plgpu.planar_snake(index, grid, 0, band)


def in_turns(count: Array | int, stages: int, step: Callable[[Array, Array, Any], Any], carry: Any = None) -> Any:
    """carry = step(i, slot, carry) for each i of `count`, in slots that take turns, beginning with the first.

    A slot's address is known but for a zero that is hidden from the compiler: it would keep all addresses in registers.
    """
    if isinstance(count, int):
        # A single turn, or few steps that are left over, would become straight code, in which the compiler reads ahead
        # more than registers can hold.
        rounds = count // stages if count >= 2 * stages and count % stages == 0 else 0
    else:
        rounds = lax.div(count, jnp.int32(stages))

    def turn(i: Array, carried: tuple[Any, Array]) -> tuple[Any, Array]:
        carry, zero = carried
        zero = lax.optimization_barrier(zero)
        for slot in range(stages):
            carry = step(i * stages + slot, zero + slot, carry)
        return carry, zero

    def left_over(i: Array, carried: tuple[Any, Array]) -> tuple[Any, Array]:
        carry, slot = carried
        following = lax.select(slot == stages - 1, jnp.int32(0), slot + 1)
        return step(i, slot, carry), following

    carry, _ = lax.fori_loop(0, rounds, turn, (carry, jnp.int32(0)))
    return lax.fori_loop(rounds * stages, count, left_over, (carry, jnp.int32(0)))[0]


class Crew(Protocol):
    """What a block's warpgroups are, of every kernel's configuration."""

    @property
    def warpgroups(self) -> int:
        """Compute warpgroups."""

    @property
    def registers(self) -> tuple[int, int]:
        """Of a thread of a compute warpgroup, and of the producer."""


def producer_and_consumers(
    config: Crew, produce: Callable[[], None], consume: Callable[[], Any], producers: int = 1
) -> None:
    """Runs `produce` in so many warps of the last warpgroup and `consume`, which stores results, in the others."""
    wg = lax.axis_index("wg")

    @pl.when(wg == config.warpgroups)
    def _():
        plgpu.set_max_registers(config.registers[1], action="decrease")

        @pl.kernel(mesh=plgpu.WarpMesh(axis_name="warp"))
        def of_each_warp() -> None:
            pl.when(lax.axis_index("warp") < producers)(produce)

        of_each_warp()

    @pl.when(wg < config.warpgroups)
    def _():
        plgpu.set_max_registers(config.registers[0], action="increase")
        consume()
        plgpu.wait_smem_to_gmem(0, wait_read_only=False)


class Slotted(Crew, Protocol):
    """And how many slots in shared memory they share."""

    @property
    def stages(self) -> int:
        """Slots."""


def through_slots(
    config: Slotted, empty: Any, produce: Callable[[], None], consume: Callable[[], Any], producers: int = 1
) -> None:
    """`producer_and_consumers` around slots that all start out empty; producers stay until all are again."""

    def fill() -> None:
        produce()
        for slot in range(config.stages):
            plgpu.barrier_wait(empty.at[slot])

    def use() -> None:
        for slot in range(config.stages):
            plgpu.barrier_arrive(empty.at[slot])
        consume()

    producer_and_consumers(config, fill, use, producers)


@dataclass(frozen=True)
class Store:
    """Writes a warpgroup's sums, which come in chunks of columns, by way of shared memory."""

    cols: int
    """Of all chunks together."""
    chunk: int
    dtype: Any
    total: int
    """Columns of the whole output."""
    width: int
    """Columns of a slot: whole chunks, or a whole part of one."""
    slots: int
    """Of each warpgroup; while one is written, the next may be filled."""

    def scratch(self, warpgroups: int) -> Any:
        """The slots of all warpgroups."""
        size = jnp.dtype(self.dtype).itemsize
        swizzle = math.gcd(math.gcd(self.width, self.total) * size, 128)
        swizzles = (plgpu.SwizzleTransform(swizzle),) if swizzle > 16 else ()  # 16 bytes need none
        transforms = (plgpu.TilingTransform((8, swizzle // size)), *swizzles)
        return plgpu.SMEM((warpgroups, self.slots, WARPGROUP_ROWS, self.width), self.dtype, transforms=transforms)

    def __call__(
        self, sums: list[Array], slots_ref: Any, out_ref: Any, row: Array, col: Array, add: bool = False
    ) -> None:
        """Rows from `row`, columns from `col`; what lies beyond the output is dropped. `add` adds to what is there."""
        part = min(self.width, self.chunk)
        sums = [piece.astype(self.dtype) for piece in sums]
        pieces = sums if part == self.chunk else [s[:, i : i + part] for s in sums for i in range(0, self.chunk, part)]
        for slot, first in enumerate(range(0, self.cols, self.width)):
            slot_ref = slots_ref.at[slot % self.slots]
            plgpu.wait_smem_to_gmem(self.slots - 1, wait_read_only=True)
            for offset in range(0, self.width, part):
                slot_ref[:, pl.ds(offset, part)] = pieces[(first + offset) // part]
            plgpu.commit_smem()
            target = out_ref.at[pl.ds(row, WARPGROUP_ROWS), pl.ds(col + first, self.width)]
            plgpu.copy_smem_to_gmem(slot_ref, target, reduction_op="add" if add else None)


@dataclass(frozen=True)
class RowSquares:
    """Writes the sum of squares of each row of a warpgroup's tile: a gradient's norm, without reading it again."""

    groups: int
    rows: int
    """Of all of a group's tiles together."""
    col_tiles: int
    cols: int
    """Of a tile."""

    @property
    def out_type(self) -> jax.ShapeDtypeStruct:
        """A sum for each row of each tile of columns."""
        return jax.ShapeDtypeStruct((self.groups, self.col_tiles, self.rows), jnp.float32)

    def __call__(self, sums: list[Array], out_ref: Any, row: Array, col: Array) -> None:
        """Of rows from `row`, of the columns that begin at `col`, into those of the group."""
        target = out_ref.at[lax.div(col, jnp.int32(self.cols)), pl.ds(row, WARPGROUP_ROWS)]
        target[...] = sum((piece * piece).sum(axis=1) for piece in sums)
