"""A prompt on disk: a folder that Hugging Face PEFT loads as it is, with what we know about it.

    adapter_config.json          PEFT's: prompt tuning for a sequence-to-sequence model
    adapter_model.safetensors    the prompt, float32[P, D], under PEFT's name `prompt_embeddings`
    prompt_tuning.json           ours: task, label words, identity of the backbone, score, ...

`training/loop.py` writes these folders; `serving/predictor.py`, evaluation and the "file"
initialisation read them, and the bare `.npy` that the original release used.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
import os
import tokenize
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from beartype import BeartypeConf, beartype
from beartype.roar import BeartypeException
from jaxtyping import Float

from prompt_tuning.checkpoint.replace_folder import replace_folder
from prompt_tuning.config import ConfigError, from_dict, to_dict

PEFT_CONFIG = "adapter_config.json"
PEFT_WEIGHTS = "adapter_model.safetensors"
METADATA = "prompt_tuning.json"
_TENSOR = "prompt_embeddings"
_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "bfloat16"}
_NPY_MAGIC = b"\x93NUMPY"
_NPY_ERRORS = (ValueError, TypeError, SyntaxError, EOFError, OverflowError, tokenize.TokenError)


@beartype(conf=BeartypeConf(is_pep484_tower=True))
@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptMetadata:
    """What is known about a prompt; every field may be left empty."""

    task: str = ""
    label_words: tuple[str, ...] = ()
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
    prompt: Float[np.ndarray, "P D"],
    metadata: PromptMetadata,
    *,
    base_model: str | None = None,
) -> None:
    """Writes a prompt folder, whole or not at all; one that is there already is replaced.

    `base_model` is the Hugging Face name of the backbone (google/t5-base-lm-adapt, ...): PEFT only
    shows it.

    Raises:
      ConfigError: the prompt is not a finite matrix, or the path is not a local folder.
    """
    prompt = _checked(np.asarray(prompt), f"the prompt for {os.fspath(folder)}")
    description = {**to_dict(metadata), "prompt_sha256": _fingerprint(prompt)}
    with replace_folder(folder) as new:
        (new / PEFT_CONFIG).write_text(_json(_peft_config(prompt, base_model)))
        safetensors.numpy.save_file(
            {_TENSOR: prompt}, new / PEFT_WEIGHTS, metadata={"format": "pt"}
        )
        (new / METADATA).write_text(_json(description))


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def _fingerprint(prompt: Float[np.ndarray, "P D"]) -> str:
    return hashlib.sha256(prompt.astype("<f4").tobytes()).hexdigest()


def _peft_config(prompt: Float[np.ndarray, "P D"], base_model: str | None) -> dict[str, Any]:
    length, embed_dim = prompt.shape
    return {
        "peft_type": "PROMPT_TUNING",
        "task_type": "SEQ_2_SEQ_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "num_virtual_tokens": length,
        "token_dim": embed_dim,
        # PEFT would otherwise expect 2 * length rows, of which it uses the first half.
        "num_transformer_submodules": 1,
        "prompt_tuning_init": "RANDOM",
        "prompt_tuning_init_text": None,
        "tokenizer_name_or_path": None,
    }


def load_prompt(
    path: str | os.PathLike[str],
) -> tuple[Float[np.ndarray, "P D"], PromptMetadata | None]:
    """The prompt, in float32, and what is known about it: None for a `.npy` or a folder of PEFT's.

    Nothing is executed: pickled arrays are refused. The sizes that a file declares are compared
    with the file's before anything is allocated.

    Raises:
      ConfigError: there is no such prompt, or it is damaged.
    """
    place = Path(path).expanduser()
    if place.is_file():
        return _checked(_read_npy(place), str(place)), None
    if not (place / PEFT_WEIGHTS).is_file():
        raise ConfigError(
            f"there is no prompt at {place}: expected a folder with {PEFT_WEIGHTS} in it, or a "
            f".npy file.{_nearby(place)}"
        )
    prompt = _checked(_read_safetensors(place), str(place / PEFT_WEIGHTS))
    if not (place / METADATA).is_file():
        return prompt, None
    return prompt, _read_metadata(place / METADATA, prompt)


def _nearby(place: Path) -> str:
    """Prompts one or two levels below, for someone who gave a MODEL_DIR."""
    found = [p.parent for g in ("*", "prompts/*") for p in place.glob(f"{g}/{PEFT_WEIGHTS}")]
    shown = ", ".join(str(p) for p in sorted(found)[-5:])
    return f" There are {len(found)} prompts in it; give one of them: {shown}." if found else ""


def _read_npy(file: Path) -> np.ndarray:
    data = file.read_bytes()
    if not data.startswith(_NPY_MAGIC):
        raise ConfigError(
            f"expected a prompt folder or a .npy file, found {file}, which is neither."
        )
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        read = {(1, 0): np.lib.format.read_array_header_1_0}.get(
            version, np.lib.format.read_array_header_2_0
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # headers of Python 2 are welcome
            shape, by_columns, dtype = read(stream)
        declared = math.prod(shape) * dtype.itemsize
        if dtype.hasobject or declared != len(data) - stream.tell():
            raise ValueError(f"it declares {dtype}{shape}, and {declared} bytes do not follow")
        flat = np.frombuffer(data, dtype, offset=stream.tell())
        return flat.reshape(shape, order="F" if by_columns else "C")
    except _NPY_ERRORS as error:
        raise ConfigError(f"the prompt file {file} is damaged: {error}. Copy it again.") from error


def _read_safetensors(folder: Path) -> np.ndarray:
    file = folder / PEFT_WEIGHTS
    try:
        # The library compares the header with the file's size before it allocates.
        tensors = dict(safetensors.deserialize(file.read_bytes()))
    except (safetensors.SafetensorError, ValueError, TypeError) as error:
        raise ConfigError(f"the prompt file {file} is damaged: {error}. Copy it again.") from error
    if set(tensors) != {_TENSOR} or tensors[_TENSOR]["dtype"] not in _DTYPES:
        found = {name: tensor["dtype"] for name, tensor in sorted(tensors.items())}
        raise ConfigError(
            f"the prompt file {file} must hold exactly {_TENSOR!r}, of one of the types "
            f"{', '.join(_DTYPES)}; found {found}."
        )
    tensor = tensors[_TENSOR]
    dtype = np.dtype(_DTYPES[tensor["dtype"]])
    prompt = np.frombuffer(tensor["data"], dtype).reshape(tensor["shape"])
    # PEFT saves twice the rows for an encoder-decoder by default and uses the first half.
    config = _read_json(folder / PEFT_CONFIG) if (folder / PEFT_CONFIG).is_file() else {}
    rows = config.get("num_virtual_tokens")
    return prompt[:rows] if isinstance(rows, int) and prompt.ndim == 2 else prompt


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file} is not JSON: {error}. Copy it again.") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{file} must hold a JSON object, found a {type(value).__name__}.")
    return value


def _read_metadata(file: Path, prompt: Float[np.ndarray, "P D"]) -> PromptMetadata:
    values = _read_json(file)
    if values.pop("prompt_sha256", None) != _fingerprint(prompt):
        raise ConfigError(
            f"{file} describes another prompt than {PEFT_WEIGHTS} beside it (the SHA-256 differs): "
            "one of the two was replaced or damaged. Copy the folder again, or delete the former."
        )
    try:
        return from_dict(PromptMetadata, values)
    except (ConfigError, BeartypeException) as error:
        raise ConfigError(
            f"{file} was written by another version of prompt-tuning "
            f"({values.get('prompt_tuning_version', 'unknown')}) or edited: {error}"
        ) from error


def _checked(prompt: np.ndarray, where: str) -> Float[np.ndarray, "P D"]:
    if prompt.ndim != 2 or 0 in prompt.shape:
        raise ConfigError(f"{where} has shape {prompt.shape}; a prompt is a matrix (P, D).")
    if not jnp.issubdtype(prompt.dtype, jnp.floating):
        raise ConfigError(f"{where} holds {prompt.dtype}; a prompt holds floating-point numbers.")
    prompt = np.array(prompt, dtype=np.float32, order="C")
    if bad := int(np.size(prompt) - np.isfinite(prompt).sum()):
        raise ConfigError(f"{where} holds {bad} values that are not finite: training diverged.")
    return prompt


def check_prompt(
    prompt: Float[np.ndarray, "P D"],
    metadata: PromptMetadata | None,
    *,
    shape: tuple[int | None, int],
    backbone: str = "",
    vocabulary: str = "",
    where: str | os.PathLike[str],
) -> None:
    """Returns if the prompt fits a model: `shape` is (P, D), with None for a P of any size.

    `backbone` and `vocabulary` are the model's; what either side leaves empty is not compared.

    Raises:
      ConfigError: width, length, backbone or vocabulary is another one.
    """
    length, embed_dim = shape
    needed = f"({'any' if length is None else length}, {embed_dim})"
    if prompt.shape[1] != embed_dim:
        raise ConfigError(
            f"the prompt {where} has shape {prompt.shape}; the model needs {needed}. Was it "
            "trained for a model of another size?"
        )
    if length is not None and prompt.shape[0] != length:
        raise ConfigError(
            f"the prompt {where} has shape {prompt.shape}; {needed} is asked for. Set "
            f"PROMPT_LENGTH = {prompt.shape[0]}, or give another prompt."
        )
    for name, theirs, ours in (
        ("backbone", metadata.backbone if metadata else "", backbone),
        ("vocabulary", metadata.vocabulary if metadata else "", vocabulary),
    ):
        if theirs and ours and theirs != ours:
            raise ConfigError(
                f"the prompt {where} was trained with another {name} ({theirs[:12]}...) than this "
                f"model's ({ours[:12]}...), and would do nothing useful here. Load the {name} it "
                "was trained with, or train a prompt for this one."
            )
