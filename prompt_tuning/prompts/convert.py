"""Converts a prompt from one form to another, with the same bits, and lists what is lost.

`t5x convert-prompt` calls this. Reading is `prompts/prompt_file.py`'s, which knows every form.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Literal

import numpy as np

from prompt_tuning.checkpoints import t5x, t5x_prompt
from prompt_tuning.checkpoints.huggingface import is_huggingface
from prompt_tuning.checkpoints.load import find_path, read_model
from prompt_tuning.config import ConfigError
from prompt_tuning.model.prompt import Prompt, other_fields
from prompt_tuning.prompts import peft, prompt_file
from prompt_tuning.prompts.embedding import open_embedding, read_identity
from prompt_tuning.prompts.prompt_file import PromptMetadata, StoredPrompt
from prompt_tuning.prompts.rows import check_rows_alone
from prompt_tuning.runtime.replace_folder import local_folder, replace_file, replace_folder, writing

Output = Literal["ours", "peft", "npy", "t5x"]
_NAMES = {
    "ours": "a prompt folder",
    "peft": "an adapter of PEFT's",
    "npy": "a numpy file",
    "t5x": "a T5X checkpoint with the prompt inside",
    "zarr": "an array of a T5X checkpoint",
}


def convert_prompt(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    form: Output,
    *,
    checkpoint: str = "",
    dead_half: bool = False,
    task: int | None = None,
) -> list[str]:
    """Writes the prompt at `path` in another form; returns lines on what was written and lost.

    If a `checkpoint` (T5X's, Hugging Face's or "tiny") is named, the prompt must fit it, and its
    identity is written if the form has a place for it; `t5x` puts the prompt into a copy of it.
    `dead_half` writes 2 P rows for PEFT, as PEFT itself does. `task` is the number of a task in an
    adapter of PEFT's that has several.

    Raises:
      ConfigError: nothing can be read or written there, something is there already, or the prompt
        does not fit the checkpoint.
    """
    place = local_folder(output, "--output")
    if place.exists():
        raise ConfigError(f"{place} exists already: delete it, or give another --output.")
    if dead_half and form != "peft":
        raise ConfigError(f"--dead_half belongs to --format=peft, found --format={form}.")
    stored = prompt_file.read_prompt(path, task)
    if form != "ours":  # the other forms are of prompts that see the input
        prompt_file.refuse_shared(stored, path)
    if form in ("npy", "t5x") or dead_half:
        check_rows_alone(stored.prompt, str(path))
    metadata = stored.metadata or PromptMetadata(init=stored.init, method=stored.method)
    backbone = find_path(checkpoint)
    if not backbone and stored.form == "t5x":
        backbone = os.fspath(path)  # of the same checkpoint
    if backbone:
        metadata = _fit(stored, metadata, backbone, path)
    with writing(f"--output {place}"):
        if form == "ours":
            prompt_file.save_prompt(place, stored.prompt, metadata, base_model=stored.base_model)
        elif form == "peft":
            _save_peft(place, stored, metadata, dead_half=dead_half)
        elif form == "npy":
            _save_npy(place, stored.prompt)
        else:
            metadata = _splice(place, stored, metadata, backbone)
    shape = prompt_file.describe_shape(stored.prompt)
    written = f"{path}: {_NAMES[stored.form]}, {shape}\n{place}: {_NAMES[form]}, the same values"
    return [written, *_losses(stored, metadata, form, dead_half=dead_half)]


def _fit(
    stored: StoredPrompt,
    metadata: PromptMetadata,
    backbone: str,
    path: str | os.PathLike[str],
) -> PromptMetadata:
    """The metadata with the identity of the backbone, if the prompt fits it."""
    width = open_embedding(backbone).shape[1]
    identity = read_identity(backbone)
    prompt_file.check_prompt(
        stored.prompt,
        metadata,
        shape=(None, width),
        model=read_model(backbone) if other_fields(stored.prompt) else None,
        backbone=identity,
        where=path,
    )
    return dataclasses.replace(metadata, backbone=identity)


def _save_peft(
    place: os.PathLike[str], stored: StoredPrompt, metadata: PromptMetadata, *, dead_half: bool
) -> None:
    is_known = metadata != PromptMetadata()
    described = prompt_file.describe(stored.prompt, metadata) if is_known else ""
    with replace_folder(place) as folder:
        peft.write_peft(
            folder,
            stored.prompt,
            base_model=stored.base_model,
            submodules=2 if dead_half else 1,
            metadata=described,
        )


def _save_npy(place: Path, prompt: Prompt) -> None:
    """Writes the rows as the original does. (Of a path, numpy would add `.npy` to the name.)"""
    place.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(place) as new, new.open("wb") as stream:
        np.save(stream, np.asarray(prompt.rows, "<f4"), allow_pickle=False)


def _splice(
    place: os.PathLike[str], stored: StoredPrompt, metadata: PromptMetadata, backbone: str
) -> PromptMetadata:
    """The metadata with the step of the checkpoint that was written."""
    if not backbone:
        raise ConfigError(
            "--format=t5x puts the prompt into a copy of its backbone, as the original keeps it: "
            "give the backbone with --checkpoint=... (For the original's PROMPT_FILE, a numpy "
            "file is enough: --format=npy.)"
        )
    if is_huggingface(backbone):
        raise ConfigError(
            f"--format=t5x copies a T5X checkpoint, and {backbone} is a Hugging Face folder: "
            "make a T5X checkpoint of it first, with `t5x convert`, and give that."
        )
    step = metadata.step or t5x.read_step(backbone)
    t5x_prompt.splice_prompt(backbone, place, stored.prompt, step)
    return dataclasses.replace(metadata, step=step)


def _losses(
    stored: StoredPrompt, metadata: PromptMetadata, form: Output, *, dead_half: bool
) -> list[str]:
    lines = []
    if stored.dtype == "float64":
        lines.append("rounded: float64 to float32")
    if stored.unused_rows:
        what = "replaced by a copy of the first" if dead_half else "left out"
        lines.append(f"{what}: the last {stored.unused_rows} rows, which PEFT never uses")
    if stored.form == "peft" and form == "ours" and stored.prompt.decoder is not None:
        layers = len(stored.prompt.decoder)
        if layers % 2 == 0:
            half = layers // 2
            lines.append(
                f"left out: half of the keys and values, which PEFT never uses; layers l and l + "
                f"{half} have the same"
            )
    if form == "peft" and other_fields(stored.prompt):
        lines.append(
            "PEFT's forward pass computes the same with it; its generate leaves a T5's prefix out "
            "(PEFT 0.21.2 with transformers 5.24)"
        )
    if form == "t5x":
        lines.append(f"step of the checkpoint: {metadata.step}; optimizer state: left out")
    preserved = {
        "ours": _fields(metadata),
        "peft": _fields(metadata),
        "npy": [],
        "t5x": ["step", "backbone"],
    }[form]
    lost = [name for name in _fields(metadata) if name not in preserved]
    if stored.base_model and form in ("npy", "t5x"):
        lost.append("base_model_name_or_path")
    if lost:
        lines.append(f"lost, since {_NAMES[form]} has no place for it: {', '.join(lost)}")
    return lines


def _fields(metadata: PromptMetadata) -> list[str]:
    """The fields that are set."""
    empty = PromptMetadata()
    names = [field.name for field in dataclasses.fields(metadata)]
    return [name for name in names if getattr(metadata, name) != getattr(empty, name)]
