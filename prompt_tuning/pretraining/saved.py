"""The saved states of a pre-training run: complete T5X checkpoints, with metadata in `run.json`.

The run resumes bit for bit from the newest checkpoint that can be read. `run.py` opens this store;
`training/loop.py` saves and restores through it.
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

RUN_FILE = "run.json"  # in each checkpoint: the metadata of the run


def find_checkpoints(model_dir: Path) -> list[Path]:
    """The checkpoints that pre-training runs wrote, in the order of their steps."""
    folders = [path.parent for path in model_dir.glob(f"checkpoint_*/{RUN_FILE}")]
    steps_of = {folder: folder.name.removeprefix("checkpoint_") for folder in folders}
    return sorted((f for f in folders if steps_of[f].isdigit()), key=lambda f: int(steps_of[f]))


class CheckpointStore:
    """Saves and restores the states of one run, as checkpoints in its MODEL_DIR."""

    def __init__(self, model_dir: Path, own: Path, *, start: int, keep: int | None) -> None:
        """`start` is the first step of the run; all but the newest `keep` checkpoints are removed.

        `own` is the folder that this process writes to: MODEL_DIR in the first process, a temporary
        folder in the others.
        """
        self._model_dir, self._own = model_dir, own
        self._start, self._keep = start, keep

    def latest_step(self) -> int | None:
        """The step of the newest checkpoint; None if there is none."""
        folders = find_checkpoints(self._model_dir)
        return int(folders[-1].name.removeprefix("checkpoint_")) if folders else None

    def read_meta(self) -> dict[str, Any] | None:
        """The newest readable `run.json`; None if there is no checkpoint.

        Raises:
          ConfigError: there are checkpoints, but none can be read.
        """
        failures = {}
        for folder in reversed(find_checkpoints(self._model_dir)):
            try:
                return _read_run_file(folder)
            except ConfigError as error:
                failures[folder] = error
        if failures:
            raise _refuse(failures)
        return None

    def restore(self, abstract: steps.TrainState) -> tuple[steps.TrainState, dict[str, Any]]:
        """The newest readable state, with the shapes and shardings of `abstract`; its `run.json`.

        Raises:
          ConfigError: no checkpoint can be read.
        """
        state, failures = abstract, dict[Path, ConfigError]()
        for folder in reversed(find_checkpoints(self._model_dir)):
            try:
                meta = _read_run_file(folder)
                shapes = {
                    name: jax.ShapeDtypeStruct(value.shape, value.dtype)
                    for name, value in state.trainable.items()
                }
                places = {name: value.sharding for name, value in state.trainable.items()}
                params, step = t5x_checkpoint.read_t5x(str(folder), shapes, shardings=places)
                moments = t5x_checkpoint.read_slots(str(folder), slots.get_slots(state.opt_state))
            except ConfigError as error:
                failures[folder] = error
                continue
            for damaged, error in failures.items():
                print(f"{damaged} cannot be read, going back to {folder.name}: {error}", flush=True)
            opt_state = slots.set_slots(state.opt_state, moments, count=step - self._start)
            counted = sharding.put(np.asarray(step, np.int32), state.step.sharding)
            return steps.TrainState(counted, params, opt_state), meta
        raise _refuse(failures)

    def save(
        self,
        step: int,
        state: steps.TrainState,
        meta: Mapping[str, Any] | None = None,
        *,
        replace: bool = False,
    ) -> None:
        """Writes the checkpoint of a step, and removes all but the newest checkpoints."""
        del replace  # an existing checkpoint is always replaced
        run = {**(meta or {}), "start": self._start}
        t5x_checkpoint.write_t5x(
            str(self._own / f"checkpoint_{step}"),
            state.trainable,
            step,
            slots=slots.get_slots(state.opt_state),
            files={RUN_FILE: json.dumps(run, indent=1, sort_keys=True) + "\n"},
        )
        for folder in find_checkpoints(self._own)[: -self._keep if self._keep else 0]:
            shutil.rmtree(folder)

    def wait(self) -> None:
        """Returns at once: `save` is synchronous."""

    def close(self) -> None:
        """Returns at once."""


def _read_run_file(folder: Path) -> dict[str, Any]:
    try:
        meta = json.loads((folder / RUN_FILE).read_bytes())
        if isinstance(meta["experiment"], dict):
            return meta
        raise ValueError("it has no experiment")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"its {RUN_FILE} is damaged ({error})") from error


def _refuse(failures: Mapping[Path, ConfigError]) -> ConfigError:
    reasons = "".join(f"\n  {folder}: {error}" for folder, error in failures.items())
    return ConfigError(
        f"no checkpoint of the run can be read:{reasons}\nRestore one of the folders from a copy, "
        "or remove them all, or choose another MODEL_DIR, to start from the beginning."
    )


def describe_saved(model_dir: Path, *, resumable: bool = True) -> str:
    """A sentence on the newest checkpoint, and, if `resumable`, on how to continue."""
    checkpoints = find_checkpoints(model_dir)
    if not checkpoints:
        return "Nothing is saved yet."
    suffix = ", and the same command continues from there" if resumable else ""
    return f"{checkpoints[-1]} is saved{suffix}."
