"""What `t5x eval` found: tables to read, and JSON and CSV for programs."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from prompt_tuning.evaluation.analysis import Analysis, illegal_line, to_json
from prompt_tuning.evaluation.evaluate import task_score
from prompt_tuning.evaluation.intervals import Interval
from prompt_tuning.evaluation.score_table import score_table, table
from prompt_tuning.runtime.replace_folder import replace_text

# The tasks whose mean is SuperGLUE's score; its diagnostics AX-b and AX-g do not count.
SUPERGLUE = ("boolq", "cb", "copa", "multirc", "record", "rte", "wic", "wsc")
MAJORITY, OWN = "majority class", "each task's own prompt"


@dataclasses.dataclass(frozen=True)
class Cell:
    """One prompt on one task, apart from its metrics."""

    rows: int
    analysis: Analysis
    intervals: Mapping[str, Interval]


@dataclasses.dataclass(frozen=True)
class Matrix:
    """`metrics[prompt][task]` is T5's metrics in per cent, named `<metric>/<method>`."""

    metrics: dict[str, dict[str, dict[str, float]]]
    majority: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)  # by task
    cells: dict[str, dict[str, Cell]] = dataclasses.field(default_factory=dict)
    methods: tuple[str, ...] = ("generate", "rank")

    @property
    def tasks(self) -> list[str]:
        """The names of the tasks, in the order in which they were scored."""
        return list(dict.fromkeys(task for row in self.metrics.values() for task in row))

    def __str__(self) -> str:
        """For each task a table with a line for each prompt; at the end one of their means."""
        parts = [self._task_table(task) for task in self.tasks]
        if len(self.tasks) > 1:
            parts += [self._mean_table(method) for method in self.methods]
        return "\n\n".join(part for part in parts if part)

    def _task_table(self, task: str) -> str:
        rows = {MAJORITY: self.majority[task]} if task in self.majority else {}
        rows |= {prompt: row[task] for prompt, row in self.metrics.items() if task in row}
        intervals = {p: row[task].intervals for p, row in self.cells.items() if task in row}
        lines = [score_table(task, rows, intervals)]
        for prompt, row in self.cells.items():
            if task in row and (line := illegal_line(row[task].analysis)):
                lines.append(f"  {prompt}: {line}")
        return "\n".join(lines)

    def _mean_table(self, method: str) -> str:
        """A task's score is the mean of its metrics; the last column the mean of the tasks'."""
        means = self.means(method)
        names = [short_name(task) for task in self.tasks]
        head = (f"mean of metrics / {method}", *names, mean_name(self.tasks))
        lines = [head]
        for prompt, scores in means.items():
            found = [scores.get(task) for task in self.tasks]
            whole = [score for score in found if score is not None]
            mean = f"{np.mean(whole):.1f}" if len(whole) == len(found) else "-"
            lines.append((prompt, *("-" if x is None else f"{x:.1f}" for x in found), mean))
        return table(lines) if any(means.values()) else ""

    def means(self, method: str) -> dict[str, dict[str, float]]:
        """The mean of every task's metrics by one method, for each line of the table.

        Where every task was scored with one prompt only, its own, they make up a line together.
        """
        rows = {MAJORITY: self.majority, **self.metrics} if self.majority else self.metrics
        means = {
            prompt: {
                task: score
                for task, metrics in row.items()
                if (score := task_score(metrics, method)) is not None
            }
            for prompt, row in rows.items()
        }
        prompts = [row for name, row in means.items() if name not in (MAJORITY, "no prompt")]
        scored = [task for row in prompts for task in row]
        if len(prompts) > 1 and sorted(scored) == sorted(self.tasks):
            means[OWN] = {task: score for row in prompts for task, score in row.items()}
        return means

    def write(self, folder: Path) -> None:
        """`matrix.json`, all of it, and `matrix.csv`, a line for each number."""
        lines = list(self._lines())
        file = io.StringIO(newline="")
        writer = csv.DictWriter(file, list(lines[0]) if lines else [])
        writer.writeheader()
        writer.writerows(lines)
        replace_text(folder / "matrix.csv", file.getvalue())
        prompts = {
            prompt: {
                task: {
                    "metrics": metrics,
                    "intervals": dict(self.cells[prompt][task].intervals),
                    "analysis": to_json(self.cells[prompt][task].analysis),
                }
                for task, metrics in row.items()
            }
            for prompt, row in self.metrics.items()
        }
        means = {method: self._mean_json(method) for method in self.methods}
        content = {"prompts": prompts, "majority": self.majority, "means": means}
        text = json.dumps(content, ensure_ascii=False, indent=1)
        replace_text(folder / "matrix.json", text + "\n")

    def _mean_json(self, method: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for prompt, scores in self.means(method).items():
            whole = len(scores) == len(self.tasks)
            mean = {mean_name(self.tasks): float(np.mean(list(scores.values())))} if whole else {}
            found[prompt] = {**scores, **mean}
        return found

    def _lines(self) -> Any:
        for prompt, row in self.metrics.items():
            for task, metrics in row.items():
                cell = self.cells[prompt][task]
                for name, value in metrics.items():
                    low, high = cell.intervals.get(name, ("", ""))
                    metric, method = name.rsplit("/", 1)
                    illegal = cell.analysis.illegal if method == "generate" else None
                    yield {
                        "prompt": prompt,
                        "task": task,
                        "metric": metric,
                        "method": method,
                        "value": value,
                        "low": low,
                        "high": high,
                        "majority": self.majority.get(task, {}).get(name, ""),
                        "rows": cell.rows,
                        "illegal": "" if illegal is None else illegal.count,
                    }


def superglue_task(name: str) -> str:
    """Which of SuperGLUE's eight tasks a seqio task is; "" of any other.

    >>> [superglue_task(f"super_glue_{x}_v102") for x in ("cb", "record", "axb")]
    ['cb', 'record', '']
    >>> superglue_task("taskless_super_glue_wsc_v102_simple_eval_examples")
    'wsc'
    """
    pattern = r"(?:taskless_)?super_glue_([a-z]+)_v102(?:_simple_eval)?(?:_examples)?"
    found = re.fullmatch(pattern, name)
    return found.group(1) if found and found.group(1) in SUPERGLUE else ""


def short_name(task: str) -> str:
    """A task in the head of a column.

    >>> short_name("taskless_super_glue_cb_v102"), short_name("tiny_mood")
    ('cb', 'tiny_mood')
    """
    return superglue_task(task) or task


def mean_name(tasks: list[str]) -> str:
    """What the mean over these tasks is called: SuperGLUE's score is that of all eight.

    >>> mean_name(["a", "b"])
    'mean of 2'
    """
    found = sorted(superglue_task(task) for task in tasks)
    return "SuperGLUE" if found == sorted(SUPERGLUE) else f"mean of {len(tasks)}"
