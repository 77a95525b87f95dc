"""The prompts that PROMPT_FILE names: one, several, a pattern, or all of a folder."""

from __future__ import annotations

import dataclasses
import glob
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prompt_tuning.config import ConfigError
from prompt_tuning.model.prompt import Prompt
from prompt_tuning.prompts import prompt_file
from prompt_tuning.session.session import Backbone
from prompt_tuning.tasks import registry


@dataclasses.dataclass(frozen=True, eq=False)
class NamedPrompt:
    """A prompt to score."""

    name: str  # in tables: the path as it was given or found
    prompt: Prompt
    step: int
    task: str = ""  # what it was tuned for; "" where nobody knows


def find_prompts(given: str | Iterable[str]) -> tuple[str, ...]:
    """The paths of all prompts that are meant, each once.

    A path with `*`, `?` or `[` is a pattern. A folder that is no prompt stands for the prompts in
    it, such as the `prompts` of a MODEL_DIR.

    Raises:
      ConfigError: a pattern matches no prompt, or a path is given twice.
    """
    found: list[str] = []
    for path in (given,) if isinstance(given, str) else given:
        if path:
            found += _expand(path)
    twice = {path for path in found if found.count(path) > 1}
    if twice:
        raise ConfigError(f"PROMPT_FILE names {', '.join(sorted(twice))} twice.")
    return tuple(found)


def _expand(path: str) -> list[str]:
    if "://" in path:
        return [path]
    expanded = os.path.expanduser(path)
    if glob.has_magic(expanded) and not os.path.exists(expanded):
        matches = [
            match for match in sorted(glob.glob(expanded, recursive=True)) if _is_prompt(match)
        ]
        if not matches:
            raise ConfigError(f"PROMPT_FILE: no prompt matches the pattern {path}.")
        return matches
    if os.path.isdir(expanded) and not _is_prompt(expanded):
        inside = sorted(str(p) for p in Path(expanded).iterdir())
        return [p for p in inside if _is_prompt(p)] or [path]  # the reader says what is wrong
    return [path]


def _is_prompt(path: str) -> bool:
    try:
        prompt_file.recognise(Path(path))
    except ConfigError:
        return False
    return True


def load_prompts(
    files: Sequence[str], width: int, backbone: Backbone, vocabulary: str
) -> list[NamedPrompt]:
    """Every prompt, held against the model and the vocabulary (its identity).

    Raises:
      ConfigError: a prompt is missing, damaged, or belongs to another model.
    """
    found = []
    for file in files:
        array, metadata = prompt_file.load_prompt(file)
        prompt_file.check_prompt(
            array,
            metadata,
            shape=(None, width),
            backbone=backbone.identity,
            vocabulary=vocabulary,
            where=file,
        )
        step, task = (metadata.step, metadata.task) if metadata else (0, "")
        found.append(NamedPrompt(file, as_prompt(array), step, task))
    return found


def as_prompt(rows: Any) -> Prompt:
    """A prompt of rows, float32, on no device yet."""
    return Prompt(np.asarray(rows, np.float32))  # pyright: ignore[reportArgumentType]


def own_tasks(prompt: NamedPrompt) -> set[str]:
    """The tasks that a prompt was tuned for; a mixture stands for its own.

    WSC is trained on its one half and scored on the other.

    Raises:
      ConfigError: the prompt does not say, or its task is not registered.
    """
    if not prompt.task:
        raise ConfigError(
            f"{prompt.name} does not say which task it was tuned for, so EVAL_PAIRS = 'own' cannot "
            "pair it: use 'all', or a prompt folder of this project."
        )
    names = {task for task, _ in registry.component_tasks(prompt.task)}
    return names | {name.replace("_simple_train", "_simple_eval") for name in names}


def file_names(prompts: Sequence[str]) -> dict[str, str]:
    """What is added to a file's name for each prompt: nothing for one, else what sets it apart.

    >>> list(file_names(["runs/mood/prompts/best", "runs/topic/prompts/best"]).values())
    ['-mood_prompts_best', '-topic_prompts_best']
    """
    if len(prompts) < 2:
        return dict.fromkeys(prompts, "")
    paths = {name: os.path.abspath(os.path.expanduser(name)) for name in prompts}
    common = os.path.commonpath(paths.values())
    return {
        name: "-" + os.path.relpath(path, common).replace(os.sep, "_")
        for name, path in paths.items()
    }
