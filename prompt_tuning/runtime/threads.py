"""Threads of XLA's where one processor stands for several devices, to try a mesh on a laptop.

XLA has a thread for each device or core, whichever are more, and a device that waits in a
collective holds one. With a thread a device and little time for each, the devices that were to come
found none: in 5 of 12 runs on two cores that three runs shared, the others waited for 40 s, after
which XLA ends the process. With two a device it was in none of 12.
"""

from __future__ import annotations

import os
import re

THREADS_A_DEVICE = 2


def provide(environment: dict[str, str] | None = None) -> int | None:
    """Sets how many threads XLA makes, before JAX is used; None where it is left to XLA.

    That is where there is one CPU device, and where NPROC, which XLA reads, is set already.

    >>> provide({"XLA_FLAGS": "--xla_force_host_platform_device_count=8"})
    16
    >>> provide({"JAX_NUM_CPU_DEVICES": "4"})
    8
    >>> provide({})
    """
    found = os.environ if environment is None else environment
    flags = re.findall(r"--xla_force_host_platform_device_count=(\d+)", found.get("XLA_FLAGS", ""))
    setting = re.findall(r"^\d+$", found.get("JAX_NUM_CPU_DEVICES", ""))
    devices = max((int(number) for number in (*flags[-1:], *setting)), default=1)
    if devices <= 1 or "NPROC" in found:
        return None
    found["NPROC"] = str(threads := THREADS_A_DEVICE * devices)
    return threads
