"""What is measured: one training step on tokens of given lengths."""

from __future__ import annotations

import dataclasses
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import numpy as np

from prompt_tuning.api import model_config


@dataclasses.dataclass(frozen=True)
class Workload:
    """One row of the table, by one engine."""

    engine: str  # "ours", "ours-cudnn", "ours-dropout", "ours-512" (padded), "peft", "t5x", "start"
    size: str = "small"
    dtype: str = "float32"
    rows: int = 8
    inputs: int = 128  # the length of every row, or the longest of `lengths`
    targets: int = 8
    prompt: int = 100
    lengths: str = ""  # a file of row lengths, made of a real task; see suites.py
    steps: int = 10  # the first ones after compiling are slower, in every engine
    devices: int = 1
    method: str = "prompt_tuning"  # PROMPT_METHOD, with its default settings

    @property
    def task(self) -> str:
        """The name of the task whose rows these are, if they are of one."""
        return Path(self.lengths).stem if self.lengths else ""

    def row_lengths(self, step: int) -> list[int]:
        """The lengths of a batch; the same for every engine."""
        if not self.lengths:
            return [self.inputs] * self.rows
        batches = json.loads(Path(self.lengths).read_text())
        return batches[step % len(batches)]

    def tokens(self, step: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Inputs and targets of a batch, end-of-sequence included."""
        random = np.random.default_rng(1000 + step)
        known = min(32000, model_config(self.size).num_embeddings)
        inputs = [random.integers(3, known, n).astype(np.int32) for n in self.row_lengths(step)]
        targets = [random.integers(3, known, self.targets).astype(np.int32)] * self.rows
        for row in (*inputs, *targets):
            row[-1] = 1
        return inputs, targets


def measure(
    workload: Workload,
    step: Callable[[int], Any],
    started: float,
    shapes: Callable[[int], Hashable] = lambda number: None,
) -> dict[str, Any]:
    """Runs the steps and returns what was seen; `step` must wait for its result.

    A step whose `shapes` are new is run once before it is timed: what it takes longer than the
    second time is tracing and compiling.
    """
    numbers = range(1, workload.steps + 1)
    seen: set[Hashable] = set()
    seconds, compiling, first = [], 0.0, 0.0
    for number in numbers:
        new = shapes(number) not in seen
        seen.add(shapes(number))
        taken = [_time(step, number) for _ in range(2 if new else 1)]
        first = first or time.perf_counter() - started - (taken[-1] if new else 0.0)
        compiling += max(0.0, taken[0] - taken[-1])
        seconds.append(taken[-1])
    tokens = [sum(workload.row_lengths(number)) for number in numbers]
    return {
        **dataclasses.asdict(workload),
        "task": workload.task,
        # Steps on real rows differ; those of one shape do not.
        "seconds_per_step": (statistics.mean if workload.lengths else statistics.median)(seconds),
        "seconds": seconds,
        "tokens_per_second": sum(tokens) / sum(seconds),
        "compile_seconds": compiling,
        "first_step_after_seconds": first,
        "peak_memory_bytes": float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024),
    }


def _time(step: Callable[[int], Any], number: int) -> float:
    begin = time.perf_counter()
    step(number)
    return time.perf_counter() - begin


def main(run: Callable[[Workload], dict[str, Any]]) -> None:
    """Reads a workload from the command line, measures it, and prints JSON."""
    print(json.dumps(run(Workload(**json.loads(sys.argv[1])))))
