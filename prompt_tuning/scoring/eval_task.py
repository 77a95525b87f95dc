"""A task as its evaluation takes it: rows, targets, and the task's own metrics.

Made of `data/features.py`'s rows once a run; `evaluate.py` fills in the predictions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from prompt_tuning.config import ConfigError, EvalConfig
from prompt_tuning.data import features
from prompt_tuning.text.spec import UNLABELLED


@dataclasses.dataclass(frozen=True)
class EvalTask:
    """One task's validation rows, and what its seqio Task knows of scoring them."""

    task: Any  # seqio.Task
    rows: features.Rows
    targets: Sequence[Any]  # postprocessed, as the metrics want them
    label_words: tuple[str, ...]

    @property
    def name(self) -> str:
        """The seqio name."""
        return self.task.name

    @property
    def vocabulary(self) -> Any:
        """The vocabulary of the targets."""
        return self.task.output_features["targets"].vocabulary

    def postprocess(self, text: str, example: Mapping[str, Any]) -> Any:
        """What the metrics take for an output."""
        return self.task.postprocess_fn(text, example=example, is_target=False)

    def metrics(self, predictions: Sequence[Any]) -> dict[str, float]:
        """The task's metrics that are numbers; T5's are in per cent."""
        values: dict[str, float] = {}
        for metric in self.task.predict_metric_fns:
            for name, value in metric(self.targets, predictions).items():
                number = getattr(value, "value", value)  # seqio.metrics.Scalar
                if np.ndim(number) == 0 and np.issubdtype(np.asarray(number).dtype, np.number):
                    values[name] = float(number)
        return values


def make_eval_task(found: features.EvalRows, config: EvalConfig) -> EvalTask:
    """Postprocesses the targets once.

    Raises:
      ConfigError: the rows have no labels, the task has no metrics that take predictions, or
        ranking is asked for and the label words are not known.
    """
    task, rows, words = found
    if not task.predict_metric_fns:
        raise ConfigError(
            f"the task {task.name} has no metric_fns over (targets, predictions): there is nothing "
            "to evaluate. Add one to the task."
        )
    if set(rows.target_texts) == {UNLABELLED}:
        raise ConfigError(
            f"the rows of EVAL_SPLIT for {task.name} have no labels, as those of SuperGLUE's test "
            "splits: score another split, or answer this one with `t5x infer`."
        )
    if config.method != "generate" and not words:
        raise ConfigError(
            f"ranking needs the label words of {task.name}, and none are known: set CLASS_LABELS, "
            "or EVAL_METHOD = 'generate'."
        )
    unused = [*task.score_metric_fns, *task.predict_with_aux_metric_fns]
    if unused:
        names = ", ".join(getattr(metric, "__name__", repr(metric)) for metric in unused)
        print(f"{task.name}: metrics over scores are not computed: {names}", flush=True)
    return EvalTask(task, rows, postprocess_targets(task, rows), words)


def postprocess_targets(task: Any, rows: features.Rows) -> list[Any]:
    """The targets as the metrics of `task` want them."""
    return [
        task.postprocess_fn(text, example=example, is_target=True)
        for text, example in zip(rows.target_texts, rows.examples, strict=True)
    ]
