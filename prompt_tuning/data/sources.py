"""Whether the rows of a task are there: the split, the TFDS directory, the network.

`features.load_rows` asks before it reads, so that what is missing is said in one sentence, in
seconds, with the cure; TFDS by itself retries for minutes.
"""

from __future__ import annotations

import re
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

import seqio
import tensorflow_datasets as tfds

from prompt_tuning.config import ConfigError
from prompt_tuning.data.vocabulary import first_line

TFDS_BUCKET = "https://storage.googleapis.com/tfds-data"  # where TFDS looks for prepared data
TIMEOUT_SECONDS = 10


def check_source(task: seqio.Task, split: str) -> None:
    """Returns when the split of the task can be read; downloads a TFDS dataset where it has to.

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
    """Whether a task has the split; downloads a TFDS dataset where it has to, to know.

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
