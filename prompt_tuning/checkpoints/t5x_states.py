"""The saved states of a pre-training run: complete T5X checkpoints, with metadata in `run.json`.

The run resumes bit for bit from the newest checkpoint that can be read. `pretraining/run.py` opens
this store; `training/loop.py` saves and restores through it.

optax stores trees of Adafactor's moments (`v_row/<parameter>`), T5X the moments of each parameter
(`<parameter>/v_row`). The arrays are equal, including placeholders of length 1.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from prompt_tuning.checkpoints import t5x
from prompt_tuning.config import ConfigError
from prompt_tuning.model import sharding

RUN_FILE = "run.json"  # in each checkpoint: the metadata of the run
_KINDS = ("v", "v_row", "v_col")


def find_checkpoints(model_dir: Path, *, file: str = RUN_FILE) -> list[Path]:
    """The checkpoints in MODEL_DIR that have this file, in the order of their steps."""
    steps = {p: p.name.removeprefix("checkpoint_") for p in model_dir.glob("checkpoint_*")}
    folders = [path for path, step in steps.items() if step.isdigit() and (path / file).exists()]
    return sorted(folders, key=lambda path: int(steps[path]))


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

    def restore(self, abstract: Any) -> tuple[Any, dict[str, Any]]:
        """The newest readable state, with the shapes and shardings of `abstract`; its `run.json`.

        Raises:
          ConfigError: no checkpoint can be read.
        """
        failures: dict[Path, ConfigError] = {}
        for folder in reversed(find_checkpoints(self._model_dir)):
            try:
                meta = _read_run_file(folder)
                shapes = {
                    name: jax.ShapeDtypeStruct(value.shape, value.dtype)
                    for name, value in abstract.trainable.items()
                }
                places = {name: value.sharding for name, value in abstract.trainable.items()}
                params, step = t5x.read_t5x(str(folder), shapes, shardings=places)
                count = step - self._start
                opt_state = read_optimizer(str(folder), abstract.opt_state, count=count)
            except ConfigError as error:
                failures[folder] = error
                continue
            for damaged, error in failures.items():
                print(f"{damaged} cannot be read, going back to {folder.name}: {error}", flush=True)
            counted = sharding.put(np.asarray(step, np.int32), abstract.step.sharding)
            return abstract._replace(step=counted, trainable=params, opt_state=opt_state), meta
        raise _refuse(failures)

    def save(
        self,
        step: int,
        state: Any,
        meta: Mapping[str, Any] | None = None,
        *,
        replace: bool = False,
    ) -> None:
        """Writes the checkpoint of a step, and removes all but the newest checkpoints."""
        del replace  # an existing checkpoint is always replaced
        run = {**(meta or {}), "start": self._start}
        t5x.write_t5x(
            str(self._own / f"checkpoint_{step}"),
            state.trainable,
            step,
            slots=get_slots(state.opt_state),
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


def read_optimizer(checkpoint: str, opt_state: Any, *, count: int) -> Any:
    """The optimiser's state with the moments of a checkpoint, after `count` steps of a run."""
    return set_slots(opt_state, t5x.read_slots(checkpoint, get_slots(opt_state)), count=count)


def get_slots(opt_state: Any) -> dict[str, Array]:
    """T5X's `param_states`, from the state of Adafactor as `optim.make_optimizer` makes it."""
    slots: dict[str, Array] = {}
    for path, value in jax.tree_util.tree_leaves_with_path(opt_state):
        if (name := _slot_name(path)) is not None:
            slots[name] = value
            # T5X's slot of the momentum, which T5 does not use.
            slots[name.rpartition("/")[0] + "/m"] = jnp.zeros((1,), jnp.float32)
    return slots


def set_slots(opt_state: Any, slots: Mapping[str, Array], *, count: int) -> Any:
    """The optimiser's state with these moments, after `count` steps of a run."""

    def replace(path: tuple[Any, ...], value: Array) -> Array:
        if (name := _slot_name(path)) is not None:
            return slots[name]
        if getattr(path[-1], "name", None) == "count":
            return sharding.put(np.full(value.shape, count, value.dtype), value.sharding)
        return value

    return jax.tree_util.tree_map_with_path(replace, opt_state)


def _slot_name(path: tuple[Any, ...]) -> str | None:
    """`<parameter>/<kind>` for a moment, else None; a moment's last key is the parameter's name."""
    *_, owner, last = (None, *path)
    kind = getattr(owner, "name", None)
    return f"{last.key}/{kind}" if last is not None and kind in _KINDS else None
