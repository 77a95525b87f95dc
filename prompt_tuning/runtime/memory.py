"""Keeps freed memory in the process on the CPU, so that each step reuses the last one's.

XLA allocates the temporaries of a program with malloc and frees them after it. glibc returns blocks
of that size to the system at once, which must then map and clear every page again in the next step.
The setting costs memory, because freed blocks are fragmented (measured in benchmarks/README.md).
"""

from __future__ import annotations

import ctypes
import os

# Parameters of mallopt(3).
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
_NEVER = -1


def keep_freed() -> bool:
    """Whether glibc will keep freed memory from now on; False with another C library.

    Call it before JAX is used: all threads must share the main heap, the only one that can grow to
    any size, and a thread that has a heap of its own keeps it.
    """
    try:
        if not (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc"):
            return False
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, ValueError):
        return False
    settings = ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, _NEVER))
    return all([mallopt(name, value) for name, value in settings])
