"""Folders of safetensors, one file or several with an index, read and written in blocks.

No function needs a whole tensor in memory: `read` takes a slice, and `write_file` takes the values
of a tensor in consecutive blocks. `huggingface.py` and `conversion.py` use this module.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open

from prompt_tuning.checkpoints.architecture import describe_adapter
from prompt_tuning.config import ConfigError
from prompt_tuning.runtime.storage import describe_lfs_pointer

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES: Mapping[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
Index = tuple[slice, ...]
_MALFORMED = (ValueError, KeyError, TypeError, AttributeError, RecursionError)


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """One tensor in its file, not read yet."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str  # safetensors' name of the dtype

    @property
    def nbytes(self) -> int:
        """The size in bytes; for floating-point tensors only."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def read(self, index: Index | None = None) -> Shaped[np.ndarray, "..."]:
        """The tensor or a part of it; no other part of the file is read."""
        with _opened(self.file) as file:
            if index is None or not self.shape:
                return file.get_tensor(self.name)
            return file.get_slice(self.name)[index]


def find_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a folder, by name; reads only the headers of the files.

    Raises:
      ConfigError: there are no safetensors, a file of the index is missing, or a file is truncated.
    """
    files = _list_files(folder)
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        with _opened(file) as opened:
            for name in opened.keys():  # noqa: SIM118 (it is no dict)
                if name in tensors:
                    raise ConfigError(
                        f"{name} is both in {tensors[name].file} and in {file}. Remove one of the "
                        "files."
                    )
                part = opened.get_slice(name)
                shape = tuple(part.get_shape())
                tensors[name] = StoredTensor(file, name, shape, part.get_dtype())
    if not (folder / SINGLE).is_file():
        _check_index(folder, tensors)
    return tensors


def _list_files(folder: Path) -> list[Path]:
    if (folder / SINGLE).is_file():  # it has precedence over an index, as in transformers
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        names = sorted(set(_read_index(folder).values()))
        outside = [name for name in names if Path(name).name != name]
        absent = [name for name in names if not (folder / name).is_file()]
        if outside or absent:
            raise ConfigError(
                f"{folder / INDEX} lists files that are not in the folder: "
                f"{', '.join((outside or absent)[:5])}. The checkpoint was copied incompletely: "
                "copy it again."
            )
        return [folder / name for name in names]
    raise ConfigError(_absent(folder))


def _absent(folder: Path) -> str:
    if adapter := describe_adapter(folder):
        return adapter
    pytorch = sorted(file.name for file in folder.glob("pytorch_model*.bin"))
    other = sorted(file.name for file in folder.glob("*.safetensors"))
    if other:
        return (
            f"{folder} has {', '.join(other[:3])}, but neither {SINGLE} nor {INDEX}, which lists "
            "the tensors of each file. Copy the rest of the checkpoint."
        )
    if not pytorch:
        return (
            f"{folder} has no weights: expected {SINGLE}, or {INDEX} and the files that it lists. "
            "Download the whole model."
        )
    return (
        f"{folder} has its weights only as {pytorch[0]}, a pickle: reading it runs its author's "
        f"code and needs torch. On a machine with transformers, convert them to {SINGLE}:\n"
        '  python -c "from transformers import T5ForConditionalGeneration as M; '
        f"M.from_pretrained('{folder}').save_pretrained('{folder}-safetensors')\"\n"
        "(MT5ForConditionalGeneration for an mT5), and give that folder."
    )


def _read_index(folder: Path) -> Mapping[str, str]:
    try:
        weight_map = json.loads((folder / INDEX).read_bytes())["weight_map"]
        if not all(isinstance(name, str) for name in weight_map.values()):
            raise ValueError("a file name is no string")
        return weight_map
    except (*_MALFORMED, OSError) as error:
        raise ConfigError(
            describe_lfs_pointer(folder / INDEX)
            or f"{folder / INDEX} cannot be read as the index of a checkpoint ({error!r}). "
            "Copy it again."
        ) from error


def _check_index(folder: Path, tensors: Mapping[str, StoredTensor]) -> None:
    index = _read_index(folder)
    wrong = [name for name, file in index.items() if name not in tensors]
    if wrong:
        raise ConfigError(
            f"{folder / INDEX} lists {len(wrong)} tensors that the files do not have: "
            f"{', '.join(wrong[:5])}. The files are of different checkpoints. Copy the whole "
            "checkpoint again."
        )


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """The file, mapped only while it is read, because resident pages count as memory."""
    try:
        with safe_open(file, framework="np") as opened:
            yield opened
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            describe_lfs_pointer(file)
            or f"{file} cannot be read as safetensors ({error}). It is damaged, or was copied "
            "incompletely: copy it again."
        ) from error


def are_equal(a: StoredTensor, b: StoredTensor) -> bool:
    """Whether two tensors are equal bit for bit, compared block by block."""
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    return all(a.read(index).tobytes() == b.read(index).tobytes() for index in row_blocks(a.shape))


def row_blocks(shape: tuple[int, ...], itemsize: int = 4, limit: int = 2**25) -> Iterator[Index]:
    """Slices of whole rows that partition a tensor, each at most `limit` bytes or a single row.

    >>> [index[0] for index in row_blocks((5, 2**22))]
    [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    rows = max(1, limit // max(1, math.prod(shape[1:]) * itemsize))
    rest = tuple(slice(0, size) for size in shape[1:])
    for start in range(0, shape[0], rows):
        yield (slice(start, min(start + rows, shape[0])), *rest)


# Writing ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class PlannedTensor:
    """The name, shape and dtype of a tensor to write, for the header of its file."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """The size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def plan_files(tensors: Iterable[PlannedTensor], max_bytes: int) -> dict[str, list[PlannedTensor]]:
    """The tensors of each file, in order; a file exceeds `max_bytes` only with a single tensor."""
    files: list[list[PlannedTensor]] = [[]]
    for tensor in tensors:
        if files[-1] and sum(t.nbytes for t in files[-1]) + tensor.nbytes > max_bytes:
            files.append([])
        files[-1].append(tensor)
    if len(files) == 1:
        return {SINGLE: files[0]}
    return {
        f"model-{number:05d}-of-{len(files):05d}.safetensors": file
        for number, file in enumerate(files, start=1)
    }


def write_index(folder: Path, files: Mapping[str, list[PlannedTensor]]) -> None:
    """Writes the index, the file of each tensor, if there are several files."""
    if len(files) == 1:
        return
    total = sum(tensor.nbytes for tensors in files.values() for tensor in tensors)
    index = {
        "metadata": {"total_size": total},
        "weight_map": {t.name: name for name, tensors in files.items() for t in tensors},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_file(
    path: Path, tensors: Iterable[PlannedTensor], pieces: Iterable[Shaped[np.ndarray, "..."]]
) -> None:
    """Writes one file; `pieces` are consecutive blocks of the values of all tensors, in order.

    safetensors' own writer needs all tensors of a file in memory.
    """
    tensors = list(tensors)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers needs it
    offset = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for piece in pieces:
            file.write(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)
        written = file.tell() - 8 - len(text)
    assert written == offset, f"{path}: {written} bytes written, expected {offset}"
