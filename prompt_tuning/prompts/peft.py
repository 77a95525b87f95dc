"""Prompts of Hugging Face PEFT for an encoder-decoder, as PEFT 0.21 computes with them.

    adapter_config.json          the method, its sizes, the name of the model
    adapter_model.safetensors    `prompt_embeddings`, and for several tasks a factor of each

* PROMPT_TUNING and P_TUNING, float[P, D] or float[2 P, D]: rows. PEFT counts an encoder-decoder as
  two submodules and saves 2 P rows by default, of which the first P reach the encoder and the
  others are never used. The used half is read, and written alone unless asked otherwise.
* PREFIX_TUNING, float[P, 2 N H K]: a prefix of the decoder's self-attention alone. Layer l has its
  keys in slot 4 l, its values in slot 4 l + 1, both modulo 2 N. So if N is even, layers l and
  l + N / 2 share one prefix, and half of the slots are never used.
* MULTITASK_PROMPT_TUNING: the rows of a task are `prompt_embeddings` times the product of the
  task's `prefix_task_cols` and `prefix_task_rows`. By default PEFT trains them with rows in front
  of the decoder's input too, which its own `generate` leaves out: such an adapter is refused.

P_TUNING and MULTITASK_PROMPT_TUNING are only read: their folded rows are written as
PROMPT_TUNING, which computes the same. `prompts/prompt_file.py` builds on this file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jaxtyping import Float, Int, Shaped

from prompt_tuning.config import ConfigError
from prompt_tuning.model.prompt import Prompt, other_fields
from prompt_tuning.prompts.rows import make_prompt
from prompt_tuning.runtime.storage import describe_lfs_pointer

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
TENSOR = "prompt_embeddings"
HEADER = "prompt_tuning"  # our metadata in the header of the weights: PEFT leaves it unread
_PREFIX, _MULTITASK = "PREFIX_TUNING", "MULTITASK_PROMPT_TUNING"
# What is read, and our names of these methods.
METHODS: Mapping[str, str] = {
    "PROMPT_TUNING": "prompt_tuning",
    "P_TUNING": "p_tuning",
    _PREFIX: "prefix_tuning",
    _MULTITASK: "prompt_tuning",
}
_TENSORS = {_MULTITASK: (TENSOR, "prefix_task_cols", "prefix_task_rows")}
_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": jnp.bfloat16}


class Adapter(NamedTuple):
    """What a folder of PEFT's holds."""

    prompt: Prompt  # what PEFT uses of it
    method: str  # our name of the one that has learned it
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
    """Writes PEFT's two files into a folder; with two `submodules` rows are there twice.

    `base_model` is the Hugging Face name of the backbone (google/t5-base-lm-adapt, ...): PEFT only
    shows it. `metadata`, ours as a text, goes into the header of the weights.

    Raises:
      ConfigError: PEFT has no such prompt.
    """
    config = {
        "task_type": "SEQ_2_SEQ_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
    }
    if not other_fields(prompt):
        config |= {
            "peft_type": "PROMPT_TUNING",
            "num_virtual_tokens": prompt.rows.shape[0],
            "token_dim": prompt.rows.shape[1],
            "num_transformer_submodules": submodules,
            "prompt_tuning_init": "RANDOM",
            "prompt_tuning_init_text": None,
            "tokenizer_name_or_path": None,
        }
        array = np.concatenate([np.asarray(prompt.rows, "<f4")] * submodules)
    else:
        array = _write_slots(prompt)
        assert prompt.decoder is not None  # it has been written
        layers, _, length, heads, head_dim = prompt.decoder.shape
        config |= {
            "peft_type": "PREFIX_TUNING",
            "num_virtual_tokens": length,
            "token_dim": heads * head_dim,
            "num_transformer_submodules": 2,
            "num_attention_heads": heads,
            "num_layers": layers,
            "prefix_projection": False,
            "encoder_hidden_size": heads * head_dim,
        }
    (folder / CONFIG).write_text(to_json(config))
    header = {"format": "pt"} | ({HEADER: metadata} if metadata else {})
    (folder / WEIGHTS).write_bytes(safetensors.numpy.save({TENSOR: array}, header))


def _slots(layers: int) -> Int[np.ndarray, "N 2"]:
    """The slots that hold each layer's keys and values in PEFT's array."""
    return (4 * np.arange(layers)[:, None] + np.arange(2)) % (2 * layers)


def _write_slots(prompt: Prompt) -> Float[np.ndarray, "P 2*N*H*K"]:
    """PEFT's array of a decoder prefix.

    Raises:
      ConfigError: the prompt has more than that, or layers that PEFT makes share a prefix differ.
    """
    if (others := other_fields(prompt)) != ["decoder"] or prompt.rows.shape[0]:
        also = [*(["rows"] if prompt.rows.shape[0] else []), *others]
        raise ConfigError(
            f"the prompt has {', '.join(also)}. Expected rows alone, or a prefix of the decoder "
            "alone: PEFT has no other prompt for a T5. Keep it as --format=ours."
        )
    decoder = np.asarray(prompt.decoder, "<f4")
    slots = _slots(len(decoder))
    array = np.zeros((2 * len(decoder), *decoder.shape[2:]), "<f4")
    array[slots] = decoder
    for layer, own in enumerate(array[slots]):
        if own.tobytes() != decoder[layer].tobytes():
            last = int(np.flatnonzero((slots == slots[layer]).all(axis=1))[-1])
            raise ConfigError(
                f"the prompt has other keys and values in decoder layer {layer} than in layer "
                f"{last}, and PEFT gives one prefix to both. Keep it as --format=ours."
            )
    return np.moveaxis(array, 0, 1).reshape(decoder.shape[2], -1)


def _read_slots(array: Shaped[np.ndarray, "P C"], config: Mapping[str, Any], file: Path) -> Prompt:
    """The decoder prefix of PEFT's array, with a prefix of its own for each layer."""
    names = ("num_virtual_tokens", "num_layers", "num_attention_heads", "token_dim")
    sizes: dict[str, Any] = {name: config.get(name) for name in names}
    length, layers, heads, width = sizes.values()
    is_counted = all(type(n) is int and n > 0 for n in sizes.values())
    if not is_counted or width % heads or array.shape != (length, 2 * layers * width):
        raise ConfigError(
            f"the prompt file {file} has shape {array.shape}, and {CONFIG} beside it has {sizes}: "
            "expected (num_virtual_tokens, 2 * num_layers * token_dim), with a token_dim that "
            "num_attention_heads divide. One of the two files was replaced; copy the folder again."
        )
    slots = np.moveaxis(array.reshape(length, 2 * layers, heads, width // heads), 1, 0)
    return Prompt(np.zeros((0, 0), np.float32), decoder=slots[_slots(layers)])  # type: ignore[arg-type]


def to_json(value: Mapping[str, Any]) -> str:
    """The text of a JSON file that people read as well."""
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def read_peft(folder: Path, task: int | None = None) -> Adapter:
    """The prompt of an adapter; of one with several tasks, that of the number `task`.

    Raises:
      ConfigError: a file is missing or damaged, it is no prompt for an encoder-decoder, or it has
        no such task.
    """
    _check_files(folder)
    file = folder / WEIGHTS
    config = parse_object((folder / CONFIG).read_bytes(), str(folder / CONFIG))
    length, kind = _check_config(config, folder / CONFIG), config["peft_type"]
    tensors, described = _read_safetensors(file, _TENSORS.get(kind, (TENSOR,)))
    array = make_prompt(tensors[TENSOR], str(file)).rows
    if kind != _MULTITASK and task is not None:
        raise ConfigError(f"--task={task}: {folder} is an adapter of one prompt. Leave --task out.")
    if kind == _PREFIX:
        prompt, unused = _read_slots(np.asarray(array), config, file), 0
    else:
        _check_sizes(array.shape, length, config.get("token_dim"), file)
        if kind == _MULTITASK:
            array = _fold_task(tensors, task, file)
        prompt, unused = Prompt(array[:length]), len(array) - length
    base_model = config.get("base_model_name_or_path")
    return Adapter(
        prompt,
        METHODS[kind],
        unused_rows=unused,
        dtype=tensors[TENSOR].dtype.name,
        base_model=base_model if isinstance(base_model, str) and base_model else None,
        init=_describe_init(config),
        header=str(described.get(HEADER, "")),
    )


def _fold_task(
    tensors: Mapping[str, Shaped[np.ndarray, "..."]], task: int | None, file: Path
) -> Any:
    """The rows of a task, float32[P, D]."""
    shared, cols, rows = (tensors[name] for name in _TENSORS[_MULTITASK])
    tasks = len(cols) if cols.ndim == 3 else 0
    expected = (tasks, len(shared), *rows.shape[1:2]), (tasks, *rows.shape[1:2], shared.shape[1])
    if not tasks or (cols.shape, rows.shape) != expected:
        raise ConfigError(
            f"the prompt file {file} has factors of shapes {cols.shape} and {rows.shape} for rows "
            f"of {shared.shape}: they do not fit. Copy it again."
        )
    if (task is None and tasks > 1) or not 0 <= (task or 0) < tasks:
        raise ConfigError(
            f"the adapter {file.parent} has prompts for {tasks} tasks. Expected the number of one, "
            f"from 0 to {tasks - 1}. Write it alone: t5x convert-prompt --input={file.parent} "
            "--task=0 --format=ours --output=..."
        )
    factor = cols[task or 0].astype(np.float64) @ rows[task or 0].astype(np.float64)
    return make_prompt(np.asarray(shared * factor, np.float32), str(file)).rows


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
    if method not in METHODS:
        raise ConfigError(
            f"{file} is an adapter of another method: expected peft_type "
            f"{', '.join(map(repr, METHODS))}, found {method!r}. Only a prompt can be loaded."
        )
    if task != "SEQ_2_SEQ_LM":
        raise ConfigError(
            f"{file} is a prompt for another kind of model: expected task_type 'SEQ_2_SEQ_LM' (an "
            f"encoder-decoder such as T5), found {task!r}."
        )
    if method == _MULTITASK and config.get("num_transformer_submodules") != 1:
        raise ConfigError(
            f"{file}: PEFT trained this {_MULTITASK} with rows in front of the decoder's input, "
            "which its own generate leaves out. Expected num_transformer_submodules = 1, found "
            f"{config.get('num_transformer_submodules')!r}. Train it again with that."
        )
    length = config.get("num_virtual_tokens")
    if not isinstance(length, int) or isinstance(length, bool) or length < 1:
        raise ConfigError(
            f"{file}: num_virtual_tokens must be a count of rows, found {length!r}. Copy it again."
        )
    return length


def _read_safetensors(
    file: Path, names: Sequence[str]
) -> tuple[dict[str, Shaped[np.ndarray, "..."]], Mapping[str, Any]]:
    """The tensors of these names, and the metadata of the header."""
    tensors, described = read_tensors(file)
    if set(tensors) != set(names):
        expected = ", ".join(map(repr, names))
        raise ConfigError(
            f"the prompt file {file} must hold exactly {expected}; found {', '.join(tensors)}."
        )
    return tensors, described


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
