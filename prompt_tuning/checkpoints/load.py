"""Reads a backbone in either format, T5X's or Hugging Face's.

The session, the predictor and all other readers of a backbone use these functions.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array

from prompt_tuning.checkpoints import architecture, huggingface, t5x
from prompt_tuning.checkpoints.layouts import find_checkpoint
from prompt_tuning.checkpoints.t5x_prompt import PROMPT, is_prompt_leaf
from prompt_tuning.config import TINY, ModelConfig
from prompt_tuning.model import sharding, t5
from prompt_tuning.runtime.storage import open_folder
from prompt_tuning.world import assets

PathLike = str | os.PathLike[str]


def find_path(spec: PathLike) -> str:
    """The path of a checkpoint; "tiny" is the bundled checkpoint."""
    return assets.tiny_checkpoint() if spec == TINY else os.fspath(spec)


def read_backbone(
    spec: PathLike,
    model: ModelConfig,
    *,
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
) -> tuple[dict[str, Array], int]:
    """All parameters of a T5, in their dtype and on a mesh if there is one, and the step.

    The step of a Hugging Face folder is 0, unless it was converted from a T5X checkpoint. A prompt
    in a T5X checkpoint is not read; `describe_unused_prompt` tells the user.

    Raises:
      ConfigError: there is no such checkpoint, it is damaged, or it is of another model.
    """
    return dict(iter_backbone(spec, model, dtype=dtype, mesh=mesh)), read_step(spec)


def iter_backbone(
    spec: PathLike,
    model: ModelConfig,
    *,
    dtype: DTypeLike | None = None,
    mesh: Mesh | None = None,
) -> Iterator[tuple[str, Array]]:
    """The parameters of `read_backbone`, one by one, as they are loaded."""
    path = find_path(spec)
    dtype = model.dtype if dtype is None else dtype
    shapes = t5.param_shapes(model)
    shardings = None if mesh is None else sharding.param_shardings(shapes, mesh)
    if huggingface.is_huggingface(path):
        folder = huggingface.open_folder(path, model)
        yield from huggingface.iter_params(folder, dtype=dtype, shardings=shardings)
        return
    checkpoint = find_checkpoint(path)
    prompt = [name for name in checkpoint.params if is_prompt_leaf(name)]
    yield from t5x.iter_t5x(checkpoint, shapes, dtype=dtype, shardings=shardings, unread=prompt)


def describe_unused_prompt(spec: PathLike, prompt_files: Iterable[PathLike]) -> str:
    """A note if the backbone's checkpoint has a prompt that is not among `prompt_files`, else "".

    Checkpoints of the original project contain model and prompt. A prompt is used only if
    PROMPT_FILE names it, so that no run uses one without the user's knowledge.
    """
    path = find_path(spec)
    if huggingface.is_huggingface(path) or PROMPT not in find_checkpoint(path).params:
        return ""
    prefix = f"{open_folder(path).url}/"
    if any(f"{open_folder(file).url}/".startswith(prefix) for file in prompt_files):
        return ""
    return (
        f"backbone: {path} also contains a prompt ({PROMPT}), which is not used. To use it: "
        f"--gin.PROMPT_FILE=\"'{path}'\""
    )


def read_step(spec: PathLike) -> int:
    """The step of a backbone's checkpoint."""
    path = find_path(spec)
    if not huggingface.is_huggingface(path):
        return t5x.read_step(path)
    folder = huggingface.local_folder(path)
    return architecture.read_saved_step(architecture.read_json(folder), str(folder))


def read_model(spec: PathLike) -> ModelConfig:
    """The architecture of a checkpoint, from config.json or the shapes of a T5X checkpoint.

    Raises:
      ConfigError: there is no such checkpoint, or it is no T5.
    """
    path = find_path(spec)
    if huggingface.is_huggingface(path):
        folder = huggingface.local_folder(path)
        where = str(folder / architecture.CONFIG)
        return architecture.parse_config(architecture.read_json(folder), where)
    folder = Path(path).expanduser()
    has_config = "://" not in path and (folder / architecture.CONFIG).is_file()
    raw = architecture.read_json(folder) if has_config else None
    return architecture.infer_model(t5x.read_shapes(path), raw, path)
