"""Reads a program that XLA compiled: its matrix products, collectives, donations, large copies.

XLA's text is the only thing every backend gives. `plan.py` reports what is found here, and the
tests hold the training step to it.
"""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_LINE = re.compile(r"%?([\w.\-]+) = (\w+)\[([\d,]*)\]\S* ([\w\-]+)\(([^)]*)\)(.*)")
_COLLECTIVE = re.compile(rf"= (\S.*?) ({'|'.join(COLLECTIVES)})(?:-start)?\(")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")


class Instruction(NamedTuple):
    """One line with one result."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    operation: str
    operands: tuple[str, ...]
    attributes: str


def instructions(text: str) -> Iterator[Instruction]:
    """The instructions of all computations that return one array."""
    for line in text.splitlines():
        if match := _LINE.search(line):
            name, dtype, shape, operation, operands, attributes = match.groups()
            yield Instruction(
                name,
                dtype,
                _shape(shape),
                operation,
                _names(operands),
                attributes,
            )


def _names(operands: str) -> tuple[str, ...]:
    """Compiled programs write `%name`, those before it the name alone."""
    names = re.findall(r"%([\w.\-]+)", operands) or operands.split(", ")
    return tuple(names)


def _shape(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(",") if n)


def dot_flops(text: str) -> int:
    """Two times the multiply-adds of every dot, on one device.

    Only for programs without loops over dots, whose body would count once, and of backends that
    keep dots in their text: XLA's CPU does, its TPU turns them into convolutions.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    total = 0
    for found in instructions(text):
        shapes[found.name] = found.shape
        if found.operation == "dot":
            left = shapes[found.operands[0]]
            contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", found.attributes)
            assert contracted is not None, found
            inner = math.prod(left[int(i)] for i in contracted.group(1).split(","))
            total += 2 * math.prod(found.shape) * inner
        hidden = found.operation == "custom-call" and "matmul" in found.attributes
        assert not hidden, f"a matrix product that is not counted: {found}"
    return total


def collectives(text: str) -> Mapping[str, list[tuple[str, tuple[int, ...]]]]:
    """Dtype and shape of every collective's result, the largest of several, by its kind.

    >>> collectives("x = ((bf16[2,4]{1,0}), (bf16[8,4]{1,0})) all-gather-start(%y), dimensions={0}")
    {'all-gather': [('bf16', (8, 4))]}
    """
    found: dict[str, list[tuple[str, tuple[int, ...]]]] = collections.defaultdict(list)
    for line in text.splitlines():
        if match := _COLLECTIVE.search(line):
            results, kind = match.groups()
            arrays = [(dtype, _shape(shape)) for dtype, shape in _ARRAY.findall(results)]
            found[kind].append(max(arrays, key=lambda array: math.prod(array[1])))
    return dict(found)


def gathers_a_weight(text: str, smallest: int) -> bool:
    """Whether an all-gather returns as much as a matrix of `smallest` elements.

    The argmax over a vocabulary that is split gathers a number for every device and target.
    """
    gathered = collectives(text).get("all-gather", [])
    return any(math.prod(shape) >= smallest for _, shape in gathered)


def donated(text: str) -> set[int]:
    """The numbers of the arguments whose memory a result takes over."""
    header = text.split("\n", 1)[0]
    found = re.search(r"input_output_alias=\{(.*?)\}, entry", header)
    return {int(n) for n in re.findall(r"\((\d+), \{", found.group(1))} if found else set()


def float32_copies(text: str, weights: set[tuple[int, ...]]) -> list[str]:
    """The conversions from bfloat16 to float32 of arrays of a weight's shape, by name.

    Of a program before XLA has optimised it (`lowered.as_text(dialect="hlo")`): what a backend
    makes of a product is its own affair, such as the CPU's, which multiplies in float32.
    """
    known = {found.name: found for found in instructions(text)}
    return [
        found.name
        for found in known.values()
        if found.operation == "convert"
        and found.dtype == "f32"
        and found.shape in weights
        and found.operands
        and (source := known.get(found.operands[0])) is not None
        and source.dtype == "bf16"
    ]
