"""The results of `t5x eval`: tables to read, and JSON and CSV for programs."""

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

from prompt_tuning.evaluation.analysis import Analysis, illegal_line
from prompt_tuning.evaluation.evaluate import task_score
from prompt_tuning.evaluation.score_table import Interval, score_table, table
from prompt_tuning.runtime.replace_folder import replace_text

# SuperGLUE's score is the mean of these tasks, without the diagnostics AX-b and AX-g.
SUPERGLUE = ("boolq", "cb", "copa", "multirc", "record", "rte", "wic", "wsc")
MAJORITY, OWN = "majority class", "each task's own prompt"


@dataclasses.dataclass(frozen=True)
class Cell:
    """Rows, error analysis and intervals of one prompt on one task."""

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
    metric: str = ""  # TASK_METRIC

    @property
    def tasks(self) -> list[str]:
        """The names of the tasks, in the order in which they were scored."""
        return list(dict.fromkeys(task for row in self.metrics.values() for task in row))

    def __str__(self) -> str:
        """One table a task with a line for each prompt; then a table of the means."""
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
        """The table of each task's score; the last column is the mean over tasks."""
        means = self.means(method)
        names = [short_name(task) for task in self.tasks]
        head = (f"{self.score_name} / {method}", *names, self._mean_name)
        lines = [head]
        for prompt, scores in means.items():
            columns = [scores.get(task) for task in self.tasks]
            known = [score for score in columns if score is not None]
            mean = f"{np.mean(known):.1f}" if len(known) == len(columns) else "-"
            lines.append((prompt, *("-" if x is None else f"{x:.1f}" for x in columns), mean))
        return table(lines) if any(means.values()) else ""

    @property
    def score_name(self) -> str:
        """What the score of a task is, in words."""
        return self.metric or "mean of metrics"

    @property
    def _mean_name(self) -> str:
        """SuperGLUE's score is a mean of the means of metrics, not of one metric."""
        return f"mean of {len(self.tasks)}" if self.metric else mean_name(self.tasks)

    def means(self, method: str) -> dict[str, dict[str, float]]:
        """The mean of every task's metrics by one method, or its TASK_METRIC, for each line.

        If every task was scored with exactly one prompt, a line joins them: each task's own prompt.
        """
        rows = {MAJORITY: self.majority, **self.metrics} if self.majority else self.metrics
        means = {
            prompt: {
                task: score
                for task, metrics in row.items()
                if (score := task_score(metrics, method, self.metric)) is not None
            }
            for prompt, row in rows.items()
        }
        prompts = [row for name, row in means.items() if name not in (MAJORITY, "no prompt")]
        scored = [task for row in prompts for task in row]
        if len(prompts) > 1 and sorted(scored) == sorted(self.tasks):
            means[OWN] = {task: score for row in prompts for task, score in row.items()}
        return means

    def write(self, folder: Path) -> None:
        """Writes `matrix.json`, with everything, and `matrix.csv`, with a line for each number."""
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
                    "analysis": dataclasses.asdict(self.cells[prompt][task].analysis),
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
        means: dict[str, Any] = {}
        for prompt, scores in self.means(method).items():
            has_all = len(scores) == len(self.tasks)
            mean = {self._mean_name: float(np.mean(list(scores.values())))} if has_all else {}
            means[prompt] = {**scores, **mean}
        return means

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
    """The name of a seqio task among SuperGLUE's eight; "" for any other task.

    >>> [superglue_task(f"super_glue_{x}_v102") for x in ("cb", "record", "axb")]
    ['cb', 'record', '']
    >>> superglue_task("taskless_super_glue_wsc_v102_simple_eval_examples")
    'wsc'
    """
    pattern = r"(?:taskless_)?super_glue_([a-z]+)_v102(?:_simple_eval)?(?:_examples)?"
    match = re.fullmatch(pattern, name)
    return match.group(1) if match and match.group(1) in SUPERGLUE else ""


def short_name(task: str) -> str:
    """The name of a task in the head of a column.

    >>> short_name("taskless_super_glue_cb_v102"), short_name("tiny_mood")
    ('cb', 'tiny_mood')
    """
    return superglue_task(task) or task


def mean_name(tasks: list[str]) -> str:
    """The name of the mean over these tasks: "SuperGLUE" if they are its eight tasks.

    >>> mean_name(["a", "b"])
    'mean of 2'
    """
    names = sorted(superglue_task(task) for task in tasks)
    return "SuperGLUE" if names == sorted(SUPERGLUE) else f"mean of {len(tasks)}"
