"""Fixtures of the whole suite: the folder of reference data, and the options."""

import mmap
import os
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
            return text.find(flag.encode()) >= 0
    return False


# Eight CPU devices, so that the mesh tests run in the same process as the others. Most of a test's
# time is compiling, of programs that run for milliseconds: LLVM need not make them faster, and the
# older emitters of XLA compile a training step in a third of the time.
# With JAX_PLATFORMS=cuda,cpu the tests of GPUs find them as users do.
if os.environ.setdefault("JAX_PLATFORMS", "cpu") == "cpu":
    flags = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    if known_to_xla("xla_cpu_use_fusion_emitters"):
        flags += "--xla_cpu_use_fusion_emitters=false "
    flags += "--xla_force_host_platform_device_count=8 "
    os.environ["XLA_FLAGS"] = flags + os.environ.get("XLA_FLAGS", "")
    startup.set_threads()
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Most tests compile the same few small programs: all processes share a cache of them. A folder in
# JAX_COMPILATION_CACHE_DIR is kept from one run of the tests to the next.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _CACHE = tempfile.TemporaryDirectory(prefix="jax-cache-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

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
