"""The rows of a task in memory: any seqio task, read once, tokenised and cut.

`batches/batching.py` makes batches of them; after this file there is only numpy.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import seqio
import tensorflow as tf
from seqio.utils import Feature

from prompt_tuning.batches.batching import Lengths, Rows, Tokens
from prompt_tuning.config import ConfigError, DataConfig, Truncate
from prompt_tuning.tasks import glue, superglue
from prompt_tuning.tasks.file_tasks import check_label_words, register_files
from prompt_tuning.tasks.registry import (
    component_tasks,
    find_spec,
    has_row_words,
    import_task_module,
    label_words,
    register,
    resolve,
    row_words,
)
from prompt_tuning.tasks.sources import check_source, has_split
from prompt_tuning.tasks.spec import FIELDS, UNLABELLED
from prompt_tuning.tasks.vocabulary import (
    first_line,
    read_vocabulary,
    same_vocabulary,
)
from prompt_tuning.vocabularies.coverage import refuse_alike
from prompt_tuning.vocabularies.truncate import Field, Input, encode_input
from prompt_tuning.vocabularies.vocabulary import Vocabulary, load_vocabulary

CLASSES = 10  # more different answers are regarded as free text


def load_rows(
    task: str,
    split: str,
    lengths: Lengths,
    *,
    vocabulary: Vocabulary | None = None,
    limit: int | None = None,
    truncate: Truncate = "end",
) -> Rows:
    """The rows of a split, tokenised and cut to `lengths`: unshuffled, one epoch.

    With a `vocabulary`, the task's has to be the same; with a `limit`, only the first rows are
    read. Random preprocessors are seeded and draw once, not anew in every epoch.

    Raises:
      ConfigError: the task, the split or the data is missing, a feature is not a sequence of
        tokens, or the vocabulary is another one.
    """
    seqio_task = resolve(task)
    if not isinstance(seqio_task, seqio.Task):
        raise ConfigError(f"{task} is a mixture; load the rows of its tasks one by one.")
    _check_vocabularies(seqio_task, vocabulary)
    if not seqio_task.requires_caching:
        check_source(seqio_task, split)
    examples = _read(seqio_task, split, lengths, limit)
    if not examples:
        raise ConfigError(f"the split {split!r} of the task {task} has no rows.")
    inputs, targets = (
        [_tokens(seqio_task, e, key) for e in examples] for key in ("inputs", "targets")
    )
    cut = {
        key: sum(_is_cut(seqio_task.output_features[key], e, key, lengths[key]) for e in examples)
        for key in ("inputs", "targets")
    }
    input_texts, target_texts = (
        [_text(seqio_task, e, key) for e in examples] for key in ("inputs", "targets")
    )
    input_texts = [_with_fields(*pair) for pair in zip(input_texts, examples, strict=True)]
    if cut["inputs"] and truncate != "end":
        if vocabulary is None:
            raise ConfigError(f"TRUNCATE = {truncate!r} needs the vocabulary of {task}.")
        inputs = [
            np.asarray(encode_input(vocabulary, text, lengths["inputs"], truncate), np.int32)
            if len(ids) == lengths["inputs"]
            else ids
            for text, ids in zip(input_texts, inputs, strict=True)
        ]
    return Rows(
        task,
        inputs,
        targets,
        input_texts,
        target_texts,
        examples,
        truncated_inputs=cut["inputs"],
        truncated_targets=cut["targets"],
    )


def _with_fields(text: str, example: dict[str, Any]) -> str:
    """The text with the fields that the example names, which are no features for anyone else."""
    names, spans = (example.pop(key, None) for key in FIELDS)
    if names is None or spans is None:
        return text
    pairs = zip(names.tolist(), spans.reshape(-1, 2).tolist(), strict=True)
    return Input(text, (Field(name.decode(), start, end) for name, (start, end) in pairs))


def _check_vocabularies(task: seqio.Task, vocabulary: Vocabulary | None) -> None:
    for key in ("inputs", "targets"):
        if key not in task.output_features:
            raise ConfigError(
                f"the task {task.name} has the output features {sorted(task.output_features)}; an "
                "encoder-decoder needs 'inputs' and 'targets'."
            )
        of_task = task.output_features[key].vocabulary
        read_vocabulary(of_task)
        if vocabulary is not None and not same_vocabulary(of_task, vocabulary):
            raise ConfigError(
                f"the task {task.name} makes its {key} with the vocabulary {of_task}, but "
                f"VOCABULARY is {vocabulary}: their ids mean different things. Use one for both."
            )


def _read(
    task: seqio.Task, split: str, lengths: Lengths, limit: int | None
) -> list[dict[str, Any]]:
    try:
        dataset = task.get_dataset(
            sequence_length=dict(lengths),
            split=split,
            use_cached=task.requires_caching,
            shuffle=False,
            seed=0,
            try_in_mem_cache=False,
        )
        if limit is not None:
            dataset = dataset.take(limit)
        return list(dataset.as_numpy_iterator())
    except ConfigError:
        raise  # from the user's own files
    except (tf.errors.OpError, ValueError, AssertionError) as error:
        raise ConfigError(
            f"the split {split!r} of the task {task.name} cannot be read: {first_line(error)}"
        ) from error


def _tokens(task: seqio.Task, example: Mapping[str, Any], key: str) -> Tokens:
    value = np.asarray(example.get(key, []))
    if key not in example or value.ndim != 1 or not np.issubdtype(value.dtype, np.integer):
        kind = f"{value.dtype}{list(value.shape)}" if key in example else "nothing"
        raise ConfigError(
            f"the task {task.name} must give {key!r} as a sequence of token ids, found {kind}. "
            "Does it lack seqio.preprocessors.tokenize?"
        )
    return value.astype(np.int32)


def _text(task: seqio.Task, example: Mapping[str, Any], key: str) -> str:
    text = example.get(f"{key}_pretokenized")
    if isinstance(text, bytes):
        return text.decode("utf-8", errors="replace")
    return task.output_features[key].vocabulary.decode(example[key].tolist())


def _is_cut(feature: Feature, example: Mapping[str, Any], key: str, length: int) -> bool:
    """Whether a feature has lost tokens; only one that fills its length can have.

    A task that keeps no pretokenized text does not show it: a full feature then counts as cut.
    """
    if len(example[key]) < length:
        return False
    text = example.get(f"{key}_pretokenized")
    if not isinstance(text, bytes):
        return True
    whole = len(feature.vocabulary.encode(text.decode("utf-8"))) + int(feature.add_eos)
    return whole > length


def training_tasks(name: str, split: str) -> list[tuple[str, float]]:
    """The names and rates of what a task or mixture trains on.

    Raises:
      ConfigError: see `tasks.component_tasks`, or no task is left.
    """
    rates = dict(component_tasks(name))
    drawn = [(task, rates[task]) for task in _with_split(name, split) if rates[task] > 0]
    if not drawn:
        raise ConfigError(
            f"no task of the mixture {name} has the split {split!r}: set TRAIN_SPLIT."
        )
    return drawn


def scored_tasks(config: DataConfig) -> list[str]:
    """The names of the tasks that are scored: of a mixture those that have the split.

    Raises:
      ConfigError: none is named, or none has the split.
    """
    if not config.names:
        raise ConfigError("MIXTURE_OR_TASK_NAME is empty: name the tasks or mixtures to score.")
    names = [task for name in config.names for task in _with_split(name, config.eval_split)]
    if not names:
        raise ConfigError(
            f"no task of {', '.join(config.names)} has the split {config.eval_split!r}: set "
            "EVAL_SPLIT."
        )
    return list(dict.fromkeys(names))


def register_tasks(config: DataConfig) -> None:
    """Registers the project's tasks, those of the user's files and those of the user's module."""
    register(
        config.vocabulary,
        tfds_data_dir=config.tfds_data_dir,
        sentinel_targets=config.sentinel_targets,
    )
    register_files(config)
    if config.mixture_or_task_module:
        import_task_module(config.mixture_or_task_module)


def load_training_rows(
    name: str,
    split: str,
    lengths: Lengths,
    *,
    vocabulary: Vocabulary | None = None,
    truncate: Truncate = "end",
) -> tuple[list[Rows], list[float]]:
    """Rows and rates of everything that a task or mixture trains on.

    Of a mixture, tasks with rate 0 and tasks without the split are there to be evaluated.

    Raises:
      ConfigError: see `load_rows` and `tasks.component_tasks`, or no task is left.
    """
    drawn = training_tasks(name, split)
    rows = [
        load_rows(task, split, lengths, vocabulary=vocabulary, truncate=truncate)
        for task, _ in drawn
    ]
    if vocabulary is not None:
        for part in rows:
            _refuse_alike_classes(part, vocabulary)
    return rows, [rate for _, rate in drawn]


def _refuse_alike_classes(rows: Rows, vocabulary: Vocabulary) -> None:
    """Raises ConfigError if all rows of a class are the same tokens to the model."""
    classes: dict[str, list[int]] = collections.defaultdict(list)
    for row, answer in enumerate(rows.target_texts):
        classes[answer].append(row)
    if not label_words(rows.task) and len(classes) > CLASSES:
        return  # free text
    for answer, numbers in classes.items():
        texts, tokens = [rows.input_texts[i] for i in numbers], [rows.inputs[i] for i in numbers]
        what = f"the {len(numbers)} inputs of {rows.task} with the answer {answer!r}"
        refuse_alike(texts, tokens, vocabulary, what)


def _with_split(name: str, split: str) -> list[str]:
    """The tasks of a mixture that have a split, as seqio draws them; a task by itself must."""
    names = [task for task, _ in component_tasks(name)]
    return [task for task in names if task == name or _has_split(task, split)]


def _has_split(task: str, split: str) -> bool:
    spec = find_spec(task)
    if spec is not None and spec.splits is not None:
        # Known without the data. A slice of a split of theirs is refused where it is read.
        return split.split("[")[0] in spec.splits
    provider: Any = resolve(task)  # a task, not a mixture
    return provider.requires_caching or has_split(provider, split)


class EvalRows(NamedTuple):
    """The rows that one task is scored on, or answered for."""

    task: Any  # seqio.Task
    rows: Rows
    label_words: tuple[str, ...]  # of the task; of one that is not ours CLASS_LABELS

    def row_words(self, row: int) -> tuple[str, ...]:
        """The words to rank for a row: its own (ReCoRD's entities), or the task's.

        () if any text is an answer.
        """
        if has_row_words(self.task.name):
            return row_words(self.task.name, self.rows.examples[row])
        return self.label_words

    def is_labelled(self, row: int) -> bool:
        """Whether a row has a label; rows of SuperGLUE's and GLUE's test splits have none."""
        spec = find_spec(self.task.name)
        if spec is not None and spec.convert is superglue.wsc:  # its target is the noun on offer
            return int(self.rows.examples[row]["label"]) != -1
        unknown = "-1.0" if spec is not None and spec.convert is glue.similarity else UNLABELLED
        return self.rows.target_texts[row] != unknown


def load_eval_rows(
    config: DataConfig, *, class_labels: tuple[str, ...] = (), limit: int | None = None
) -> list[EvalRows]:
    """The evaluation rows of every task that is named.

    A mixture stands for those of its tasks that have the split.

    Registers the tasks first, the user's own included.

    Raises:
      ConfigError: a task, its data or its vocabulary is missing or does not fit.
    """
    register_tasks(config)
    vocabulary = load_vocabulary(config.vocabulary)
    check_label_words(config.files.words, vocabulary, config.task_feature_lengths)
    loaded = []
    for name in scored_tasks(config):
        rows = load_rows(
            name,
            config.eval_split,
            config.task_feature_lengths,
            vocabulary=vocabulary,
            limit=limit,
            truncate=config.truncate,
        )
        _refuse_alike_classes(rows, vocabulary)
        loaded.append(EvalRows(resolve(name), rows, label_words(name, otherwise=class_labels)))
    return loaded
