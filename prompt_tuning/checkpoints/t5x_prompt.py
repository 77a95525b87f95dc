"""Prompts inside T5X checkpoints, as the original project and `upstream/plugin.py` save them.

`prompts/prompt_file.py` reads prompts with it; `prompts/convert.py` writes them with it.
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
PROMPT = SCOPE + "prompt"  # the parameter of the paper's method
MAX_BYTES = 2**31  # larger than any prompt; a damaged shape is an error before the allocation


def is_prompt_leaf(name: str) -> bool:
    """Whether a parameter of T5X's tree belongs to a prompt method: `PROMPT`, or `PROMPT`/NAME."""
    return name == PROMPT or name.startswith(PROMPT + "/")


def read_t5x_prompt(path: str | os.PathLike[str]) -> tuple[Shaped[np.ndarray, "..."], int]:
    """The prompt of a checkpoint in its stored dtype, and the checkpoint's step.

    Raises:
      ConfigError: the checkpoint cannot be read, or has no prompt of this kind.
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
            f"there is no prompt in the checkpoint {checkpoint.folder.url}: it has no {PROMPT}. "
            "Give the checkpoint of a prompt tuning run, or a prompt file."
        )
    return (
        f"the checkpoint {checkpoint.folder.url} has no {PROMPT}: its prompt is of another kind "
        f"({', '.join(sorted(others)[:5])}). Expected float[P, D] in front of the encoder's input. "
        "Give the prompt folder that its run wrote (prompts/step_...)."
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
        raise ConfigError(f"{leaf.what} has shape {shape}. Expected a small matrix (P, D).")
    return explain(lambda: np.asarray(store.read().result()), leaf.folder, leaf.what)


class _Unread:
    """A parameter that is read each time NumPy converts it to an array."""

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
    """Writes a copy of a checkpoint with the prompt under the original project's name.

    Parameters keep their dtypes and bits; one at a time is in memory. The optimizer's state is not
    copied; T5X initialises it. An existing prompt is replaced.

    Raises:
      ConfigError: the checkpoint cannot be read, or the output is not a local folder.
    """
    params: Any = {name: _Unread(leaf) for name, leaf in find_checkpoint(backbone).params.items()}
    write_t5x(output, {**params, PROMPT: np.asarray(prompt.rows)}, step, dtype=None)
