"""Scores prompts on whole validation splits: by generation, and by ranking the label words.

From `EvalTask` to T5's metrics in per cent. `training/tasks.py` calls it during a run and
`evaluation/matrix.py` for `t5x eval`; both pass a backbone that is already on the devices.
Predictions depend on the inputs alone. Only the metrics read the targets.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from prompt_tuning.batches import batching
from prompt_tuning.config import ConfigError, DataConfig, EvalConfig
from prompt_tuning.decoding import decode
from prompt_tuning.evaluation import ranking
from prompt_tuning.model import sharding, t5
from prompt_tuning.model.loss import pair_log_likelihoods
from prompt_tuning.model.prompt import Prompt, encode
from prompt_tuning.session import checks
from prompt_tuning.tasks.eval_task import EvalTask, plain
from prompt_tuning.tasks.metrics import majority_predictions


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """The metrics of one prompt on one task, named `<T5's name>/<method>`, and every row."""

    metrics: dict[str, float]
    rows: list[dict[str, Any]]
    # By method, for each row: the text of the answer, and the postprocessed answer.
    outputs: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    predictions: dict[str, list[Any]] = dataclasses.field(default_factory=dict)


class Evaluator:
    """The compiled functions of one model and its batch size; traced once a shape."""

    def __init__(self, model: t5.T5, mesh: Mesh, evaluation: EvalConfig, data: DataConfig) -> None:
        """Raises ConfigError if the batch size does not divide by the mesh."""
        self.mesh, self.config = mesh, evaluation
        self.lengths = data.task_feature_lengths
        self.batch_size = evaluation.batch_size or data.batch_size
        checks.check_batch_size(self.batch_size, mesh)
        search = decode.Search(self.lengths["targets"], evaluation.num_decodes, evaluation.decoding)

        def generate(
            backbone: t5.Params,
            prompt: Prompt,
            tokens: Int[Array, "B T"],
            numbers: Int[Array, "B"],
            which: Int[Array, "B"] | None = None,
        ) -> tuple[Int[Array, "B L"], Float[Array, "B"]]:
            encoded = encode(model, backbone, prompt, tokens, which)
            sequences, scores = decode.generate_all(
                model, backbone, prompt, encoded, search, which, numbers=numbers
            )
            return sequences[:, -1], scores[:, -1]

        # If there are several processes, each needs the answers to all rows.
        everywhere = sharding.replicated(mesh)
        self.generate: Callable[..., Any] = jax.jit(generate, out_shardings=everywhere)
        self.encode: Callable[..., Any] = jax.jit(functools.partial(encode, model))
        self.score_pairs: Callable[..., Any] = jax.jit(
            functools.partial(pair_log_likelihoods, model), out_shardings=everywhere
        )

    def batches(self, rows: batching.Rows) -> Iterator[tuple[jax.Array, list[int]]]:
        """Input tokens [B, T] on the devices, and the numbers of their rows.

        Rows of similar length share a batch. The last batch is padded; ignore results past its
        last real row.
        """
        for batch, places in batching.eval_batches(rows, self.batch_size, self.lengths):
            yield self.place(tokens=np.asarray(batch["encoder_input_tokens"]))["tokens"], places

    def place(self, **arrays: np.ndarray) -> dict[str, jax.Array]:
        """The arrays on the devices, sharded by row."""
        return sharding.shard_batch(arrays, self.mesh)


def evaluate(evaluator: Evaluator, params: tuple[t5.Params, Prompt], task: EvalTask) -> TaskResult:
    """The metrics of (backbone, prompt) on every row of `task`, by each method of EVAL_METHOD.

    A task without label words is not ranked.

    Raises:
      ConfigError: the task's postprocessing or a metric fails.
      FloatingPointError: a word's probability is not a number.
    """
    records = [_record(task, i) for i in range(len(task.rows))]
    used = _usable_methods(task, evaluator.config)
    outputs = {method: answer(evaluator, params, task, method, records) for method in used}
    result = _score(task, records, outputs)
    for method in used[:1]:
        answers = zip(records, outputs[method], result.predictions[method], strict=True)
        for record, output, prediction in answers:
            record |= {"output": output, "prediction": plain(prediction)}
    return result


def answer(
    evaluator: Evaluator,
    params: tuple[t5.Params, Prompt],
    task: EvalTask,
    method: str,
    records: list[dict[str, Any]] | None = None,
) -> list[str]:
    """The answer to every row by one method; adds the scores to `records`, one a row.

    Raises:
      FloatingPointError: a word's probability is not a number.
    """
    records = [{} for _ in range(len(task.rows))] if records is None else records
    return (_generate if method == "generate" else _rank)(evaluator, params, task, records)


def from_records(task: EvalTask, records: list[dict[str, Any]], config: EvalConfig) -> TaskResult:
    """The result of an earlier `evaluate`, from the rows that it wrote."""
    outputs: dict[str, list[str]] = {}
    if config.method != "rank":
        outputs["generate"] = [record["output"] for record in records]
    if config.method != "generate" and task.can_rank:
        scores = [record["label_scores"] for record in records]
        outputs["rank"] = [max(words, key=words.__getitem__) for words in scores]
    return _score(task, records, outputs)


def _score(
    task: EvalTask, records: list[dict[str, Any]], outputs: dict[str, list[str]]
) -> TaskResult:
    predictions = {
        method: [task.postprocess(row, text) for row, text in enumerate(texts)]
        for method, texts in outputs.items()
    }
    metrics = {
        f"{name}/{method}": value
        for method, values in predictions.items()
        for name, value in task.metrics(values).items()
    }
    return TaskResult(metrics, records, outputs, predictions)


def _generate(
    evaluator: Evaluator, params: Any, task: EvalTask, records: list[dict[str, Any]]
) -> list[str]:
    """The generated texts; adds their scores to the records."""
    # Dispatch all batches before waiting for the first result.
    batches = evaluator.batches(task.rows)
    answers = []
    for tokens, places in batches:
        padded = places + places[-1:] * (len(tokens) - len(places))
        numbers = evaluator.place(numbers=np.asarray(padded, np.int32))
        answers.append((places, evaluator.generate(*params, tokens, **numbers)))
    outputs = [""] * len(task.rows)
    for places, answer in answers:
        for row, ids, score in zip(places, *jax.device_get(answer), strict=False):
            outputs[row] = task.vocabulary.decode(ids.tolist())
            records[row]["score"] = score.item()
    return outputs


def _rank(
    evaluator: Evaluator, params: Any, task: EvalTask, records: list[dict[str, Any]]
) -> list[str]:
    """The word of each row with the highest score; if scores are equal, the first."""
    outputs: list[str] = []
    for row, scores in enumerate(ranking.rank(evaluator, params, task)):
        words = task.words(row)
        outputs.append(words[int(np.argmax(scores))])
        records[row].setdefault("score", max(scores))
        records[row]["label_scores"] = dict(zip(words, scores, strict=True))
    return outputs


def majority(task: EvalTask, config: EvalConfig) -> dict[str, float]:
    """The metrics of the majority baseline: every row is answered with the most frequent target.

    They are repeated under the name of every method of `config`, to be compared with its scores.
    """
    texts = majority_predictions(task.rows.target_texts, len(task.rows))
    return _score_texts(task, config, texts)


def best_constant(task: EvalTask, config: EvalConfig) -> float | None:
    """The best `task_score` that the same answer to every row reaches; None if there is none.

    The majority class is not always the best constant: its F1 is 0 if it is the negative class.
    """
    scores = []
    for text in dict.fromkeys(task.rows.target_texts):
        metrics = _score_texts(task, config, [text] * len(task.rows))
        score = task_score(metrics, methods(config)[0], config.metric)
        if score is not None and np.isfinite(score):
            scores.append(score)
    return max(scores, default=None)


def _score_texts(task: EvalTask, config: EvalConfig, texts: Sequence[str]) -> dict[str, float]:
    values = task.metrics([task.postprocess(row, text) for row, text in enumerate(texts)])
    used = _usable_methods(task, config)
    return {f"{name}/{method}": v for name, v in values.items() for method in used}


def _usable_methods(task: EvalTask, config: EvalConfig) -> list[str]:
    return [method for method in methods(config) if method == "generate" or task.can_rank]


def methods(config: EvalConfig) -> tuple[str, ...]:
    """The methods that an evaluation uses; the best prompt is chosen by the first."""
    return ("generate", "rank") if config.method == "both" else (config.method,)


def task_score(metrics: Mapping[str, float], method: str, metric: str = "") -> float | None:
    """The mean of a task's metrics by one method, as on SuperGLUE's leaderboard; or one `metric`.

    None if the task was not scored by that method.

    >>> task_score({"f1/rank": 50.0, "accuracy/rank": 70.0, "f1/generate": 0.0}, "rank")
    60.0
    """
    values = [
        value
        for name, value in metrics.items()
        if (name == f"{metric}/{method}" if metric else name.endswith(f"/{method}"))
    ]
    return float(np.mean(values)) if values else None


def mean_score(scores: Iterable[Mapping[str, float]], config: EvalConfig) -> float:
    """The mean over tasks of each task's score: the mean of its metrics (the paper's criterion, 3),
    or its metric TASK_METRIC.

    If a metric is NaN, for instance without predictions, the mean is minus infinity.
    """
    method = methods(config)[0]
    means = [task_score(metrics, method, config.metric) for metrics in scores]
    means = [mean for mean in means if mean is not None]
    return float(np.nan_to_num(np.mean(means), nan=-np.inf))


def describe_choice(tasks: Sequence[EvalTask], config: EvalConfig) -> str:
    """A line on what chooses the best prompt; "" if each task has a single metric.

    Raises:
      ConfigError: see `check_metric`.
    """
    method = methods(config)[0]
    if config.metric:
        check_metric(tasks, config)
        return f"the best prompt is chosen by {config.metric}/{method} (TASK_METRIC)"
    try:
        names = {task.name: _metric_names(task, config) for task in tasks}
    except ConfigError:  # a user's metric may not accept constant answers
        return ""
    if max(map(len, names.values()), default=0) < 2:
        return ""
    texts = {task: ", ".join(f"{name}/{method}" for name in own) for task, own in names.items()}
    of = "; ".join(text if len(texts) == 1 else f"{task}: {text}" for task, text in texts.items())
    return f"the best prompt is chosen by the mean of {of} (TASK_METRIC names one of them)"


def check_metric(tasks: Sequence[EvalTask], config: EvalConfig) -> None:
    """Raises ConfigError if a task does not have the metric that TASK_METRIC names."""
    for task in tasks if config.metric else ():
        known = _metric_names(task, config)
        if known and config.metric not in known:
            raise ConfigError(
                f"TASK_METRIC = {config.metric!r}: the task {task.name} has no such metric. "
                f"Expected one of its metrics, {', '.join(known)}, or '' for their mean."
            )


def _metric_names(task: EvalTask, config: EvalConfig) -> list[str]:
    """The metrics of the method that chooses the best prompt."""
    method = methods(config)[0]
    names = (name.rsplit("/", 1) for name in majority(task, config))
    return [metric for metric, scored in names if scored == method]


def _record(task: EvalTask, row: int) -> dict[str, Any]:
    example = task.rows.examples[row]
    texts = {
        "inputs_pretokenized": task.rows.input_texts[row],
        "targets_pretokenized": task.rows.target_texts[row],
        **{k: plain(v) for k, v in example.items() if k.endswith("_pretokenized")},
    }
    return {"input": texts, "target": plain(task.targets[row])}
