"""How FP8 products are cut: what `tune` found fastest for the shapes that are trained, and a rule for all others."""

import functools
import json
import math
from importlib import resources
from typing import Literal

from dsv3_jax.ops.hopper import MULTIPROCESSORS, Config
from dsv3_jax.ops.quantize.formats import TILE

Kind = Literal["matmul", "grouped_matmul", "wgrad"]

# Outputs, reduced width: every linear of the 671B model (report 4.2), with q_down and kv_down as one.
SHAPES_671B = {
    "q_kv_down": (2112, 7168),
    "q_up": (24576, 1536),
    "kv_up": (32768, 512),
    "out": (7168, 16384),
    "gate_up": (4096, 7168),
    "down": (7168, 2048),
}

_TWO_WARPGROUPS_TAKE = {"matmul": 1.05, "grouped_matmul": 1.05, "wgrad": 1.15}
"""Of the time that three take for as many rows of a large result, as measured on an H100."""


def config_for(kind: Kind, m: int, n: int, k: int, groups: int = 1) -> Config:
    """The cut of `groups` [m, n] results over a reduction of k (of a group), in grouped products of all their rows."""
    found = _tuned().get(f"{kind} {m} {n} {k}")
    return Config(**found) if found is not None else _by_rule(kind, groups * m, n)


def _by_rule(kind: Kind, m: int, n: int) -> Config:
    """Three warpgroups hide promotion best, unless two leave fewer multiprocessors idle at the end. The weights of many
    groups keep L2 busy, which clusters spare."""

    def cost(rows: int) -> float:
        rounds = math.ceil(math.ceil(m / rows) * math.ceil(n / TILE) / MULTIPROCESSORS)
        return rounds * rows * (_TWO_WARPGROUPS_TAKE[kind] if rows == 128 else 1)

    return Config(rows=min((192, 128), key=cost), cluster=2 if kind == "grouped_matmul" else 1)


@functools.cache
def _tuned() -> dict[str, dict[str, int]]:
    return json.loads(resources.files(__package__).joinpath("tiles.json").read_text())
