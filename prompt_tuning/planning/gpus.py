"""Descriptions of GPUs, with which XLA compiles for a GPU that this machine does not have.

With JAX's CUDA plugin XLA compiles on any x86 Linux machine for a `GpuTargetConfig`, a text with
the properties of a device. The numbers are from the data sheets and from CUDA's table of compute
capabilities.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Sequence
from typing import Any, NamedTuple

from prompt_tuning.planning.chips import Topology, compile_only_devices

PLUGINS = ("jax_cuda13_plugin", "jax_cuda12_plugin")
A_HOST = 8  # GPUs of a host, if there are several hosts
# Autotuning needs a GPU. Without it all products use cuBLAS.
OPTIONS = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_autotune_level": 0}


class Gpu(NamedTuple):
    """The properties of a GPU that its compiler needs."""

    name: str
    capability: tuple[int, int]
    cores: int  # streaming multiprocessors
    units: int  # float32 units of each
    shared: int  # KiB of shared memory of each; a block can use one KiB less
    threads: int  # of each
    cache: int  # MiB of level 2
    clock: float  # GHz
    bandwidth: float  # bytes/s of the memory


GPUS = {
    "t4": Gpu("Tesla T4", (7, 5), 40, 64, 64, 1024, 4, 1.59, 320e9),
    "l4": Gpu("NVIDIA L4", (8, 9), 58, 128, 100, 1536, 48, 2.04, 300e9),
    "a100": Gpu("NVIDIA A100-SXM4-40GB", (8, 0), 108, 64, 164, 2048, 40, 1.41, 1555e9),
    "a100-80": Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 164, 2048, 40, 1.41, 2039e9),
    "h100": Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 228, 2048, 50, 1.98, 3352e9),
    "h200": Gpu("NVIDIA H200", (9, 0), 132, 128, 228, 2048, 50, 1.98, 4800e9),
}


def has_compiler() -> bool:
    """Whether JAX's CUDA plugin is installed; nothing is imported."""
    return any(importlib.util.find_spec(name) for name in PLUGINS)


def find_gpus(topology: Topology) -> tuple[Sequence[Any], str]:
    """Devices to compile for, and the name of the compiler.

    Raises:
      ConfigError: the compiler does not support them.
    """
    hosts, rest = divmod(topology.devices, A_HOST)
    shape = f"1x{hosts}x{A_HOST}" if hosts and not rest else f"1x1x{topology.devices}"
    options = {"platform": "cuda", "topology": shape, "target_config": target_config(topology)}
    devices = compile_only_devices(topology, "GPU", **options)
    return devices, f"the GPU's own compiler ({_version()})"


def _version() -> str:
    name = next(name for name in PLUGINS if importlib.util.find_spec(name))
    return f"{name.replace('_', '-')} {importlib.metadata.version(name)}"


def target_config(topology: Topology) -> str:
    """XLA's GpuTargetConfig of a device of the topology, as text."""
    gpu = GPUS[topology.name.split(":")[0]]
    shared = 1024 * gpu.shared
    device = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 48 * 1024,
        "shared_memory_per_core": shared,
        "shared_memory_per_block_optin": shared if gpu.capability < (8, 0) else shared - 1024,
        "threads_per_core_limit": gpu.threads,
        "core_count": gpu.cores,
        "fpus_per_core": gpu.units,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 2**16 - 1,
        "block_dim_limit_z": 2**16 - 1,
        "memory_bandwidth": int(gpu.bandwidth),
        "l2_cache_size": gpu.cache * 2**20,
        "clock_rate_ghz": gpu.clock,
        "device_memory_size": int(topology.chip.memory or 0),
        "registers_per_core_limit": 2**16,
        "registers_per_block_limit": 2**16,
    }
    lines = [f"{name}: {value}" for name, value in device.items()]
    major, minor = gpu.capability
    return "\n".join(
        [
            "gpu_device_info {",
            *lines,
            f"cuda_compute_capability {{ major: {major} minor: {minor} }}",
            "}",
            'platform_name: "CUDA"',
            "dnn_version_info { major: 9 minor: 10 }",
            "runtime_version { major: 12 minor: 8 }",
            f'device_description_str: "{gpu.name}"',
        ]
    )
