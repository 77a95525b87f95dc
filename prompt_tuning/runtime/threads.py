"""Threads for several CPU devices in one process, which else deadlock.

A device that waits in a collective holds one of XLA's threads. With one thread a device on few
cores the devices that are to come may get none, and after 40 s XLA ends the process.
"""

import os
import re

THREADS_PER_DEVICE = 2


def provide() -> None:
    """Sets NPROC, the number of threads that XLA makes, unless it is set or there is one device.

    Call it before JAX is used.
    """
    flags = re.findall(r"host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    flags += re.findall(r"^\d+$", os.environ.get("JAX_NUM_CPU_DEVICES", ""))
    devices = max(map(int, flags), default=1)
    if devices > 1:
        os.environ.setdefault("NPROC", str(THREADS_PER_DEVICE * devices))
