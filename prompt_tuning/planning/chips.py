"""What is known of accelerators before one is rented: memory and peak, from their data sheets."""

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
    options: Mapping[str, str] = {}  # what the TPU's compiler has to be told of the chip


# TPUs multiply float32 in bfloat16 by default; GPUs from A100 on in TF32, at half of bfloat16's
# rate; a T4 has no bfloat16 and multiplies it in float32.
CHIPS = {
    "v3": Chip("tpu", 16 * GIB, 61.5e12, 61.5e12),  # a core: two to a chip
    # JAX runs the two cores of a v4 as one device; its compiler has to be asked to.
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


class Topology(NamedTuple):
    """Some chips: `v5e:4x8` is a TPU slice, `h100:8` eight GPUs, `cpu:8` eight CPU devices."""

    name: str
    chip: Chip
    devices: int


def parse_topology(name: str) -> Topology:
    """The chips that a name stands for.

    >>> parse_topology("v5e:4x8").devices, parse_topology("h100:8").chip.platform
    (32, 'gpu')

    Raises:
      ConfigError: there is no such chip, or the size is not one.
    """
    found = re.fullmatch(r"([\w\-]+):(\d+(?:x\d+)*)", name)
    if found is None or found.group(1) not in CHIPS:
        raise ConfigError(
            f"--topology={name}: expected a chip and how many of them, such as v5e:4x8, h100:8 or "
            f"cpu:8. The chips: {', '.join(CHIPS)}."
        )
    devices = math.prod(int(n) for n in found.group(2).split("x"))
    if devices < 1:
        raise ConfigError(
            f"--topology={name} has no device: it must be a count of 1 or more, such as cpu:8."
        )
    chip = CHIPS[found.group(1)]
    # v4 and v5p count chips; each is one JAX device. v3 counts chips of two cores.
    return Topology(name, chip, devices * (2 if found.group(1) == "v3" else 1))


def ask_compiler(topology: Topology, whose: str, /, **asked: str) -> Sequence[Any]:
    """Devices that are not here, of the compiler that is asked for them.

    Raises:
      ConfigError: it does not take them.
    """
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(**asked).devices
    except Exception as error:  # the plugins have no type of their own
        raise ConfigError(
            f"--topology={topology.name}: the {whose}'s compiler does not take it: "
            f"{str(error).splitlines()[0]:.200}"
        ) from error
