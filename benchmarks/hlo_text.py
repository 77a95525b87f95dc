"""The instructions of a program of XLA, from its text: matrix products, and large copies.

Tests hold the training step and `t5x plan` to them, and `profile_step.py` sorts operations by them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_LINE = re.compile(r"%?([\w.\-]+) = (\w+)\[([\d,]*)\]\S* ([\w\-]+)\(([^)]*)\)(.*)")


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
