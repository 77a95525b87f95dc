"""The state of a run, saved so that a killed run continues bit for bit. Only this file knows Orbax.

`training/loop.py` saves what it trains, the optimizer's state and the step here; when only a prompt
is trained that is a few hundred kilobytes. A save happens in the background and appears whole or
not at all; the last two are kept, so that a damaged one costs one period and not the run.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from prompt_tuning.checkpoint.replace_folder import local_folder
from prompt_tuning.config import ConfigError

TreeT = TypeVar("TreeT")

KEPT = 2
DIGEST_BYTES = 2**22  # of a leaf: a prompt is smaller; a whole model would take too long to hash
SHOWN = 5  # differences, in an error
_logger = logging.getLogger(__name__)


class RunStateStore:
    """The saved states of one run, `directory/<step>/`; has to be closed, or used in a `with`."""

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self._directory = local_folder(directory, "the place of a run's state")
        options = ocp.CheckpointManagerOptions(
            max_to_keep=KEPT, create=True, cleanup_tmp_directories=True
        )
        # Handlers are named: without them a new process could not read what an old one has saved.
        self._manager = ocp.CheckpointManager(
            self._directory,
            options=options,
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "meta": ocp.JsonCheckpointHandler(),
            },
        )

    def __enter__(self) -> RunStateStore:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def latest_step(self) -> int | None:
        """The step of the newest state, None if there is no state."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, meta: Mapping[str, Any] | None = None) -> None:
        """Starts saving a pytree of arrays, and JSON values with it; returns once it is copied.

        The caller may overwrite or donate its arrays at once. A step that is there already is left
        as it is: by construction it is the same.
        """
        if step in self._manager.all_steps():
            return
        leaves = _nonempty(_named_leaves(state))
        content = {"meta": dict(meta or {}), "sha256": _digest(leaves, meta or {})}
        saved = self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(leaves), meta=ocp.args.JsonSave(content)
            ),
        )
        if not saved:
            raise ValueError(
                f"step {step} lies before the newest state in {self._directory}, "
                f"{self.latest_step()}: states are saved in order."
            )

    def restore(self, abstract: TreeT) -> tuple[TreeT, dict[str, Any]]:
        """The newest undamaged state, in the structure of `abstract`, and what was saved with it.

        `abstract` holds arrays or `jax.ShapeDtypeStruct`s; a leaf that has a sharding is restored
        to it, each device reading its part. NumPy leaves come back as NumPy. If a newer state is
        damaged a warning says so and it is moved aside, so that `latest_step` is the restored step
        and training can save over it again.

        Raises:
          ConfigError: there is no state; none can be read; or it is the state of another run:
            names, shapes or dtypes differ.
        """
        self.wait()  # a state that is still being written would look damaged
        steps = sorted(self._manager.all_steps(), reverse=True)
        failures: dict[int, Exception] = {}
        for step in steps:
            try:
                restored = self._restore(step, abstract)
            except MemoryError:
                raise
            except Exception as error:  # Orbax has no type of its own for a damaged file
                failures[step] = error
                continue
            self._move_aside(failures, step)
            return restored
        if not steps:
            raise ConfigError(f"there is no saved state in {self._directory}.")
        for error in failures.values():
            if isinstance(error, ConfigError):
                raise error
        reasons = "; ".join(f"step {step}: {_brief(e)}" for step, e in failures.items())
        raise ConfigError(
            f"no saved state in {self._directory} can be read ({reasons}). Restore the folder from "
            "a copy, or delete it to start the run from the beginning."
        )

    def read_meta(self) -> dict[str, Any] | None:
        """What was saved with the newest readable state; None without one.

        For a look before anything is loaded: `restore` is what checks the state and repairs.
        """
        self.wait()
        # Not through the manager: it would forget how to read the arrays.
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
            for step in sorted(self._manager.all_steps(), reverse=True):
                try:
                    return reader.restore(self._directory / str(step) / "meta")["meta"]
                except Exception:
                    _logger.debug("the JSON values of step %d are damaged", step, exc_info=True)
        return None

    def _restore(self, step: int, abstract: TreeT) -> tuple[TreeT, dict[str, Any]]:
        named = _named_leaves(abstract)
        leaves = {name: _target(leaf) for name, leaf in _nonempty(named).items()}
        _check_same(self._stored(step), leaves, f"{self._directory}/{step}")
        restored: Any = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(leaves), meta=ocp.args.JsonRestore()
            ),
        )
        meta = restored.meta["meta"]
        if restored.meta["sha256"] != _digest(restored.state, meta):
            raise ValueError("its SHA-256 is not the one it was saved with")
        values = [
            restored.state[name] if name in leaves else _empty(leaf) for name, leaf in named.items()
        ]
        return jax.tree.unflatten(jax.tree.structure(abstract), values), meta

    def _stored(self, step: int) -> dict[str, Any]:
        """Shape and dtype of every leaf of a saved state."""
        metadata = self._manager.item_metadata(step).state
        if metadata is None or metadata.tree is None:
            raise ValueError("its list of arrays is missing")
        return metadata.tree

    def _move_aside(self, failures: Mapping[int, Exception], restored: int) -> None:
        for step, error in failures.items():
            aside = self._directory / f"damaged_{step}"
            shutil.rmtree(aside, ignore_errors=True)
            (self._directory / str(step)).rename(aside)
            _logger.warning(
                "the saved state of step %d is damaged (%s): continuing from step %d. It was moved "
                "to %s.",
                step,
                _brief(error),
                restored,
                aside,
            )
        if failures:
            self._manager.reload()

    def wait(self) -> None:
        """Returns when everything is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for what is being saved and ends the background threads."""
        self._manager.close()


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {error!s:.200}"


def _named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves under readable names: `opt_state/inner_states/train/0/mu/prompt`.

    Saving a flat dictionary keeps us independent of how Orbax treats named tuples, empty states
    and None; the structure is the caller's to give back.
    """
    paths = jax.tree_util.tree_leaves_with_path(tree)
    leaves = {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in paths}
    assert len(leaves) == len(paths), "two leaves of the state have the same name"
    return leaves


def _nonempty(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """What is saved: Orbax refuses arrays without elements."""
    return {name: leaf for name, leaf in leaves.items() if 0 not in leaf.shape}


def _target(leaf: Any) -> Any:
    """What Orbax needs to restore a leaf; one without a sharding goes to the first device."""
    if isinstance(leaf, np.ndarray):
        return leaf
    sharding = getattr(leaf, "sharding", None)
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _empty(leaf: Any) -> Any:
    numpy = np if isinstance(leaf, np.ndarray) else jnp
    return numpy.zeros(leaf.shape, leaf.dtype)


def _is_key(leaf: Any) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _digest(leaves: Mapping[str, Any], meta: Mapping[str, Any]) -> str:
    """The SHA-256 of what is saved: Orbax's arrays carry no checksum."""
    digest = hashlib.sha256(json.dumps(meta, sort_keys=True).encode())
    for name, leaf in sorted(leaves.items()):
        array = jax.random.key_data(leaf) if _is_key(leaf) else leaf
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        if getattr(array, "is_fully_addressable", True) and array.nbytes <= DIGEST_BYTES:
            digest.update(np.asarray(array).tobytes())
    return digest.hexdigest()


def _check_same(stored: Mapping[str, Any], wanted: Mapping[str, Any], where: str) -> None:
    """Refuses the state of another run; Orbax would cast another dtype silently."""

    def describe(leaf: Any) -> str:
        return f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"

    problems = [f"{name} is missing" for name in sorted(set(wanted) - set(stored))]
    problems += [f"{name} is unknown" for name in sorted(set(stored) - set(wanted))]
    problems += [
        f"{name} is {describe(stored[name])}, this run has {describe(leaf)}"
        for name, leaf in sorted(wanted.items())
        if name in stored and not _is_key(leaf) and describe(stored[name]) != describe(leaf)
    ]
    if problems:
        rest = f" and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise ConfigError(
            f"the state in {where} was saved by another run: {'; '.join(problems[:SHOWN])}{rest}. "
            "Use the settings it was started with, or another MODEL_DIR."
        )
