"""A prompt inside a T5X checkpoint, where the original and `upstream/plugin.py` train it.

`prompt_file.py` reads prompts through this file; `prompts/convert.py` puts them there.
"""

from __future__ import annotations

import math
import os
import posixpath
from typing import Any

import numpy as np
import tensorstore as ts
from jaxtyping import Shaped

from prompt_tuning.checkpoints.layouts import Checkpoint, Leaf, find_checkpoint, open_leaves
from prompt_tuning.checkpoints.t5x import read_step, write_t5x
from prompt_tuning.config import ConfigError
from prompt_tuning.model.prompt import Prompt
from prompt_tuning.runtime.storage import Folder, explain, open_folder

SCOPE = "encoder/prompt/prompt/"  # in T5X's tree, before the names of a prompt method's parameters
PROMPT = SCOPE + "prompt"  # the paper's method has this one
MAX_BYTES = 2**31  # far beyond any prompt: a damaged shape is an error, not an allocation


def is_prompt_leaf(name: str) -> bool:
    """Whether a parameter of T5X's tree belongs to a prompt method: `PROMPT`, or `PROMPT`/NAME."""
    return name == PROMPT or name.startswith(PROMPT + "/")


def read_t5x_prompt(path: str | os.PathLike[str]) -> tuple[Shaped[np.ndarray, "..."], int]:
    """The prompt of a checkpoint, as it is stored, and the checkpoint's step.

    Raises:
      ConfigError: the checkpoint cannot be read, or holds no prompt of this kind.
    """
    checkpoint = find_checkpoint(path)
    leaf = checkpoint.params.get(PROMPT)
    if leaf is None:
        raise ConfigError(_absent(checkpoint))
    return _read(leaf), read_step(path)


def _absent(checkpoint: Checkpoint) -> str:
    others = [name for name in checkpoint.params if "prompt" in name]
    if not others:
        return (
            f"there is no prompt in the checkpoint {checkpoint.folder.url}: it is a model alone, "
            f"without {PROMPT}. Give the checkpoint of a prompt tuning run, or a prompt file."
        )
    return (
        f"the checkpoint {checkpoint.folder.url} has no {PROMPT}: its prompt is of another kind "
        f"({', '.join(sorted(others)[:5])}), and only one float[P, D] in front of the encoder's "
        "input can be loaded. Give the prompt folder that its run wrote (prompts/step_...)."
    )


def read_zarr_prompt(path: str | os.PathLike[str]) -> Shaped[np.ndarray, "..."]:
    """The array of one zarr folder, such as a checkpoint's `target.encoder.prompt.prompt.prompt`.

    Raises:
      ConfigError: it cannot be read.
    """
    folder = open_folder(path)
    parent = Folder(posixpath.dirname(folder.path), folder.bucket)
    driver = "zarr" if folder.read(".zarray") is not None else "zarr3"
    return _read(Leaf(folder.url, parent, spec={"driver": driver, "kvstore": folder.spec()}))


def _read(leaf: Leaf) -> Shaped[np.ndarray, "..."]:
    (store,) = open_leaves({"prompt": leaf}, ts.Context()).values()
    shape, itemsize = tuple(store.shape), store.dtype.numpy_dtype.itemsize
    if math.prod(shape) * itemsize > MAX_BYTES:
        raise ConfigError(f"{leaf.what} has shape {shape}; a prompt is a small matrix (P, D).")
    return explain(lambda: np.asarray(store.read().result()), leaf.folder, leaf.what)


class _Unread:
    """A parameter that is read when numpy converts it, and not kept in memory."""

    def __init__(self, leaf: Leaf) -> None:
        self._leaf = leaf

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        (store,) = open_leaves({"array": self._leaf}, ts.Context()).values()
        read = explain(lambda: store.read().result(), self._leaf.folder, self._leaf.what)
        return np.asarray(read, dtype)


def splice_prompt(
    backbone: str | os.PathLike[str],
    output: str | os.PathLike[str],
    prompt: Prompt,
    step: int,
) -> None:
    """Writes a copy of a checkpoint with the prompt inside, under the original's name.

    Every parameter keeps its dtype and bits; one at a time is in memory. The optimizer's state is
    not copied: T5X begins a new one. A prompt that is in the checkpoint already is replaced.

    Raises:
      ConfigError: the checkpoint cannot be read, or the output is not a local folder.
    """
    params: Any = {name: _Unread(leaf) for name, leaf in find_checkpoint(backbone).params.items()}
    write_t5x(output, {**params, PROMPT: np.asarray(prompt.rows)}, step, dtype=None)
