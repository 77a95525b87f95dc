"""Runs of several processes: joining them, and which process writes files.

T5X's flags name the coordinator. On Slurm, TPU pods and GKE, JAX finds the other processes itself.
Every process runs the same command with the same settings, and needs a shared file system for
MODEL_DIR.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from prompt_tuning.config import ConfigError

# A process without a heartbeat for this long is regarded as dead, and the others are aborted. JAX's
# default is 100 seconds.
HEARTBEAT_SECONDS = 20
JOIN_SECONDS = 300  # how long a process waits for the others to start


class Flags(NamedTuple):
    """T5X's flags of several processes, under the same names."""

    multiprocess_gpu: bool = False
    coordinator_address: str | None = None
    process_count: int | None = None
    process_index: int | None = None

    def check(self) -> None:
        """Raises ConfigError if a flag is given without the others that it needs."""
        flags = {name: value for name, value in self._asdict().items() if value is not None}
        flags.pop("multiprocess_gpu")
        if flags and not self.multiprocess_gpu:
            raise ConfigError(f"--{next(iter(flags))} needs --multiprocess_gpu. Add it.")
        if flags and len(flags) < 3:
            raise ConfigError(
                "--coordinator_address=HOST:PORT, --process_count and --process_index belong "
                f"together; found {', '.join(f'--{n}={v}' for n, v in flags.items())}. Give all "
                "three, or none on Slurm or a TPU pod, where JAX finds the processes itself."
            )
        if self.process_count is not None and not (
            0 <= (self.process_index or 0) < self.process_count
        ):
            raise ConfigError(
                f"--process_index={self.process_index} is not in [0, --process_count="
                f"{self.process_count}). Number the processes from 0."
            )


def is_wanted(flags: Flags, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is one of several, by its flags or the environment.

    >>> is_wanted(Flags(), {"SLURM_JOB_ID": "7", "SLURM_STEP_NUM_TASKS": "4"})
    True
    """
    if flags.multiprocess_gpu:
        return True
    if environment.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        return True  # srun -n 4; sbatch itself does not set it for its script
    return "," in environment.get("TPU_WORKER_HOSTNAMES", "")


def local_device_ids(environment: Mapping[str, str] = os.environ) -> list[int] | None:
    """JAX's `local_device_ids`: [] for all devices of this host, None for JAX's own choice.

    On Slurm, JAX itself takes one device for each task. That is right if a node has as many tasks
    as devices; if it has a single task, the other devices would be idle.

    >>> local_device_ids({"SLURM_STEP_TASKS_PER_NODE": "1(x4)"})
    []
    >>> local_device_ids({"SLURM_STEP_TASKS_PER_NODE": "8(x4)"})
    """
    tasks = environment.get("SLURM_STEP_TASKS_PER_NODE", "")
    return [] if re.fullmatch(r"1(\(x\d+\))?(,1(\(x\d+\))?)*", tasks) else None


def join(flags: Flags) -> None:
    """Joins the other processes; afterwards `jax.devices()` has the devices of all processes.

    Call it before JAX is used. Only the first process writes to standard output.

    Raises:
      ConfigError: the other processes cannot be reached.
    """
    import jax

    try:
        jax.distributed.initialize(
            flags.coordinator_address,
            flags.process_count,
            flags.process_index,
            local_device_ids(),
            initialization_timeout=JOIN_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"the other processes cannot be reached: {str(error).splitlines()[0]:.300}. Give "
            "--coordinator_address=HOST:PORT --process_count=N --process_index=I to each, and "
            "start all of them."
        ) from error
    if jax.process_index() != 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def check_joined() -> None:
    """Raises ConfigError if there are devices of other processes that have not joined this one.

    The hosts of a TPU slice see each other's chips even if their processes have not joined.
    """
    import jax

    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise ConfigError(
            f"the devices are those of {jax.process_count()} processes, which have not joined each "
            "other. Add --multiprocess_gpu on every host; it is for any kind of device."
        )


def check_alone(what: str, environment: Mapping[str, str] = os.environ) -> None:
    """Raises ConfigError if this process is one of several; `what` needs a single process.

    >>> check_alone("this", {"SLURM_STEP_NUM_TASKS": "1"})
    """
    if is_wanted(Flags(), environment):
        raise ConfigError(
            f"{what} needs a single process, but this is one of several (by Slurm's or the TPU "
            "pod's variables). Start it once, with `srun -n 1`, or on a separate host."
        )


def is_first() -> bool:
    """Whether this process is the one that writes files."""
    import jax

    return jax.process_index() == 0


def count() -> int:
    """The number of processes."""
    import jax

    return jax.process_count()


@contextlib.contextmanager
def writing_folder(folder: Path) -> Iterator[Path]:
    """The folder that this process writes to: `folder` in the first process, else a temporary one.

    So all processes run the same code, and only the first leaves files.
    """
    if is_first():
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="prompt_tuning_") as elsewhere:
        yield Path(elsewhere)
