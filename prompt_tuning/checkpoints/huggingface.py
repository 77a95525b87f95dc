"""Hugging Face T5 folders: the architecture from config.json, the parameters under T5X's names.

It uses `architecture.py`, `names.py` and `safetensors_files.py`. `load.py` reads the backbones of
runs with it, `conversion.py` converts whole folders.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array

from prompt_tuning.checkpoints import names
from prompt_tuning.checkpoints.architecture import (
    CONFIG,
    check_sizes,
    parse_config,
    read_json,
    read_saved_step,
)
from prompt_tuning.checkpoints.safetensors_files import (
    DTYPES,
    INDEX,
    SINGLE,
    Index,
    StoredTensor,
    are_equal,
    find_tensors,
)
from prompt_tuning.checkpoints.t5x import check_tree
from prompt_tuning.config import ConfigError, ModelConfig
from prompt_tuning.model import t5
from prompt_tuning.runtime import hub


@dataclasses.dataclass(frozen=True)
class Source:
    """The tensor of one of T5X's parameters."""

    stored: StoredTensor
    transposed: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape in T5X."""
        return self.stored.shape[::-1] if self.transposed else self.stored.shape

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the file."""
        return DTYPES[self.stored.dtype]

    def read(self, index: Index | None = None) -> np.ndarray:
        """The parameter or a part of it, in T5X's orientation and the dtype of the file."""
        if not self.transposed:
            return self.stored.read(index)
        return self.stored.read(index[::-1] if index else None).T


@dataclasses.dataclass(frozen=True)
class HuggingFaceT5:
    """A checked Hugging Face folder: its tensors are exactly those of a T5."""

    path: Path
    model: ModelConfig
    step: int
    sources: Mapping[str, Source]  # by T5X's names


def is_huggingface(path: str | os.PathLike[str]) -> bool:
    """Whether a checkpoint is in Hugging Face's format, not in T5X's."""
    text = os.fspath(path)
    if text.startswith(hub.SCHEME):
        return True
    if "://" in text:
        return False
    folder = Path(text).expanduser()
    if (folder / "checkpoint").is_file() or (folder / "state").is_dir():
        return False  # T5X's, possibly with a config.json from `t5x convert`
    if folder.suffix in (".safetensors", ".bin") and folder.is_file():
        return True
    files = ("config.json", SINGLE, INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")
    return any((folder / name).is_file() for name in files)


def local_folder(path: str | os.PathLike[str]) -> Path:
    """The folder of a path or of hf://organisation/name[@revision], which it downloads.

    Raises:
      ConfigError: the address is malformed, huggingface_hub is not installed, or the download
        failed.
    """
    text = os.fspath(path)
    if not text.startswith(hub.SCHEME):
        folder = Path(text).expanduser().absolute()
        if folder.is_file():
            raise ConfigError(f"{folder} is one file of a model. Give its folder, {folder.parent}.")
        return folder
    return hub.download(text)


def open_folder(path: str | os.PathLike[str], expected: ModelConfig | None = None) -> HuggingFaceT5:
    """A folder whose tensors are exactly those of its config.json.

    Only copies of the embedding table are read. With `expected` the architecture must equal it.

    Raises:
      ConfigError: a file or tensor is missing, damaged, or of another shape or family.
    """
    folder = local_folder(path)
    raw = read_json(folder)
    where = str(folder / CONFIG)
    model = parse_config(raw, where)
    if expected is not None:
        check_sizes(model, expected, where)
    stored = find_tensors(folder)
    _check_depth(model, stored, where)
    sources = _choose_sources(folder, raw, model, stored)
    return HuggingFaceT5(folder, model, read_saved_step(raw, where), sources)


def _check_depth(model: ModelConfig, stored: Mapping[str, StoredTensor], where: str) -> None:
    """Checks the number of layers, which may be huge in a damaged file, before shapes are made."""
    for stack, expected in (
        ("encoder", model.num_encoder_layers),
        ("decoder", model.num_decoder_layers),
    ):
        number = names.count_layers(stored, stack)
        if number != expected:
            raise ConfigError(
                f"{where}: the {stack} has {expected} layers, but there are tensors of {number}. "
                "Config.json and weights are of different models, or tensors are missing. Copy the "
                "checkpoint again."
            )


def _choose_sources(
    folder: Path, raw: Mapping[str, Any], model: ModelConfig, stored: Mapping[str, StoredTensor]
) -> dict[str, Source]:
    """The tensor of every parameter.

    Raises:
      ConfigError: with all tensors that are missing, unknown, or of another shape.
    """
    shapes = {name: tuple(shape.shape) for name, shape in t5.param_shapes(model).items()}
    wanted = {name: names.to_huggingface(name) for name in shapes}
    left = {name: tensor for name, tensor in stored.items() if name != names.UNUSED}
    _drop_copies(folder, left, tied=model.logits_via_embedding)
    if names.HEAD in wanted and names.LM_HEAD not in left:
        if raw.get("tie_word_embeddings") is False:
            raise ConfigError(
                f"{folder / CONFIG}: tie_word_embeddings is false, but there is no "
                f"{names.LM_HEAD}. This is a tied model, or the checkpoint is incomplete. Copy it "
                "again."
            )
        wanted[names.HEAD] = names.Tensor(names.SHARED, True)  # tied and unscaled: the same values
    tensors = {
        n: (tensor.shape, DTYPES.get(tensor.dtype, tensor.dtype)) for n, tensor in left.items()
    }
    needed = {tensor.name: tensor.shape(shapes[name]) for name, tensor in wanted.items()}
    check_tree(str(folder), tensors, needed)
    return {name: Source(left[t.name], t.transposed) for name, t in wanted.items()}


def _drop_copies(folder: Path, left: dict[str, StoredTensor], *, tied: bool) -> None:
    """Removes copies of the embedding table from `left`, after comparing their values.

    Raises:
      ConfigError: a copy differs from the table.
    """
    copies = [*names.COPIES_OF_SHARED, *([names.LM_HEAD] if tied else [])]
    present = [name for name in copies if name in left]
    if names.SHARED not in left and present:  # older writers saved the table under another name
        left[names.SHARED] = left.pop(present.pop(0))
    for name in present:
        if not are_equal(left[names.SHARED], left.pop(name)):
            why = (
                "by its config.json input and output share one table "
                "(tie_word_embeddings or scale_decoder_outputs is true, or left out). If this is a "
                "T5 1.1, set tie_word_embeddings to false there and remove scale_decoder_outputs"
                if name == names.LM_HEAD
                else "encoder and decoder of a T5 share one table"
            )
            raise ConfigError(f"{folder}: {name} differs from {names.SHARED}, and {why}.")


def iter_params(
    folder: HuggingFaceT5,
    *,
    dtype: DTypeLike,
    shardings: Mapping[str, jax.sharding.Sharding] | None = None,
) -> Iterator[tuple[str, Array]]:
    """The parameters, one by one, in `dtype`; each device receives only its own shard.

    Raises:
      ConfigError: a file is damaged.
    """
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    wanted = np.dtype(dtype)

    def place(name: str, source: Source) -> Array:
        sharding = device if shardings is None else shardings[name]
        shards: dict[Any, np.ndarray] = {}

        def fetch(index: Index | None) -> np.ndarray:
            parts = zip(index or (), source.shape, strict=True)
            whole = tuple(slice(*part.indices(size)) for part, size in parts)
            key = tuple((part.start, part.stop) for part in whole)
            if key not in shards:  # devices along the data axis have the same shard
                shards[key] = np.ascontiguousarray(source.read(whole).astype(wanted))
            return shards[key]

        return jax.make_array_from_callback(source.shape, sharding, fetch)

    for name, source in sorted(folder.sources.items()):
        yield name, place(name, source)
