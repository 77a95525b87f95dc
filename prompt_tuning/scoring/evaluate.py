"""Scores prompts on whole validation splits: by generation, and by ranking the label words.

From `EvalTask` to T5's metrics in per cent. `training/loop.py` calls it during a run,
`evaluation/matrix.py` for `t5x eval`; both hand over a backbone that is already on the devices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from prompt_tuning.config import EvalConfig, Experiment
from prompt_tuning.data import features
from prompt_tuning.model import decode, loss, sharding, t5
from prompt_tuning.model.prompt import encode_prompted
from prompt_tuning.scoring.eval_task import EvalTask
from prompt_tuning.text.metrics import majority_predictions


@dataclasses.dataclass(frozen=True)
class Scored:
    """One prompt on one task: metrics named `<T5's name>/<method>`, and every row."""

    metrics: dict[str, float]
    rows: list[dict[str, Any]]


class Evaluator:
    """The compiled functions of one model and how to batch for them; traced once a shape."""

    def __init__(self, experiment: Experiment, mesh: Mesh) -> None:
        """Reads model, evaluation and data settings of `experiment`."""
        config, evaluation = experiment.model, experiment.eval
        self.mesh, self.config = mesh, evaluation
        self.lengths = experiment.data.task_feature_lengths
        self.batch_size = evaluation.batch_size or experiment.data.batch_size
        sharding.check_batch_size(self.batch_size, mesh)
        length = self.lengths["targets"]

        def generate(
            backbone: t5.Params, prompt: Float[Array, "P D"], tokens: Int[Array, "B T"]
        ) -> tuple[Int[Array, "B L"], Float[Array, "B"]]:
            return decode.generate(
                config,
                backbone,
                prompt,
                tokens,
                length=length,
                num_decodes=evaluation.num_decodes,
            )

        def rank(
            backbone: t5.Params,
            prompt: Float[Array, "P D"],
            tokens: Int[Array, "B T"],
            labels: Int[Array, "C L"],
        ) -> Float[Array, "B C"]:
            encoded = encode_prompted(config, backbone, prompt, tokens)
            return loss.label_log_likelihoods(config, backbone, encoded, labels)

        # Every process of many needs every row's answer.
        everywhere = sharding.replicated(mesh)
        self.generate: Callable[..., Any] = jax.jit(generate, out_shardings=everywhere)
        self.rank: Callable[..., Any] = jax.jit(rank, out_shardings=everywhere)

    def over_rows(
        self, rows: features.Rows, answer: Callable[[jax.Array], Any]
    ) -> list[tuple[Any, ...]]:
        """What `answer` says of every row, in the order of the rows, given batches of tokens.

        Rows of like length share a batch. Nothing is waited for before all batches are under way.
        """
        parts = []
        for batch, places in features.eval_batches(rows, self.batch_size, self.lengths):
            tokens = {"tokens": np.asarray(batch["encoder_input_tokens"])}
            parts.append((places, answer(sharding.shard_batch(tokens, self.mesh)["tokens"])))
        found: dict[int, tuple[Any, ...]] = {}
        for places, arrays in parts:
            columns = jax.tree.leaves(jax.device_get(arrays))
            # The last batch is filled up: what stands behind its places is nobody's.
            found |= {place: values for place, *values in zip(places, *columns, strict=False)}
        return [found[row] for row in range(len(rows))]


def evaluate(
    evaluator: Evaluator, params: tuple[t5.Params, Float[Array, "P D"]], task: EvalTask
) -> Scored:
    """Scores (backbone, prompt) on every row of `task` with the methods of the configuration."""
    records = [_record(task, i) for i in range(len(task.rows.examples))]
    metrics: dict[str, float] = {}
    if evaluator.config.method != "rank":
        metrics |= _by_generation(evaluator, params, task, records)
    if evaluator.config.method != "generate":
        metrics |= _by_rank(evaluator, params, task, records)
    return Scored(metrics, records)


def _by_generation(
    evaluator: Evaluator, params: Any, task: EvalTask, records: list[dict[str, Any]]
) -> dict[str, float]:
    """Metrics of the generated texts; fills in the records."""
    answers = evaluator.over_rows(task.rows, lambda tokens: evaluator.generate(*params, tokens))
    predictions = []
    for record, example, (ids, score) in zip(records, task.rows.examples, answers, strict=True):
        text = task.vocabulary.decode(ids.tolist())
        predictions.append(task.postprocess(text, example))
        record.update(output=text, prediction=_plain(predictions[-1]), score=score.item())
    return {f"{k}/generate": v for k, v in task.metrics(predictions).items()}


def _by_rank(
    evaluator: Evaluator, params: Any, task: EvalTask, records: list[dict[str, Any]]
) -> dict[str, float]:
    """Metrics of the most probable label words; fills in the records."""
    labels = _label_tokens(task)
    answers = evaluator.over_rows(task.rows, lambda tokens: evaluator.rank(*params, tokens, labels))
    predictions = []
    for record, example, (scores,) in zip(records, task.rows.examples, answers, strict=True):
        row = scores.tolist()
        word = task.label_words[int(np.argmax(row))]
        predictions.append(task.postprocess(word, example))
        if "output" not in record:
            record.update(output=word, prediction=_plain(predictions[-1]), score=max(row))
        record["label_scores"] = dict(zip(task.label_words, row, strict=True))
    return {f"{k}/rank": v for k, v in task.metrics(predictions).items()}


def majority(task: EvalTask, train: features.Rows, config: EvalConfig) -> dict[str, float]:
    """The metrics of always answering the most frequent target of the training rows.

    Named for every method of `config`, so that they stand beside what they are to be beaten by.
    """
    answers = majority_predictions(train.target_texts, len(task.targets))
    values = task.metrics(
        [task.postprocess(*pair) for pair in zip(answers, task.rows.examples, strict=True)]
    )
    return {f"{k}/{method}": v for k, v in values.items() for method in methods(config)}


def methods(config: EvalConfig) -> tuple[str, ...]:
    """The methods an evaluation uses; the first one chooses the best prompt."""
    return ("generate", "rank") if config.method == "both" else (config.method,)


def mean_score(scored: Mapping[str, Scored], config: EvalConfig) -> float:
    """The mean over tasks of the mean of each task's metrics (the paper's criterion, 3).

    A metric that is not a number (of no predictions, say) makes it the lowest score of all.
    """
    suffix = "/" + methods(config)[0]
    means = [
        float(np.mean([v for k, v in one.metrics.items() if k.endswith(suffix)]))
        for one in scored.values()
    ]
    return float(np.nan_to_num(np.mean(means), nan=-np.inf))


def _record(task: EvalTask, row: int) -> dict[str, Any]:
    example = task.rows.examples[row]
    texts = {
        "inputs_pretokenized": task.rows.input_texts[row],
        "targets_pretokenized": task.rows.target_texts[row],
        **{k: _plain(v) for k, v in example.items() if k.endswith("_pretokenized")},
    }
    return {"input": texts, "target": _plain(task.targets[row])}


def _label_tokens(task: EvalTask) -> Int[np.ndarray, "C L"]:
    feature = task.task.output_features["targets"]
    eos = [feature.vocabulary.eos_id] if feature.add_eos else []
    ids = [list(feature.vocabulary.encode(word)) + eos for word in task.label_words]
    tokens = np.zeros((len(ids), max(map(len, ids))), np.int32)
    for row, label in zip(tokens, ids, strict=True):
        row[: len(label)] = label
    return tokens


def _plain(value: Any) -> Any:
    """What JSON can hold of a seqio value."""
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace")
    if isinstance(value, (np.ndarray, np.generic)):
        return _plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return value
