"""Reads a program that XLA compiled: its collectives and donations.

The HLO text is the only description that every backend provides. `plan.py` reports these numbers.
"""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Mapping

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_COLLECTIVE = re.compile(rf"= (\S.*?) ({'|'.join(COLLECTIVES)})(?:-start)?\(")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")


def _shape(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in text.split(",") if n)


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
