"""The one place that knows in which format a backbone is: T5X's checkpoints, or Hugging Face's.

`session/setup.py`, `serving/predictor.py` and all others that read a backbone come here.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import jax
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array

from prompt_tuning.checkpoints import architecture, huggingface, t5x
from prompt_tuning.checkpoints.layouts import find_checkpoint
from prompt_tuning.checkpoints.t5x_prompt import PROMPT, is_prompt_leaf
from prompt_tuning.config import TINY, ModelConfig
from prompt_tuning.model import sharding, t5
from prompt_tuning.runtime.prefetch import Ahead
from prompt_tuning.runtime.storage import open_folder
from prompt_tuning.world import assets

PathLike = str | os.PathLike[str]


def find_path(spec: PathLike) -> str:
    """Where a checkpoint lies; "tiny" is the bundled one."""
    return assets.tiny_checkpoint() if spec == TINY else os.fspath(spec)


def read_backbone(
    spec: PathLike,
    model: ModelConfig,
    *,
    dtype: DTypeLike | None = None,
    shardings: Mapping[str, jax.sharding.Sharding] | None = None,
) -> tuple[dict[str, Array], int]:
    """All parameters of a T5, straight to their dtype and their place, and the step.

    The step of a Hugging Face folder is 0, unless it was made of a T5X checkpoint. A prompt that
    lies in a T5X checkpoint as well is not read: `describe_unused_prompt` is for the user.

    Raises:
      ConfigError: there is no such checkpoint, it is damaged, or it is not of this model.
    """
    return dict(iter_backbone(spec, model, dtype=dtype, shardings=shardings)), read_step(spec)


def iter_backbone(
    spec: PathLike,
    model: ModelConfig,
    *,
    dtype: DTypeLike | None = None,
    shardings: Mapping[str, jax.sharding.Sharding] | None = None,
) -> Iterator[tuple[str, Array]]:
    """The parameters of `read_backbone`, each as soon as it is in its place."""
    path = find_path(spec)
    dtype = model.dtype if dtype is None else dtype
    if huggingface.is_huggingface(path):
        folder = huggingface.open_folder(path, model)
        yield from huggingface.iter_params(folder, dtype=dtype, shardings=shardings)
        return
    checkpoint = find_checkpoint(path)
    prompt = [name for name in checkpoint.params if is_prompt_leaf(name)]
    shapes = t5.param_shapes(model)
    yield from t5x.iter_t5x(checkpoint, shapes, dtype=dtype, shardings=shardings, unread=prompt)


def read_ahead(
    spec: PathLike, model: ModelConfig, mesh: Mesh, *, dtype: DTypeLike | None = None
) -> Ahead[tuple[str, Array]]:
    """The parameters of `iter_backbone`, read in the background; `dict` of it waits for all."""

    def items() -> Iterator[tuple[str, Array]]:
        places = sharding.param_shardings(t5.param_shapes(model), mesh)
        yield from iter_backbone(spec, model, dtype=dtype, shardings=places)

    return Ahead(items())


def describe_unused_prompt(spec: PathLike, prompt_files: Iterable[PathLike]) -> str:
    """A line about a prompt that lies in the backbone's checkpoint and in none of the files named.

    The original's checkpoints hold model and prompt. Here the prompt is asked for by name, so that
    no run has one without its user's knowledge; empty where there is none, or it is asked for.
    """
    path = find_path(spec)
    if huggingface.is_huggingface(path) or PROMPT not in find_checkpoint(path).params:
        return ""
    own = f"{open_folder(path).url}/"
    if any(f"{open_folder(file).url}/".startswith(own) for file in prompt_files):
        return ""
    return (
        f"backbone: {path} holds a prompt as well ({PROMPT}), which is not used: "
        f"--gin.PROMPT_FILE=\"'{path}'\" names it"
    )


def read_step(spec: PathLike) -> int:
    """The step at which a backbone stands."""
    path = find_path(spec)
    if not huggingface.is_huggingface(path):
        return t5x.read_step(path)
    folder = huggingface.local_folder(path)
    return architecture.read_saved_step(architecture.read_json(folder), str(folder))


def read_model(spec: PathLike) -> ModelConfig:
    """The architecture of a checkpoint: of config.json, or of the shapes of a T5X checkpoint.

    Raises:
      ConfigError: there is no such checkpoint, or it is no T5.
    """
    path = find_path(spec)
    if huggingface.is_huggingface(path):
        folder = huggingface.local_folder(path)
        where = str(folder / architecture.CONFIG)
        return architecture.parse_config(architecture.read_json(folder), where)
    beside = Path(path).expanduser()
    there = "://" not in path and (beside / architecture.CONFIG).is_file()
    raw = architecture.read_json(beside) if there else None
    return architecture.infer_model(t5x.read_shapes(path), raw, path)
