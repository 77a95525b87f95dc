"""What is measured: one training step on synthetic tokens of given lengths."""

from __future__ import annotations

import dataclasses
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Workload:
    """One row of the table."""

    engine: str  # "ours", "ours-512" (padded to 512), "peft"
    size: str = "small"
    dtype: str = "float32"
    rows: int = 8
    inputs: int = 128  # the length of every row, or with `spread` the longest
    targets: int = 2
    prompt: int = 100
    spread: bool = False  # lengths as SuperGLUE's: most short, some long
    steps: int = 8

    def lengths(self, step: int) -> np.ndarray:
        """The lengths of a batch; the same for every engine."""
        if not self.spread:
            return np.full(self.rows, self.inputs)
        draw = np.random.default_rng(step).lognormal(np.log(self.inputs / 4), 0.55, self.rows)
        return np.clip(draw, 16, self.inputs).astype(int)

    def tokens(self, step: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Inputs and targets of a batch, end-of-sequence included."""
        random = np.random.default_rng(1000 + step)
        inputs = [random.integers(3, 32000, n).astype(np.int32) for n in self.lengths(step)]
        targets = [random.integers(3, 32000, self.targets).astype(np.int32)] * self.rows
        for row in (*inputs, *targets):
            row[-1] = 1
        return inputs, targets


def measure(workload: Workload, step: Callable[[int], Any], started: float) -> dict[str, Any]:
    """Runs the steps and returns what was seen; `step` must wait for its result."""
    step(0)
    first = time.perf_counter() - started
    seconds = []
    for number in range(1, workload.steps + 1):
        step(number)  # new shapes are compiled here
        begin = time.perf_counter()
        step(number)
        seconds.append(time.perf_counter() - begin)
    tokens = [int(workload.lengths(n).sum()) for n in range(1, workload.steps + 1)]
    return {
        **dataclasses.asdict(workload),
        "seconds_per_step": statistics.median(seconds),
        "seconds": seconds,
        "tokens_per_second": sum(tokens) / sum(seconds),
        "first_step_after_seconds": first,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def main(run: Callable[[Workload], dict[str, Any]]) -> None:
    """Reads a workload from the command line, measures it, and prints JSON."""
    print(json.dumps(run(Workload(**json.loads(sys.argv[1])))))
