"""A seqio task of the user's own files, set by macros alone: `gin/tasks/custom.gin`.

The rows come from `file_examples.py`. Mixtures, metrics, ranking and upstream T5X take the task by
its name, as any other.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import seqio
import tensorflow as tf
from seqio.utils import Feature

from prompt_tuning.config import ConfigError, DataConfig
from prompt_tuning.tasks import answers, metrics, registry
from prompt_tuning.tasks.file_examples import EVAL, TRAIN, as_columns, load_split
from prompt_tuning.tasks.spec import UNLABELLED
from prompt_tuning.tasks.vocabulary import seqio_vocabulary, target_vocabulary
from prompt_tuning.vocabularies.vocabulary import Vocabulary

# The task that `register_files` added last: the only state of this module.
_registered: list[seqio.Task] = []


def register_files(config: DataConfig) -> None:
    """Adds the task of the user's files to seqio's registry, in place of one that was added before.

    The files are read when the rows are asked for.

    Raises:
      ConfigError: the task has the name of another one.
    """
    for task in _registered:
        if task.name in seqio.TaskRegistry.names() and seqio.TaskRegistry.get(task.name) is task:
            seqio.TaskRegistry.remove(task.name)
            registry.own_words.pop(task.name, None)
    _registered.clear()
    name, files = config.file_task_name, config.files
    if not files.given:
        return
    if name in registry.task_names():
        raise ConfigError(
            f"there is a task {name!r} already: give the one of your files another name, as "
            "MIXTURE_OR_TASK_NAME, or as TASK_NAME where the run is on several."
        )
    task = _make_task(config)
    seqio.TaskRegistry.add_provider(name, task)
    registry.own_words[name] = files.words
    _registered.append(task)


def _make_task(config: DataConfig) -> seqio.Task:
    name, files = config.file_task_name, config.files
    vocabulary = seqio_vocabulary(config.vocabulary)
    targets = target_vocabulary(vocabulary, config.sentinel_targets)

    def rows(split: str, shuffle_files: bool = False, seed: int | None = None) -> tf.data.Dataset:
        del shuffle_files, seed
        columns: Any = as_columns(load_split(files, split), UNLABELLED)
        return tf.data.Dataset.from_tensor_slices(columns)

    words = files.words
    return seqio.Task(
        name,
        source=seqio.FunctionDataSource(
            rows, splits=[*([TRAIN] if files.train_file else []), EVAL]
        ),
        preprocessors=[
            seqio.preprocessors.tokenize,
            seqio.CacheDatasetPlaceholder(),
            seqio.preprocessors.append_eos_after_trim,
        ],
        output_features={
            "inputs": Feature(vocabulary, add_eos=True),
            "targets": Feature(targets, add_eos=True),
        },
        postprocess_fn=functools.partial(_postprocess, words=words),
        metric_fns=[metrics.accuracy, metrics.macro_f1] if words else [metrics.score_texts],
    )


def _postprocess(
    output: str,
    *,
    words: Sequence[str],
    example: Mapping[str, Any] | None = None,
    is_target: bool = False,
) -> Any:
    """The index of a label word, -1 for another output; or the text, where there are no words.

    Raises:
      ConfigError: a target is asked for where the row has none.
    """
    if is_target and output == UNLABELLED:
        raise ConfigError(
            f"{(example or {}).get('row', b'a row').decode()}: nothing in TARGET_FIELD, so the row "
            "cannot be scored. Rows without an answer can be answered with `t5x infer`."
        )
    return answers.label_index(output, labels=words) if words else output


def check_label_words(
    words: Sequence[str], vocabulary: Vocabulary, lengths: Mapping[str, int]
) -> None:
    """Checks that the model can write every word, and tell it from the others.

    Raises:
      ConfigError: the tokens of a word are another text (with pieces that the vocabulary does not
        know, say), are too many, or are those of another word.
    """
    seen: dict[tuple[int, ...], str] = {}
    for word in words:
        ids = tuple(vocabulary.encode(word))
        if (written := vocabulary.decode(list(ids))) != word:
            raise ConfigError(
                f"LABEL_WORDS: the vocabulary writes {word!r} as {written!r}, so the answer would "
                "never be right: choose a word that it knows."
            )
        if len(ids) + 1 > lengths["targets"]:
            raise ConfigError(
                f"LABEL_WORDS: {word!r} is {len(ids)} tokens and an end-of-sequence, more than the "
                f"{lengths['targets']} of TASK_FEATURE_LENGTHS['targets']: the answer would be cut."
            )
        if ids in seen:
            raise ConfigError(
                f"LABEL_WORDS: {word!r} and {seen[ids]!r} are the same tokens ({list(ids)}): the "
                "model could not tell them apart."
            )
        seen[ids] = word
