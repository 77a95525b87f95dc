"""Several processes, one program: how this one joins the others, and which of them writes.

T5X's flags name the coordinator; on Slurm, TPU pods and GKE, JAX finds the others by itself. Every
process runs the same command on the same settings, and needs the same file system for MODEL_DIR.
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

# A process that has not been heard of for so long is gone, and takes the others with it. JAX waits
# for 100 seconds.
HEARTBEAT_SECONDS = 20
JOIN_SECONDS = 300  # while the others start


class Flags(NamedTuple):
    """T5X's flags of the same names."""

    multiprocess_gpu: bool = False
    coordinator_address: str | None = None
    process_count: int | None = None
    process_index: int | None = None

    def check(self) -> None:
        """Raises ConfigError where one is given without the others."""
        given = {name: value for name, value in self._asdict().items() if value is not None}
        given.pop("multiprocess_gpu")
        if given and not self.multiprocess_gpu:
            raise ConfigError(
                f"--{next(iter(given))} is about several processes: add --multiprocess_gpu."
            )
        if given and len(given) < 3:
            raise ConfigError(
                "--coordinator_address=HOST:PORT, --process_count and --process_index belong "
                f"together; found {', '.join(f'--{n}={v}' for n, v in given.items())}. Give all "
                "three, or none where Slurm or a TPU pod tells JAX."
            )
        if self.process_count is not None and not (
            0 <= (self.process_index or 0) < self.process_count
        ):
            raise ConfigError(
                f"--process_index={self.process_index} does not lie in [0, --process_count="
                f"{self.process_count}): number the processes from 0."
            )


def is_wanted(flags: Flags, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is one of several: by its flags, or by where it was started.

    >>> is_wanted(Flags(), {"SLURM_JOB_ID": "7", "SLURM_STEP_NUM_TASKS": "4"})
    True
    """
    if flags.multiprocess_gpu:
        return True
    if environment.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        return True  # srun -n 4; not what sbatch itself sets for its script
    return "," in environment.get("TPU_WORKER_HOSTNAMES", "")


def local_device_ids(environment: Mapping[str, str] = os.environ) -> list[int] | None:
    """Which devices of this host are this process's, as JAX is told; an empty list: all of them.

    Left to itself (None), JAX takes one device for each task of Slurm's, which is right where
    there are as many tasks as devices, and leaves seven of eight idle where a node has one task.

    >>> local_device_ids({"SLURM_STEP_TASKS_PER_NODE": "1(x4)"})
    []
    >>> local_device_ids({"SLURM_STEP_TASKS_PER_NODE": "8(x4)"})
    """
    tasks = environment.get("SLURM_STEP_TASKS_PER_NODE", "")
    return [] if re.fullmatch(r"1(\(x\d+\))?(,1(\(x\d+\))?)*", tasks) else None


def join(flags: Flags) -> None:
    """Joins the other processes; afterwards `jax.devices()` are everybody's.

    Must come before JAX is used. Standard output is left to the first process.

    Raises:
      ConfigError: the others are not found.
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
            f"the other processes are not found: {str(error).splitlines()[0]:.300}. Give "
            "--coordinator_address=HOST:PORT --process_count=N --process_index=I to each, and "
            "start all of them."
        ) from error
    if jax.process_index() != 0:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def check_joined() -> None:
    """Raises ConfigError where the devices are of several processes that never joined.

    The hosts of a TPU slice see each other's chips whether or not the processes know each other.
    """
    import jax

    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise ConfigError(
            f"the devices here are those of {jax.process_count()} processes, which have not joined "
            "each other: add --multiprocess_gpu (it means any kind of device), the same on every "
            "host."
        )


def check_alone(what: str, environment: Mapping[str, str] = os.environ) -> None:
    """Raises ConfigError where `what`, which one process does alone, was started as several.

    >>> check_alone("this", {"SLURM_STEP_NUM_TASKS": "1"})
    """
    if is_wanted(Flags(), environment):
        raise ConfigError(
            f"{what} is done by one process, and this is one of several (by Slurm's or the TPU "
            "pod's variables): start it once, with `srun -n 1`, or on a host of its own."
        )


def is_first() -> bool:
    """Whether this process is the one that writes files."""
    import jax

    return jax.process_index() == 0


def count() -> int:
    """How many processes there are."""
    import jax

    return jax.process_count()


@contextlib.contextmanager
def writing_folder(folder: Path) -> Iterator[Path]:
    """Where this process writes: `folder` if it is the first, else a place that nobody reads.

    So all processes run the same code, and one of them leaves files.
    """
    if is_first():
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="prompt_tuning_") as elsewhere:
        yield Path(elsewhere)
