"""A Hugging Face T5 folder: its architecture from config.json, its parameters under T5X's names.

After `architecture.py`, `names.py` and `safetensors_files.py`; `load.py` reads the backbones of
runs through it, `conversion.py` whole folders.
"""

from __future__ import annotations

import dataclasses
import os
import re
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
    Stored,
    find_tensors,
    same_values,
)
from prompt_tuning.checkpoints.t5x import check_tree
from prompt_tuning.config import ConfigError, ModelConfig
from prompt_tuning.model import t5

ADDRESS = re.compile(r"hf://(?P<name>[^/@]+/[^/@]+)(@(?P<revision>.+))?")
# What is downloaded: no weights in other formats.
DOWNLOADED = ("*.json", "*.safetensors", "*.model", "*.txt")


@dataclasses.dataclass(frozen=True)
class Source:
    """Where one of T5X's parameters is stored."""

    stored: Stored
    transposed: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape in T5X."""
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
class Folder:
    """A Hugging Face folder that was understood: what is in it is exactly a T5."""

    path: Path
    model: ModelConfig
    step: int
    sources: Mapping[str, Source]  # by T5X's names


def is_huggingface(path: str | os.PathLike[str]) -> bool:
    """Whether a checkpoint is one of Hugging Face's, rather than T5X's."""
    text = os.fspath(path)
    if text.startswith("hf://"):
        return True
    if "://" in text:
        return False
    folder = Path(text).expanduser()
    if (folder / "checkpoint").is_file() or (folder / "state").is_dir():
        return False  # T5X's; `t5x convert` leaves a config.json in it
    if folder.suffix in (".safetensors", ".bin") and folder.is_file():
        return True
    files = ("config.json", SINGLE, INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")
    return any((folder / name).is_file() for name in files)


def local_folder(path: str | os.PathLike[str]) -> Path:
    """The folder of a path, or of hf://organisation/name[@revision] once that is downloaded.

    Raises:
      ConfigError: the address is malformed, huggingface_hub is absent, or the download failed.
    """
    text = os.fspath(path)
    if not text.startswith("hf://"):
        folder = Path(text).expanduser().absolute()
        if folder.is_file():
            raise ConfigError(f"{folder} is one file of a model: give its folder, {folder.parent}.")
        return folder
    match = ADDRESS.fullmatch(text)
    if match is None:
        raise ConfigError(
            f"expected hf://organisation/name or hf://organisation/name@revision, found {text!r}."
        )
    try:
        import huggingface_hub
    except ImportError as error:
        raise ConfigError(
            f"{text}: huggingface_hub, which downloads from Hugging Face, is not installed. "
            "`pip install huggingface_hub`, or copy the model here and give its folder."
        ) from error
    try:
        return Path(
            huggingface_hub.snapshot_download(
                match["name"],
                revision=match["revision"],
                allow_patterns=list(DOWNLOADED),
                ignore_patterns=["*/*"],
            )
        )
    except Exception as error:  # of half a dozen libraries below it
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        reason = re.sub(r"\b(?:Got: )?\w+Error: ", "", first)
        raise ConfigError(
            f"{text} cannot be downloaded and is not in the local cache ({reason}). Check the name "
            "and the network, or copy the model here and give its folder."
        ) from error


def open_folder(path: str | os.PathLike[str], expected: ModelConfig | None = None) -> Folder:
    """A folder whose tensors are exactly those of its config.json; no value is read but copies.

    With `expected` the architecture must be that one.

    Raises:
      ConfigError: something is absent, damaged, of another shape or family; all of it is listed.
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
    return Folder(folder, model, read_saved_step(raw, where), sources)


def _check_depth(model: ModelConfig, stored: Mapping[str, Stored], where: str) -> None:
    """Before any shape is made of it: the number of layers may be anything in a damaged file."""
    for stack, expected in (
        ("encoder", model.num_encoder_layers),
        ("decoder", model.num_decoder_layers),
    ):
        found = names.count_layers(stored, stack)
        if found != expected:
            raise ConfigError(
                f"{where} says that the {stack} has {expected} layers, and the tensors are of "
                f"{found}: config.json and weights are not of one model, or some are missing. "
                "Copy the checkpoint again."
            )


def _choose_sources(
    folder: Path, raw: Mapping[str, Any], model: ModelConfig, stored: Mapping[str, Stored]
) -> dict[str, Source]:
    """The tensor of every parameter.

    Raises:
      ConfigError: with all that is missing, left over, or of another shape.
    """
    shapes = {name: tuple(shape.shape) for name, shape in t5.param_shapes(model).items()}
    wanted = {name: names.to_huggingface(name) for name in shapes}
    left = {name: tensor for name, tensor in stored.items() if name != names.UNUSED}
    _drop_copies(folder, left, tied=model.logits_via_embedding)
    if names.HEAD in wanted and names.LM_HEAD not in left:
        if raw.get("tie_word_embeddings") is False:
            raise ConfigError(
                f"{folder / CONFIG} says that the output has a matrix of its own "
                f"(tie_word_embeddings is false), and there is no {names.LM_HEAD}: this is a tied "
                "model, or the checkpoint is incomplete."
            )
        wanted[names.HEAD] = names.Tensor(names.SHARED, True)  # tied and unscaled: the same values
    found = {
        n: (tensor.shape, DTYPES.get(tensor.dtype, tensor.dtype)) for n, tensor in left.items()
    }
    needed = {tensor.name: tensor.shape(shapes[name]) for name, tensor in wanted.items()}
    check_tree(str(folder), found, needed)
    return {name: Source(left[t.name], t.transposed) for name, t in wanted.items()}


def _drop_copies(folder: Path, left: dict[str, Stored], *, tied: bool) -> None:
    """Takes out the tensors that repeat the embedding table, once they are known to.

    Raises:
      ConfigError: one differs from it.
    """
    copies = [*names.COPIES_OF_SHARED, *([names.LM_HEAD] if tied else [])]
    present = [name for name in copies if name in left]
    if names.SHARED not in left and present:  # older writers keep one of the equal ones
        left[names.SHARED] = left.pop(present.pop(0))
    for name in present:
        if not same_values(left[names.SHARED], left.pop(name)):
            why = (
                "its config.json says that input and output share one table "
                "(tie_word_embeddings or scale_decoder_outputs is true, or left out). If this is a "
                "T5 1.1, set tie_word_embeddings to false there and remove scale_decoder_outputs"
                if name == names.LM_HEAD
                else "encoder and decoder of a T5 share one table"
            )
            raise ConfigError(f"{folder}: {name} differs from {names.SHARED}, and {why}.")


def iter_params(
    folder: Folder,
    *,
    dtype: DTypeLike,
    shardings: Mapping[str, jax.sharding.Sharding] | None = None,
) -> Iterator[tuple[str, Array]]:
    """One parameter after another: each device receives its own share, cast on the way.

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
            if key not in shards:  # devices of the data axis hold the same part
                shards[key] = np.ascontiguousarray(source.read(whole).astype(wanted))
            return shards[key]

        return jax.make_array_from_callback(source.shape, sharding, fetch)

    for name, source in sorted(folder.sources.items()):
        yield name, place(name, source)
