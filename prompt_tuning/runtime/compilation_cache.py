"""Programs that XLA has compiled once are kept, so that the same run starts at once the next time.

JAX names an entry by the hash of program, options, devices and versions, and a damaged one is
compiled again. What it does not hash is the CPU's instruction set, which a home folder on several
machines would mix up: the folder is named after it.
"""

from __future__ import annotations

import hashlib
import os
import platform
from pathlib import Path

OFF = "off"


def choose(setting: str | None) -> Path | None:
    """The folder of the cache; None where there is to be none, or JAX's own variable names one.

    Raises nothing: what cannot be written to is left out by JAX, with a warning.
    """
    if setting == OFF or (setting is None and "JAX_COMPILATION_CACHE_DIR" in os.environ):
        return None
    if setting is not None:
        return Path(setting).expanduser()
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return home / "prompt_tuning" / f"xla-{_machine()}"


def use(setting: str | None) -> Path | None:
    """Keeps compiled programs in the folder of `setting`, or the user's; see `choose`."""
    folder = choose(setting)
    import jax

    if setting == OFF:
        jax.config.update("jax_enable_compilation_cache", False)
        return None
    if folder is not None:
        jax.config.update("jax_compilation_cache_dir", str(folder))
    # A hundred small programs make up a start; JAX's limit of one second leaves them out.
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return folder


def _machine() -> str:
    """A short hash of the processor's kind and what it can do."""
    found = platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        found += next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        found += platform.processor()
    return hashlib.sha256(found.encode()).hexdigest()[:12]
