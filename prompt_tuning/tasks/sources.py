"""Whether the rows of a task are there: the split, the TFDS directory, the network.

`task_rows.load_rows` checks before it reads, so that missing data is one error with its cure,
within seconds. TFDS by itself retries for minutes.
"""

from __future__ import annotations

import os
import re
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import seqio
import tensorflow as tf
import tensorflow_datasets as tfds

from prompt_tuning.config import ConfigError
from prompt_tuning.tasks.vocabulary import first_line, same_vocabulary
from prompt_tuning.vocabularies.vocabulary import Vocabulary

TFDS_BUCKET = "https://storage.googleapis.com/tfds-data"  # where TFDS looks for prepared data
TIMEOUT_SECONDS = 10


def check_source(task: seqio.Task, split: str) -> None:
    """Checks that the split of the task can be read; downloads a TFDS dataset if it has to.

    Raises:
      ConfigError: the data is not there and cannot be had, or it has no such split.
    """
    if not has_split(task, split):
        raise ConfigError(
            f"the task {task.name} has no split {split!r}; it has "
            f"{', '.join(map(str, task.source.splits)) or 'none'}. Set TRAIN_SPLIT or EVAL_SPLIT, "
            "or prepare the missing split."
        )


def has_split(task: seqio.Task, split: str) -> bool:
    """Whether a task has the split; downloads a TFDS dataset to know, if it has to.

    Raises:
      ConfigError: the data is not there and cannot be had.
    """
    source = task.source
    if isinstance(source, seqio.TfdsDataSource):
        _fetch(task.name, source.tfds_dataset, split)
    # Splits that TFDS itself knows can be sliced and added: train[:32]+validation.
    sliceable = isinstance(source.splits, Mapping)
    names = re.findall(r"([\w.-]+)(?:\[[^\]]*\])?", split) if sliceable else [split]
    splits = tuple(str(name) for name in source.splits)
    return bool(names) and all(name in splits for name in names)


def _fetch(task: str, loader: Any, split: str) -> None:
    """Sees to it that a TFDS dataset is on the disk.

    A builder of our own: seqio keeps its builders for good, and one that was made before the data
    was there would never find it.
    """
    if loader.tfds_splits is not None and split not in loader.tfds_splits:
        return  # a dataset for each split, and none for this one: the caller names those there are
    name, directory = loader.get_split_params(split)
    if name is None:
        return  # a directory of the user's, read as it is
    builder = tfds.builder(name, data_dir=directory)
    if builder.is_prepared():
        return
    reason = _no_network(builder)
    if reason is None:
        try:
            builder.download_and_prepare()
            return
        except Exception as error:  # whatever the download raises, the cure is the same
            reason = f"{type(error).__name__}: {first_line(error)}"
    raise ConfigError(
        f"the data of {task} (TFDS {name}) is not at {builder.data_dir}, and it cannot be "
        f"downloaded ({reason}). {_cure(name)}"
    )


def _cure(name: str) -> str:
    if name.startswith("super_glue/"):
        return (
            "Put the official archives or JSONL files into a folder and run `t5x prepare-superglue "
            "--jsonl_dir=<folder> --tfds_data_dir=<directory>`, which needs no network; then give "
            "--tfds_data_dir=<directory> here."
        )
    cure = "Prepare it where there is a network, and give that directory as --tfds_data_dir here."
    if name.startswith("definite_pronoun_resolution"):
        cure += (
            " Or train without it: the mixture super_glue_without_dpr_v102_proportional (or "
            "taskless_...) is SuperGLUE's own data."
        )
    return cure


def _no_network(builder: Any) -> str | None:
    """Why neither the source of the data nor TFDS' copy answers; None if one does.

    TFDS' copy is asked last, and not at all for datasets that do not say where they come from.
    """
    url = getattr(builder.builder_config, "data_url", None)
    urls = [url] if url else list(builder.url_infos or ())
    if not urls:
        return None
    reason = _unreachable(urls[0])
    return reason if reason and _unreachable(TFDS_BUCKET) else None


def _unreachable(url: str) -> str | None:
    """Why the host of `url` does not answer; None if it does, be it with an error page."""
    request = urllib.request.Request(url, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS):
            return None
    except urllib.error.HTTPError:
        return None
    except OSError as error:  # URLError and timeouts
        return f"{url}: {getattr(error, 'reason', error)}"


# Text to pre-train on ------------------------------------------------------------------------


def describe_tfds(name: str, directory: str | None) -> str:
    """Name, version and place of a TFDS data set, whose rows never change.

    Raises:
      ConfigError: TFDS does not know it.
    """
    try:
        builder: Any = tfds.builder(name, data_dir=directory and os.path.expanduser(directory))
    except Exception as error:  # whatever TFDS raises, the cure is the same
        raise ConfigError(_unreadable(f"{name!r}", error)) from error
    return f"{builder.info.full_name} in {builder.data_dir}"


def _unreadable(what: str, error: Exception) -> str:
    return (
        f"TFDS_CORPUS: {what} cannot be read ({type(error).__name__}: {first_line(error)}). Give "
        "the directory that holds it with --tfds_data_dir, and its splits with TRAIN_SPLIT and "
        "EVAL_SPLIT."
    )


def read_tfds(name: str, split: str, field: str, directory: str | None) -> Iterator[str]:
    """The texts of a split of a TFDS data set, in the order of its files.

    Raises:
      ConfigError: the data set, the split or the field is not there.
    """
    try:
        builder: Any = tfds.builder(name, data_dir=directory and os.path.expanduser(directory))
        if not builder.is_prepared():
            builder.download_and_prepare()
        rows = builder.as_dataset(split=split, shuffle_files=False)
    except Exception as error:  # whatever TFDS raises, the cure is the same
        raise ConfigError(_unreadable(f"the split {split!r} of {name!r}", error)) from error
    if not isinstance(rows.element_spec, Mapping) or field not in rows.element_spec:
        names = ", ".join(rows.element_spec) if isinstance(rows.element_spec, Mapping) else "none"
        raise ConfigError(f"TEXT_FIELD: {name} has no field {field!r}; its fields: {names}.")
    for row in tfds.as_numpy(rows):
        yield row[field].decode("utf-8", errors="replace")


def read_text_task(task: Any, split: str, vocabulary: Vocabulary) -> Iterator[list[int]]:
    """The tokens of a task that gives text as `targets`, whole and without EOS, row by row.

    Raises:
      ConfigError: the task gives something else, or cannot be read.
    """
    if not isinstance(task, seqio.Task):
        raise ConfigError(
            f"MIXTURE_OR_TASK_NAME: {task.name} is a mixture; a corpus is one task. Register a "
            "task over all of the text."
        )
    feature = task.output_features.get("targets")
    if feature is None or not same_vocabulary(feature.vocabulary, vocabulary):
        raise ConfigError(
            f"the task {task.name} must make 'targets' with VOCABULARY: pre-training takes them as "
            f"its text. Its output features: {sorted(task.output_features)}."
        )
    check_source(task, split)
    try:
        dataset = task.get_dataset(None, split=split, use_cached=False, shuffle=False, seed=0)
        for row in dataset.as_numpy_iterator():
            yield _without_eos(_text_of(task, row), vocabulary.eos_id)
    except (tf.errors.OpError, ValueError, AssertionError, KeyError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"the split {split!r} of the task {task.name} cannot be read: {first_line(error)}. As a"
            " corpus it has to give whole documents, without knowing TASK_FEATURE_LENGTHS."
        ) from error


def _text_of(task: seqio.Task, row: Mapping[str, Any]) -> np.ndarray:
    """The token ids of a row that has no inputs."""
    if len(row.get("inputs", ())):
        raise ConfigError(
            f"the task {task.name} has inputs: pre-training makes inputs and targets itself, of "
            "the text that a task gives as 'targets'. (A task with both is trained on with "
            "runs/model_tune.gin.)"
        )
    targets = np.asarray(row.get("targets"))
    if targets.dtype.kind != "i":
        raise ConfigError(
            f"the task {task.name} must give 'targets' as token ids: does it lack "
            "seqio.preprocessors.tokenize?"
        )
    return targets


def _without_eos(ids: np.ndarray, eos: int | None) -> list[int]:
    values = ids.tolist()
    return values[:-1] if values and values[-1] == eos else values
