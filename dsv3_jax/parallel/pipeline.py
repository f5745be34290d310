"""One executor for every pipeline schedule: what one device does, tick by tick (report 3.2.1).

A `lax.scan` over the ticks of a table. In a tick each rank takes the branch that its table entry names: a forward, a
backward, weight gradients, or a forward and a backward in one region, whose exchanges hide behind each other's
products. Then all ranks pass on what they made. Pools are read inside the branches and written after them: a branch
that wrote one would copy it whole.

Stages are loops over the layers that a rank holds, from its first to its last, so that one program fits stages of any
size. Embedding and tail (final norm, head, MTP modules) run on the ranks of the first and last stage only; the tail
runs forward and backward at once, when the last stage's backward begins. Evaluation has forwards alone: nothing is
kept, and the tail follows the last stage's forward.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsv3_jax.ops.weights import Logs, Params
from dsv3_jax.parallel import pipeline_layer
from dsv3_jax.parallel.mesh import vary_over
from dsv3_jax.parallel.pipeline_layer import Layer, Weights
from dsv3_jax.parallel.pipeline_stages import Layout
from dsv3_jax.parallel.pipeline_table import Channel, Table, Work

type Tree = Any
type Row = dict[str, Int[Array, ""]]


@dataclass(frozen=True)
class Model:
    """A model in pieces, with its weights on this device."""

    embed: Callable[[Params, Int[Array, "batch seq"]], Float[Array, "batch seq d"]]
    """(ends, tokens) -> what enters the first layer."""
    tail: Callable[[Float[Array, "batch seq d"], Params, Int[Array, "batch seq"]], tuple[Array, Tree]]
    """(what leaves the last layer, ends, tokens) -> (the loss to differentiate, a report to sum over microbatches)."""
    ends: Params
    """What the gradients of embedding and tail are taken of."""
    layers: dict[str, Layer]
    """One layer of each kind, in the order that data passes them."""
    weights: dict[str, Weights]
    """Those of the layers that this rank holds, stacked."""
    contexts: dict[str, Tree]
    """The layers' last argument, stacked."""
    shared: Tree
    """What all layers' context has besides: a layer gets (its own, this)."""
    layouts: dict[str, Layout]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sums:
    """Over all microbatches, of what this rank ran."""

    gradients: dict[str, dict[str, Float[Array, "held ..."]]]
    """Float32, by kind and path."""
    ends: Params
    report: Tree
    """The tail's; zeros where this rank runs no last stage."""
    stats: dict[str, Tree]
    """The layers', stacked."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Made:
    """What a tick leaves: an output to pass on, a gradient to pass back, and what waits for later passes."""

    y: Array
    dx: Array
    kept: dict[str, Tree]
    products: dict[str, Tree]


@dataclass(frozen=True)
class _Rank:
    """What the passes of one rank read."""

    model: Model
    table: Table
    tokens: Tree
    """What embedding and tail read, stacked by microbatch."""
    stages: int
    axes: tuple[str, ...]

    @cached_property
    def shapes(self) -> tuple[Sums, _Made]:
        """Of all that the passes make."""
        return _shapes(self)

    @property
    def rows(self) -> Row:
        """The table's columns of this rank, stacked by tick."""
        here = jax.lax.axis_index("pipe")
        return self.vary({name: jnp.asarray(column)[:, here] for name, column in self.table.columns.items()})

    @property
    def nothing(self) -> _Made:
        """What a tick leaves that runs no pass."""
        return self.zeros(self.shapes[1])

    def zeros(self, shapes: Tree) -> Tree:
        """Of these shapes, differing between devices as all values of the scan do."""
        return jax.tree.map(lambda s: vary_over(jnp.zeros(s.shape, s.dtype), self.axes), shapes)

    def vary(self, tree: Tree) -> Tree:
        """Marked as differing between devices, as every value of the scan is."""
        return jax.tree.map(lambda x: vary_over(x, self.axes), tree)

    def place(self, kind: str, stage: Array) -> tuple[Array, Array | int]:
        """Where the stage's layers begin among those held, and how many there are."""
        layout = self.model.layouts[kind]
        first = jnp.asarray(layout.first)[jax.lax.axis_index("pipe"), stage]
        # Where all stages have as many layers, loops have a length that is known.
        same = layout.count.min() == layout.count.max()
        return first, int(layout.count[0]) if same else jnp.asarray(layout.count)[stage]

    def layer(self, kind: str, i: Array) -> tuple[Weights, Tree]:
        """Weights and context of a held layer."""
        weights, own = _take((self.model.weights[kind], self.model.contexts[kind]), i)
        return weights, (own, self.model.shared)


def run(
    model: Model,
    table: Table,
    stages: int,
    tokens: Int[Array, "microbatches batch seq"],
    axes: tuple[str, ...],
) -> Sums:
    """Losses and gradients of all microbatches, as sums over them, on this rank; `axes` are those of the whole mesh.

    To be called inside a shard_map with an axis `pipe`.
    """
    rank = _Rank(model, table, tokens, stages, axes)
    sums, made = rank.shapes
    most = {"inputs": made.y, "gradients": made.y, "kept": made.kept, "products": made.products}
    pools = {
        name: rank.zeros(
            jax.tree.map(lambda x, n=table.slots[name]: jax.ShapeDtypeStruct((n, *x.shape), x.dtype), value)
        )
        for name, value in most.items()
    }
    branches = [partial(_work, rank, work) for work in table.works]

    def tick(carry: tuple[dict, Sums], row: Row) -> tuple[tuple[dict, Sums], None]:
        pools, sums = carry
        sums, made = jax.lax.switch(row["work"], branches, sums, pools, row)
        return (_pass_on(table, pools, made, row), sums), None

    (_, sums), _ = jax.lax.scan(tick, (pools, rank.zeros(sums)), rank.rows)
    return sums


def run_forward(model: Model, table: Table, stages: int, batches: Tree, axes: tuple[str, ...]) -> Tree:
    """The tail's report, summed over microbatches, on the rank of the last stage; zeros on the others. No backward.

    To be called as `run`, with the table of a schedule that has forwards only. What embedding and tail read of a
    microbatch may be any tree, stacked.
    """
    rank = _Rank(model, table, batches, stages, axes)
    x = jax.eval_shape(model.embed, model.ends, _take(batches, jnp.int32(0)))
    report = jax.eval_shape(model.tail, x, model.ends, _take(batches, jnp.int32(0)))[1]

    def forward(inputs: Array, report: Tree, row: Row) -> tuple[Array, Tree]:
        stage, batch = row["F_stage"], _take(batches, row["F_microbatch"])
        x = _entering(rank, inputs, row)
        for kind, layer in model.layers.items():
            first, count = rank.place(kind, stage)

            def body(i: Array, x: Array, kind: str = kind, layer: Layer = layer, first: Array = first) -> Array:
                return rank.vary(layer(x, *rank.layer(kind, first + i))[0][0])

            x = jax.lax.fori_loop(0, count, body, x)

        def tail() -> Tree:
            return rank.vary(_sum(report, model.tail(x, model.ends, batch)[1]))

        return x, jax.lax.cond(stage == stages - 1, tail, lambda: report)

    branches = [forward if work[0] else lambda inputs, report, row: (rank.zeros(x), report) for work in table.works]

    def tick(carry: tuple[Array, Tree], row: Row) -> tuple[tuple[Array, Tree], None]:
        inputs, report = carry
        y, report = jax.lax.switch(row["work"], branches, inputs, report, row)
        for channel in table.channels:
            inputs = _arrive(channel, inputs, y, row)
        return (inputs, report), None

    pool = jax.ShapeDtypeStruct((table.slots["inputs"], *x.shape), x.dtype)
    (_, report), _ = jax.lax.scan(tick, rank.zeros((pool, report)), rank.rows)
    return report


def _pass_on(table: Table, pools: dict[str, Tree], made: _Made, row: Row) -> dict[str, Tree]:
    """Writes what a tick made into the pools that it waits in, here or on the rank that needs it."""
    pools = {
        **pools,
        "kept": _put(pools["kept"], row["F_to"], made.kept),
        "products": _put(pools["products"], row["I_to"], made.products),
        "gradients": _put(pools["gradients"], row["F_last_to"], made.y),
    }
    for channel in table.channels:
        value, pool = (made.y, "inputs") if channel.passes == "F" else (made.dx, "gradients")
        pools[pool] = _arrive(channel, pools[pool], value, row)
    return pools


def _arrive(channel: Channel, pool: Array, value: Array, row: Row) -> Array:
    """The pool of the rank that a value goes to, with it."""
    if channel.shift:
        value = jax.lax.ppermute(value, "pipe", channel.pairs)
    return _put(pool, row[channel.name], value)


def _work(rank: _Rank, work: Work, sums: Sums, pools: dict[str, Tree], row: Row) -> tuple[Sums, _Made]:
    forward, backward, weight = work
    made = rank.nothing
    if forward:
        y, kept, sums = _forward(rank, sums, pools, row)
        made = replace(made, y=y, kept=kept)
    if backward:
        dx, products, sums = _backward(rank, sums, pools, row, defer=backward == "I")
        made = replace(made, dx=dx, products=products)
    if weight:
        sums = _weight(rank, sums, pools, row)
    return rank.vary(sums), rank.vary(made)


def _forward(rank: _Rank, sums: Sums, pools: dict[str, Tree], row: Row) -> tuple[Array, dict[str, Tree], Sums]:
    model, stage = rank.model, row["F_stage"]
    x = _entering(rank, pools["inputs"], row)
    kept, stats = rank.nothing.kept, dict(sums.stats)
    for kind, layer in model.layers.items():
        first, count = rank.place(kind, stage)

        def body(i: Array, carry: tuple, kind: str = kind, layer: Layer = layer, first: Array = first) -> tuple:
            x, kept, stats = carry
            x, own, seen = pipeline_layer.forward(layer, x, *rank.layer(kind, first + i))
            return rank.vary((x, _set(kept, i, own), _add(stats, first + i, seen)))

        x, kept[kind], stats[kind] = jax.lax.fori_loop(0, count, body, (x, kept[kind], stats[kind]))
    return x, kept, replace(sums, stats=stats)


def _entering(rank: _Rank, inputs: Array, row: Row) -> Array:
    """What enters a forward: the embedded tokens, or what the stage before has sent."""
    tokens = _take(rank.tokens, row["F_microbatch"])
    return jax.lax.cond(
        row["F_stage"] == 0,
        lambda: rank.vary(rank.model.embed(rank.model.ends, tokens)),
        lambda: _take(inputs, row["F_from"]),
    )


def _backward(
    rank: _Rank, sums: Sums, pools: dict[str, Tree], row: Row, defer: bool
) -> tuple[Array, dict[str, Tree], Sums]:
    """The input's gradient. Weight gradients are computed too, or their products returned to wait in the pool."""
    model, stage = rank.model, row["I_stage"]
    tokens = _take(rank.tokens, row["I_microbatch"])
    dy, sums = _backward_of_tail(rank, sums, _take(pools["gradients"], row["I_from"]), stage, tokens)
    kept, products, gradients = _take(pools["kept"], row["I_kept"]), rank.nothing.products, dict(sums.gradients)
    for kind, layer in reversed(model.layers.items()):
        first, count = rank.place(kind, stage)

        def body(
            j: Array,
            carry: tuple,
            kind: str = kind,
            layer: Layer = layer,
            first: Array = first,
            count: Array | int = count,
        ) -> tuple:
            dy, gradients, products = carry
            i = count - 1 - j
            dx, small, logs = pipeline_layer.backward(layer, _take(kept[kind], i), dy, *rank.layer(kind, first + i))
            gradients = _add(gradients, first + i, small)
            gradients = gradients if defer else _add_products(gradients, first + i, logs)
            return rank.vary((dx, gradients, _set(products, i, logs) if defer else products))

        carry = (dy, gradients[kind], products.get(kind))
        dy, gradients[kind], products[kind] = jax.lax.fori_loop(0, count, body, carry)
    sums = replace(sums, gradients=gradients, ends=_backward_of_embedding(rank, sums.ends, dy, stage, tokens))
    return dy, products if defer else rank.nothing.products, sums


def _backward_of_tail(
    rank: _Rank, sums: Sums, dy: Array, stage: Array, tokens: Int[Array, "batch seq"]
) -> tuple[Array, Sums]:
    """On the last stage, whose output waits where others have their output's gradient: loss and gradient of it."""
    gradient = jax.grad(rank.model.tail, argnums=(0, 1), has_aux=True)

    def tail() -> tuple[Array, Params, Tree]:
        (dy_, ends), report = gradient(dy, rank.model.ends, tokens)
        return rank.vary((dy_, _sum(sums.ends, ends), _sum(sums.report, report)))

    last = stage == rank.stages - 1
    dy, ends, report = jax.lax.cond(last, tail, lambda: (dy, sums.ends, sums.report))
    return dy, replace(sums, ends=ends, report=report)


def _backward_of_embedding(
    rank: _Rank, ends: Params, dx: Array, stage: Array, tokens: Int[Array, "batch seq"]
) -> Params:
    def embedding() -> Params:
        _, pullback = jax.vjp(lambda ends: rank.model.embed(ends, tokens), rank.model.ends)
        return rank.vary(_sum(ends, pullback(dx)[0]))

    return jax.lax.cond(stage == 0, embedding, lambda: ends)


def _weight(rank: _Rank, sums: Sums, pools: dict[str, Tree], row: Row) -> Sums:
    """Multiplies what a backward has logged earlier."""
    products, gradients = _take(pools["products"], row["W_from"]), dict(sums.gradients)
    for kind in rank.model.layers:
        first, count = rank.place(kind, row["W_stage"])

        def body(i: Array, gradients: Tree, kind: str = kind, first: Array = first) -> Tree:
            return rank.vary(_add_products(gradients, first + i, _take(products[kind], i)))

        gradients[kind] = jax.lax.fori_loop(0, count, body, gradients[kind])
    return replace(sums, gradients=gradients)


def _shapes(rank: _Rank) -> tuple[Sums, _Made]:
    model = rank.model
    x = jax.eval_shape(model.embed, model.ends, rank.tokens[0])
    report = jax.eval_shape(model.tail, x, model.ends, rank.tokens[0])[1]
    kept, products, stats, gradients = {}, {}, {}, {}
    for kind, layer in model.layers.items():
        most, held = int(model.layouts[kind].count.max()), model.layouts[kind].held.shape[1]
        weights, context = jax.eval_shape(partial(rank.layer, kind), jnp.int32(0))
        _, own, seen = jax.eval_shape(partial(pipeline_layer.forward, layer), x, weights, context)
        logs, made = jax.eval_shape(partial(_backward_and_weight, layer), own, x, weights, context)
        kept[kind], products[kind] = _stacked(most, own), _stacked(most, logs)
        stats[kind], gradients[kind] = _stacked(held, seen), _stacked(held, made)
    if not rank.table.slots["products"]:
        products = dict.fromkeys(products)
    return Sums(gradients, model.ends, report, stats), _Made(x, x, kept, products)


def _backward_and_weight(layer: Layer, kept: Tree, dy: Array, weights: Weights, context: Tree) -> tuple[Tree, Tree]:
    _, small, logs = pipeline_layer.backward(layer, kept, dy, weights, context)
    return logs, small | {name: product.compute() for name, product in logs.items()}


def _stacked(count: int, shapes: Tree) -> Tree:
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct((count, *s.shape), s.dtype), shapes)


def _take(tree: Tree, i: Array) -> Tree:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), tree)


def _set(tree: Tree, i: Array, values: Tree) -> Tree:
    return jax.tree.map(lambda x, v: jax.lax.dynamic_update_index_in_dim(x, v, i, 0), tree, values)


def _put(pool: Tree, slot: Array, values: Tree) -> Tree:
    """Writes into a slot; -1 writes back what is there."""

    def put(x: Array, value: Array) -> Array:
        at = jnp.maximum(slot, 0)
        old = jax.lax.dynamic_index_in_dim(x, at, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(x, jnp.where(slot < 0, old, value), at, 0)

    return jax.tree.map(put, pool, values)


def _add(stacked: dict[str, Array] | Tree, i: Array, values: Tree) -> Tree:
    """Adds to element i; a dict may have more than is added to."""
    if isinstance(stacked, dict):
        return stacked | {name: _add(stacked[name], i, value) for name, value in values.items()}
    return jax.tree.map(lambda x, v: x.at[i].add(v.astype(x.dtype)), stacked, values)


def _add_products(stacked: dict[str, Array], i: Array, logs: Logs) -> dict[str, Array]:
    """Adds the gradients of what was logged to element i."""
    return stacked | {name: product.add_to(stacked[name], i) for name, product in logs.items()}


def _sum(total: Tree, values: Tree) -> Tree:
    return jax.tree.map(lambda x, v: x + v, total, values)
