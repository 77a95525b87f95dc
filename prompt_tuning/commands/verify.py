"""`t5x verify`: is what lies at a path what was written there?

Prompts and run states carry checksums of their own. Other files are held against a manifest, and
checkpoints are read from end to end as well, which finds what is truncated or missing.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from prompt_tuning.checkpoints import manifest, run_state, t5x
from prompt_tuning.checkpoints.architecture import infer_model
from prompt_tuning.config import ConfigError
from prompt_tuning.model import t5
from prompt_tuning.prompts import prompt_file

STATES = "checkpoints"  # of a MODEL_DIR
RUN_FILE = "run.json"  # in a checkpoint that pre-training has written

Check = tuple[str, Callable[[], str]]  # of what, and what says how it was found to be good


def verify(path: str, *, write: bool = False) -> tuple[list[str], list[str]]:
    """Checks all that is known at `path`: what is good, and what is not, each as a sentence.

    With `write` a manifest is recorded once everything else is good.

    Raises:
      ConfigError: there is nothing at the path, or nothing to check it by.
    """
    if "://" in path:
        raise ConfigError(
            f"expected a local path, found {path}. Copy it here first; a manifest that was "
            "recorded at its source is copied along."
        )
    place = Path(path).expanduser()
    if not place.exists():
        raise ConfigError(f"there is nothing at {place}. Check the path.")
    checks = list(_find_checks(place))
    if not write and os.path.lexists(manifest.path_of(place)):
        checks.append((f"{place}, by its manifest", lambda: _by_manifest(place)))
    if not checks and not write:
        manifest.check(place)  # says that there is none
    good, bad = [], []
    for what, check in checks:
        try:
            good.append(f"{what}: {check()}")
        except ConfigError as error:
            bad.append(str(error))
    if write and not bad:
        arrays = digest_arrays(place) if _is_checkpoint(place) else {}
        good.append(f"{place}: recorded {manifest.record(place, arrays)}")
    return good, bad


def _find_checks(place: Path) -> Iterator[Check]:
    """What there is to check without a manifest."""
    if (place / STATES).is_dir() or (place / "prompts").is_dir() or _checkpoints(place):
        yield from _in_model_dir(place)
    elif place.name == STATES and place.is_dir():
        yield from _states(place)
    elif _is_state(place):
        yield _state(place.parent, int(place.name))
    elif _is_checkpoint(place):
        yield f"checkpoint {place}", lambda: _read_through(place)
    elif _is_prompt(place):
        yield f"prompt {place}", lambda: _read_prompt(place)


def _in_model_dir(place: Path) -> Iterator[Check]:
    if (place / STATES).is_dir():
        yield from _states(place / STATES)
    for folder in sorted((place / "prompts").glob("[!.]*")):
        yield f"prompt {folder}", lambda folder=folder: _read_prompt(folder)
    for folder in _checkpoints(place):
        yield f"checkpoint {folder}", lambda folder=folder: _read_through(folder)
        if os.path.lexists(manifest.path_of(folder)):
            yield f"{folder}, by its manifest", lambda folder=folder: _by_manifest(folder)


def _checkpoints(place: Path) -> list[Path]:
    """Those of a MODEL_DIR, in the order of their steps."""
    found = {p: p.name.removeprefix("checkpoint_") for p in place.glob("checkpoint_*")}
    return sorted((p for p, step in found.items() if step.isdigit()), key=lambda p: int(found[p]))


def _read_run_file(folder: Path) -> str:
    """What a pre-training keeps in a checkpoint."""
    try:
        step = json.loads((folder / RUN_FILE).read_bytes())["start"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{folder / RUN_FILE} is damaged ({error}): delete {folder} to go on from the "
            "checkpoint before."
        ) from error
    return f"of a run that began at step {step}"


def _states(directory: Path) -> Iterator[Check]:
    steps = run_state.saved_steps(directory)
    if not steps:
        raise ConfigError(f"there is no saved state in {directory}.")
    for step in steps:
        yield _state(directory, step)


def _state(directory: Path, step: int) -> Check:
    def check() -> str:
        with run_state.RunStateStore(directory, read_only=True) as store:
            return f"{len(store.check(step))} arrays, all with the SHA-256 they were saved with"

    return f"state {directory}/{step}", check


def _is_state(place: Path) -> bool:
    return place.name.isdigit() and place.parent.name == STATES


def _is_checkpoint(place: Path) -> bool:
    if _is_state(place.absolute()):  # Orbax's files as well
        return False
    names = ("checkpoint", "_METADATA", "state/checkpoint", "state/_METADATA")
    return any((place / name).is_file() for name in names)


def _is_prompt(place: Path) -> bool:
    if place.is_file():
        return place.suffix == ".npy"
    return (place / prompt_file.METADATA).exists() or (place / "adapter_config.json").exists()


def _read_prompt(place: Path) -> str:
    prompt, metadata = prompt_file.load_prompt(place)
    shape = f"{prompt.shape[0]} x {prompt.shape[1]}"
    if metadata is None:
        return f"{shape}, can be read; it has no checksum of its own"
    return f"{shape}, with the SHA-256 it was written with"


def _read_through(place: Path) -> str:
    count = len(digest_arrays(place))
    _check_model(place)
    has = os.path.lexists(manifest.path_of(place))
    more = "" if has else "; bits that flipped show against a manifest only (--write)"
    return f"{count} arrays, step {t5x.read_step(place)}, all can be read{more}"


def _check_model(place: Path) -> None:
    """Returns if the parameters are all of a T5's, and no others but a prompt's.

    Raises:
      ConfigError: names those that are missing, unknown or of another shape.
    """
    found = {name: shape for name, shape in t5x.read_shapes(place).items() if "prompt" not in name}
    needed = t5.param_shapes(infer_model(found, None, f"the checkpoint {place}"))
    t5x.check_tree(
        str(place),
        {name: (shape, np.dtype("float32")) for name, shape in found.items()},
        {name: tuple(shape.shape) for name, shape in needed.items()},
    )


def digest_arrays(place: Path) -> dict[str, str]:
    """The SHA-256 of every parameter of a checkpoint, by name.

    Raises:
      ConfigError: one is missing, truncated or not finite.
    """
    digests = {}
    for name in t5x.read_shapes(place, contents=True):
        array = t5x.read_param(place, name)
        if array.dtype.kind not in "fV":  # bfloat16 is a V
            raise ConfigError(
                f"{name} of the checkpoint {place} holds {array.dtype}, expected floating-point "
                "numbers: it is damaged, or no model. Copy it again."
            )
        if not np.isfinite(array.astype(np.float32)).all():
            raise ConfigError(
                f"{name} of the checkpoint {place} holds values that are not finite: its training "
                "diverged, or it is damaged. Take another one."
            )
        head = f"{array.dtype} {array.shape}\n".encode()
        digests[name] = hashlib.sha256(head + array.tobytes()).hexdigest()
    return digests


def _by_manifest(place: Path) -> str:
    arrays = digest_arrays(place) if _is_checkpoint(place) else {}
    return f"{manifest.check(place, arrays)} files, all with the SHA-256 that was recorded"
