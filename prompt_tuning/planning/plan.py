"""`t5x plan`: estimates memory and time of a run on given chips, before renting them.

It compiles the real training step for the real mesh. For TPUs and GPUs it uses their own compilers,
which `pip install libtpu` and `pip install jax[cuda12]` install on any x86 Linux machine. Without
them it uses XLA's CPU compiler, whose memory is an upper bound.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from prompt_tuning.config import ConfigError, Experiment
from prompt_tuning.methods.table import find_method
from prompt_tuning.model import sharding
from prompt_tuning.model.prompt import POSITIONS
from prompt_tuning.planning import flops, gpus, hlo, program
from prompt_tuning.planning.chips import GIB, HERE, Topology, compile_only_devices
from prompt_tuning.planning.devices import describe_parts
from prompt_tuning.session import checks

OVERSTATES = "XLA's CPU compiler: its temporaries are an upper bound"
GPU_COMPILER = "; pip install 'jax[cuda12]' installs the GPU's own"
HEADROOM = 0.95  # the share of a chip's memory that a program can use; the runtime needs the rest
FRACTION = "XLA_CLIENT_MEM_FRACTION"  # JAX's variable: the share of a GPU that it preallocates


@dataclasses.dataclass(frozen=True)
class Plan:
    """The estimates for a run; bytes are those of one device."""

    topology: str
    devices: int
    mesh: dict[str, int]
    compiler: str
    overstates_memory: bool
    compile_seconds: float
    parameters: int
    trainable: int
    dtype: str
    batch: dict[str, int]
    argument_bytes: int
    temporary_bytes: int
    output_bytes: int
    memory_bytes: int | None
    usable_share: float  # the share of the memory that a program can use
    fits: bool | None  # None: the device's memory is unknown
    collectives: dict[str, int]
    largest_gather_bytes: int
    gathers_a_weight: bool
    donates: bool
    forward_flops: int
    step_flops: int
    utilisation: float
    seconds_per_step: float | None
    steps: int | None
    hours: float | None
    problem: str = ""


def make_plan(experiment: Experiment, topology: Topology, *, utilisation: float = 0.4) -> Plan:
    """The plan of a run; compiles its largest program for `topology`.

    Raises:
      ConfigError: batch or mesh do not fit the devices, or the TPU's compiler is not installed.
    """
    if not 0.0 < utilisation <= 1.0:
        raise ConfigError(f"--utilisation={utilisation}: expected a number in (0, 1].")
    checks.check_method(experiment)
    devices, compiler = find_devices(topology)
    compiles_for = devices[0].platform
    mesh = sharding.make_mesh(experiment.num_model_partitions, devices)
    checks.check_batch_size(experiment.data.batch_size, mesh)
    describe_parts(experiment, mesh)  # raises an error if MICROBATCHES does not fit
    shapes = program.largest_shapes(experiment)
    lowered = program.lower_step(experiment, mesh, platform=topology.chip.platform)
    start = time.perf_counter()
    compiled, problem = None, ""
    try:
        options = gpus.OPTIONS if compiles_for == "gpu" and topology.name != HERE else None
        compiled = lowered.compile(options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        problem = _explain_memory(str(error))
    seconds = time.perf_counter() - start
    return Plan(
        topology=topology.name,
        devices=topology.devices,
        mesh=dict(mesh.shape),
        compiler=compiler,
        overstates_memory=compiles_for == "cpu" and topology.name != HERE,
        compile_seconds=round(seconds, 1),
        **_describe_run(experiment, mesh, shapes),
        **_describe_memory(compiled, topology),
        **_describe_program(experiment, lowered, compiled),
        **_describe_time(experiment, topology, utilisation),
        problem=problem,
    )


def find_devices(topology: Topology) -> tuple[Sequence[Any], str]:
    """Devices to compile for, and the name of the compiler.

    Raises:
      ConfigError: the TPU's compiler is not installed, or there are too few CPU devices.
    """
    if topology.name == HERE:
        return jax.devices(), f"this machine's own compiler ({jax.default_backend()})"
    if topology.chip.platform == "tpu":
        return _find_tpus(topology)
    is_gpu = topology.chip.platform == "gpu"
    if is_gpu and gpus.has_compiler():
        return gpus.find_gpus(topology)
    devices = jax.devices("cpu")
    if len(devices) < topology.devices:
        raise ConfigError(
            f"--topology={topology.name} needs {topology.devices} CPU devices, JAX has "
            f"{len(devices)}. Run `t5x plan` in a new process, or set JAX_NUM_CPU_DEVICES."
        )
    return devices[: topology.devices], OVERSTATES + (GPU_COMPILER if is_gpu else "")


def _find_tpus(topology: Topology) -> tuple[Sequence[Any], str]:
    try:
        import libtpu
    except ImportError as error:
        raise ConfigError(
            f"--topology={topology.name} needs the TPU's compiler, which runs on any x86 Linux "
            "machine: pip install libtpu. Without it, --topology=cpu:N gives an upper bound of "
            "the memory."
        ) from error
    options = {"platform": "tpu", "topology_name": topology.name, **topology.chip.options}
    devices = compile_only_devices(topology, "TPU", **options)
    return devices, f"the TPU's own compiler (libtpu {libtpu.__version__})"


def _explain_memory(message: str) -> str:
    match = re.search(r"Used ([\d.]+\w) of ([\d.]+\w) hbm", message)
    if match:
        return f"the program needs {match.group(1)} of {match.group(2)} memory"
    return message.splitlines()[0][:300]


def _describe_run(experiment: Experiment, mesh: Mesh, shapes: program.Shapes) -> dict[str, Any]:
    params = program.abstract_params(experiment, mesh)
    prompt = params.pop("prompt")
    total = sum(value.size for value in params.values())
    return {
        "parameters": total,
        "trainable": prompt.size if experiment.train.trainable == "prompt" else total,
        "dtype": experiment.model.dtype,
        "batch": {**shapes._asdict(), "microbatches": experiment.train.microbatches},
    }


def _describe_memory(compiled: Any, topology: Topology) -> dict[str, Any]:
    capacity = topology.chip.memory
    share = usable_share(topology)
    values: dict[str, Any] = {"memory_bytes": None if capacity is None else int(capacity)}
    values["usable_share"] = share
    if compiled is None:
        return values | {
            "argument_bytes": 0,
            "temporary_bytes": 0,
            "output_bytes": 0,
            "fits": False,
        }
    memory = compiled.memory_analysis()
    output = max(memory.output_size_in_bytes - memory.alias_size_in_bytes, 0)
    used = memory.argument_size_in_bytes + memory.temp_size_in_bytes + output
    return values | {
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "output_bytes": output,
        "fits": None if capacity is None else used <= share * capacity,
    }


def usable_share(topology: Topology, environment: Mapping[str, str] = os.environ) -> float:
    """The share of a chip's memory that a program can use; by default 75 % of a GPU's.

    JAX preallocates that share of a GPU (XLA_CLIENT_MEM_FRACTION), and a run must fit in it.

    >>> from prompt_tuning.planning.chips import parse_topology
    >>> usable_share(parse_topology("h100:1"), {})
    0.75

    Raises:
      ConfigError: the environment variable is not a number.
    """
    if topology.chip.platform != "gpu" or topology.name == HERE:  # its memory is what JAX has
        return HEADROOM
    value = environment.get(FRACTION) or environment.get("XLA_PYTHON_CLIENT_MEM_FRACTION") or "0.75"
    try:
        return float(value)
    except ValueError as error:
        raise ConfigError(
            f"{FRACTION}={value}: expected a share of a GPU's memory. Set a number such as 0.9, or "
            "unset the variable."
        ) from error


def _describe_program(experiment: Experiment, lowered: Any, compiled: Any) -> dict[str, Any]:
    # Without Adafactor's placeholders of one number, which no computation reads.
    state = [x for x in jax.tree.leaves(lowered.args_info) if x.donated and x.shape != (1,)]
    text = "" if compiled is None else compiled.as_text()
    collectives = hlo.collectives(text)
    gathered = [math.prod(shape) for _, shape in collectives.get("all-gather", [])]
    # The elements of one head of a projection, the smallest shard of a matrix.
    smallest = experiment.model.embed_dim * experiment.model.head_dim
    return {
        "collectives": {kind: len(results) for kind, results in sorted(collectives.items())},
        "largest_gather_bytes": 4 * max(gathered, default=0),
        "gathers_a_weight": hlo.gathers_a_weight(text, smallest),
        "donates": 0 < len(state) == len(hlo.donated(text)),
    }


def describe_prompt(experiment: Experiment) -> tuple[dict[str, Any], int]:
    """What `flops.count` is told of the prompt, and the operations of its fold, once a step."""
    given = program.prompt_shapes(experiment)
    lengths = {
        field: 0 if (shape := getattr(given, field)) is None else shape.shape[axis]
        for field, axis in POSITIONS.items()
    }
    prefixes = flops.Prefixes(
        lengths["encoder"], lengths["decoder"], lengths["cross"] + lengths["memory"]
    )
    once = 0
    if find_method(experiment.prompt.method).visibility == "prompt":
        once = flops.count_fold(experiment.model, experiment.prompt.length)
    return {"prompt": lengths["rows"], "prefixes": prefixes}, once


def _describe_time(experiment: Experiment, topology: Topology, utilisation: float) -> dict:
    shapes = program.largest_shapes(experiment)
    tuned = experiment.train.trainable == "prompt"
    given, once = describe_prompt(experiment)
    cost = flops.count(
        experiment.model,
        rows=shapes.rows * experiment.train.microbatches,
        inputs=shapes.inputs,
        targets=shapes.targets,
        **given,
    )
    total = cost.step if tuned else 3 * cost.forward
    total *= 2 if experiment.train.input_noise else 1  # each row is predicted twice
    total += once if tuned else 0
    peak = getattr(topology.chip, experiment.model.dtype)
    seconds = None if peak is None else total / (peak * topology.devices * utilisation)
    steps = run_steps(experiment)
    return {
        "forward_flops": cost.forward,
        "step_flops": total,
        "utilisation": utilisation,
        "seconds_per_step": seconds,
        "steps": steps,
        "hours": None if seconds is None or steps is None else seconds * steps / 3600,
    }


def run_steps(experiment: Experiment) -> int | None:
    """The number of steps of a run; None if the checkpoint's step is unknown."""
    train = experiment.train
    if train.train_steps is None:
        return train.train_steps_relative
    if experiment.from_scratch:
        return train.train_steps
    named = re.search(r"checkpoint_(\d+)/?$", experiment.checkpoint)
    return None if named is None else max(train.train_steps - int(named.group(1)), 0)


def describe(plan: Plan) -> str:
    """The plan as text."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    batch = plan.batch
    share = " (part of a batch)" if batch["microbatches"] > 1 else ""
    lines = [
        ("model", f"{plan.parameters:,} parameters, {plan.dtype}; {plan.trainable:,} are trained"),
        (
            "batch",
            f"{batch['rows']} rows of {batch['inputs']} + {batch['targets']} tokens{share}, "
            f"{batch['rows'] // plan.mesh['data']} a data-parallel device",
        ),
        ("mesh", f"{mesh} on {plan.topology}"),
        ("compiled by", f"{plan.compiler}, in {plan.compile_seconds:.0f} s"),
        ("memory", _memory_line(plan)),
        ("collectives", _collective_line(plan)),
        (
            "cost",
            f"{plan.step_flops / 1e12:.3g} TFLOP a step, "
            f"{plan.step_flops / plan.forward_flops:.2f} x forward",
        ),
        ("time", describe_time(plan)),
    ]
    return "\n".join(f"{name:<12} {text}" for name, text in lines)


def _memory_line(plan: Plan) -> str:
    if plan.problem:
        return f"DOES NOT FIT: {plan.problem}"
    parts = (
        f"{plan.argument_bytes / GIB:.2f} GiB arguments + {plan.temporary_bytes / GIB:.2f} GiB "
        f"temporaries a device"
    )
    if plan.memory_bytes is None:
        return parts
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    if plan.overstates_memory and not plan.fits:
        verdict = "may not fit"
    preallocated = f", of which JAX preallocates {plan.usable_share:.0%} ({FRACTION})"
    share = preallocated if plan.usable_share != HEADROOM else ""
    halves = plan.batch["rows"] % (2 * plan.mesh["data"]) == 0
    if halves and not plan.fits and plan.argument_bytes < plan.usable_share * plan.memory_bytes:
        verdict += f"; MICROBATCHES = {2 * plan.batch['microbatches']} halves the temporaries"
    return f"{parts}, of {plan.memory_bytes / GIB:.0f} GiB{share}: {verdict}"


def _collective_line(plan: Plan) -> str:
    if plan.problem:
        return "unknown"
    counts = ", ".join(f"{count} {kind}" for kind, count in plan.collectives.items()) or "none"
    gathers = "A WEIGHT IS GATHERED" if plan.gathers_a_weight else "no weight is gathered"
    donates = "the state is donated" if plan.donates else "THE STATE IS NOT DONATED"
    return f"{counts}; {gathers}; {donates}"


def describe_time(plan: Plan) -> str:
    """The estimated time of a step and of the run."""
    if plan.seconds_per_step is None:
        return "unknown: the peak of this device is not in the table"
    text = (
        f"{plan.seconds_per_step:.3g} s a step at {plan.utilisation:.0%} of the peak (assumed, "
        "not measured), every row padded to full length"
    )
    if plan.hours is not None:
        text += f"; {plan.steps:,} steps: {plan.hours:.1f} h"
    return text
