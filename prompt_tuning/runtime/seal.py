"""JSON that holds a checksum of itself: what `t5x eval` leaves for programs to read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prompt_tuning.config import ConfigError

_KEY = "sha256"


def write(content: Mapping[str, Any]) -> str:
    """The text of a JSON object, with the SHA-256 of the text that it has without it.

    >>> write({"a": 1}).count("sha256")
    1
    """
    return _text({**content, _KEY: _digest(content)})


def check(file: Path) -> None:
    """Returns if the file is as `write` made it.

    Raises:
      ConfigError: it is not.
    """
    try:
        text = file.read_bytes()
        content = json.loads(text)
        expected = content.pop(_KEY)
    except (OSError, ValueError, KeyError, AttributeError, RecursionError) as error:
        raise ConfigError(
            f"{file} is damaged ({error}): run the command that wrote it again."
        ) from error
    if expected != _digest(content) or text != write(content).encode():
        raise ConfigError(
            f"{file} is not what was written there (SHA-256): run the command that wrote it again."
        )


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(_text(content).encode()).hexdigest()


def _text(content: Mapping[str, Any]) -> str:
    return json.dumps(content, ensure_ascii=False, indent=1) + "\n"
