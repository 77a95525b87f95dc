"""Training health checks: stop on a non-finite loss, warn if the loss stops falling.

`loop.py` checks the metrics of each step; `tasks.py` reports on all losses of the run.
"""

from __future__ import annotations

import collections
import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from prompt_tuning.batches import batching
from prompt_tuning.batches.order import row_order
from prompt_tuning.config import DataConfig

FEWEST = 8  # steps before the losses are checked
PATIENCE = 150  # steps before "not learning" is reported: the loss first falls to the entropy
WINDOW = 10  # the least steps of a window; its mean is compared with that of the window before
FLAT = 0.97  # ratio of a window's loss to the one before: from here on it has not fallen
SLOW = 0.85  # the same ratio: from here on it falls too slowly to leave the entropy
NEAR = 0.9  # ratio of a loss to the entropy of the targets: from here on nothing is learned
RISEN = 1.5  # ratio of the loss to the lowest window's: from here on the run diverges
MANY = 100  # with more different targets their entropy is no baseline


class NotFiniteError(FloatingPointError):
    """The loss or its gradient became NaN or infinite in the step that ends at `step`."""

    def __init__(self, step: int, message: str) -> None:
        self.step = step
        super().__init__(message)


def check_finite(sums: Sequence[Mapping[str, Any]], step: int) -> None:
    """Checks that the metrics of every step are finite; `step` is the number of the last.

    Raises:
      NotFiniteError: names the first step whose loss or gradient is not finite.
    """
    for number, metrics in enumerate(sums, start=step - len(sums) + 1):
        bad = {k: float(v) for k, v in metrics.items() if not np.isfinite(v)}
        if bad:
            values = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in bad.items())
            raise NotFiniteError(number, f"the run diverged in step {number} ({values})")


def describe_not_finite(error: FloatingPointError, done: int) -> tuple[int, str]:
    """The first step that was not finite, and a description; `done` steps were finished."""
    if isinstance(error, NotFiniteError):
        return error.step, f"{error}; --debug-nans shows where the first NaN comes from"
    # Raised by JAX, because of debug_nans.
    return done + 1, f"the run diverged in step {done + 1}, {locate(error)}"


def name_rows(
    train: Sequence[batching.Rows],
    rates: Sequence[float],
    config: DataConfig,
    seed: int,
    step: int,
) -> str:
    """The rows of a step's batch as text, by task and number.

    Steps are counted from 1 in this run, rows of a split from 0.
    """
    size = config.batch_size
    positions = np.arange((step - 1) * size, step * size)
    tasks, rows = row_order(seed, [len(rows) for rows in train], rates, positions)
    named: dict[str, list[str]] = {}
    for task, row in zip(tasks, rows, strict=True):
        named.setdefault(train[task].task, []).append(str(row))
    split = config.train_split
    return "; ".join(f"{name} {split} {', '.join(n)}" for name, n in named.items())


def locate(error: BaseException) -> str:
    """The error's first line, and the innermost line of this project in its traceback."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "prompt_tuning" in f.filename]
    first = str(error).strip().splitlines()[0]
    if not frames:
        return first
    last = frames[-1]
    return f"{first.rstrip('.')} at {last.filename}, line {last.lineno}: `{last.line}`"


def target_entropy(rows: Sequence[batching.Rows], rates: Sequence[float]) -> float | None:
    """The entropy of the targets per token: the loss of a model that ignores the inputs.

    None if there are too many different targets to be classes.
    """
    shares: collections.Counter[tuple[int, ...]] = collections.Counter()
    for task_rows, rate in zip(rows, rates, strict=True):
        share = rate / sum(rates) / len(task_rows)
        for target in task_rows.targets:
            shares[tuple(target.tolist())] += share  # type: ignore[assignment]
    if not 1 < len(shares) <= MANY:
        return None
    tokens = sum(share * len(target) for target, share in shares.items())
    return -sum(share * math.log(share) for share in shares.values()) / tokens


def clear_margin(rows: int) -> float:
    """The margin in points by which a score on this many rows is clearly above a baseline.

    Three standard errors of a share of one half, but at least ten points.

    >>> round(clear_margin(56)), clear_margin(5000)
    (20, 10.0)
    """
    return max(10.0, 150.0 / math.sqrt(rows))


def describe_problem(
    losses: Sequence[float],
    entropy: float | None,
    learned: Callable[[], bool] = lambda: False,
) -> str | None:
    """A warning that a run diverges or does not learn; None if there is no problem.

    `losses` has the cross entropy per token of every step. The mean of the last quarter is compared
    with that of the quarter before. The difference counts as a fall if it is also more than twice
    its standard error. Above the entropy of the targets a slow fall counts as not learning, because
    a run that ignores its inputs also approaches the entropy slowly. If the evaluation shows that
    the run has `learned`, it is never reported as not learning.

    >>> describe_problem([0.7] * 200, entropy=0.69)[:26]
    'the run is not learning: t'
    """
    if len(losses) < FEWEST:
        return None
    size = min(max(WINDOW, len(losses) // 4), len(losses) // 2)
    ends = range(len(losses), size - 1, -size)
    windows = [np.asarray(losses[end - size : end], np.float64) for end in ends]
    means = [float(window.mean()) for window in windows]
    now, before, lowest = means[0], means[1], min(means)
    noise = 2.0 * math.sqrt((windows[0].var() + windows[1].var()) / size)
    falls = before - now > max((1.0 - SLOW) * before, noise)
    if now > RISEN * lowest and now >= FLAT * before and (entropy is None or now > entropy):
        return (
            f"the run is diverging: the cross entropy per token was {lowest:.3f} and is {now:.3f}. "
            "A lower LEARNING_RATE or a warm-up (WARMUP_STEPS) may help."
        )
    if entropy is None or len(losses) < PATIENCE or now < NEAR * entropy or falls or learned():
        return None
    where = "at" if now < entropy / NEAR else "above"
    return (
        f"the run is not learning: the cross entropy per token stays at {now:.3f}, {where} the "
        f"entropy of the targets ({entropy:.3f}), as if the inputs were not read. If it lasts, try "
        "another PROMPT_INIT, LEARNING_RATE or PROMPT_LENGTH, or a backbone that is adapted to "
        "prompts or larger."
    )
