"""Size and SHA-256 of files: what a folder held, to be compared with what it holds.

`run_state.py` puts such a list into every state, `checkpoints/manifest.py` beside files of others.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

NAME = "manifest.sha256.json"


def describe(place: Path) -> dict[str, Any]:
    """Size and SHA-256 of every file of a folder, by its path in it, or of one file."""
    if not place.is_dir():
        return {place.name: _entry(place)}
    own = place / NAME
    found = {}
    for folder, folders, names in os.walk(place):
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        for name in [*names, *links]:
            file = Path(folder, name)
            if file != own and not name.endswith(".tmp"):
                found[file.relative_to(place).as_posix()] = _entry(file)
    return found


def _entry(file: Path) -> dict[str, Any]:
    if not is_file(file):  # a broken link, a pipe that would never end
        return {"bytes": 0, "sha256": "no file"}
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    return {"bytes": file.stat().st_size, "sha256": digest}


def is_file(path: Path) -> bool:
    """Whether there is a file that ends: no folder, no pipe, no circle of links."""
    try:
        return path.is_file()
    except (OSError, RuntimeError):  # no permission; a circle, in some versions of Python
        return False


def compare(expected: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """What is different, a clause for each file."""
    problems = [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
    problems += [
        f"{name} is not in the manifest" for name in sorted(found.keys() - expected.keys())
    ]
    for name in sorted(expected.keys() & found.keys()):
        old, new = expected[name], found[name]
        if new["sha256"] == "no file" != old["sha256"]:
            problems.append(f"{name} is no file any more")
        elif old["bytes"] != new["bytes"]:
            problems.append(f"{name} has {new['bytes']} bytes, and had {old['bytes']}")
        elif old["sha256"] != new["sha256"]:
            problems.append(f"{name} has other contents (SHA-256)")
    return problems


def write(path: Path, values: Mapping[str, Any]) -> None:
    """Writes a manifest, whole or not at all."""
    content = json.dumps(values, indent=1, sort_keys=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(content + "\n", encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read(path: Path) -> dict[str, Any]:
    """The values of a manifest.

    Raises:
      ValueError: it is none.
      OSError: it cannot be read.
    """
    if os.path.lexists(path) and not is_file(path):
        raise ValueError("it is no file, but a folder, a pipe or a link that leads nowhere")
    try:
        values = json.loads(path.read_bytes())
        entries = values["files"].values()
        arrays = values.get("arrays") or {}
        if all(type(f["bytes"]) is int and isinstance(f["sha256"], str) for f in entries) and all(
            isinstance(name, str) for name in arrays.values()
        ):
            return values
    except (KeyError, TypeError, AttributeError, RecursionError, ValueError) as error:
        raise ValueError("it does not list files with their sizes and SHA-256") from error
    raise ValueError("an entry has no size or no SHA-256")
