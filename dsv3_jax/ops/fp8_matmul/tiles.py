"""How FP8 products are cut: what `tune` found fastest for the shapes that are trained, and a rule for all others."""

import functools
import json
import math
from dataclasses import dataclass
from importlib import resources
from typing import Literal

from dsv3_jax.ops.hopper import MULTIPROCESSORS, Config
from dsv3_jax.ops.quantize.formats import TILE

Kind = Literal["matmul", "grouped_matmul", "wgrad", "grouped_wgrad"]


@dataclass(frozen=True)
class Shapes:
    """The linears of a model, each as its outputs and the width it reduces, and how many rows they meet on a GPU."""

    rows: int
    linears: dict[str, tuple[int, int]]
    routed_rows: int
    groups: int
    """Experts on the GPU, of whose products all rows together are `routed_rows`."""
    experts: dict[str, tuple[int, int]]


TUNED = {
    # A GPU's share of the 671B model (report 4.2), with q_down and kv_down as one.
    "671b": Shapes(
        rows=4096,
        linears={
            "q_kv_down": (2112, 7168),
            "q_up": (24576, 1536),
            "kv_up": (32768, 512),
            "out": (7168, 16384),
            "gate_up": (4096, 7168),
            "down": (7168, 2048),
        },
        routed_rows=32768,
        groups=4,
        experts={"gate_up": (4096, 7168), "down": (7168, 2048)},
    ),
    # 2.3 billion parameters on one GPU: experiments/whole_model. 106496 rows are 6 of each token's, each expert's in
    # whole tiles.
    "2b": Shapes(
        rows=16384,
        linears={
            "q": (3072, 2048),
            "kv_down": (576, 2048),
            "kv_up": (4096, 512),
            "out": (2048, 2048),
            "dense_gate_up": (12288, 2048),
            "dense_down": (2048, 6144),
            "shared_down": (2048, 1536),
        },
        routed_rows=106496,
        groups=64,
        experts={"gate_up": (1536, 2048), "down": (2048, 768)},
    ),
}
SHAPES_671B = TUNED["671b"]

_TWO_WARPGROUPS_TAKE = {"matmul": 1.1, "grouped_matmul": 1.07, "wgrad": 1.2, "grouped_wgrad": 1.15}
"""Of the time that three take for as many rows of a large result, as measured on an H100."""


def config_for(kind: Kind, m: int, n: int, k: int, groups: int = 1) -> Config:
    """The cut of an [m, n] result over a reduction of k, which for grouped products has the rows of all groups; of
    grouped weight gradients there are `groups` results, each over a k of its own."""
    found = _tuned().get(tiles_key(kind, m, n, k))
    rows = groups * m if kind == "grouped_wgrad" else m
    return Config(**found) if found is not None else _by_rule(kind, rows, n)


def tiles_key(kind: Kind, m: int, n: int, k: int) -> str:
    """Under which `tiles.json` has a cut."""
    return f"{kind} {m} {n} {k}"


def _by_rule(kind: Kind, m: int, n: int) -> Config:
    """Three warpgroups hide promotion best, unless two leave fewer multiprocessors idle at the end. The weights of many
    groups keep L2 busy, which clusters spare. Narrow bands suit products, wider ones weight gradients."""

    def cost(rows: int) -> float:
        rounds = math.ceil(math.ceil(m / rows) * math.ceil(n / TILE) / MULTIPROCESSORS)
        return rounds * rows * (_TWO_WARPGROUPS_TAKE[kind] if rows == 128 else 1)

    return Config(
        rows=min((192, 128), key=cost),
        band=8 if kind in ("wgrad", "grouped_wgrad") else 4,
        cluster=2 if kind == "grouped_matmul" else 1,
    )


@functools.cache
def _tuned() -> dict[str, dict[str, int]]:
    return json.loads(resources.files(__package__).joinpath("tiles.json").read_text())
