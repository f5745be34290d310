"""Counts the multiplications of matrix products in a compiled program."""

import math
import re
from collections.abc import Callable
from functools import cache


def multiplications(text: str, branches: Callable[[list[float]], float]) -> float:
    """Of a run of the program whose compiled text this is: loops count as often as they turn.

    `branches` says what a conditional counts, from what each of its branches does, outer ones last. Raises ValueError
    for a loop whose number of turns is not known.
    """
    computations = {}
    for block in re.split(r"\n(?=(?:ENTRY )?%)", text):
        name = re.match(r"(?:ENTRY )?(%[\w.\-]+)", block)
        if name:
            computations[name[1]] = block
    entry = next(name for name, block in computations.items() if block.startswith("ENTRY"))

    @cache
    def count(name: str) -> float:
        block = computations[name]
        shapes = dict(re.findall(r"(%[\w.\-]+) = \w+\[([\d,]*)\]", block))
        shapes |= dict(re.findall(r"(%?[\w.\-]+): \w+\[([\d,]*)\]", block.split("\n")[0]))
        total = 0.0
        for line in block.split("\n")[1:]:
            if " dot(" in line:
                total += _dot(line, shapes)
            elif " while(" in line:
                turns = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
                if turns is None:
                    raise ValueError(f"a loop of unknown length: {line.strip()[:80]}")
                total += int(turns[1]) * count(re.search(r"body=(%[\w.\-]+)", line)[1])
            elif " conditional(" in line:
                found = re.search(r"branch_computations=\{([^}]*)\}", line)
                names = re.findall(r"%[\w.\-]+", found[1]) if found else re.findall(r"_computation=(%[\w.\-]+)", line)
                total += branches([count(branch) for branch in names])
            else:
                total += sum(count(called) for called in re.findall(r"(?:calls|to_apply)=(%[\w.\-]+)", line))
        return total

    return count(entry)


def _dot(line: str, shapes: dict[str, str]) -> float:
    result = re.search(r"= \w+\[([\d,]*)\]", line)[1]
    left = re.search(r" dot\((?:\w+\[([\d,]*)\]\S* )?(%[\w.\-]+)", line)
    sizes = _sizes(left[1] if left[1] is not None else shapes[left[2]])
    contracted = _sizes(re.search(r"lhs_contracting_dims=\{([\d,]*)\}", line)[1])
    return math.prod(_sizes(result)) * math.prod(sizes[dim] for dim in contracted)


def _sizes(text: str) -> list[int]:
    return [int(size) for size in text.split(",") if size]
