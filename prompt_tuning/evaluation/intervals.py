"""How sure a score is: its 95 % interval over rows that might as well have been drawn.

The validation sets of CB and COPA have 56 and 100 rows; a point there is one row, and the interval
is some twenty points wide.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from prompt_tuning.tasks.eval_task import EvalTask, is_right

LEVEL = 0.95
SEED = 0
MOST_WORK = 1_000_000  # rows scored for one interval; resamples become fewer where rows are many
FEWEST_RESAMPLES = 100  # with fewer there is no interval: of 10,000 rows it is narrow anyway
Interval = tuple[float, float]


def score_intervals(
    task: EvalTask, predictions: Mapping[str, Sequence[Any]], resamples: int
) -> dict[str, Interval]:
    """The interval of every metric, `{"accuracy/rank": (58.9, 82.1)}`; {} for 0 resamples.

    Accuracy is a share of rows: Wilson's interval, which stays honest at 0 and at 100 %. Of any
    other metric it is the percentile bootstrap, with a fixed seed. Rows of one group, such as the
    answers to one question of MultiRC, are drawn together.
    """
    found: dict[str, Interval] = {}
    for method, given in predictions.items() if resamples else ():
        right = [is_right(t, p) for t, p in zip(task.targets, given, strict=True)]
        values = task.metrics(given)
        share = 100.0 * float(np.mean(right))
        is_share = np.isclose(values.get("accuracy", np.nan), share)
        affordable = min(resamples, MOST_WORK // len(right))
        intervals: dict[str, Interval] = {}
        if set(values) - ({"accuracy"} if is_share else set()) and (
            affordable >= min(resamples, FEWEST_RESAMPLES)
        ):
            intervals = bootstrap(task, given, affordable)
        if is_share:
            intervals["accuracy"] = wilson(sum(right), len(right))
        found |= {f"{name}/{method}": interval for name, interval in intervals.items()}
    return found


def wilson(right: int, rows: int) -> Interval:
    """Wilson's interval of a share of rows, in per cent.

    >>> [round(end, 1) for end in wilson(56, 56)]
    [93.6, 100.0]
    """
    from scipy.stats import binomtest

    low, high = binomtest(right, rows).proportion_ci(LEVEL, method="wilson")
    return 100.0 * float(low), 100.0 * float(high)


def bootstrap(task: EvalTask, predictions: Sequence[Any], resamples: int) -> dict[str, Interval]:
    """The percentile interval of every metric over rows drawn with replacement."""
    units = _units(task.targets)
    draws = np.random.default_rng(SEED).integers(len(units), size=(resamples, len(units)))
    values: dict[str, list[float]] = {}
    for drawn in draws:
        rows = [(copy, row) for copy, unit in enumerate(drawn) for row in units[unit]]
        targets = [_in_own_group(task.targets[row], copy) for copy, row in rows]
        for name, value in task.metrics([predictions[row] for _, row in rows], targets).items():
            values.setdefault(name, []).append(value)
    ends = [100 * (1 - LEVEL) / 2, 100 * (1 + LEVEL) / 2]
    return {
        name: (float(low), float(high))
        for name, found in values.items()
        for low, high in [np.nanpercentile(found, ends)]
    }


def _units(targets: Sequence[Any]) -> list[list[int]]:
    """The rows that are drawn together."""
    units: dict[Hashable, list[int]] = {}
    for row, target in enumerate(targets):
        grouped = isinstance(target, Mapping) and "group" in target
        units.setdefault(("group", repr(target["group"])) if grouped else row, []).append(row)
    return list(units.values())


def _in_own_group(target: Any, copy: int) -> Any:
    """A group that is drawn twice is two groups."""
    if isinstance(target, Mapping) and "group" in target:
        return {**target, "group": (copy, target["group"])}
    return target
