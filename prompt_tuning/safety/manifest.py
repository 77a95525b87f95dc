"""A list of checksums beside files that have none: what was there, byte for byte.

    manifest.sha256.json   {"files": {"checkpoint": {"bytes": 812, "sha256": "..."}, ...},
                            "arrays": {"encoder/encoder_norm/scale": "...", ...}}

`t5x verify --write` records one for a folder, or as `<name>.sha256.json` for a single file;
`t5x verify` compares.
"""

from __future__ import annotations

import hashlib
import json
import os
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prompt_tuning.config import ConfigError

NAME = "manifest.sha256.json"
SUFFIX = ".sha256.json"
SHOWN = 10  # problems, in an error
NO_ARRAYS: Mapping[str, str] = types.MappingProxyType({})


def path_of(place: Path) -> Path:
    """Where the manifest of a folder or file lies."""
    return place / NAME if place.is_dir() else place.with_name(place.name + SUFFIX)


def record(place: Path, arrays: Mapping[str, str] = NO_ARRAYS) -> Path:
    """Writes the manifest of a folder, with all that lies in it, or of a file; returns its path.

    `arrays` are checksums of the arrays in it, so that a change names the parameter as well.
    """
    path = path_of(place)
    values = {"files": _describe(place), "arrays": dict(arrays)}
    content = json.dumps(values, indent=1, sort_keys=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(content + "\n", encoding="utf-8")
    temporary.replace(path)
    return path


def check(place: Path, arrays: Mapping[str, str] = NO_ARRAYS) -> int:
    """Compares a folder or file with its manifest and returns how many files agree.

    `arrays` are the checksums of now.

    Raises:
      ConfigError: there is no manifest, or a file is missing, new, of another size or content.
    """
    path = path_of(place)
    values, found = _read(path), _describe(place)
    expected, then = values["files"], values.get("arrays") or {}
    problems = [f"the array {n} has other contents" for n in arrays if arrays[n] != then.get(n)]
    problems += [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
    problems += [
        f"{name} is not in the manifest" for name in sorted(found.keys() - expected.keys())
    ]
    for name in sorted(expected.keys() & found.keys()):
        old, new = expected[name], found[name]
        if old["bytes"] != new["bytes"]:
            problems.append(f"{name} has {new['bytes']} bytes, and had {old['bytes']}")
        elif old["sha256"] != new["sha256"]:
            problems.append(f"{name} has other contents (SHA-256)")
    if problems:
        rest = f"\n  and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        listed = "\n  ".join(problems[:SHOWN])
        raise ConfigError(
            f"{place} is not what {path} was made of:\n  {listed}{rest}\nCopy it again from where "
            "it came from; if the change is meant, record it with --write."
        )
    return len(expected)


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
        entries = values["files"].values()
        if all(type(f["bytes"]) is int and isinstance(f["sha256"], str) for f in entries):
            return values
        raise ValueError("an entry has no size or no SHA-256")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{path} is no manifest, or is damaged: {error}.") from error
    except FileNotFoundError as error:
        raise ConfigError(
            f"there is no manifest at {path}, so there is nothing to compare with. While the files "
            "are known to be good, record one with --write."
        ) from error


def _describe(place: Path) -> dict[str, Any]:
    """Size and SHA-256 of every file, by its path in the folder."""
    if not place.is_dir():
        return {place.name: _entry(place)}
    own = place / NAME
    found = {}
    for folder, _, names in os.walk(place):
        for name in names:
            file = Path(folder, name)
            if file != own and not name.endswith(".tmp"):
                found[file.relative_to(place).as_posix()] = _entry(file)
    return found


def _entry(file: Path) -> dict[str, Any]:
    if not file.is_file():  # a broken link, a pipe that would never end
        return {"bytes": 0, "sha256": "no file"}
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    return {"bytes": file.stat().st_size, "sha256": digest}
