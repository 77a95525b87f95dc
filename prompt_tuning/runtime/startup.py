"""What is set before JAX is used: what malloc keeps, XLA's threads, the cache of programs.

* XLA allocates the temporaries of a program with malloc and frees them after it. glibc returns
  blocks of that size to the system at once, which must then map and clear every page again in the
  next step. Keeping them costs memory, because freed blocks are fragmented (benchmarks/README.md).
* A CPU device that waits in a collective blocks one of XLA's threads. On a machine with few cores
  there may be no thread for the remaining devices; XLA then aborts the process after 40 s.
* The same run compiles only once. The key of a program in the cache is JAX's hash of program,
  options, devices and versions, but not of the CPU's instruction set. Several machines may share a
  home folder, so the folder's name contains it. A damaged entry is compiled again.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
from pathlib import Path

# Parameters of mallopt(3).
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
_NEVER = -1
THREADS_PER_DEVICE = 2
OFF = "off"


def prepare() -> None:
    """Sets all but the cache."""
    keep_freed()
    set_threads()


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


def set_threads() -> None:
    """Sets NPROC, the number of XLA's threads, if it is unset and there are several CPU devices.

    Call it before JAX is used.
    """
    flags = re.findall(r"host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    flags += re.findall(r"^\d+$", os.environ.get("JAX_NUM_CPU_DEVICES", ""))
    devices = max(map(int, flags), default=1)
    if devices > 1:
        os.environ.setdefault("NPROC", str(THREADS_PER_DEVICE * devices))


def choose_cache(setting: str | None) -> Path | None:
    """The folder of the cache; None if it is off, or set by JAX_COMPILATION_CACHE_DIR.

    JAX warns of a folder that it cannot write to, and goes on without a cache.
    """
    if setting == OFF or (setting is None and "JAX_COMPILATION_CACHE_DIR" in os.environ):
        return None
    if setting is not None:
        return Path(setting).expanduser()
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return home / "prompt_tuning" / f"xla-{_machine()}"


def enable_cache(setting: str | None) -> Path | None:
    """The folder of the cache, which it enables; see `choose_cache`."""
    folder = choose_cache(setting)
    import jax

    if setting == OFF:
        jax.config.update("jax_enable_compilation_cache", False)
        return None
    if folder is not None:
        jax.config.update("jax_compilation_cache_dir", str(folder))
    # JAX caches only programs that compile for a second; the start of a run has many smaller ones.
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return folder


def _machine() -> str:
    """A short hash of the processor's architecture and instruction set."""
    description = platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        description += next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        description += platform.processor()
    return hashlib.sha256(description.encode()).hexdigest()[:12]
