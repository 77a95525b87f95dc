"""The records of a run, kept a second time: in its saved state, which has checksums.

`training/report.py` writes `metrics.jsonl` and its like, which anybody may read, edit or damage. A
run that continues holds them against what its state says of them, and makes anew what differs.
"""

from __future__ import annotations

import base64
import contextlib
import json
import re
import zlib
from collections.abc import Mapping
from pathlib import Path

from prompt_tuning.runtime.replace_folder import replace_text

KEY = "records"  # in the JSON values of a state
MOST_BYTES = 2**30  # that are unpacked of a state
DAMAGED = ".damaged"  # is appended to the name of what was there
_NAME = re.compile(r"metrics\.jsonl|inference_eval/[^/\0]+-(metrics|analysis)\.jsonl")


def pack(texts: Mapping[str, str]) -> str:
    r"""Files, by their paths in MODEL_DIR, as one JSON string.

    >>> unpack(pack({"metrics.jsonl": "{}\n"}))
    {'metrics.jsonl': '{}\n'}
    """
    return base64.b64encode(
        zlib.compress(json.dumps(dict(texts), sort_keys=True).encode())
    ).decode()


def unpack(packed: str) -> dict[str, str]:
    """The files; none but records, so that nothing else can be overwritten."""
    content = zlib.decompressobj().decompress(base64.b64decode(packed), MOST_BYTES)
    return {name: text for name, text in json.loads(content).items() if _NAME.fullmatch(name)}


def describe_damage(path: Path, text: str) -> str | None:
    """How a file differs from `text`, with which it has to begin; None if it does."""
    try:
        found = path.read_bytes()
    except FileNotFoundError:
        return f"{path} is missing" if text else None
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"
    wanted = text.encode()
    if found.startswith(wanted):
        return None
    if wanted.startswith(found):
        return f"{path} has {len(found)} bytes, and had {len(wanted)}"
    lines = zip(found.split(b"\n"), wanted.split(b"\n"), strict=False)
    number = next((n for n, (one, other) in enumerate(lines, start=1) if one != other), 1)
    return f"line {number} of {path} is not what was written"


def restore(folder: Path, texts: Mapping[str, str], step: int) -> list[str]:
    """Makes every file what the state of `step` says of it; returns what was damaged, in words.

    What a killed run had written after its last state is dropped: it will be written again.
    """
    said = []
    for name, text in texts.items():
        path = folder / name
        if damage := describe_damage(path, text):
            kept = _keep_damaged(path)
            said.append(f"{damage}: it was made anew from the saved state of step {step}{kept}")
        elif cut := _count_unreadable(path, len(text.encode())):
            said.append(
                f"{path} ended in {cut} bytes that cannot be read, after the saved state of step "
                f"{step}: they were cut off"
            )
        elif path.exists() and path.stat().st_size == len(text.encode()):
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, text)
    return said


def _keep_damaged(path: Path) -> str:
    other = path.with_name(path.name + DAMAGED)
    with contextlib.suppress(OSError):
        path.replace(other)
        return f"; what was there is {other.name}"
    return ""


def _count_unreadable(path: Path, start: int) -> int:
    """The bytes from the first line on, behind `start`, that is no JSON."""
    tail = path.read_bytes()[start:] if path.exists() else b""
    place = 0
    for line in tail.splitlines(keepends=True):
        try:
            json.loads(line)
        except (ValueError, RecursionError):
            return len(tail) - place
        place += len(line)
    return 0
