"""One processor that stands for several devices has the threads that they need."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from prompt_tuning.runtime.startup import THREADS_PER_DEVICE, set_threads

ROOT = Path(__file__).parents[1]
EIGHT = "--xla_force_host_platform_device_count=8"
# The threads that run a program's operations, by the name that XLA gives them.
COUNT = """
from prompt_tuning.runtime import startup
startup.set_threads()
import jax
from pathlib import Path
assert jax.device_count() == {devices}
names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
print(sum("XLAEigen" in name for name in names))
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux to count threads")
@pytest.mark.parametrize(
    ("devices", "settings"),
    [(8, {"XLA_FLAGS": EIGHT}), (6, {"XLA_FLAGS": "", "JAX_NUM_CPU_DEVICES": "6"})],
)
def test_xla_has_more_threads_than_devices(devices, settings):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **settings}
    environment.pop("NPROC", None)
    done = subprocess.run(
        [sys.executable, "-c", COUNT.format(devices=devices)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == THREADS_PER_DEVICE * devices


@pytest.mark.parametrize(
    ("settings", "threads"),
    [
        ({}, None),
        ({"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}, None),
        ({"JAX_NUM_CPU_DEVICES": "-1"}, None),
        ({"JAX_NUM_CPU_DEVICES": "4"}, "8"),
        ({"XLA_FLAGS": EIGHT, "NPROC": "3"}, "3"),
    ],
)
def test_one_device_and_what_the_user_has_set_are_left_to_xla(settings, threads, monkeypatch):
    for name in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES", "NPROC"):
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    set_threads()
    assert os.environ.get("NPROC") == threads
