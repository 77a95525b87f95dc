"""Reads a program that XLA compiled: its matrix products, collectives, donations, large copies.

The HLO text is the only description that every backend provides. `plan.py` reports these numbers,
and tests check the training step with them.
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
    """One instruction with a single result."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    operation: str
    operands: tuple[str, ...]
    attributes: str


def instructions(text: str) -> Iterator[Instruction]:
    """The instructions with a single result, of all computations."""
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
    """The operands' names: `%name` in a compiled program, `name` before compilation."""
    names = re.findall(r"%([\w.\-]+)", operands) or operands.split(", ")
    return tuple(names)


def _shape(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(",") if n)


def dot_flops(text: str) -> int:
    """The floating-point operations of all dots, two for a multiply-add, on one device.

    The program must not have dots in loops, because the body of a loop is counted once. The backend
    must keep dots: XLA's CPU backend does, its TPU backend makes them convolutions.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    total = 0
    for instruction in instructions(text):
        shapes[instruction.name] = instruction.shape
        if instruction.operation == "dot":
            left = shapes[instruction.operands[0]]
            contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
            assert contracted is not None, instruction
            inner = math.prod(left[int(i)] for i in contracted.group(1).split(","))
            total += 2 * math.prod(instruction.shape) * inner
        hidden = instruction.operation == "custom-call" and "matmul" in instruction.attributes
        assert not hidden, f"a matrix product that is not counted: {instruction}"
    return total


def collectives(text: str) -> Mapping[str, list[tuple[str, tuple[int, ...]]]]:
    """Dtype and shape of every collective's largest result, by the kind of the collective.

    >>> collectives("x = ((bf16[2,4]{1,0}), (bf16[8,4]{1,0})) all-gather-start(%y), dimensions={0}")
    {'all-gather': [('bf16', (8, 4))]}
    """
    by_kind: dict[str, list[tuple[str, tuple[int, ...]]]] = collections.defaultdict(list)
    for line in text.splitlines():
        if match := _COLLECTIVE.search(line):
            results, kind = match.groups()
            arrays = [(dtype, _shape(shape)) for dtype, shape in _ARRAY.findall(results)]
            by_kind[kind].append(max(arrays, key=lambda array: math.prod(array[1])))
    return dict(by_kind)


def gathers_a_weight(text: str, smallest: int) -> bool:
    """Whether the result of an all-gather has at least `smallest` elements.

    Smaller gathers are expected: the argmax over a sharded vocabulary gathers a number for every
    device and target.
    """
    gathered = collectives(text).get("all-gather", [])
    return any(math.prod(shape) >= smallest for _, shape in gathered)


def donated(text: str) -> set[int]:
    """The numbers of the donated arguments, those that a result aliases."""
    header = text.split("\n", 1)[0]
    match = re.search(r"input_output_alias=\{(.*?)\}, entry", header)
    return {int(n) for n in re.findall(r"\((\d+), \{", match.group(1))} if match else set()


def float32_copies(text: str, weights: set[tuple[int, ...]]) -> list[str]:
    """The names of conversions from bfloat16 to float32 of arrays with a weight's shape.

    `text` must be the program before optimisation (`lowered.as_text(dialect="hlo")`): the CPU
    backend, for instance, itself converts the operands of products to float32.
    """
    by_name = {instruction.name: instruction for instruction in instructions(text)}
    return [
        instruction.name
        for instruction in by_name.values()
        if instruction.operation == "convert"
        and instruction.dtype == "f32"
        and instruction.shape in weights
        and instruction.operands
        and (source := by_name.get(instruction.operands[0])) is not None
        and source.dtype == "bf16"
    ]
