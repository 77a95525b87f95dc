"""Fits a run to the devices of this machine, by compiling its largest step for them."""

from __future__ import annotations

import dataclasses

from jax.sharding import Mesh

from prompt_tuning.config import ConfigError, Experiment
from prompt_tuning.model import sharding
from prompt_tuning.model.device import multiplies_bfloat16
from prompt_tuning.planning.chips import GIB, topology_here
from prompt_tuning.planning.plan import Plan, describe_time, make_plan
from prompt_tuning.session import checks

SHORTEST = 64  # inputs are not cut to fewer tokens


def fit_to_devices(experiment: Experiment, memory: float | None = None) -> tuple[Experiment, str]:
    """The experiment with settings that fit these devices, and a line that names them.

    DTYPE is bfloat16 where the device multiplies it. MICROBATCHES is doubled until a step fits; if
    a single row a device does not, the length of the inputs is halved. `memory` is the bytes of one
    device, if not all of them may be used.

    Raises:
      ConfigError: nothing fits.
    """
    mesh = sharding.make_mesh(experiment.num_model_partitions)
    devices = list(mesh.devices.flat)
    topology = topology_here(devices, memory or checks.memory_of(mesh) / mesh.size)
    dtype = "bfloat16" if multiplies_bfloat16(devices[0]) else "float32"
    model = dataclasses.replace(experiment.model, dtype=dtype)
    experiment = dataclasses.replace(experiment, model=model)
    while not (plan := make_plan(experiment, topology)).fits:
        experiment = _make_smaller(experiment, plan, mesh)
    inputs = experiment.data.task_feature_lengths["inputs"]
    used = (plan.argument_bytes + plan.temporary_bytes + plan.output_bytes) / GIB
    return experiment, (
        f"fits {mesh.size} x {devices[0].device_kind}: DTYPE = {dtype!r}, "
        f"MICROBATCHES = {experiment.train.microbatches}, inputs of {inputs} tokens; a step needs "
        f"{used:.1f} of {(plan.memory_bytes or 0) / GIB:.1f} GiB a device\n"
        f"time: {describe_time(plan)}"
    )


def _make_smaller(experiment: Experiment, plan: Plan, mesh: Mesh) -> Experiment:
    """The experiment with half of the rows or, if it is one row a device, half of the inputs."""
    data, train = experiment.data, experiment.train
    rows, lengths = data.batch_size // train.microbatches, dict(data.task_feature_lengths)
    has_room = plan.argument_bytes < plan.usable_share * (plan.memory_bytes or 0)
    if has_room and rows % (2 * mesh.shape["data"]) == 0:
        train = dataclasses.replace(train, microbatches=2 * train.microbatches)
    elif has_room and lengths["inputs"] >= 2 * SHORTEST:
        lengths["inputs"] //= 2
        data = dataclasses.replace(data, task_feature_lengths=lengths)
    else:
        raise ConfigError(
            f"INITIAL_CHECKPOINT_PATH = {experiment.checkpoint!r}: {plan.parameters:,} parameters "
            f"in {plan.dtype} do not fit: a device has {(plan.memory_bytes or 0) / GIB:.1f} GiB, "
            f"and the weights, the prompt and its optimiser are {plan.argument_bytes / GIB:.1f} of "
            "them. Choose a smaller backbone, or devices with more memory."
        )
    return dataclasses.replace(experiment, data=data, train=train)
