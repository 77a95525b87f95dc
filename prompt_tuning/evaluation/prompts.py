"""The prompts that PROMPT_FILE names: a path, several, a pattern, or all prompts in a folder.

`matrix.py` and `submit.py` find, load and check their prompts here.
"""

from __future__ import annotations

import dataclasses
import glob
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from prompt_tuning.config import ConfigError, ModelConfig
from prompt_tuning.methods.method import Frozen
from prompt_tuning.model.prompt import Prompt
from prompt_tuning.prompts import prompt_file
from prompt_tuning.session.session import Backbone
from prompt_tuning.tasks import registry


@dataclasses.dataclass(frozen=True, eq=False)
class NamedPrompt:
    """A prompt to score."""

    name: str  # in tables: its path
    prompt: Prompt
    step: int
    task: str = ""  # the task it was tuned for; "" if that is unknown


def find_prompts(paths: str | Iterable[str]) -> tuple[str, ...]:
    """The paths of all prompts that PROMPT_FILE names, each once.

    A path with `*`, `?` or `[` is a pattern. A folder that is no prompt means all prompts in it,
    such as `prompts` in a MODEL_DIR.

    Raises:
      ConfigError: a pattern matches no prompt, or a path is named twice.
    """
    prompts: list[str] = []
    for path in (paths,) if isinstance(paths, str) else paths:
        if path:
            prompts += _expand(path)
    twice = {path for path in prompts if prompts.count(path) > 1}
    if twice:
        raise ConfigError(f"PROMPT_FILE names {', '.join(sorted(twice))} twice.")
    return tuple(prompts)


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
        return [p for p in inside if _is_prompt(p)] or [path]  # loading it raises the error
    return [path]


def _is_prompt(path: str) -> bool:
    try:
        prompt_file.recognise(Path(path))
    except ConfigError:
        return False
    return True


def load_prompts(
    files: Sequence[str], model: ModelConfig, backbone: Backbone, vocabulary: str
) -> list[NamedPrompt]:
    """Every prompt, checked against the backbone and the fingerprint of the vocabulary.

    Raises:
      ConfigError: a prompt is missing, damaged, or was tuned for another model.
    """
    prompts = []
    for file in files:
        prompt, metadata = prompt_file.load_fitting_prompt(
            file,
            (None, model.embed_dim),
            frozen=Frozen(model, backbone.params),
            backbone=backbone.identity,
            vocabulary=vocabulary,
        )
        step, task = (metadata.step, metadata.task) if metadata else (0, "")
        prompts.append(NamedPrompt(file, prompt, step, task))
    return prompts


def tuned_tasks(prompt: NamedPrompt) -> set[str]:
    """The names of the tasks that a prompt was tuned for; a mixture counts as its tasks.

    Tasks that are only scored count with the one that they are trained as: WSC is trained on
    "simple_train" and scored on "simple_eval".

    Raises:
      ConfigError: the prompt's task is unknown or not registered.
    """
    if not prompt.task:
        raise ConfigError(
            f"EVAL_PAIRS = 'own': {prompt.name} does not name the task it was tuned for. Set "
            "EVAL_PAIRS = 'all', or give a prompt folder of this project."
        )
    names = {task for task, _ in registry.component_tasks(prompt.task)}
    return names | {name for name in registry.task_names() if registry.trained_task(name) in names}


def file_suffixes(prompts: Sequence[str]) -> dict[str, str]:
    """The suffix of each prompt's files: "" for a single prompt, else its path below the others'.

    >>> list(file_suffixes(["runs/mood/prompts/best", "runs/topic/prompts/best"]).values())
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
