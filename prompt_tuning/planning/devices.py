"""Mesh, memory of the arrays and batch of a run, for `t5x train --dry_run`. Compiles nothing."""

from __future__ import annotations

import math
from typing import Any

import jax
from jax.sharding import Mesh

from prompt_tuning.batches.groups import check_microbatches, make_cutting
from prompt_tuning.config import Experiment
from prompt_tuning.model import sharding
from prompt_tuning.model.device import choose_device
from prompt_tuning.planning import program
from prompt_tuning.planning.chips import GIB
from prompt_tuning.session import checks


def describe_devices(experiment: Experiment, mesh: Mesh | None = None) -> str:
    """A text on the mesh, the memory of weights and optimiser, and the cutting of batches.

    Raises:
      ConfigError: batch or mesh do not fit the devices.
    """
    mesh = mesh or sharding.make_mesh(experiment.num_model_partitions)
    rows = experiment.data.batch_size
    checks.check_method(experiment)
    checks.check_batch_size(rows, mesh)
    partitions = mesh.shape["model"]
    choose_device(experiment.model, mesh.devices.flat, partitions=partitions)
    kind = getattr(mesh.devices.flat[0], "device_kind", "device")
    parts = describe_parts(experiment, mesh)
    return "\n".join(
        [
            f"mesh: data {mesh.shape['data']} x model {mesh.shape['model']} on {mesh.size} {kind}, "
            f"{jax.process_count()} process(es)",
            f"{describe_arrays(experiment, mesh)}; `t5x plan` estimates the temporaries of a step",
            f"batch: {rows} rows, {rows // mesh.shape['data']} a data-parallel device, "
            f"{host_rows(rows, mesh)} of this host; {parts}",
        ]
    )


def describe_parts(experiment: Experiment, mesh: Mesh) -> str:
    """A text on the parts that a batch is cut into.

    Raises:
      ConfigError: MICROBATCHES does not fit batch and mesh.
    """
    if experiment.corpus.objective != "task":
        parts = experiment.train.microbatches
        check_microbatches(experiment.data.batch_size, parts, mesh.shape["data"])
        return f"{parts} equal part(s) of one shape"
    cutting = make_cutting(experiment.train, experiment.data, mesh.shape["data"])
    return (
        f"{cutting.fewest} to {cutting.most} parts by length, at most {cutting.max_shapes} shapes"
    )


def describe_arrays(experiment: Experiment, mesh: Mesh) -> str:
    """A text on the memory of weights, prompt and optimiser on each device."""
    state, frozen = program.abstract_state(experiment, mesh)
    changing = device_bytes(state) / GIB
    if experiment.train.trainable == "model":
        return f"weights and optimiser: {changing:.3f} GiB a device in float32"
    weights = f"{device_bytes(frozen) / GIB:.3f} GiB a device in {experiment.model.dtype}"
    return f"weights: {weights}, prompt and optimiser: {1024 * changing:.3f} MiB"


def device_bytes(tree: Any) -> int:
    """The bytes on one device of arrays of these shapes, dtypes and shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def host_rows(rows: int, mesh: Mesh) -> int:
    """The number of rows of a batch that this process puts on its devices."""
    local = {
        data
        for data, devices in enumerate(mesh.devices)
        if any(device.process_index == jax.process_index() for device in devices)
    }
    return len(local) * (rows // mesh.shape["data"])
