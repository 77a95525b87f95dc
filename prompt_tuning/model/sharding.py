"""One table from parameter name to T5X's logical axes to mesh axes, read by loader and step.

The mesh has two axes: 'data' splits the batch, 'model' the width of the matrices. Modules carry no
annotations; XLA propagates the shardings of parameters and batch.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from prompt_tuning.config import ConfigError, ModelConfig
from prompt_tuning.model.device import choose_device

LOGICAL_AXES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"prompt|encoder/prompt/.*", ("prompt", "prompt_embed")),
    (r"token_embedder/embedding", ("vocab", "embed")),
    (r"(encoder|decoder)/relpos_bias/rel_embedding", ("heads", "relpos_buckets")),
    (r".*/(query|key|value)/kernel", ("embed", "joined_kv")),
    (r".*/out/kernel", ("joined_kv", "embed")),
    (r".*/mlp/wi(_\d+)?/kernel", ("embed", "mlp")),
    (r".*/mlp/wo/kernel", ("mlp", "embed")),
    (r"decoder/logits_dense/kernel", ("embed", "vocab")),
    (r".*/scale", ("embed",)),
)
# T5X's one-dimensional parameter partitioning: what is not named here is replicated.
MESH_AXES: Mapping[str, str] = {
    "batch": "data",
    "vocab": "model",
    "heads": "model",
    "joined_kv": "model",
    "mlp": "model",
}


def make_mesh(num_model_partitions: int, devices: Sequence[Any] | None = None) -> Mesh:
    """A ('data', 'model') mesh over all devices.

    Raises:
      ConfigError: the devices cannot be divided by `num_model_partitions`.
    """
    devices = jax.devices() if devices is None else list(devices)
    if len(devices) % num_model_partitions:
        raise ConfigError(
            f"NUM_MODEL_PARTITIONS = {num_model_partitions} does not divide the {len(devices)} "
            "devices: choose a divisor."
        )
    shape = len(devices) // num_model_partitions, num_model_partitions
    grid = np.array(devices).reshape(shape)  # in this order a host's devices are neighbours
    if devices[0].platform == "tpu":
        # Neighbours in the mesh shall be neighbours in the torus. Not every torus is known.
        with contextlib.suppress(AssertionError, NotImplementedError, ValueError):
            grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(grid, ("data", "model"))


def logical_axes(name: str, shape: Sequence[int]) -> tuple[str, ...]:
    """T5X's names of a parameter's dimensions.

    Those of a prompt method's parameters have no names that a mesh divides: each device folds the
    whole prompt.

    Raises:
      ValueError: no rule matches; a parameter is never replicated by accident.
    """
    if name.startswith("prompt/"):
        return tuple(f"method_{number}" for number in range(len(shape)))
    for pattern, axes in LOGICAL_AXES:
        if re.fullmatch(pattern, name):
            return axes
    raise ValueError(f"no rule of LOGICAL_AXES matches the parameter {name}: add one.")


def partition_spec(name: str, shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
    """A parameter's axes on the mesh; a dimension that does not divide evenly is replicated."""
    places = [MESH_AXES.get(axis) for axis in logical_axes(name, shape)]
    sizes = zip(places, shape, strict=True)
    return PartitionSpec(*(p if p and size % mesh.shape[p] == 0 else None for p, size in sizes))


def check_microbatches(size: int, parts: int, mesh: Mesh) -> None:
    """Raises ConfigError if a microbatch does not divide by the data-parallel devices."""
    multiple = parts * mesh.shape["data"]
    if size % multiple:
        raise ConfigError(
            f"BATCH_SIZE = {size} cannot be cut into MICROBATCHES = {parts} equal parts for the "
            f"{mesh.shape['data']} data-parallel devices: choose a multiple of {multiple}."
        )


def check_attention(config: ModelConfig, mesh: Mesh) -> None:
    """Raises ConfigError if ATTENTION is not possible on these devices or their mesh."""
    choose_device(config, mesh.devices.flat)
    check_heads(config, mesh)


def check_heads(config: ModelConfig, mesh: Mesh) -> None:
    """Raises ConfigError if cuDNN would have to attend with a part of a head."""
    if config.attention == "cudnn" and config.num_heads % mesh.shape["model"]:
        raise ConfigError(
            f"ATTENTION = 'cudnn' takes whole heads: NUM_MODEL_PARTITIONS = {mesh.shape['model']} "
            f"does not divide NUM_HEADS = {config.num_heads}. Choose a divisor, or set "
            "ATTENTION = 'xla'."
        )


def param_shardings(
    shapes: Mapping[str, jax.ShapeDtypeStruct | jax.Array], mesh: Mesh
) -> dict[str, NamedSharding]:
    """The sharding of every parameter."""
    return {
        name: NamedSharding(mesh, partition_spec(name, value.shape, mesh))
        for name, value in shapes.items()
    }


def check_memory(mesh: Mesh, needed: int, what: str, lengths: tuple[int, int]) -> None:
    """Refuses a setting that needs more bytes than there are, for rows of these lengths.

    Raises:
      ConfigError: `what` is too large.
    """
    memory, (inputs, targets) = memory_of(mesh), lengths
    if needed > memory:
        raise ConfigError(
            f"{what} with rows of {inputs} + {targets} tokens (TASK_FEATURE_LENGTHS and "
            f"PROMPT_LENGTH) needs more than {needed / 2**30:,.0f} GiB for a step, and the "
            f"{mesh.size} devices have {memory / 2**30:,.0f} GiB: lower {what.split(' ')[0]} or "
            "the lengths."
        )


def memory_of(mesh: Mesh) -> int:
    """Bytes of memory of all devices of the mesh; for CPU devices those of the machine."""
    limits = [(d.memory_stats() or {}).get("bytes_limit", 0) for d in mesh.local_devices]
    if all(limits):
        return sum(limits) * mesh.size // len(limits)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * jax.process_count()


def replicated(mesh: Mesh) -> NamedSharding:
    """The same value on every device."""
    return NamedSharding(mesh, PartitionSpec())


def put(value: np.ndarray, where: Sharding) -> jax.Array:
    """A value that every process has, on the devices of all processes.

    `jax.device_put` would compare it between processes first, which needs equally many devices.
    """
    return jax.make_array_from_callback(value.shape, where, lambda index: value[index])


def replicate(tree: Any, mesh: Mesh) -> Any:
    """A tree of arrays that every process has, on every device."""
    return jax.tree.map(lambda leaf: put(np.asarray(leaf), replicated(mesh)), tree)


def check_batch_size(batch_size: int, mesh: Mesh) -> None:
    """Raises ConfigError when a batch does not divide by the data axis."""
    parts = mesh.shape["data"]
    if batch_size % parts:
        raise ConfigError(
            f"BATCH_SIZE = {batch_size} does not divide by the {parts} data-parallel devices "
            f"({mesh.size} devices, NUM_MODEL_PARTITIONS = {mesh.shape['model']}): choose a "
            f"multiple of {parts}."
        )


def shard_batch(batch: Mapping[str, Any], mesh: Mesh) -> dict[str, jax.Array]:
    """The batch on the devices, its rows split over 'data'.

    Every process has the whole batch and places the rows of its own devices.
    """
    rows = NamedSharding(mesh, PartitionSpec("data"))
    arrays = {name: np.asarray(value) for name, value in batch.items()}
    return {
        name: jax.make_array_from_callback(value.shape, rows, value.__getitem__)
        for name, value in arrays.items()
    }
