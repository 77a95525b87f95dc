"""numpy's files, the form in which the original released its prompts; nothing is unpickled.

Read and written for `prompts/prompt_file.py` and `prompts/convert.py`.
"""

from __future__ import annotations

import io
import math
import os
import tokenize
import uuid
import warnings
from pathlib import Path

import numpy as np
from jaxtyping import Float, Shaped

from prompt_tuning.config import ConfigError

MAGIC = b"\x93NUMPY"
_ERRORS = (ValueError, TypeError, SyntaxError, EOFError, OverflowError, tokenize.TokenError)


def read_npy(file: Path) -> Shaped[np.ndarray, "..."]:
    """The array of a `.npy` file, by rows whatever order it was written in.

    The size that the header declares is compared with the file's before anything is allocated.

    Raises:
      ConfigError: it is damaged, or holds Python objects.
    """
    data = file.read_bytes()
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        read = {(1, 0): np.lib.format.read_array_header_1_0}.get(
            version, np.lib.format.read_array_header_2_0
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # headers of Python 2 are welcome
            shape, by_columns, dtype = read(stream)
        if dtype.hasobject:
            raise ValueError("it holds pickled Python objects, which are never loaded")
        declared = math.prod(shape) * dtype.itemsize
        if declared != len(data) - stream.tell():
            raise ValueError(f"it declares {dtype}{shape}, and {declared} bytes do not follow")
        flat = np.frombuffer(data, dtype, offset=stream.tell())
        return flat.reshape(shape, order="F" if by_columns else "C")
    except _ERRORS as error:
        reason = str(error)
        if " object at 0x" in reason:  # numpy's words for a header that is more than values
            reason = "its header is not a description of an array"
        raise ConfigError(f"the prompt file {file} is damaged: {reason}. Copy it again.") from error


def write_npy(file: str | os.PathLike[str], prompt: Float[np.ndarray, "P D"]) -> None:
    """Writes a prompt as the original does, float32 by rows; the file appears whole or not at all.

    The name is taken as it is: numpy's own function would add `.npy` to it.
    """
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.parent / f".{file.name}.{uuid.uuid4().hex}.tmp"
    try:
        with new.open("wb") as stream:
            np.save(stream, np.ascontiguousarray(prompt, "<f4"), allow_pickle=False)
        new.rename(file)
    finally:
        new.unlink(missing_ok=True)
