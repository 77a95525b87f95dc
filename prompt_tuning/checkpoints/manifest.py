"""A list of checksums beside files that have none: what was there, byte for byte.

    manifest.sha256.json   {"files": {"checkpoint": {"bytes": 812, "sha256": "..."}, ...},
                            "arrays": {"encoder/encoder_norm/scale": "...", ...}}

`t5x verify --write` records one for a folder, or as `<name>.sha256.json` for a single file;
`t5x verify` compares.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prompt_tuning.checkpoints import file_list
from prompt_tuning.checkpoints.file_list import NAME
from prompt_tuning.config import ConfigError

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
    file_list.write(path, {"files": file_list.describe(place), "arrays": dict(arrays)})
    return path


def check(place: Path, arrays: Mapping[str, str] = NO_ARRAYS) -> int:
    """Compares a folder or file with its manifest and returns how many files agree.

    `arrays` are the checksums of now.

    Raises:
      ConfigError: there is no manifest, or a file is missing, new, of another size or content.
    """
    path = path_of(place)
    values, found = _read(path), file_list.describe(place)
    expected, then = values["files"], values.get("arrays") or {}
    problems = [f"the array {n} has other contents" for n in arrays if arrays[n] != then.get(n)]
    problems += file_list.compare(expected, found)
    if problems:
        rest = f"\n  and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        listed = "\n  ".join(problems[:SHOWN])
        raise ConfigError(
            f"{place} is not what {path} was made of:\n  {listed}{rest}\nCopy it again from where "
            "it came from; if the change is meant, record it with --write."
        )
    return len(expected)


def check_checkpoint(spec: str) -> str:
    """Holds the files of a checkpoint against their manifest, before it is loaded; says so.

    Raises:
      ConfigError: they differ, there is no manifest, or the checkpoint is not on this machine.
    """
    if "://" in spec:
        raise ConfigError(
            f"VERIFY_CHECKPOINT = True: {spec} is not on this machine, so its files cannot be held "
            "against a manifest. Copy it here, or set VERIFY_CHECKPOINT = False."
        )
    place = Path(spec).expanduser()
    if place.exists() and not path_of(place).exists():
        raise ConfigError(
            f"VERIFY_CHECKPOINT = True, and {place} has no manifest. While the checkpoint is known "
            f"to be good, record one: `t5x verify {place} --write`."
        )
    if not place.exists():
        return ""  # whoever loads it says so better
    return f"backbone: {check(place)} files of {place}, all with the SHA-256 that was recorded"


def _read(path: Path) -> dict[str, Any]:
    try:
        return file_list.read(path)
    except ValueError as error:
        raise ConfigError(
            f"{path} is no manifest, or is damaged: {error}. Copy it again, or record another one "
            "with --write while the files are known to be good."
        ) from error
    except FileNotFoundError as error:
        raise ConfigError(
            f"there is no manifest at {path}, so there is nothing to compare with. While the files "
            "are known to be good, record one with --write."
        ) from error
    except OSError as error:
        raise ConfigError(
            f"the manifest {path} cannot be read ({error.strerror}): change its permissions, or "
            "record another one with --write."
        ) from error
