"""Accelerators that `t5x plan` knows: their memory and peak, from their data sheets."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from prompt_tuning.config import ConfigError

GIB = 2**30


class Chip(NamedTuple):
    """One device as JAX counts them."""

    platform: str  # 'tpu', 'gpu' or 'cpu'
    memory: float | None  # bytes
    bfloat16: float | None  # peak FLOP/s of dense matrix products
    float32: float | None  # of float32 products as XLA runs them by default
    options: Mapping[str, str] = {}  # options of the TPU's compiler for this chip


# By default TPUs multiply float32 in bfloat16, and GPUs from A100 on in TF32, at half the rate of
# bfloat16. A T4 has no bfloat16 and multiplies it in float32.
CHIPS = {
    "v2": Chip("tpu", 8 * GIB, 22.5e12, 22.5e12),  # a core, as of v3
    "v3": Chip("tpu", 16 * GIB, 61.5e12, 61.5e12),  # a core: two to a chip
    # JAX runs the two cores of a v4 as one device; the compiler needs an option for that.
    "v4": Chip("tpu", 32 * GIB, 275e12, 275e12, {"chip_config_name": "megacore"}),
    "v5e": Chip("tpu", 16 * GIB, 197e12, 197e12),
    "v5p": Chip("tpu", 95 * GIB, 459e12, 459e12),
    "v6e": Chip("tpu", 32 * GIB, 918e12, 918e12),
    "t4": Chip("gpu", 15 * GIB, 8.1e12, 8.1e12),
    "l4": Chip("gpu", 22 * GIB, 121e12, 60e12),
    "a100": Chip("gpu", 40e9, 312e12, 156e12),
    "a100-80": Chip("gpu", 80e9, 312e12, 156e12),
    "h100": Chip("gpu", 80e9, 989e12, 494e12),
    "h200": Chip("gpu", 141e9, 989e12, 494e12),
    "cpu": Chip("cpu", None, None, None),
}


HERE = "this machine"


class Topology(NamedTuple):
    """Chips and their number: `v5e:4x8` is a TPU slice, `h100:8` are GPUs, `cpu:8` CPU devices.

    The name of the devices that JAX has in this process is HERE.
    """

    name: str
    chip: Chip
    devices: int


def parse_topology(name: str) -> Topology:
    """The topology of a name, such as v5e:4x8.

    >>> parse_topology("v5e:4x8").devices, parse_topology("h100:8").chip.platform
    (32, 'gpu')

    Raises:
      ConfigError: there is no such chip, or the number is invalid.
    """
    match = re.fullmatch(r"([\w\-]+):(\d+(?:x\d+)*)", name)
    if match is None or match.group(1) not in CHIPS:
        raise ConfigError(
            f"--topology={name}: expected a chip and a number, such as v5e:4x8, h100:8 or cpu:8. "
            f"The chips: {', '.join(CHIPS)}."
        )
    devices = math.prod(int(n) for n in match.group(2).split("x"))
    if devices < 1:
        raise ConfigError(f"--topology={name}: expected 1 device or more, such as cpu:8.")
    chip = CHIPS[match.group(1)]
    # v4 and v5p count chips; each is one JAX device. v2 and v3 count chips of two cores.
    return Topology(name, chip, devices * (2 if match.group(1) in ("v2", "v3") else 1))


def topology_here(devices: Sequence[Any], memory: float) -> Topology:
    """The topology of devices that JAX has, with `memory` bytes each.

    The peak is unknown if the table does not have the device.
    """
    kind = devices[0].device_kind.lower().replace(" lite", "e")  # "TPU v5 lite" is v5e
    chips = [chip for name, chip in CHIPS.items() if name in re.split(r"[ \-]", kind)]
    chip = chips[0] if chips else CHIPS["cpu"]
    return Topology(HERE, chip._replace(platform=devices[0].platform, memory=memory), len(devices))


def compile_only_devices(topology: Topology, platform: str, /, **options: str) -> Sequence[Any]:
    """Abstract devices of a compiler; `platform` names the compiler in the error.

    Raises:
      ConfigError: the compiler does not support them.
    """
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(**options).devices
    except Exception as error:  # the plugins raise no common type
        raise ConfigError(
            f"--topology={topology.name}: the {platform}'s compiler does not support it: "
            f"{str(error).splitlines()[0]:.200}"
        ) from error
