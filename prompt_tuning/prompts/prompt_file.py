"""A prompt on disk: a folder that Hugging Face PEFT loads as it is, with what we know about it.

    adapter_config.json          PEFT's: prompt tuning for a sequence-to-sequence model
    adapter_model.safetensors    the prompt, float32[P, D], under PEFT's name `prompt_embeddings`
    prompt_tuning.json           ours: task, label words, method, identity of the backbone, ...

PEFT cannot express keys and values as T5 has them, nor rows that do not see the input. A folder of
such a prompt has `prompt.safetensors` in place of PEFT's files: an array for each field of
`Prompt`, or the rows of a shared prompt, which is folded by whoever has the backbone.

`training/loop.py` writes these folders; `serving/predictor.py`, evaluation and the "file"
initialisation read them, and prompts in other forms: `.npy`, as the original released them, PEFT's
own folders (`peft.py`) and T5X checkpoints with a prompt inside (`checkpoints/t5x_prompt.py`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors.numpy
from beartype.roar import BeartypeException
from jaxtyping import Shaped

from prompt_tuning.checkpoints.t5x_prompt import read_t5x_prompt, read_zarr_prompt
from prompt_tuning.config import ConfigError, ModelConfig, from_dict, to_dict, typed
from prompt_tuning.methods import shared_prompt
from prompt_tuning.methods.method import Frozen, Visibility, shapes_of_fields
from prompt_tuning.model.prompt import POSITIONS, Prompt, other_fields
from prompt_tuning.prompts import peft
from prompt_tuning.prompts.peft import parse_object, to_json
from prompt_tuning.prompts.rows import (
    check_arrays,
    check_rows_alone,
    make_prompt,
    widen_no_rows,
)
from prompt_tuning.runtime.replace_folder import replace_folder
from prompt_tuning.runtime.storage import describe_lfs_pointer

METADATA = "prompt_tuning.json"
ARRAYS = "prompt.safetensors"
SHARED_ROWS = "shared_rows"  # the name of the array of a shared prompt: PEFT's would be misread
NO_FILES: Mapping[str, str] = types.MappingProxyType({})
Form = Literal["ours", "peft", "npy", "t5x", "zarr"]
_NPY = b"\x93NUMPY"  # how a file of numpy's begins
_T5X_INDICES = ("checkpoint", "_METADATA", "state/_METADATA", "state/checkpoint")


@typed
@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptMetadata:
    """What is known about a prompt; every field has an empty default."""

    task: str = ""
    label_words: tuple[str, ...] = ()
    method: str = "prompt_tuning"  # PROMPT_METHOD; what is saved is its folded prompt
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # the method's, all
    visibility: Visibility = "input"  # what the rows see: also the input, or the prompt alone
    backbone: str = ""  # checkpoint.identity.backbone_identity of the frozen model
    vocabulary: str = ""  # SHA-256 of the SentencePiece model
    init: str = ""
    step: int = 0  # absolute, as in T5X
    score: float | None = None
    score_name: str = ""
    config_hash: str = ""
    prompt_tuning_version: str = ""


def save_prompt(
    folder: str | os.PathLike[str],
    prompt: Prompt,
    metadata: PromptMetadata,
    *,
    base_model: str | None = None,
) -> None:
    """Writes a prompt folder, whole or not at all; an older folder of that name is replaced.

    `base_model` is the Hugging Face name of the backbone (google/t5-base-lm-adapt, ...): PEFT only
    shows it.

    Raises:
      ConfigError: the prompt has members or numbers that are not finite, or the path is not a
        local folder.
    """
    with replace_folder(folder) as new:
        _write(new, prompt, metadata, os.fspath(folder), base_model)


def save_prompts(
    folder: str | os.PathLike[str], prompts: Mapping[str, tuple[Prompt, PromptMetadata]]
) -> None:
    """Writes a folder of prompt folders, by name, whole or not at all.

    The name "" is the folder itself: `save_prompt`.
    """
    with replace_folder(folder) as new:
        for name, (prompt, metadata) in prompts.items():
            (new / name).mkdir(exist_ok=True)
            _write(new / name, prompt, metadata, os.path.join(folder, name))


def list_prompts(folder: Path) -> list[Path]:
    """The prompts that `save_prompts` wrote to a folder: itself, or the folders in it."""
    inside = sorted({path.parent for path in folder.glob(f"[!.]*/{METADATA}")})
    return [folder] if (folder / METADATA).is_file() or not inside else inside


def _write(
    new: Path, prompt: Prompt, metadata: PromptMetadata, where: str, base_model: str | None = None
) -> None:
    prompt = check_arrays(prompt, f"the prompt for {where}")
    if metadata.visibility == "input" and not other_fields(prompt):
        peft.write_peft(new, prompt, base_model=base_model)
    else:
        (new / ARRAYS).write_bytes(safetensors.numpy.save(_name_arrays(prompt, metadata)))
    files = {file.name: _sha256(file.read_bytes()) for file in sorted(new.iterdir())}
    (new / METADATA).write_text(describe(prompt, metadata, files))


def describe(
    prompt: Prompt,
    metadata: PromptMetadata,
    files: Mapping[str, str] = NO_FILES,
) -> str:
    """The text of prompt_tuning.json; PEFT's form carries it in the header of its weights.

    It holds checksums of the prompt, of the `files` beside it and of itself, so that nothing can
    change unnoticed.
    """
    values = {**to_dict(metadata), "prompt_sha256": _fingerprint(prompt)}
    if files:
        values["files"] = dict(files)
    return to_json({**values, "sha256": _sha256(to_json(values).encode())})


def describe_shape(prompt: Prompt) -> str:
    """The shape of rows, `float32[20, 768]`, and of other fields, `encoder float32[12, 2, ...]`."""
    others = other_fields(prompt)
    rows = [f"float32{[*prompt.rows.shape]}"] if prompt.rows.shape[0] or not others else []
    return ", ".join([*rows, *(f"{f} float32{[*getattr(prompt, f).shape]}" for f in others)])


def _name_arrays(prompt: Prompt, metadata: PromptMetadata) -> dict[str, np.ndarray]:
    if metadata.visibility == "prompt":
        return {SHARED_ROWS: np.asarray(prompt.rows, "<f4")}
    fields = [*(["rows"] if prompt.rows.shape[0] else []), *other_fields(prompt)]
    return {field: np.asarray(getattr(prompt, field), "<f4") for field in fields}


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _fingerprint(prompt: Prompt) -> str:
    """The SHA-256 of all numbers; of the fields' names and shapes too, if it is not rows alone."""
    arrays = {field: np.asarray(getattr(prompt, field), "<f4") for field in other_fields(prompt)}
    named = (
        f"{field} {array.shape}\n".encode() + array.tobytes() for field, array in arrays.items()
    )
    return _sha256(np.asarray(prompt.rows, "<f4").tobytes() + b"".join(named))


@dataclasses.dataclass(frozen=True)
class StoredPrompt:
    """A prompt, its rows float32 in numpy, with what its form says about it."""

    prompt: Prompt
    form: Form
    metadata: PromptMetadata | None = None
    base_model: str | None = None  # the Hugging Face name of its backbone
    init: str = ""  # how PEFT began it
    method: str = "prompt_tuning"  # our name of the one that has learned it
    dtype: str = "float32"  # of the file
    unused_rows: int = 0  # of PEFT's file


def load_prompt(
    path: str | os.PathLike[str], frozen: Frozen | None = None
) -> tuple[Prompt, PromptMetadata | None]:
    """The prompt, its rows float32 in numpy, and what is known about it, None if nothing is.

    Reads everything that `recognise` knows. Nothing is executed: pickles are refused. A shared
    prompt is folded by the `frozen` backbone.

    Raises:
      ConfigError: there is no such prompt, it is damaged, or it is a shared prompt and there is no
        backbone: as a plain prompt it would be another one.
    """
    stored = read_prompt(path)
    if frozen is None:
        refuse_shared(stored, path)
    elif is_shared(stored):
        return shared_prompt.fold_rows(stored.prompt.rows, frozen), stored.metadata
    return stored.prompt, stored.metadata


def is_shared(stored: StoredPrompt) -> bool:
    """Whether what is stored are rows that do not see the input."""
    return stored.metadata is not None and stored.metadata.visibility == "prompt"


def refuse_shared(stored: StoredPrompt, path: str | os.PathLike[str]) -> None:
    """Raises ConfigError for a shared prompt: as a plain one it would be another prompt."""
    if is_shared(stored):
        raise ConfigError(
            f"{path} is a shared prompt: its rows do not see the input. Expected a prompt of rows "
            "that do. Predictor, t5x eval, t5x infer and PROMPT_METHOD = 'shared_prompt' read it."
        )


def load_fitting_prompt(
    path: str | os.PathLike[str],
    shape: tuple[int | None, int],
    *,
    frozen: Frozen | None = None,
    backbone: str = "",
    vocabulary: str = "",
) -> tuple[Prompt, PromptMetadata | None]:
    """`load_prompt`, with `check_prompt` against a model: with `frozen`, of any fields."""
    prompt, metadata = load_prompt(path, frozen)
    model = frozen.model if frozen else None
    identities = {"backbone": backbone, "vocabulary": vocabulary}
    check_prompt(prompt, metadata, shape=shape, model=model, where=path, **identities)
    return widen_no_rows(prompt, shape[1]), metadata


def read_prompt(path: str | os.PathLike[str], task: int | None = None) -> StoredPrompt:
    """The prompt at a path, in any form that `recognise` knows.

    `task` is the number of one in an adapter of PEFT's that has several.

    Raises:
      ConfigError: there is no such prompt, or it is damaged.
    """
    place = Path(path).expanduser()
    try:
        form, place = ("t5x", place) if "://" in os.fspath(path) else recognise(place)
    except OSError as error:  # a name that is too long; no permission
        raise ConfigError(
            f"the prompt {os.fspath(path)[:100]!r} cannot be read ({error.strerror}): check the "
            "path."
        ) from error
    if form in ("ours", "peft"):
        return _read_folder(place, form, task)
    if task is not None:
        raise ConfigError(f"--task={task}: {path} is one prompt. Leave --task out.")
    metadata = None
    if form == "npy":
        array = _read_npy(place)
    elif form == "zarr":
        array = read_zarr_prompt(place)
    else:
        array, step = read_t5x_prompt(path)
        metadata = PromptMetadata(step=step)
    prompt = make_prompt(array, str(path))
    return StoredPrompt(prompt, form, metadata, dtype=array.dtype.name)


def check_stored_prompt(path: str | os.PathLike[str], model: ModelConfig) -> None:
    """Raises ConfigError if a prompt cannot be read, or ATTENTION = 'cudnn' does not take it.

    It needs no weights: commands call it before they read a backbone.
    """
    stored = read_prompt(path)
    reaches_encoder = stored.prompt.encoder is not None or is_shared(stored)
    _check_attention(reaches_encoder, model, os.fspath(path))


def describe_more_than_rows(stored: StoredPrompt) -> str:
    """What a prompt is that is not only rows which see the input; "" if it is."""
    if is_shared(stored):
        return "a shared prompt"
    others = other_fields(stored.prompt)
    return f"a prompt of {', '.join(others)}" if others else ""


def _read_npy(file: Path) -> Shaped[np.ndarray, "..."]:
    """The array of a `.npy` file. It is mapped, so its size is checked before memory is taken."""
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
        if array.offset + array.nbytes != file.stat().st_size:
            raise ValueError(f"its header names {array.shape}, which is not its size")
        return array
    except Exception as error:  # numpy has no one exception for a header that is damaged
        raise ConfigError(f"the prompt file {file} is damaged: {error}. Copy it again.") from error


def recognise(place: Path) -> tuple[Form, Path]:
    """The form of a prompt, by content and not by name, and the path to read.

    * "ours": a folder with prompt_tuning.json; "peft": a folder with only PEFT's files;
    * "t5x": a folder with the index of a T5X checkpoint (msgpack or Orbax), or a msgpack file;
    * "zarr": the folder of one array of a T5X checkpoint;
    * "npy": a file that begins as numpy's do (in the original's checkpoints its name is
      encoder.prompt.prompt.prompt), or a folder with one such file.

    Raises:
      ConfigError: nothing is there, or none of these.
    """
    if place.is_file():
        return _recognise_file(place)
    if (place / METADATA).is_file():
        return "ours", place
    if any((place / name).is_file() for name in (peft.CONFIG, peft.WEIGHTS, peft.PICKLED)):
        return "peft", place
    if any((place / name).is_file() for name in (".zarray", "zarr.json")):
        return "zarr", place
    if any((place / name).is_file() for name in _T5X_INDICES):
        return "t5x", place
    arrays = [file for file in place.glob("*") if file.is_file() and _starts_as_npy(file)]
    if len(arrays) == 1:
        return "npy", arrays[0]
    raise ConfigError(
        describe_lfs_pointer(place)
        or f"there is no prompt at {place}: expected a folder of ours or of PEFT's "
        f"({peft.WEIGHTS}), a .npy file, or a T5X checkpoint.{_nearby(place, arrays)}"
    )


def _recognise_file(file: Path) -> tuple[Form, Path]:
    if file.name in (METADATA, peft.CONFIG, peft.WEIGHTS, ARRAYS):
        return recognise(file.parent)
    if _starts_as_npy(file):
        return "npy", file
    with file.open("rb") as stream:
        first = stream.read(1)
    if first and (0x81 <= first[0] <= 0x8F or first[0] in (0xDE, 0xDF)):  # a msgpack map
        return "t5x", file
    raise ConfigError(
        describe_lfs_pointer(file)
        or f"expected a prompt folder, a .npy file or a T5X checkpoint, found {file}, which is "
        "neither. (Pickles, .pt, .bin and .npz files are not read.)"
    )


def _starts_as_npy(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(len(_NPY)) == _NPY


def _nearby(place: Path, arrays: list[Path]) -> str:
    """The end of a message that names prompts one or two levels below: of a MODEL_DIR."""
    depths = ("*", "*/*", "prompts/*/*")  # prompts of members are a level below others
    paths = [p.parent for depth in depths for p in place.glob(f"{depth}/{METADATA}")]
    paths += [p.parent for p in place.glob(f"*/{peft.WEIGHTS}") if p.parent not in paths]
    paths += [p for g in ("*", "numpy_checkpoints/*") for p in place.glob(f"{g}/*.prompt")]
    paths += [p.parent for p in place.glob(f"checkpoint_*/{_T5X_INDICES[0]}")] + arrays
    shown = ", ".join(str(p) for p in sorted(paths)[-5:])
    return f" There are {len(paths)} prompts in it; give one of them: {shown}." if paths else ""


def _read_folder(folder: Path, form: Form, task: int | None) -> StoredPrompt:
    if (folder / ARRAYS).is_file() or (form == "ours" and _names_arrays(folder)):
        return _read_arrays(folder)
    adapter = peft.read_peft(folder, task)
    metadata = None
    if form == "ours":
        text = (folder / METADATA).read_bytes()
        metadata = _read_metadata(text, adapter.prompt, str(folder / METADATA), folder)
    elif adapter.header:
        where = f"the header of {folder / peft.WEIGHTS}"
        metadata = _read_metadata(adapter.header.encode(), adapter.prompt, where)
    return StoredPrompt(
        adapter.prompt,
        form,
        metadata,
        adapter.base_model,
        adapter.init,
        adapter.method,
        adapter.dtype,
        unused_rows=adapter.unused_rows,
    )


def _names_arrays(folder: Path) -> bool:
    """Whether the metadata names the file of arrays, which is then missing."""
    files = parse_object((folder / METADATA).read_bytes(), str(folder / METADATA)).get("files")
    return isinstance(files, dict) and ARRAYS in files


def _read_arrays(folder: Path) -> StoredPrompt:
    file = folder / ARRAYS
    arrays, _ = peft.read_tensors(file)
    if unknown := arrays.keys() - {*POSITIONS, SHARED_ROWS}:
        raise ConfigError(
            f"the prompt file {file} holds {', '.join(sorted(unknown))}. Expected fields of a "
            f"prompt: {', '.join(POSITIONS)}, or {SHARED_ROWS}. Copy it again."
        )
    if SHARED_ROWS in arrays:
        prompt = make_prompt(arrays[SHARED_ROWS], str(file))
    else:
        width = arrays["memory"].shape[-1] if "memory" in arrays else 0
        rows = arrays.pop("rows", np.zeros((0, width), np.float32))
        prompt = check_arrays(Prompt(rows, **arrays), str(file))  # type: ignore[arg-type]
    text = (folder / METADATA).read_bytes()
    metadata = _read_metadata(text, prompt, str(folder / METADATA), folder)
    if (metadata.visibility == "prompt") != (SHARED_ROWS in arrays):
        raise ConfigError(
            f"{folder / METADATA} says visibility = {metadata.visibility!r}, and {file} holds "
            f"{', '.join(arrays)}: one of the two was replaced. Copy the folder again."
        )
    return StoredPrompt(prompt, "ours", metadata)


def _read_metadata(
    text: bytes, prompt: Prompt, where: str, folder: Path | None = None
) -> PromptMetadata:
    values = parse_object(text, where)
    own = values.pop("sha256", None)
    whole = to_json({**values, "sha256": _sha256(to_json(values).encode())})
    if own is not None and whole.encode() != text:
        raise ConfigError(
            f"{where} is not what was written, by its SHA-256: it is damaged, or was edited. Copy "
            'it again; if the change is yours, delete its entry "sha256".'
        )
    arrays = ARRAYS if folder is not None and (folder / ARRAYS).is_file() else peft.WEIGHTS
    if values.pop("prompt_sha256", None) != _fingerprint(prompt):
        raise ConfigError(
            f"{where} describes another prompt than {arrays} (the SHA-256 of the numbers differs): "
            "one of the two was replaced or damaged. Copy the folder again."
        )
    files = values.pop("files", {})
    if folder is not None and isinstance(files, dict):
        _check_files(folder, files)
    try:
        return from_dict(PromptMetadata, values)
    except (ConfigError, BeartypeException) as error:
        raise ConfigError(
            f"{where} was written by another version of prompt-tuning "
            f"({values.get('prompt_tuning_version', 'unknown')}) or edited: {error}"
        ) from error


def _check_files(folder: Path, files: Mapping[str, str]) -> None:
    for name in (peft.CONFIG, peft.WEIGHTS, ARRAYS):
        if name in files and files[name] != _sha256((folder / name).read_bytes()):
            raise ConfigError(
                f"{folder / name} is not what was written, by its SHA-256: it is damaged, or was "
                'edited. Copy it again; if the change is yours, delete the entries "files" and '
                f'"sha256" of {METADATA}.'
            )


def check_prompt(
    prompt: Prompt,
    metadata: PromptMetadata | None,
    *,
    shape: tuple[int | None, int],
    model: ModelConfig | None = None,
    backbone: str = "",
    vocabulary: str = "",
    where: str | os.PathLike[str],
) -> None:
    """Raises ConfigError unless the prompt fits a model.

    `shape` is (P, D), or (None, D) for any length. Keys, values and memory need a `model`; without
    one only rows fit. `backbone` and `vocabulary` are the model's fingerprints, compared with those
    of `metadata` if both sides have them.
    """
    length, embed_dim = shape
    if model is None:
        check_rows_alone(prompt, os.fspath(where))
    else:
        _check_fields(prompt, model, os.fspath(where))
    stored = tuple(prompt.rows.shape)
    needed = f"({'any' if length is None else length}, {embed_dim})"
    if stored[1] != embed_dim and not (model and other_fields(prompt) and stored == (0, 0)):
        raise ConfigError(
            f"the prompt {where} has shape {stored}; the model needs {needed}. Was it "
            "trained for a model of another size?"
        )
    if length is not None and stored[0] != length:
        raise ConfigError(
            f"the prompt {where} has shape {stored}; {needed} is asked for. Set "
            f"PROMPT_LENGTH = {stored[0]}, or give another prompt."
        )
    for name, trained, loaded in (
        ("backbone", metadata.backbone if metadata else "", backbone),
        ("vocabulary", metadata.vocabulary if metadata else "", vocabulary),
    ):
        if trained and loaded and trained != loaded:
            raise ConfigError(
                f"the prompt {where} was trained with another {name} ({trained[:12]}...) than this "
                f"model's ({loaded[:12]}...), and would do nothing useful here. Load the {name} it "
                "was trained with, or train a prompt for this one."
            )


def _check_fields(prompt: Prompt, model: ModelConfig, where: str) -> None:
    for field in other_fields(prompt):
        found = tuple(getattr(prompt, field).shape)
        expected = shapes_of_fields(model, found[POSITIONS[field]])[field]
        if found != expected:
            raise ConfigError(
                f"the prompt {where} has {field} of shape {found}; the model needs {expected}. Was "
                "it trained for a model of another size?"
            )
    _check_attention(prompt.encoder is not None, model, where)


def _check_attention(reaches_encoder: bool, model: ModelConfig, where: str) -> None:
    if reaches_encoder and model.attention == "cudnn":
        raise ConfigError(
            f"the prompt {where} has keys and values for the encoder, which ATTENTION = 'cudnn' "
            "does not take. Set ATTENTION = 'xla'."
        )
