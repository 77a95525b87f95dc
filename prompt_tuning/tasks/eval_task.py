"""What evaluation needs of a task: rows, targets, the words to rank, metrics.

Made once a run from the rows of `task_rows.py`; `evaluation/evaluate.py` makes the predictions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from prompt_tuning.batches import batching
from prompt_tuning.config import ConfigError, EvalConfig
from prompt_tuning.tasks import task_rows
from prompt_tuning.tasks.answers import text
from prompt_tuning.tasks.registry import find_spec, own_words


@dataclasses.dataclass(frozen=True)
class EvalTask:
    """The evaluation rows of one task, and how to score them."""

    task: Any  # seqio.Task
    rows: batching.Rows
    targets: Sequence[Any]  # postprocessed, as the metrics want them
    label_words: tuple[str, ...] = ()  # the same for every row
    row_words: tuple[tuple[str, ...], ...] = ()  # or each row's own: the entities of ReCoRD

    @property
    def name(self) -> str:
        """The seqio name."""
        return self.task.name

    @property
    def vocabulary(self) -> Any:
        """The vocabulary of the targets."""
        return self.task.output_features["targets"].vocabulary

    @property
    def can_rank(self) -> bool:
        """Whether the words to rank are known."""
        return bool(self.label_words or self.row_words)

    def words(self, row: int) -> tuple[str, ...]:
        """The words to rank for a row; () if any text is an answer."""
        return self.row_words[row] if self.row_words else self.label_words

    def postprocess(self, row: int, output: str) -> Any:
        """The output after the task's postprocess_fn.

        Raises:
          ConfigError: the task's own function fails on it.
        """
        example = self.rows.examples[row]
        try:
            return self.task.postprocess_fn(output, example=example, is_target=False)
        except Exception as error:  # the user's code: whatever it raises is theirs to read
            raise ConfigError(
                f"the postprocess_fn of the task {self.name} fails on the output {output!r} with "
                f"{type(error).__name__}: {error}. It has to take any text, the empty one too."
            ) from error

    def metrics(
        self, predictions: Sequence[Any], targets: Sequence[Any] | None = None
    ) -> dict[str, float]:
        """The task's metrics that are numbers; T5's are in per cent.

        Raises:
          ConfigError: a metric fails.
        """
        targets = self.targets if targets is None else targets
        values: dict[str, float] = {}
        for metric in self.task.predict_metric_fns:
            try:
                scores = metric(targets, predictions)
            except Exception as error:  # the user's code, as above
                name = getattr(metric, "__name__", repr(metric))
                raise ConfigError(
                    f"the metric {name} of the task {self.name} fails on {len(predictions)} "
                    f"predictions with {type(error).__name__}: {error}. The first target and "
                    f"prediction: {targets[0]!r}, {predictions[0]!r}."
                ) from error
            for name, value in scores.items():
                number = getattr(value, "value", value)  # seqio.metrics.Scalar
                if np.ndim(number) == 0 and np.issubdtype(np.asarray(number).dtype, np.number):
                    values[name] = float(number)
        return values


def make_eval_tasks(
    loaded: Sequence[task_rows.EvalRows], config: EvalConfig
) -> tuple[EvalTask, ...]:
    """The tasks that have metrics; the others are printed and left out.

    Raises:
      ConfigError: no task has metrics, a row has no label, or nothing is known to rank where
        ranking is asked for.
    """
    scored = [rows for rows in loaded if rows.task.predict_metric_fns]
    for rows in loaded:
        if rows not in scored and scored:
            print(f"{rows.task.name}: not scored, since it has no metrics", flush=True)
    if not scored:
        names = ", ".join(rows.task.name for rows in loaded)
        raise ConfigError(
            f"the task {names} has no metric_fns over (targets, predictions): there is nothing "
            "to evaluate. Add one to the task, or answer its rows with `t5x infer`."
        )
    tasks = tuple(make_eval_task(rows, config) for rows in scored)
    without = [task.name for task in tasks if not task.can_rank]
    if without and config.method != "generate":
        # For the project's tasks and for files, no words means that any text is an answer.
        unknown = [name for name in without if not (find_spec(name) or name in own_words)]
        if config.method == "rank" or (unknown and len(without) == len(tasks)):
            raise ConfigError(
                f"ranking needs the label words of {', '.join(without)}, and none are known: set "
                "EVAL_METHOD = 'generate', or, of your own files, LABEL_WORDS, or, of another task "
                "of your own, CLASS_LABELS."
            )
        print(f"{', '.join(without)}: scored by generation only, since any text is an answer")
    return tasks


def make_eval_task(loaded: task_rows.EvalRows, config: EvalConfig) -> EvalTask:
    """The task with its postprocessed targets.

    Raises:
      ConfigError: a row has no label, or a word to rank has no tokens.
    """
    task, rows, words = loaded
    missing = [row for row in range(len(rows)) if not loaded.is_labelled(row)]
    if missing:
        what = "the rows" if len(missing) == len(rows) else f"{len(missing)} of {len(rows)} rows"
        raise ConfigError(
            f"{what} of EVAL_SPLIT for {task.name} have no labels, as those of SuperGLUE's test "
            "splits: score another split, or answer this one with `t5x infer`."
        )
    unused = [*task.score_metric_fns, *task.predict_with_aux_metric_fns]
    if unused:
        names = ", ".join(getattr(metric, "__name__", repr(metric)) for metric in unused)
        print(f"{task.name}: metrics over scores are not computed: {names}", flush=True)
    row_words = () if words else find_row_words(loaded)
    return EvalTask(task, rows, postprocess_targets(task, rows), words, row_words)


def find_row_words(loaded: task_rows.EvalRows) -> tuple[tuple[str, ...], ...]:
    """The words to rank for each row, of a user's task its feature `label_words`; () if unknown."""
    row_words = []
    for row, example in enumerate(loaded.rows.examples):
        feature = [text(word) for word in example.get("label_words", ())]
        row_words.append(loaded.row_words(row) or tuple(dict.fromkeys(feature)))
    return tuple(row_words) if all(row_words) else ()


def postprocess_targets(task: Any, rows: batching.Rows) -> list[Any]:
    """The targets after the task's postprocess_fn."""
    return [
        task.postprocess_fn(target, example=example, is_target=True)
        for target, example in zip(rows.target_texts, rows.examples, strict=True)
    ]


def is_right(target: Any, prediction: Any) -> bool:
    """Whether a postprocessed prediction equals the target, or one of its answers.

    Targets with a group (MultiRC, ReCoRD) are compared by their value.

    >>> is_right(1, 1), is_right(["a", "b"], "b"), is_right({"value": 0, "group": 3}, {"value": 1})
    (True, True, False)
    """
    if isinstance(target, Mapping) and isinstance(prediction, Mapping):
        target, prediction = target.get("value"), prediction.get("value")
    if isinstance(target, (list, tuple)) and not isinstance(prediction, (list, tuple)):
        return any(is_right(answer, prediction) for answer in target)
    return bool(np.array_equal(np.asarray(target), np.asarray(prediction)))


def plain(value: Any) -> Any:
    """A seqio value as JSON has it: bytes as text, arrays as lists."""
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace")
    if isinstance(value, (np.ndarray, np.generic)):
        return plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    return value
