"""Whether a run is well: a loss that is not finite stops it, one that stands still is mentioned.

`loop.py` hands over the sums of each step and the records of the run.
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
from prompt_tuning.session import setup

FEWEST = 8  # steps before a course is judged
PATIENCE = 100  # steps before a run could have learned: until then its loss falls to the entropy
WINDOW = 10  # steps that are compared with as many before, in a short run
FLAT = 0.97  # of the loss a window earlier: more has not fallen
SLOW = 0.85  # of the loss a window earlier: more is no way to leave the entropy
NEAR = 0.9  # of the entropy of the targets
RISEN = 1.5  # times the lowest loss of a window
MANY = 100  # different targets: their frequencies are no baseline any more


class NotFiniteError(FloatingPointError):
    """The loss or its gradient became NaN or infinite in the step that ends at `step`."""

    def __init__(self, step: int, said: str) -> None:
        self.step = step
        super().__init__(said)


def check_finite(sums: Sequence[Mapping[str, Any]], step: int) -> None:
    """Returns when the loss and the gradient of every step are finite; `step` is the last one's.

    Raises:
      NotFiniteError: names the first step where they are not.
    """
    for number, one in enumerate(sums, start=step - len(sums) + 1):
        bad = {k: float(v) for k, v in one.items() if not np.isfinite(v)}
        if bad:
            values = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in bad.items())
            raise NotFiniteError(number, f"the run diverged in step {number} ({values})")


def describe_not_finite(error: FloatingPointError, done: int) -> tuple[int, str]:
    """The step that was not finite, and what is known of it, after `done` whole steps."""
    if isinstance(error, NotFiniteError):
        return error.step, f"{error}; --debug-nans shows where the first NaN comes from"
    return done + 1, f"the run diverged in step {done + 1}, {locate(error)}"  # JAX's own


def name_rows(data: setup.Data, config: DataConfig, seed: int, step: int) -> str:
    """The rows of the batch of a step, counted from 1 in this run, by task and number.

    The first row of a split has number 0.
    """
    size = config.batch_size
    positions = np.arange((step - 1) * size, step * size)
    sizes = [len(rows) for rows in data.train]
    tasks, rows = row_order(seed, sizes, data.rates, positions)
    named: dict[str, list[str]] = {}
    for task, row in zip(tasks, rows, strict=True):
        named.setdefault(data.train[task].task, []).append(str(row))
    split = config.train_split
    return "; ".join(f"{name} {split} {', '.join(n)}" for name, n in named.items())


def locate(error: BaseException) -> str:
    """The innermost line of this project that an error came through."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "prompt_tuning" in f.filename]
    first = str(error).strip().splitlines()[0]
    if not frames:
        return first
    last = frames[-1]
    return f"{first.rstrip('.')} at {last.filename}, line {last.lineno}: `{last.line}`"


def target_entropy(rows: Sequence[batching.Rows], rates: Sequence[float]) -> float | None:
    """The loss per target token of a model that knows how frequent each target is, and no more.

    None where the targets are no few classes.
    """
    shares: collections.Counter[tuple[int, ...]] = collections.Counter()
    for one, rate in zip(rows, rates, strict=True):
        for target in one.targets:
            shares[tuple(target.tolist())] += rate / sum(rates) / len(one)  # type: ignore[assignment]
    if not 1 < len(shares) <= MANY:
        return None
    tokens = sum(share * len(target) for target, share in shares.items())
    return -sum(share * math.log(share) for share in shares.values()) / tokens


def clearly(rows: int) -> float:
    """By how many points a score of so many rows is above another, and not by luck.

    Three standard errors of a share of one half, and ten points at least.

    >>> round(clearly(56)), clearly(5000)
    (20, 10.0)
    """
    return max(10.0, 150.0 / math.sqrt(rows))


def describe_trouble(
    losses: Sequence[float],
    entropy: float | None,
    learned: Callable[[], bool] = lambda: False,
) -> str | None:
    """What is wrong with the course of a cross entropy per token, as a sentence; None if nothing.

    A run of which the evaluation shows that it has `learned` is not called not learning.

    There is one value for each step. The last quarter is compared with the one before; a fall
    counts when it is also more than the noise of the steps, twice the standard error of the
    difference. A run that learns nothing creeps down to the entropy for long: a slow fall above it
    is no sign of learning.

    >>> describe_trouble([0.7] * 200, entropy=0.69)[:26]
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
