"""What the text of a compiled program says about its exchanges: what each could run beside, and what it does."""

import re
from dataclasses import dataclass

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (?:\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")
_EXCHANGES = ("all-to-all", "ragged-all-to-all")
_KERNELS = re.compile(r'custom_call_target="[^"]*(?:gemm|matmul|cublas|cudnn|mosaic|triton)[^"]*"', re.IGNORECASE)


@dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    operands: tuple[str, ...]
    called: tuple[str, ...]
    """Computations that it runs."""
    is_kernel: bool
    """A call of a library's or a kernel's matrix product."""


@dataclass(frozen=True)
class ExchangeOverlap:
    """How many matrix products an exchange has to do with, in the computation that it stands in."""

    computation: str
    name: str
    products: int
    """All products of the computation."""
    independent: int
    """Those that neither need the exchange nor are needed by it."""
    during: int | None
    """Those that are scheduled between its start and its done; None where it is not asynchronous."""


def read_program(text: str) -> dict[str, list[Instruction]]:
    """The computations of an HLO module, `compiled.as_text()`, with their instructions in order."""
    computations: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            current = computations.setdefault(head[1], [])
        elif found := _INSTRUCTION.match(line):
            current.append(_instruction(*found.groups(), line))
    return computations


def exchange_overlaps(text: str) -> list[ExchangeOverlap]:
    """Every all-to-all of an HLO module whose computation holds matrix products, in order."""
    computations = read_program(text)
    return [
        overlap
        for name, instructions in computations.items()
        for overlap in _overlaps(name, instructions, computations)
        if overlap.products
    ]


def _instruction(name: str, opcode: str, rest: str, line: str) -> Instruction:
    depth, end = 1, 0
    while depth and end < len(rest):
        depth += {"(": 1, ")": -1}.get(rest[end], 0)
        end += 1
    branches = [b.strip().lstrip("%") for found in _BRANCHES.findall(line) for b in found.split(",")]
    operands = tuple(re.findall(r"%([\w.\-]+)", rest[:end]))
    return Instruction(name, opcode, operands, (*_CALLED.findall(rest[end:]), *branches), bool(_KERNELS.search(line)))


def _overlaps(
    computation: str, instructions: list[Instruction], computations: dict[str, list[Instruction]]
) -> list[ExchangeOverlap]:
    exchanges = [(i, x) for i, x in enumerate(instructions) if _starts_exchange(x, computations)]
    if not exchanges:
        return []
    products = {x.name: i for i, x in enumerate(instructions) if _is_product(x, computations)}
    needs = _transitive(instructions)
    found = []
    for place, exchange in exchanges:
        independent = [p for p in products if p not in needs[exchange.name] and exchange.name not in needs[p]]
        done = _done(exchange, instructions)
        during = None if done is None else sum(place < at < done for at in products.values())
        found.append(ExchangeOverlap(computation, exchange.name, len(products), len(independent), during))
    return found


def _starts_exchange(x: Instruction, computations: dict[str, list[Instruction]]) -> bool:
    if x.opcode in _EXCHANGES or x.opcode.removesuffix("-start") in _EXCHANGES:
        return True
    if x.opcode != "async-start":
        return False
    return any(inner.opcode in _EXCHANGES for name in x.called for inner in computations.get(name, []))


def _done(start: Instruction, instructions: list[Instruction]) -> int | None:
    """The place of the instruction that waits for an asynchronous one."""
    if not start.opcode.endswith("-start"):
        return None
    done = start.opcode.removesuffix("start") + "done"
    return next(i for i, x in enumerate(instructions) if x.opcode == done and start.name in x.operands)


def _is_product(x: Instruction, computations: dict[str, list[Instruction]]) -> bool:
    if x.opcode == "dot" or x.is_kernel:
        return True
    return any(_is_product(inner, computations) for name in x.called for inner in computations.get(name, []))


def _transitive(instructions: list[Instruction]) -> dict[str, set[str]]:
    """All that each instruction needs; operands stand before their users."""
    needs: dict[str, set[str]] = {}
    for x in instructions:
        needs[x.name] = set(x.operands).union(*(needs.get(operand, ()) for operand in x.operands))
    return needs
