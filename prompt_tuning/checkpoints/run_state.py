"""The state of a run, saved so that a killed run continues bit for bit. Only this file knows Orbax.

`training/loop.py` saves what it trains, the optimizer's state and the step here; when only a prompt
is trained that is a few hundred kilobytes. A save happens in the background and appears whole or
not at all; the last two are kept, so that a damaged one costs one period and not the run. Every
array is saved with its SHA-256, and so are the JSON values with the list of them.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import shutil
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
from absl import flags

from prompt_tuning.checkpoints import state_arrays as arrays
from prompt_tuning.config import ConfigError
from prompt_tuning.runtime import agreement, processes
from prompt_tuning.runtime.replace_folder import local_folder
from prompt_tuning.runtime.storage import reason_of

TreeT = TypeVar("TreeT")

KEPT = 2
OTHERS = "another process cannot read it"
# A network file system that comes back, a disk on which others make room.
MAY_PASS = frozenset(
    {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOENT, errno.ENOTCONN, errno.EAGAIN}
    | {errno.ENOSPC, errno.EDQUOT}
)
_logger = logging.getLogger(__name__)


class SaveError(Exception):
    """A state could not be written; the states saved before are as they were.

    `may_pass`: the reason is one of a network file system that may come back.
    """

    def __init__(self, reason: str, *, may_pass: bool = False) -> None:
        self.may_pass = may_pass
        super().__init__(reason)


def saved_steps(directory: Path) -> list[int]:
    """The steps whose states are complete, in order, whoever is writing more of them."""
    try:
        names = os.listdir(directory)
    except OSError:
        return []
    return sorted(int(name) for name in names if name.isascii() and name.isdigit())


class RunStateStore:
    """The saved states of one run, `directory/<step>/`; has to be closed, or used in a `with`.

    With `read_only` nothing is created or tidied up, so that another process may be writing.
    """

    def __init__(self, directory: str | os.PathLike[str], *, read_only: bool = False) -> None:
        self._directory = local_folder(directory, "the place of a run's state")
        for name in ("absl", "asyncio"):
            logging.getLogger(name).addFilter(_is_not_orbaxs)  # a filter is only added once
        _let_hosts_differ()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=None if read_only else KEPT,
            create=not read_only,
            cleanup_tmp_directories=not read_only,
            read_only=read_only,
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

    def save(
        self,
        step: int,
        state: Any,
        meta: Mapping[str, Any] | None = None,
        *,
        replace: bool = False,
    ) -> None:
        """Starts saving a pytree of arrays, and JSON values with it; returns once it is copied.

        The caller may overwrite or donate its arrays at once. A step that is there already is left
        as it is, since by construction it is the same, unless `replace` says that it is not.

        Raises:
          SaveError: this state, or the one before it, cannot be written.
        """
        with self._explained():
            if step in self._manager.all_steps():
                if not replace:
                    return
                self._manager.wait_until_finished()
                self._manager.delete(step)
            self._manager.wait_until_finished()
            leaves = arrays.nonempty(arrays.named_leaves(state))
            content = arrays.seal(
                {"step": step, "meta": dict(meta or {}), "arrays": arrays.digests(leaves)}
            )
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

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turns what Orbax raises into one sentence, and frees the space of what it left behind."""
        try:
            yield
        except Exception as error:  # OSErrors, TensorStore's ValueErrors, and wrappings of both
            if jax.process_count() > 1 and isinstance(error, jax.errors.JaxRuntimeError):
                raise  # another process is gone: nothing that files could explain
            threading.excepthook = _hush  # the other threads of a save that failed fail as well
            if processes.is_first():
                for rest in self._directory.glob("*orbax-checkpoint-tmp*"):
                    shutil.rmtree(rest, ignore_errors=True)
            with contextlib.suppress(Exception):
                self._manager.reload()
            code = _os_error(error)
            reason = _brief(error) if code is None else os.strerror(code)
            raise SaveError(reason, may_pass=code in MAY_PASS) from error

    def restore(self, abstract: TreeT) -> tuple[TreeT, dict[str, Any]]:
        """The newest undamaged state, in the structure of `abstract`, and what was saved with it.

        `abstract` holds arrays or `jax.ShapeDtypeStruct`s; a leaf that has a sharding is restored
        to it, each device reading its part. NumPy leaves come back as NumPy. If a newer state is
        damaged a line says so and it is moved aside, so that `latest_step` is the restored step
        and training can save over it again.

        Raises:
          ConfigError: there is no state; none can be read; or it is the state of another run:
            names, shapes or dtypes differ.
        """
        self.wait()  # a state that is still being written would look damaged
        steps = sorted({*self._manager.all_steps(), *saved_steps(self._directory)}, reverse=True)
        agreement.check("saved states", str(steps))
        failures: dict[int, Exception] = {}
        for step in steps:
            try:
                with agreement.raise_together(OTHERS):  # what follows takes all of them
                    self._check_fits(step, abstract)
                with agreement.raise_together(OTHERS):
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
                    content = reader.restore(self._directory / str(step) / "meta")
                    arrays.check_seal(content, step)
                    return content["meta"]
                except Exception:
                    _logger.debug("the JSON values of step %d are damaged", step, exc_info=True)
        return None

    def check(self, step: int) -> list[str]:
        """Reads the state of a step against its checksums and returns the names of its arrays.

        Raises:
          ConfigError: it is damaged.
        """
        try:
            # Without the shardings: they are of the devices that it was saved from.
            stored = {
                name: arrays.target(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
                for name, leaf in self._stored(step).items()
            }
            self._read(step, stored)
        except MemoryError:
            raise
        except Exception as error:
            raise ConfigError(
                f"the saved state {self._directory}/{step} is damaged: {_brief(error)}. A run that "
                "goes on takes the one before it; to keep this one, restore it from a copy."
            ) from error
        return sorted(stored)

    def _check_fits(self, step: int, abstract: TreeT) -> None:
        """Raises where a state is damaged or another run's, by its list of arrays."""
        leaves = arrays.nonempty(arrays.named_leaves(abstract))
        arrays.check_same(self._stored(step), leaves, f"{self._directory}/{step}")

    def _restore(self, step: int, abstract: TreeT) -> tuple[TreeT, dict[str, Any]]:
        named = arrays.named_leaves(abstract)
        leaves = {name: arrays.target(leaf) for name, leaf in arrays.nonempty(named).items()}
        state, meta = self._read(step, leaves)
        values = [
            state[name] if name in leaves else arrays.empty(leaf) for name, leaf in named.items()
        ]
        return jax.tree.unflatten(jax.tree.structure(abstract), values), meta

    def _read(self, step: int, leaves: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The arrays of a state and its JSON values, once they are what was saved."""
        restored: Any = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(dict(leaves)), meta=ocp.args.JsonRestore()
            ),
        )
        content = restored.meta
        arrays.check_seal(content, step)
        expected, found = content["arrays"], arrays.digests(restored.state)
        wrong = [n for n in sorted(expected | found) if expected.get(n) != found.get(n)]
        if wrong:
            raise ValueError(
                f"not what was saved, by their SHA-256: {', '.join(wrong[: arrays.SHOWN])}"
            )
        return restored.state, content["meta"]

    def _stored(self, step: int) -> dict[str, Any]:
        """Shape and dtype of every leaf of a saved state."""
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
        """Returns when everything is on disk.

        Raises:
          SaveError: it cannot be written.
        """
        with self._explained():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for what is being saved and ends the background threads."""
        with self._explained():
            self._manager.wait_until_finished()
            self._manager.close()


def _hush(args: threading.ExceptHookArgs) -> None:
    _logger.debug("a thread has failed", exc_info=args.exc_value)


def _let_hosts_differ() -> None:
    """Makes Orbax wait by JAX's coordinator where hosts have different numbers of devices.

    Its own way is a collective that takes them for equal, and fails.
    """
    hosts = [device.process_index for device in jax.devices()]
    if len({hosts.count(host) for host in hosts}) > 1:
        flags.FLAGS["experimental_orbax_use_distributed_barrier"].parse("true")


def _is_not_orbaxs(record: logging.LogRecord) -> bool:
    """Orbax logs the traceback of every error that it raises, and that it only reads."""
    if record.name == "asyncio":  # a save failed: `SaveError` says so
        return "never retrieved" not in record.getMessage()
    return "orbax" not in record.pathname or record.levelno < logging.WARNING


def _brief(error: Exception) -> str:
    return f"{reason_of(error):.300}"


def _os_error(error: Exception) -> int | None:
    """The operating system's number, which TensorStore hides at the end of its message."""
    if isinstance(error, OSError) and error.errno:
        return error.errno
    code = re.search(r"os_error_code='(\d+)'", str(error))
    return int(code.group(1)) if code else None
