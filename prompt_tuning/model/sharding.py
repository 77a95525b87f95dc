"""One table from parameter name to T5X's logical axes to mesh axes, read by loader and step.

The mesh has two axes: 'data' splits the batch, 'model' the width of the matrices. Modules carry no
annotations; XLA propagates the shardings of parameters and batch.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from prompt_tuning.config import ConfigError

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


def param_shardings(
    shapes: Mapping[str, jax.ShapeDtypeStruct | jax.Array], mesh: Mesh
) -> dict[str, NamedSharding]:
    """The sharding of every parameter."""
    return {
        name: NamedSharding(mesh, partition_spec(name, value.shape, mesh))
        for name, value in shapes.items()
    }


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
