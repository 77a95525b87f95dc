"""The cache of compiled programs on disk: the same run compiles only once.

The key of an entry is JAX's hash of program, options, devices and versions; a damaged entry is
compiled again. The key does not contain the CPU's instruction set. Several machines may share a
home folder, so the folder's name contains it.
"""

from __future__ import annotations

import hashlib
import os
import platform
from pathlib import Path

OFF = "off"


def choose_folder(setting: str | None) -> Path | None:
    """The folder of the cache; None if it is off, or set by JAX_COMPILATION_CACHE_DIR.

    JAX warns of a folder that it cannot write to, and goes on without a cache.
    """
    if setting == OFF or (setting is None and "JAX_COMPILATION_CACHE_DIR" in os.environ):
        return None
    if setting is not None:
        return Path(setting).expanduser()
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return home / "prompt_tuning" / f"xla-{_machine()}"


def enable(setting: str | None) -> Path | None:
    """The folder of the cache, which it enables; see `choose_folder`."""
    folder = choose_folder(setting)
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
