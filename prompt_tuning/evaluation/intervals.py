"""95 % confidence intervals of scores, by Wilson's formula or the bootstrap over rows.

`matrix.py` and `training/tasks.py` show them beside the scores. They matter for small validation
sets: CB and COPA have 56 and 100 rows, and their intervals are some twenty points wide.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from prompt_tuning.evaluation.score_table import Interval
from prompt_tuning.tasks.eval_task import EvalTask, is_right

LEVEL = 0.95
SEED = 0
MOST_WORK = 1_000_000  # rows scored for one interval; limits the resamples if there are many rows
FEWEST_RESAMPLES = 100  # fewer give no interval: that of so many rows would be narrow


def score_intervals(
    task: EvalTask, predictions: Mapping[str, Sequence[Any]], resamples: int
) -> dict[str, Interval]:
    """The interval of every metric, `{"accuracy/rank": (58.9, 82.1)}`; {} for 0 resamples.

    Accuracy is a share of rows: it has Wilson's interval, which is also right at 0 and 100 %. Any
    other metric has the percentile bootstrap's, with a fixed seed. Rows of one group, such as the
    answers to one question of MultiRC, are drawn together.
    """
    all_intervals: dict[str, Interval] = {}
    for method, answers in predictions.items() if resamples else ():
        right = [is_right(t, p) for t, p in zip(task.targets, answers, strict=True)]
        values = task.metrics(answers)
        share = 100.0 * float(np.mean(right))
        is_share = np.isclose(values.get("accuracy", np.nan), share)
        affordable = min(resamples, MOST_WORK // len(right))
        intervals: dict[str, Interval] = {}
        if set(values) - ({"accuracy"} if is_share else set()) and (
            affordable >= min(resamples, FEWEST_RESAMPLES)
        ):
            intervals = bootstrap(task, answers, affordable)
        if is_share:
            intervals["accuracy"] = wilson(sum(right), len(right))
        all_intervals |= {f"{name}/{method}": interval for name, interval in intervals.items()}
    return all_intervals


def wilson(right: int, rows: int) -> Interval:
    """Wilson's interval of a share of rows, in per cent.

    >>> [round(end, 1) for end in wilson(56, 56)]
    [93.6, 100.0]
    """
    from scipy.stats import binomtest

    low, high = binomtest(right, rows).proportion_ci(LEVEL, method="wilson")
    return 100.0 * float(low), 100.0 * float(high)


def bootstrap(task: EvalTask, predictions: Sequence[Any], resamples: int) -> dict[str, Interval]:
    """The percentile interval of every numeric metric over rows drawn with replacement."""
    groups = _group_rows(task.targets)
    draws = np.random.default_rng(SEED).integers(len(groups), size=(resamples, len(groups)))
    values: dict[str, list[float]] = {}
    for drawn in draws:
        rows = [(copy, row) for copy, group in enumerate(drawn) for row in groups[group]]
        targets = [_rename_group(task.targets[row], copy) for copy, row in rows]
        for name, value in task.metrics([predictions[row] for _, row in rows], targets).items():
            values.setdefault(name, []).append(value)
    ends = [100 * (1 - LEVEL) / 2, 100 * (1 + LEVEL) / 2]
    return {
        name: (float(low), float(high))
        for name, scores in values.items()
        if not np.isnan(scores).all()  # a gender parity without a whole pair
        for low, high in [np.nanpercentile(scores, ends)]
    }


def _group_rows(targets: Sequence[Any]) -> list[list[int]]:
    """The rows of each group; a row without a group is a group of one."""
    groups: dict[Hashable, list[int]] = {}
    for row, target in enumerate(targets):
        has_group = isinstance(target, Mapping) and "group" in target
        groups.setdefault(("group", repr(target["group"])) if has_group else row, []).append(row)
    return list(groups.values())


def _rename_group(target: Any, copy: int) -> Any:
    """The target with a group name of its own for each copy: a group drawn twice is two groups."""
    if isinstance(target, Mapping) and "group" in target:
        return {**target, "group": (copy, target["group"])}
    return target
