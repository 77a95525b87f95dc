"""Fixtures of the whole suite: the folder of reference data, and the options."""

import ctypes
import gc
import mmap
import os
import resource
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from prompt_tuning.runtime import startup

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))  # hlo_text


def known_to_xla(flag: str) -> bool:
    """Whether jaxlib knows a flag: XLA ends a process that sets another one."""
    for library in Path(find_spec("jaxlib").origin).parent.glob("libjax_common*"):
        with (
            library.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text,
        ):
            return text.find(f"\0{flag}\0".encode()) >= 0
    return False


# Eight CPU devices, so that the mesh tests run in the same process as the others. Most of a test's
# time is compiling, of programs that run for milliseconds: LLVM need not make them faster, and the
# older emitters of XLA compile a training step in a third of the time. A program also takes less in
# one piece, and without the places in the source that its operations come from.
# With JAX_PLATFORMS=cuda,cpu the tests of GPUs find them as users do.
if os.environ.setdefault("JAX_PLATFORMS", "cpu") == "cpu":
    flags = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    for flag in (
        "xla_cpu_use_fusion_emitters=false",
        "xla_cpu_parallel_codegen_split_count=1",
    ):
        if known_to_xla(flag.split("=")[0]):
            flags += f"--{flag} "
    flags += "--xla_force_host_platform_device_count=8 "
    os.environ["XLA_FLAGS"] = flags + os.environ.get("XLA_FLAGS", "")
    startup.set_threads()
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Most tests compile the same few small programs: all processes share a cache of them. A folder in
# JAX_COMPILATION_CACHE_DIR is kept from one run of the tests to the next.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _CACHE = tempfile.TemporaryDirectory(prefix="jax-cache-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax
import pytest

# Files of minutes, begun first: one at the end would leave the other workers idle.
LONGEST = {f"test_{name}.py" for name in ("notebook", "superglue_run", "loop", "world", "kill")}
LEVELS = ("slow", "weekly")  # markers; pyproject.toml says what is behind each
SHARED = Path(__file__).resolve().parents[1].parent / "shared"


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Reference data that may not be distributed with the project; absent on most machines."""
    if not SHARED.is_dir():
        pytest.skip("the reference data (../shared: T5X outputs, SuperGLUE rows) is not here")
    return SHARED


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file's tests stay in one worker: what a module's fixtures take is not spent twice."""
    from xdist.scheduler import LoadFileScheduling

    config.option.loadscopereorder = False  # the longest files are not those with the most tests
    return LoadFileScheduling(config, log)


def pytest_addoption(parser: pytest.Parser) -> None:
    for level in LEVELS:
        parser.addoption(
            f"--{level}", action="store_true", help=f"also run the tests marked {level}"
        )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONGEST)
    for level in LEVELS:
        if not config.getoption(f"--{level}"):
            skip = pytest.mark.skip(reason=f"{level}: run with --{level}")
            for item in items:
                if level in item.keywords:
                    item.add_marker(skip)


def pytest_collection_finish() -> None:
    gc.freeze()  # modules and tests stay to the end: no collection has to look at them again


# JAX keeps every program that it has compiled, some 1.5 MB each: a worker would grow to 5 GB.
MEMORY_LIMIT = 5 << 28
memory_limit = MEMORY_LIMIT


def resident_bytes() -> int:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE
    except OSError:  # not Linux: the programs are kept
        return 0


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    """Programs are dropped if the process has grown; what is needed again comes from the cache."""
    global memory_limit
    if resident_bytes() > memory_limit:
        jax.clear_caches()
        gc.collect()
        if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
            libc.malloc_trim(0)
        memory_limit = max(MEMORY_LIMIT, resident_bytes() + (1 << 28))


def peak_gigabytes() -> float:
    units = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * units / 2**30


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["peak"] = peak_gigabytes()


peaks: list[float] = []


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    peaks.append(getattr(node, "workeroutput", {}).get("peak", 0.0))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    peak = max(peaks, default=peak_gigabytes())
    terminalreporter.write_line(f"peak memory of a process of tests: {peak:.1f} GB")
