"""Reads what XLA compiled: the FLOPs of its matrix products."""

import math
import re

import jax

_LINE = re.compile(r"%?([\w.\-]+) = \w+\[([\d,]*)\]\S* (\S+?)\(([^)]*)\)(.*)")


def dot_flops(function, *args) -> int:
    """2 x the multiply-adds of every dot in the optimised program.

    Only for programs without loops: a loop's body would count once.
    """
    text = jax.jit(function).lower(*args).compile().as_text()
    shapes: dict[str, list[int]] = {}
    total = 0
    for line in text.splitlines():
        match = _LINE.search(line)
        if not match:
            continue
        name, shape, operation, operands, attributes = match.groups()
        shapes[name] = [int(n) for n in shape.split(",") if n]
        if operation == "dot":
            left = shapes[re.findall(r"%([\w.\-]+)", operands)[0]]
            contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", attributes).group(1)
            inner = math.prod(left[int(i)] for i in contracted.split(","))
            total += 2 * math.prod(shapes[name]) * inner
        assert operation != "custom-call" or "matmul" not in attributes, line
    return total
