"""Restores a bfloat16 backbone over eight devices and prints the peak of its memory as JSON.

python restore_peak.py CHECKPOINT MODEL_AS_JSON
"""

import json
import os
import sys
import threading
import time
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

from prompt_tuning.runtime import startup

startup.keep_freed()  # as the command does: what it keeps counts

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from prompt_tuning.checkpoints.t5x import read_t5x  # noqa: E402
from prompt_tuning.config import ModelConfig, from_dict  # noqa: E402
from prompt_tuning.model import sharding, t5  # noqa: E402


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    config = from_dict(ModelConfig, json.loads(sys.argv[2]))
    shapes = t5.param_shapes(config)
    places = sharding.param_shardings(shapes, sharding.make_mesh(8))
    jax.block_until_ready(jnp.ones(8) + 1)
    before, seen, done = resident(), [0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            seen[0] = max(seen[0], resident())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    params, _ = read_t5x(sys.argv[1], shapes, dtype="bfloat16", shardings=places)
    jax.block_until_ready(params)
    done.set()
    watcher.join()
    print(json.dumps({"peak": seen[0] - before}))


if __name__ == "__main__":
    main()
