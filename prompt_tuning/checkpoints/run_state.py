"""The saved states of a run, from which a killed run resumes bit for bit; a wrapper of Orbax.

A state is the trainable parameters, the optimizer's state and the step, and metadata in JSON. Saves
are atomic and run in the background. The last two states are kept, so that a run can resume even if
the newest is damaged. Arrays and metadata are saved with their SHA-256. `training/run.py` saves and
restores through it. No other module imports Orbax.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import flags

from prompt_tuning.config import ConfigError
from prompt_tuning.runtime import agreement, processes
from prompt_tuning.runtime.replace_folder import local_folder
from prompt_tuning.runtime.storage import reason_of

TreeT = TypeVar("TreeT")

NUM_KEPT = 2
SHOWN = 5  # differences shown in an error
OTHER_FAILED = "another process cannot read it"
_logger = logging.getLogger(__name__)


class SaveError(OSError):
    """A state could not be written; the older states are unchanged."""


def saved_steps(directory: Path) -> list[int]:
    """The steps of the complete states, in order; another process may be writing further ones."""
    try:
        names = os.listdir(directory)
    except OSError:
        return []
    return sorted(int(name) for name in names if name.isascii() and name.isdigit())


class RunStateStore:
    """The saved states of one run, `directory/<step>/`; must be closed, or used in a `with`.

    With `read_only` no file is created or removed, so that another process may be writing.
    """

    def __init__(self, directory: str | os.PathLike[str], *, read_only: bool = False) -> None:
        self._directory = local_folder(directory, "the folder of a run's states")
        for name in ("absl", "asyncio"):
            logging.getLogger(name).addFilter(_is_not_from_orbax)  # a filter is added only once
        _allow_unequal_hosts()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None if read_only else NUM_KEPT,
            create=not read_only,
            cleanup_tmp_directories=not read_only,
            read_only=read_only,
        )
        # Without explicit handlers a new process could not read the states of an old one.
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
        """The step of the newest state; None if there is none."""
        return self._manager.latest_step()

    def save(
        self,
        step: int,
        state: Any,
        meta: Mapping[str, Any] | None = None,
        *,
        replace: bool = False,
    ) -> None:
        """Starts saving a pytree of arrays and its JSON metadata; returns once they are copied.

        The caller may then overwrite or donate its  If a state of this step exists it is
        kept, unless `replace`: a step is a function of its inputs, so it is the same state.

        Raises:
          SaveError: this state, or the one before it, cannot be written.
        """
        with self._save_errors():
            if step in self._manager.all_steps():
                if not replace:
                    return
                self._manager.wait_until_finished()
                self._manager.delete(step)
            self._manager.wait_until_finished()
            leaves = drop_empty(named_leaves(state))
            content = add_digest(
                {"step": step, "meta": dict(meta or {}), "arrays": compute_digests(leaves)}
            )
            is_saved = self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(leaves), meta=ocp.args.JsonSave(content)
                ),
            )
        if not is_saved:
            raise ValueError(
                f"step {step} is before the newest state in {self._directory}, "
                f"{self.latest_step()}: states are saved in order."
            )

    @contextlib.contextmanager
    def _save_errors(self) -> Iterator[None]:
        """A block whose errors become a SaveError; removes the files of the failed save."""
        try:
            yield
        except Exception as error:  # OSErrors, TensorStore's ValueErrors, and wrappers of both
            if jax.process_count() > 1 and isinstance(error, jax.errors.JaxRuntimeError):
                raise  # another process has died: not an error of writing
            threading.excepthook = _log_quietly  # the other threads of the failed save fail too
            if processes.is_first():
                for rest in self._directory.glob("*orbax-checkpoint-tmp*"):
                    shutil.rmtree(rest, ignore_errors=True)
            with contextlib.suppress(Exception):
                self._manager.reload()
            code = _os_error(error)
            reason = (_brief(error),) if code is None else (code, os.strerror(code))
            raise SaveError(*reason) from error

    def restore(self, abstract: TreeT) -> tuple[TreeT, dict[str, Any]]:
        """The newest undamaged state, in the structure of `abstract`, and its metadata.

        The leaves of `abstract` are arrays or `jax.ShapeDtypeStruct`s. A leaf with a sharding is
        restored to it, each device reading its shard. NumPy leaves are restored as NumPy  A
        newer state that is damaged is moved aside, with a message, so that `latest_step` is the
        restored step and the later steps can be saved again.

        Raises:
          ConfigError: there is no state, none can be read, or it is of another run: names, shapes
            or dtypes differ.
        """
        self.wait()  # an incomplete state would look damaged
        steps = sorted({*self._manager.all_steps(), *saved_steps(self._directory)}, reverse=True)
        agreement.check("saved states", str(steps))
        failures: dict[int, Exception] = {}
        for step in steps:
            try:
                with agreement.raise_together(OTHER_FAILED):
                    self._check_fits(step, abstract)
                with agreement.raise_together(OTHER_FAILED):
                    restored = self._restore(step, abstract)
            except MemoryError:
                raise
            except Exception as error:  # Orbax has no common type for damaged files
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
        """The metadata of the newest readable state; None if there is none.

        It does not check the arrays; `restore` does.
        """
        self.wait()
        # Not with the manager: it would replace the handler of the
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
            for step in sorted(self._manager.all_steps(), reverse=True):
                try:
                    content = reader.restore(self._directory / str(step) / "meta")
                    check_digest(content, step)
                    return content["meta"]
                except Exception:
                    _logger.debug("the metadata of step %d is damaged", step, exc_info=True)
        return None

    def check(self, step: int) -> list[str]:
        """The names of a state's arrays, after checking them against their checksums.

        Raises:
          ConfigError: it is damaged.
        """
        try:
            # Without the saved shardings, which are those of other devices.
            stored = {
                name: restore_target(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
                for name, leaf in self._stored(step).items()
            }
            self._read(step, stored)
        except MemoryError:
            raise
        except Exception as error:
            raise ConfigError(
                f"the saved state {self._directory}/{step} is damaged: {_brief(error)}. Restore it "
                "from a copy; otherwise the run resumes from the state before it."
            ) from error
        return sorted(stored)

    def _check_fits(self, step: int, abstract: TreeT) -> None:
        """Raises an error if the list of arrays of a state is damaged or of another run."""
        leaves = drop_empty(named_leaves(abstract))
        check_same(self._stored(step), leaves, f"{self._directory}/{step}")

    def _restore(self, step: int, abstract: TreeT) -> tuple[TreeT, dict[str, Any]]:
        named = named_leaves(abstract)
        targets = {n: restore_target(leaf) for n, leaf in drop_empty(named).items()}
        state, meta = self._read(step, targets)
        values = [
            state[name] if name in targets else make_empty(leaf) for name, leaf in named.items()
        ]
        return jax.tree.unflatten(jax.tree.structure(abstract), values), meta

    def _read(self, step: int, leaves: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The arrays and the metadata of a state, checked against their checksums."""
        restored: Any = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(dict(leaves)), meta=ocp.args.JsonRestore()
            ),
        )
        content = restored.meta
        check_digest(content, step)
        expected, actual = content["arrays"], compute_digests(restored.state)
        wrong = [n for n in sorted(expected | actual) if expected.get(n) != actual.get(n)]
        if wrong:
            raise ValueError(f"the SHA-256 differs: {', '.join(wrong[:SHOWN])}")
        return restored.state, content["meta"]

    def _stored(self, step: int) -> dict[str, Any]:
        """The shape and dtype of every array of a saved state, by name."""
        metadata = self._manager.item_metadata(step).state
        if metadata is None or metadata.tree is None:
            raise ValueError("its list of arrays is missing")
        return metadata.tree

    def _move_aside(self, failures: Mapping[int, Exception], restored: int) -> None:
        if failures:
            with agreement.raise_together("the first process cannot move a damaged state"):
                if processes.is_first():
                    self._move(failures, restored)
            self._manager.reload()

    def _move(self, failures: Mapping[int, Exception], restored: int) -> None:
        for step, error in failures.items():
            aside = self._directory / f"damaged_{step}"
            if aside.is_dir():
                shutil.rmtree(aside, ignore_errors=True)
            (self._directory / str(step)).rename(aside)
            reason = f"the saved state of step {step} is damaged ({_brief(error)})"
            print(
                f"{reason}: continuing from step {restored}. It was moved to {aside}.", flush=True
            )

    def wait(self) -> None:
        """Waits until everything is on disk.

        Raises:
          SaveError: it cannot be written.
        """
        with self._save_errors():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the current save and ends the background threads."""
        with self._save_errors():
            self._manager.wait_until_finished()
            self._manager.close()


def _log_quietly(args: threading.ExceptHookArgs) -> None:
    _logger.debug("a thread has failed", exc_info=args.exc_value)


def _allow_unequal_hosts() -> None:
    """If hosts have different numbers of devices, makes Orbax use JAX's distributed barrier.

    Orbax's default barrier is a collective that needs the same number on all hosts.
    """
    hosts = [device.process_index for device in jax.devices()]
    if len({hosts.count(host) for host in hosts}) > 1:
        flags.FLAGS["experimental_orbax_use_distributed_barrier"].parse("true")


def _is_not_from_orbax(record: logging.LogRecord) -> bool:
    """Whether to log a record: not Orbax's tracebacks, whose errors this module reports itself."""
    if record.name == "asyncio":  # reported by `SaveError`
        return "never retrieved" not in record.getMessage()
    return "orbax" not in record.pathname or record.levelno < logging.WARNING


def _brief(error: Exception) -> str:
    return f"{reason_of(error):.300}"


def _os_error(error: Exception) -> int | None:
    """The errno of an error; TensorStore has it at the end of its message."""
    if isinstance(error, OSError) and error.errno:
        return error.errno
    code = re.search(r"os_error_code='(\d+)'", str(error))
    return int(code.group(1)) if code else None


# Arrays by name, and their checksums ------------------------------------------------------------


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves by readable name, such as `opt_state/inner_states/train/0/mu/prompt`.

    A flat dictionary does not depend on how Orbax saves named tuples, empty states and None. The
    caller restores the structure.
    """
    paths = jax.tree_util.tree_leaves_with_path(tree)
    leaves = {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in paths}
    assert len(leaves) == len(paths), "two leaves of the state have the same name"
    return leaves


def drop_empty(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves that have elements; Orbax cannot save the others."""
    return {name: leaf for name, leaf in leaves.items() if 0 not in leaf.shape}


def restore_target(leaf: Any) -> Any:
    """Orbax's argument to restore a leaf; without a sharding it is restored to the first device."""
    if isinstance(leaf, np.ndarray):
        return leaf
    sharding = getattr(leaf, "sharding", None)
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def make_empty(leaf: Any) -> Any:
    """An array of the same shape and dtype as `leaf`, which has no elements."""
    numpy = np if isinstance(leaf, np.ndarray) else jnp
    return numpy.zeros(leaf.shape, leaf.dtype)


def _is_key(leaf: Any) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def compute_digests(leaves: Mapping[str, Any]) -> dict[str, str]:
    """The SHA-256 of every array, by name, except arrays sharded over several processes."""

    def digest(leaf: Any) -> str:
        array = np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf)
        content = hashlib.sha256(f"{array.dtype} {array.shape}\n".encode())
        content.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        return content.hexdigest()

    whole = {n: x for n, x in leaves.items() if _is_whole(x)}
    with concurrent.futures.ThreadPoolExecutor() as pool:  # hashing releases the GIL
        return dict(zip(whole, pool.map(digest, whole.values()), strict=True))


def _is_whole(leaf: Any) -> bool:
    """Whether this process has all elements of an array; replicated arrays are whole."""
    if not isinstance(leaf, jax.Array):
        return True
    return leaf.is_fully_addressable or leaf.is_fully_replicated


def add_digest(content: dict[str, Any]) -> dict[str, Any]:
    """The JSON values with their SHA-256 added."""
    text = json.dumps(content, sort_keys=True)
    return {**content, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def check_digest(content: Mapping[str, Any], step: int) -> None:
    """Raises ValueError if the SHA-256 of the JSON values differs, or their step."""
    rest = {key: value for key, value in content.items() if key != "sha256"}
    if add_digest(rest) != content:
        raise ValueError("the SHA-256 of its metadata differs")
    if content.get("step", step) != step:
        raise ValueError(f"it is the state of step {content['step']}: the folder was renamed")


def check_same(stored: Mapping[str, Any], wanted: Mapping[str, Any], where: str) -> None:
    """Checks names, shapes and dtypes of a saved state; Orbax would silently cast dtypes."""

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
