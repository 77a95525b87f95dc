"""Prompts of Hugging Face PEFT: prompt tuning for an encoder-decoder, as PEFT 0.21 has it.

    adapter_config.json          the method, its sizes, the name of the model
    adapter_model.safetensors    `prompt_embeddings`, float[P, D] or float[2 P, D]

PEFT counts an encoder-decoder as two submodules and saves 2 P rows for it by default, of which the
first P reach the encoder and the others are never used. Here the used half is read, and written
alone unless asked otherwise: PEFT loads both. `prompts/prompt_file.py` builds on this file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jaxtyping import Shaped

from prompt_tuning.config import ConfigError
from prompt_tuning.model.prompt import Prompt
from prompt_tuning.prompts.rows import make_prompt
from prompt_tuning.runtime.storage import describe_lfs_pointer

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
TENSOR = "prompt_embeddings"
HEADER = "prompt_tuning"  # our metadata in the header of the weights: PEFT leaves it unread
_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": jnp.bfloat16}


class Adapter(NamedTuple):
    """What a folder of PEFT's holds."""

    prompt: Prompt  # the rows that PEFT uses
    unused_rows: int
    dtype: str  # of the file
    base_model: str | None
    init: str  # how it began, in words
    header: str  # our metadata, if `t5x convert-prompt` wrote the file; else ""


def write_peft(
    folder: Path,
    prompt: Prompt,
    *,
    base_model: str | None = None,
    submodules: int = 1,
    metadata: str = "",
) -> None:
    """Writes PEFT's two files into a folder; with two `submodules` the rows are there twice.

    `base_model` is the Hugging Face name of the backbone (google/t5-base-lm-adapt, ...): PEFT only
    shows it. `metadata`, ours as a text, goes into the header of the weights.
    """
    length, embed_dim = prompt.rows.shape
    config = {
        "peft_type": "PROMPT_TUNING",
        "task_type": "SEQ_2_SEQ_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "num_virtual_tokens": length,
        "token_dim": embed_dim,
        "num_transformer_submodules": submodules,
        "prompt_tuning_init": "RANDOM",
        "prompt_tuning_init_text": None,
        "tokenizer_name_or_path": None,
    }
    (folder / CONFIG).write_text(to_json(config))
    rows = np.concatenate([np.asarray(prompt.rows, "<f4")] * submodules)
    header = {"format": "pt"} | ({HEADER: metadata} if metadata else {})
    (folder / WEIGHTS).write_bytes(safetensors.numpy.save({TENSOR: rows}, header))


def to_json(value: Mapping[str, Any]) -> str:
    """The text of a JSON file that people read as well."""
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def read_peft(folder: Path) -> Adapter:
    """The prompt of an adapter.

    Raises:
      ConfigError: a file is missing or damaged, or it is no prompt for an encoder-decoder.
    """
    _check_files(folder)
    config = parse_object((folder / CONFIG).read_bytes(), str(folder / CONFIG))
    length = _check_config(config, folder / CONFIG)
    stored, described = _read_safetensors(folder / WEIGHTS)
    array = make_prompt(stored, str(folder / WEIGHTS)).rows
    _check_sizes(array.shape, length, config.get("token_dim"), folder / WEIGHTS)
    base_model = config.get("base_model_name_or_path")
    return Adapter(
        Prompt(array[:length]),
        unused_rows=len(array) - length,
        dtype=stored.dtype.name,
        base_model=base_model if isinstance(base_model, str) and base_model else None,
        init=_describe_init(config),
        header=str(described.get(HEADER, "")),
    )


def _describe_init(config: Mapping[str, Any]) -> str:
    init = config.get("prompt_tuning_init")
    if init == "TEXT":
        return f"the pieces of {config.get('prompt_tuning_init_text')!r}, in PEFT"
    return {"RANDOM": "random, in PEFT", "SAMPLE_VOCAB": "sampled vocabulary, in PEFT"}.get(
        str(init), ""
    )


def _check_sizes(shape: tuple[int, ...], length: int, width: Any, file: Path) -> None:
    if shape[0] not in (length, 2 * length):
        raise ConfigError(
            f"the prompt file {file} has shape {shape}, and {CONFIG} beside it has "
            f"num_virtual_tokens = {length}: expected {length} rows, or {2 * length} of which PEFT "
            "uses the first half. One of the two files was replaced; copy the folder again."
        )
    if width is not None and width != shape[1]:
        raise ConfigError(
            f"the prompt file {file} has shape {shape}, and {CONFIG} beside it has token_dim = "
            f"{width!r}. One of the two files was replaced; copy the folder again."
        )


def _check_files(folder: Path) -> None:
    if not (folder / WEIGHTS).is_file():
        pickled = (
            f" {PICKLED} is there, which is a pickle and never loaded: save the adapter again with "
            "PEFT's save_pretrained(..., safe_serialization=True)."
            if (folder / PICKLED).is_file()
            else " Copy the folder again."
        )
        raise ConfigError(f"there is no prompt at {folder}: {WEIGHTS} is missing.{pickled}")
    if not (folder / CONFIG).is_file():
        raise ConfigError(
            f"the prompt at {folder} has no {CONFIG}, without which its method and its length are "
            "unknown. Copy the folder again."
        )


def _check_config(config: Mapping[str, Any], file: Path) -> int:
    """The prompt's length."""
    method, task = config.get("peft_type"), config.get("task_type")
    if method != "PROMPT_TUNING":
        raise ConfigError(
            f"{file} is an adapter of another method: expected peft_type 'PROMPT_TUNING', found "
            f"{method!r}. Only a prompt in front of the embedded input can be loaded."
        )
    if task != "SEQ_2_SEQ_LM":
        raise ConfigError(
            f"{file} is a prompt for another kind of model: expected task_type 'SEQ_2_SEQ_LM' (an "
            f"encoder-decoder such as T5), found {task!r}."
        )
    length = config.get("num_virtual_tokens")
    if not isinstance(length, int) or isinstance(length, bool) or length < 1:
        raise ConfigError(
            f"{file}: num_virtual_tokens must be a count of rows, found {length!r}. Copy it again."
        )
    return length


def _read_safetensors(file: Path) -> tuple[Shaped[np.ndarray, "..."], Mapping[str, Any]]:
    """The tensor, and the metadata of the header."""
    tensors, described = read_tensors(file)
    if set(tensors) != {TENSOR}:
        raise ConfigError(
            f"the prompt file {file} must hold exactly {TENSOR!r}; found {', '.join(tensors)}."
        )
    return tensors[TENSOR], described


def read_tensors(file: Path) -> tuple[dict[str, Shaped[np.ndarray, "..."]], Mapping[str, Any]]:
    """The arrays of a safetensors file, and the metadata of its header.

    Raises:
      ConfigError: the file is damaged, or an array is not of floating-point numbers.
    """
    try:
        data = file.read_bytes()
        # The library compares the header with the file's size before it allocates.
        tensors = dict(safetensors.deserialize(data))
        size = int.from_bytes(data[:8], "little")
        described = json.loads(data[8 : 8 + size]).get("__metadata__") or {}
    except (OSError, safetensors.SafetensorError, ValueError, TypeError, RecursionError) as error:
        raise ConfigError(
            describe_lfs_pointer(file)
            or f"the prompt file {file} is damaged: {error}. Copy it again."
        ) from error
    dtypes = {name: tensor["dtype"] for name, tensor in sorted(tensors.items())}
    if not set(dtypes.values()) <= set(_DTYPES):
        raise ConfigError(
            f"the prompt file {file} must hold arrays of one of the types {', '.join(_DTYPES)}; "
            f"found {dtypes}."
        )
    arrays = {
        name: np.frombuffer(t["data"], np.dtype(_DTYPES[t["dtype"]])).reshape(t["shape"])
        for name, t in tensors.items()
    }
    return arrays, described


def parse_object(text: bytes | str, where: str) -> dict[str, Any]:
    """The object that a JSON text holds.

    Raises:
      ConfigError: it is not JSON, or something else than an object.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is not JSON ({error}). Copy it again.") from error
    if not isinstance(value, dict):
        raise ConfigError(
            f"{where} must hold a JSON object, found a {type(value).__name__}. Copy it again."
        )
    return value
