"""`t5x verify`: checks prompts, run states and checkpoints for damage.

Prompts and run states contain checksums. Checkpoints are read completely, which detects missing and
truncated files; a manifest, if there is one, detects every change.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

from prompt_tuning.commands.command import Command
from prompt_tuning.config import ConfigError

STATES = "checkpoints"  # in a MODEL_DIR

Check = tuple[str, Callable[[], str]]  # what is checked; a function that returns the result


def verify(path: str, *, write: bool = False) -> tuple[list[str], list[str]]:
    """A sentence for each check at `path` that passed, and for each that failed.

    With `write` a manifest is recorded if nothing is damaged.

    Raises:
      ConfigError: the path does not exist, or has no checksums.
    """
    from prompt_tuning.checkpoints import manifest

    if "://" in path:
        raise ConfigError(
            f"expected a local path, found {path}. Copy it first, with its manifest if it has one."
        )
    place = Path(path).expanduser()
    if not place.exists():
        raise ConfigError(f"{place} does not exist. Check the path.")
    if write and not place.is_dir():
        raise ConfigError(f"--write: {place} is a file. Give a folder.")
    checks = list(_checks(place))
    if not write and (not checks or (place / manifest.NAME).exists()):
        checks.append(_by_manifest(place))
    good, bad = [], []
    for what, check in checks:
        try:
            good.append(f"{what}: {check()}")
        except ConfigError as error:
            bad.append(str(error))
    if write and not bad:
        good.append(f"{place}: recorded {manifest.record(place)}")
    return good, bad


def _checks(place: Path) -> Iterator[Check]:
    """The checks that need no manifest of the folder itself."""
    from prompt_tuning.checkpoints.t5x_states import find_checkpoints
    from prompt_tuning.prompts import prompt_file

    def has(*names: str) -> bool:
        return any((place / name).exists() for name in names)

    parent, name = place.absolute().parent, place.absolute().name
    if has(STATES, "prompts") or find_checkpoints(place, file=""):
        yield from _check_model_dir(place)
    elif name == STATES:
        yield from _check_states(place)
    elif parent.name == STATES and name.isdigit():
        yield f"state {place}", lambda: _read_state(parent, int(name))
    elif has("checkpoint", "_METADATA", "state/checkpoint", "state/_METADATA"):
        yield f"checkpoint {place}", lambda: _read_checkpoint(place)
    elif has(prompt_file.METADATA, "adapter_config.json") or place.suffix == ".npy":
        yield f"prompt {place}", lambda: _read_prompt(place)


def _check_model_dir(place: Path) -> Iterator[Check]:
    from prompt_tuning.checkpoints import manifest, t5x_states
    from prompt_tuning.prompts import prompt_file

    if (place / STATES).exists():
        yield from _check_states(place / STATES)
    for path in sorted((place / "prompts").glob("[!.]*")):
        for folder in prompt_file.list_prompts(path):
            yield f"prompt {folder}", lambda folder=folder: _read_prompt(folder)
    for folder in t5x_states.find_checkpoints(place, file=""):
        yield f"checkpoint {folder}", lambda folder=folder: _read_checkpoint(folder)
        if (folder / manifest.NAME).exists():
            yield _by_manifest(folder)


def _check_states(directory: Path) -> Iterator[Check]:
    from prompt_tuning.checkpoints import run_state

    steps = run_state.saved_steps(directory)
    if not steps:
        raise ConfigError(f"there is no saved state in {directory}.")
    for step in steps:
        yield f"state {directory}/{step}", lambda step=step: _read_state(directory, step)


def _by_manifest(place: Path) -> Check:
    from prompt_tuning.checkpoints import manifest

    what = f"{place}, by its manifest"
    return what, lambda: f"{manifest.check(place)} files, all with the SHA-256 that was recorded"


def _read_state(directory: Path, step: int) -> str:
    from prompt_tuning.checkpoints import run_state

    with run_state.RunStateStore(directory, read_only=True) as store:
        return f"{len(store.check(step))} arrays, all with the SHA-256 they were saved with"


def _read_prompt(place: Path) -> str:
    from prompt_tuning.prompts import prompt_file

    stored = prompt_file.read_prompt(place)
    shape, metadata = prompt_file.describe_shape(stored.prompt), stored.metadata
    if metadata is None:
        return f"{shape}, can be read; it has no checksum"
    return f"{shape}, with the SHA-256 it was written with"


def _read_checkpoint(place: Path) -> str:
    """A sentence on a checkpoint, of which it reads every parameter.

    Raises:
      ConfigError: a parameter is missing, truncated or not finite, or the model is not a T5.
    """
    import numpy as np

    from prompt_tuning.checkpoints import manifest, t5x
    from prompt_tuning.checkpoints.architecture import infer_model
    from prompt_tuning.model import t5

    shapes = t5x.read_shapes(place)
    backbone = {name: shape for name, shape in shapes.items() if "prompt" not in name}
    needed = t5.param_shapes(infer_model(backbone, None, f"the checkpoint {place}"))
    t5x.check_tree(
        str(place),
        {name: (shape, np.dtype("float32")) for name, shape in backbone.items()},
        {name: tuple(shape.shape) for name, shape in needed.items()},
    )
    for name in shapes:
        array = t5x.read_param(place, name, check=True)
        if array.dtype.kind not in "fV":  # bfloat16 is a V
            raise ConfigError(
                f"{name} of the checkpoint {place} is {array.dtype}. Expected floating-point "
                "numbers: the checkpoint is damaged, or no model. Copy it again."
            )
        if not np.isfinite(array.astype(np.float32)).all():
            raise ConfigError(
                f"{name} of the checkpoint {place} has values that are not finite: its training "
                "diverged, or it is damaged. Choose another checkpoint."
            )
    has_manifest = (place / manifest.NAME).exists()
    more = "" if has_manifest else "; flipped bits are detected only by a manifest (--write)"
    return f"{len(shapes)} arrays, step {t5x.read_step(place)}, all can be read{more}"


def _add_flags(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "path", metavar="PATH", help="a MODEL_DIR, a prompt, a checkpoint, or any folder"
    )
    command.add_argument(
        "--write", action="store_true", help="record the checksums of what is there in a manifest"
    )


def _verify(args: argparse.Namespace, rest: list[str]) -> int:
    good, bad = verify(args.path, write=args.write)
    for line in good:
        print(line)
    if bad:
        listed = "\n".join(bad)
        raise ConfigError(f"{len(bad)} of {len(good) + len(bad)} checks failed.\n{listed}")
    return 0


COMMANDS = {
    "verify": Command(
        "check prompts, run states and checkpoints against their checksums", _add_flags, _verify
    ),
}
