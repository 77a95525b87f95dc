"""The progress display of a run, the timing of its steps, and the means of their metrics.

`loop.py` updates the display after each step and records the means and timings.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
from tqdm import tqdm

ItemT = TypeVar("ItemT")


class CompileClock:
    """Measures the seconds that JAX has traced and compiled since the clock was made."""

    def __init__(self) -> None:
        self._spans: list[tuple[float, float]] = []  # begin and end; none overlaps another
        jax.monitoring.register_event_duration_secs_listener(self._add)

    def _add(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event.startswith("/jax/core/compile/"):
            begin = (end := time.monotonic()) - duration_secs
            while self._spans and self._spans[-1][0] >= begin:  # what is nested reports first
                self._spans.pop()
            self._spans.append((begin, end))

    def seconds(self) -> float:
        """The sum so far."""
        return sum(end - begin for begin, end in self._spans)

    def close(self) -> None:
        """Stops listening to JAX."""
        jax.monitoring.unregister_event_duration_listener(self._add)


class Progress:
    """A bar on a terminal; else lines at most every five seconds, of a long run fewer.

    Speed and remaining time are computed when new values are shown, because only then the host has
    waited for the device. The time of compilation is excluded.
    """

    def __init__(self, *, start: int, total: int, rows_per_step: int) -> None:
        self._rows_per_step = rows_per_step
        self._total, self._step, self._start = total, start, start
        self._shown: dict[str, str] = {}
        self.steps_per_second: float | None = None
        self._compiling = CompileClock()
        self._began = self._last_line = time.monotonic()
        self._bar = (
            tqdm(
                total=total,
                initial=start,
                dynamic_ncols=True,
                bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]",
            )
            if sys.stderr.isatty()
            else None
        )

    def update(self, step: int, shown: Mapping[str, str] | None = None) -> None:
        """Advances to `step` of the run and shows new values."""
        if shown:
            seconds = time.monotonic() - self._began - self._compiling.seconds()
            self.steps_per_second = (step - self._start) / max(seconds, 1e-9)
        self._shown.update(shown or {})
        self._shown = {name: value for name, value in self._shown.items() if value}
        advance, self._step = step - self._step, step
        if self._bar is not None:
            self._bar.set_postfix_str(self._describe(), refresh=False)
            self._bar.update(advance)
        elif (now := time.monotonic()) - self._last_line >= max(5.0, (now - self._began) / 20):
            self._last_line = now
            text = self._describe()
            print(f"step {self._step}/{self._total}{': ' * bool(text)}{text}", flush=True)

    def print_line(self, text: str) -> None:
        """Prints a line without tearing the bar."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stdout)
        else:
            print(text, flush=True)

    def close(self) -> None:
        """Ends the bar."""
        self._compiling.close()
        if self._bar is not None:
            self._bar.close()

    def _describe(self) -> str:
        """The last values, the speed and the remaining time."""
        parts = [f"{name} {value}" for name, value in self._shown.items()]
        if self.steps_per_second:
            left = (self._total - self._step) / self.steps_per_second
            parts.append(f"{self.steps_per_second * self._rows_per_step:.0f} examples/s")
            parts.append(f"{left:.0f} s left")
        return ", ".join(parts)


class StepTimer:
    """Measures the time of the steps between two records, and how long devices waited for rows."""

    def __init__(self) -> None:
        self._steps = 0  # of this process since the last record
        self._began = self._waited = 0.0

    def next_batch(self, batches: Iterator[ItemT], sums: Sequence[Mapping[str, Any]]) -> ItemT:
        """The batch of the next step; `sums` are the metrics of the steps dispatched before.

        A wait counts if the devices are idle at its end. They may have become idle during it, so
        the result is an upper bound.
        """
        start = time.perf_counter()
        if not self._steps:
            self._began, self._waited = start, 0.0
        batch = next(batches)
        if not self._steps or all(value.is_ready() for value in sums[-1].values()):
            self._waited += time.perf_counter() - start
        self._steps += 1
        return batch

    def values(self, sums: Sequence[Mapping[str, Any]], rows: int) -> dict[str, float]:
        """T5X's `timing/...` values since the last call; {} if there was no step.

        The device must have finished the steps. `waiting_for_rows` is the share of `seconds` in
        which devices waited for rows. Compilation of the first step is included; evaluation and
        saving are not.
        """
        if not self._steps:
            return {}
        seconds = max(time.perf_counter() - self._began, 1e-9)
        steps, self._steps = self._steps, 0
        tokens = sum(float(metrics["tokens"]) for metrics in sums[-steps:])
        return {
            "seconds": seconds,
            "steps_per_second": steps / seconds,
            "seqs_per_second": steps * rows / seconds,
            "target_tokens_per_second": tokens / seconds,
            "waiting_for_rows": min(1.0, self._waited / seconds),
        }


def mean_values(sums: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The means over target tokens of what `loss_fn` sums, for some steps.

    The gradient's norm is a mean over the steps.
    """
    totals = {name: float(sum(metrics[name] for metrics in sums)) for name in sums[0]}
    tokens = max(totals["tokens"], 1.0)
    return {
        "loss": totals["loss"] / tokens,
        "cross_entropy": totals["cross_entropy"] / tokens,
        "z_loss": totals["z_loss"] / tokens,
        "token_accuracy": 100.0 * totals["correct"] / tokens,
        "gradient_norm": totals["gradient_norm"] / len(sums),
    }


def describe_training(values: Mapping[str, float], timing: Mapping[str, float]) -> dict[str, str]:
    """The values that the progress bar shows; waits only from 5 % on."""
    waiting = timing.get("waiting_for_rows", 0.0)
    return {
        "loss": f"{values['loss']:.3f}",
        "waiting for rows": f"{waiting:.0%}" if waiting >= 0.05 else "",
    }
