"""Manifests: the SHA-256 of every file in a folder.

    manifest.sha256.json   {"files": {"checkpoint": {"bytes": 812, "sha256": "..."}, ...}}

`t5x verify --write` records a manifest; `t5x verify` and VERIFY_CHECKPOINT check it.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from prompt_tuning.config import ConfigError
from prompt_tuning.runtime.replace_folder import replace_text

NAME = "manifest.sha256.json"
SHOWN = 10  # problems shown in an error


def record(folder: Path) -> Path:
    """The path of the manifest of a folder, which it writes."""
    text = json.dumps({"files": _describe(folder)}, indent=1, sort_keys=True)
    replace_text(folder / NAME, text + "\n")
    return folder / NAME


def check(folder: Path) -> int:
    """The number of files in a folder, after checking each against the manifest.

    Raises:
      ConfigError: there is no manifest, or a file is missing, new, of another size or content.
    """
    path = folder / NAME
    try:
        expected = json.loads(path.read_bytes())["files"]
        files = _describe(folder)
        problems = [f"{name} is missing" for name in sorted(expected.keys() - files.keys())]
        problems += [f"{name} is not in it" for name in sorted(files.keys() - expected.keys())]
        for name in sorted(expected.keys() & files.keys()):
            old, new = expected[name], files[name]
            if old["bytes"] != new["bytes"]:
                problems.append(f"{name} has {new['bytes']} bytes, and had {old['bytes']}")
            elif old["sha256"] != new["sha256"]:
                problems.append(f"{name} has other contents (SHA-256)")
    except FileNotFoundError as error:
        raise ConfigError(
            f"there is no manifest {path}. While the files are known to be good, record one with "
            "--write."
        ) from error
    except OSError as error:
        raise ConfigError(
            f"{error.filename or path} cannot be read ({error.strerror}). Change its permissions, "
            "or copy it again."
        ) from error
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(
            f"{path} is no manifest, or is damaged. Copy it again, or record another one with "
            "--write while the files are known to be good."
        ) from error
    if problems:
        rest = f"\n  and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        listed = "\n  ".join(problems[:SHOWN])
        raise ConfigError(
            f"{folder} differs from its manifest {path}:\n  {listed}{rest}\nCopy the folder again "
            "from its source. If the change is intended, record it with --write."
        )
    return len(files)


def check_checkpoint(spec: str) -> str:
    """A line on the files of a checkpoint, checked against the manifest; "" without a folder.

    Raises:
      ConfigError: a file differs, there is no manifest, or the checkpoint is in a bucket.
    """
    if "://" in spec:
        raise ConfigError(
            f"VERIFY_CHECKPOINT = True: {spec} is not on this machine, so its files cannot be "
            "checked against a manifest. Copy it here, or set VERIFY_CHECKPOINT = False."
        )
    folder = Path(spec).expanduser()
    if not folder.is_dir():
        return ""  # loading it raises a better error
    if not (folder / NAME).exists():
        raise ConfigError(
            f"VERIFY_CHECKPOINT = True: {folder} has no manifest. While the checkpoint is known "
            f"to be good, record one: `t5x verify {folder} --write`."
        )
    return f"backbone: {check(folder)} files of {folder}, all with the SHA-256 that was recorded"


def _describe(folder: Path) -> dict[str, Any]:
    """The size and the SHA-256 of every file, by its path in the folder."""
    files = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent, name)
            if path != folder / NAME and not name.endswith(".tmp") and path.is_file():
                with path.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                size = path.stat().st_size
                files[path.relative_to(folder).as_posix()] = {"bytes": size, "sha256": digest}
    return files
