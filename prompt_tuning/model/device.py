"""How a T5 is computed on the devices where it lies: chosen once, and an argument of the model.

Before `products.py`, which multiplies; `session` and the predictor choose.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

from prompt_tuning.config import Attending, ConfigError, ModelConfig


class Device(NamedTuple):
    """How a T5 is computed.

    * "processor": one CPU device. Attention takes a few rows of a batch at a time. In bfloat16 the
      factors of an MLP's product stay float32 until they are multiplied, because processors round
      to bfloat16 slowly.
    * "gpu": in bfloat16, sequences are padded to a multiple of 8 (`padded_length`).
    * "any": all else: several CPU devices, over which the rows of a batch are split, and TPUs.
    """

    kind: Literal["any", "processor", "gpu"] = "any"
    # The kernel that attends by the lengths of rows, if ATTENTION = 'cudnn'. XLA's has the same
    # arguments, and takes its place if the program is compiled on other devices.
    kernel: Attending = "xla"


ANY = Device()


def choose_device(
    config: ModelConfig, devices: Iterable[Any], platform: str = "", *, partitions: int = 1
) -> Device:
    """How `config` is computed on these devices, or on devices of `platform` that they stand for.

    `partitions` of them share the heads of one copy of the model.

    Raises:
      ConfigError: the devices do not have the attention that ATTENTION names.
    """
    devices = list(devices)
    compiling = [device.platform for device in devices]
    platforms = [platform] * len(compiling) if platform else compiling
    if set(platforms) == {"gpu"}:
        if config.attention == "cudnn" and config.num_heads % partitions:
            raise ConfigError(
                f"ATTENTION = 'cudnn' takes whole heads: NUM_MODEL_PARTITIONS = {partitions} does "
                f"not divide NUM_HEADS = {config.num_heads}. Choose a divisor, or set ATTENTION = "
                "'xla'."
            )
        if compiling != platforms:
            return Device("gpu", "xla")
        _check_capability(config, devices)
        return Device("gpu", "cudnn")
    if config.attention == "cudnn":
        raise ConfigError(
            f"ATTENTION = 'cudnn' is for NVIDIA's GPUs, and the devices are {platforms[0]}: set "
            "ATTENTION = 'xla'."
        )
    return Device("processor") if platforms == ["cpu"] else ANY


def _check_capability(config: ModelConfig, devices: Sequence[Any]) -> None:
    """Raises ConfigError for GPUs that lack cuDNN's attention, before XLA compiles for them."""
    for device in devices if config.attention == "cudnn" else ():
        if not _is_ampere(device):
            capability = getattr(device, "compute_capability", "none")
            raise ConfigError(
                "ATTENTION = 'cudnn' is for NVIDIA's GPUs of compute capability 8.0 (Ampere) or "
                f"later, and {device.device_kind} has {capability}: set ATTENTION = 'xla'."
            )


def _is_ampere(device: Any) -> bool:
    """Whether it is a GPU of NVIDIA's, of compute capability 8.0 or later."""
    numbers = str(getattr(device, "compute_capability", "none")).split(".")
    return all(n.isdigit() for n in numbers) and int(numbers[0]) >= 8  # AMD's have names


def multiplies_bfloat16(device: Any) -> bool:
    """Whether the device has products in bfloat16: a TPU, or a GPU of NVIDIA's from Ampere on."""
    return device.platform == "tpu" or _is_ampere(device)


def padded_length(config: ModelConfig, device: Device, length: int) -> int:
    """The length that sequences are padded to: on GPUs a multiple of 8 in bfloat16.

    Their bfloat16 products need such sizes. XLA copies every operand of another size, the attention
    weights too, which are the most that a step keeps.

    >>> config = ModelConfig(num_encoder_layers=1, num_decoder_layers=1, num_heads=1, head_dim=64,
    ...                      embed_dim=64, mlp_dim=64, num_embeddings=8, dtype="bfloat16")
    >>> padded_length(config, Device("gpu"), 612), padded_length(config, ANY, 612)
    (616, 612)
    """
    if device.kind != "gpu" or config.dtype != "bfloat16":
        return length
    return -(-length // 8) * 8
