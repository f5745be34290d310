"""How FP8 products are cut: what `tune` found fastest for the shapes that are trained, and a rule for all others."""

import functools
import json
from importlib import resources
from typing import Literal

from dsv3_jax.ops.hopper import Config

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


def config_for(kind: Kind, m: int, n: int, k: int) -> Config:
    """The cut of an [m, n] result over a reduction of k (of a group, where there are groups)."""
    found = _tuned().get(f"{kind} {m} {n} {k}")
    if found is not None:
        return Config(**found)
    # Three warpgroups hide promotion best, and clusters spare L2; two warpgroups waste less of a small result.
    return Config(rows=128) if m < 2 * 192 else Config(rows=192, cluster=2)


@functools.cache
def _tuned() -> dict[str, dict[str, int]]:
    return json.loads(resources.files(__package__).joinpath("tiles.json").read_text())
