"""A `t5x` command as several processes on this machine that find each other."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent


def start(
    folders: Sequence[Path],
    arguments: Sequence[str],
    devices: Sequence[int],
    command: str = "train",
) -> list[subprocess.Popen]:
    """One process for each number of devices, in its folder; a single one joins nobody."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    started = []
    for index, count in enumerate(devices):
        flags = [
            "--multiprocess_gpu",
            f"--coordinator_address=127.0.0.1:{port}",
            f"--process_count={len(devices)}",
            f"--process_index={index}",
        ]
        line = [sys.executable, "-m", "prompt_tuning.cli", command, *arguments]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)]),
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={count}",
        }
        started.append(
            subprocess.Popen(
                line + (flags if len(devices) > 1 else []),
                cwd=folders[index],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    return started


def finish(started: Sequence[subprocess.Popen]) -> list[str]:
    """What each has said, once all have ended well."""
    said = [process.communicate(timeout=400)[0] for process in started]
    assert [process.returncode for process in started] == [0] * len(started), said
    return said
