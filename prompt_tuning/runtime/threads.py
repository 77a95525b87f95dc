"""Sets the number of XLA's threads for several CPU devices in one process, to prevent a deadlock.

A device that waits in a collective blocks one of XLA's threads. On a machine with few cores there
may be no thread for the remaining devices; XLA then aborts the process after 40 s.
"""

import os
import re

THREADS_PER_DEVICE = 2


def set_count() -> None:
    """Sets NPROC, the number of XLA's threads, if it is unset and there are several CPU devices.

    Call it before JAX is used.
    """
    flags = re.findall(r"host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    flags += re.findall(r"^\d+$", os.environ.get("JAX_NUM_CPU_DEVICES", ""))
    devices = max(map(int, flags), default=1)
    if devices > 1:
        os.environ.setdefault("NPROC", str(THREADS_PER_DEVICE * devices))
