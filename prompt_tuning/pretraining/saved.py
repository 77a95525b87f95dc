"""What a pre-training run saves: T5X checkpoints with the optimiser, and with `run.json` beside.

Each is whole, so the run goes on from its newest one that can be read, bit for bit, and so does
upstream T5X.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from prompt_tuning.checkpoints import slots
from prompt_tuning.checkpoints import t5x as t5x_checkpoint
from prompt_tuning.config import ConfigError
from prompt_tuning.model import sharding
from prompt_tuning.training import step as steps

RUN_FILE = "run.json"  # in each checkpoint: what the run is, and how it stands


def find_checkpoints(model_dir: Path) -> list[Path]:
    """The checkpoints that runs of this kind have written, in the order of their steps."""
    folders = [path.parent for path in model_dir.glob(f"checkpoint_*/{RUN_FILE}")]
    steps_of = {folder: folder.name.removeprefix("checkpoint_") for folder in folders}
    return sorted((f for f in folders if steps_of[f].isdigit()), key=lambda f: int(steps_of[f]))


def read_meta(folders: list[Path]) -> dict[str, Any] | None:
    """The newest `run.json` that can be read; None where there is no checkpoint at all.

    Raises:
      ConfigError: none can be read.
    """
    failures = {}
    for folder in reversed(folders):
        try:
            return _read_run_file(folder)
        except ConfigError as error:
            failures[folder] = error
    if failures:
        raise _refuse(failures)
    return None


def _read_run_file(folder: Path) -> dict[str, Any]:
    try:
        meta = json.loads((folder / RUN_FILE).read_bytes())
        if isinstance(meta["experiment"], dict):
            return meta
        raise ValueError("it holds no experiment")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"its {RUN_FILE} is damaged ({error})") from error


def restore(folders: list[Path], state: steps.TrainState, start: int) -> steps.TrainState:
    """The newest state that can be read, in the place of `state`.

    Raises:
      ConfigError: none can be read.
    """
    failures: dict[Path, ConfigError] = {}
    for folder in reversed(folders):
        try:
            _read_run_file(folder)
            shapes = {
                name: jax.ShapeDtypeStruct(value.shape, value.dtype)
                for name, value in state.trainable.items()
            }
            places = {name: value.sharding for name, value in state.trainable.items()}
            params, step = t5x_checkpoint.read_t5x(str(folder), shapes, shardings=places)
            found = t5x_checkpoint.read_slots(str(folder), slots.get_slots(state.opt_state))
        except ConfigError as error:
            failures[folder] = error
            continue
        for damaged, error in failures.items():
            print(f"{damaged} cannot be read, going back to {folder.name}: {error}", flush=True)
        opt_state = slots.set_slots(state.opt_state, found, count=step - start)
        counted = sharding.put(np.asarray(step, np.int32), state.step.sharding)
        return steps.TrainState(counted, params, opt_state)
    raise _refuse(failures)


def _refuse(failures: Mapping[Path, ConfigError]) -> ConfigError:
    reasons = "".join(f"\n  {folder}: {error}" for folder, error in failures.items())
    return ConfigError(
        f"no checkpoint of the run can be read:{reasons}\nRestore one of the folders from a copy, "
        "or remove them all, or choose another MODEL_DIR, to start from the beginning."
    )


def save(
    model_dir: Path, state: steps.TrainState, meta: Mapping[str, Any], keep: int | None
) -> None:
    """Writes the checkpoint of this step, and removes all but the newest `keep`."""
    step = int(state.step)
    t5x_checkpoint.write_t5x(
        str(model_dir / f"checkpoint_{step}"),
        state.trainable,
        step,
        slots=slots.get_slots(state.opt_state),
        files={RUN_FILE: json.dumps(meta, indent=1, sort_keys=True) + "\n"},
    )
    for folder in find_checkpoints(model_dir)[: -keep if keep else 0]:
        shutil.rmtree(folder)


def describe_saved(model_dir: Path, *, go_on: bool = True) -> str:
    """What a run leaves that has to end, as a sentence; without `go_on` it cannot."""
    found = find_checkpoints(model_dir)
    if not found:
        return "Nothing is saved yet."
    return f"{found[-1]} is saved{', and the same command continues from there' * go_on}."
