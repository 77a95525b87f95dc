"""A session is what every command opens first: devices, model, and the backbone being read.

    with open_session(run) as session:     # the backbone is read in the background from here on
        import TensorFlow, load rows ...
        backbone = session.load_backbone()

Training, pre-training, evaluation and submissions open a session; the predictor does not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import jax
from jax.sharding import Mesh
from jaxtyping import Array

from prompt_tuning.checkpoints import architecture, huggingface, identity, load, manifest
from prompt_tuning.config import ConfigError, EvalRun, Experiment, InferRun
from prompt_tuning.model import sharding
from prompt_tuning.model.device import choose_device
from prompt_tuning.model.t5 import T5, init_params, param_shapes
from prompt_tuning.runtime import processes
from prompt_tuning.runtime.prefetch import Prefetcher
from prompt_tuning.runtime.replace_folder import local_folder
from prompt_tuning.session import checks

if TYPE_CHECKING:
    from prompt_tuning.config.gin_reader import Loaded

RunT = TypeVar("RunT", Experiment, EvalRun, InferRun)


@dataclasses.dataclass(frozen=True)
class Backbone:
    """The parameters of a checkpoint's T5, on the devices."""

    params: dict[str, Array]
    step: int
    identity: str


@dataclasses.dataclass(frozen=True)
class Session:
    """The devices, the model, and the backbone, which is read in the background."""

    checkpoint: str
    mesh: Mesh
    model: T5
    step: int  # of the checkpoint; 0 if the weights are random
    verifies: bool  # check the checkpoint against its manifest
    reading: Prefetcher[tuple[str, Array]] | None  # None: the weights are random

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        if self.reading is not None:
            self.reading.close()

    def load_backbone(self, seed: int = 0) -> Backbone:
        """The backbone on the devices, in its dtype: the checkpoint's, or random by `seed`.

        Raises:
          ConfigError: the checkpoint is damaged, or is of another model.
        """
        if self.verifies:
            print(manifest.check_checkpoint(load.find_path(self.checkpoint)), flush=True)
        if self.reading is not None:
            with self.reading as items:
                params = dict(items)
        else:
            shapes = param_shapes(self.model.config)
            places = sharding.param_shardings(shapes, self.mesh)
            make = jax.jit(init_params, static_argnums=0, out_shardings=places)
            params = make(self.model.config, jax.random.key(seed))
        return Backbone(params, self.step, identity.backbone_identity(params))


def open_session(run: Experiment | EvalRun) -> Session:
    """The session of a run, after checks of devices and sizes; the backbone is already being read.

    Weights that are to be trained are read in float32, frozen ones in the model's dtype.

    Raises:
      ConfigError: devices, sizes or attention do not fit, or there is no checkpoint.
    """
    processes.check_joined()
    mesh = sharding.make_mesh(run.num_model_partitions)
    dtype, is_random = run.model.dtype, False
    if isinstance(run, Experiment):
        dtype = "float32" if run.train.trainable == "model" else dtype
        is_random = run.from_scratch
        checks.check_method(run)
        checks.check_batch_size(run.data.batch_size, mesh)
    checks.check_activations(run, mesh)
    partitions = run.num_model_partitions
    model = T5(run.model, choose_device(run.model, mesh.devices.flat, partitions=partitions))
    step, reading = 0, None
    if not is_random:
        step = load.read_step(run.checkpoint)
        backbone = load.iter_backbone(run.checkpoint, run.model, dtype=dtype, mesh=mesh)
        reading = Prefetcher(backbone)
    return Session(run.checkpoint, mesh, model, step, run.verify_checkpoint, reading)


def make_dir(name: str, macro: str) -> Path:
    """The absolute path of the folder that a macro names; makes the folder.

    Raises:
      ConfigError: it cannot be made, or is in a bucket.
    """
    path = local_folder(name, macro)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{macro} {path} cannot be made or is not a folder ({error.strerror}). Choose another."
        ) from error
    return path


def describe_start(experiment: Experiment, step: int) -> Iterator[str]:
    """Notes on the step at which backbone and optimiser start, and on an unused prompt, if any.

    A Hugging Face folder has no step, so the user has to choose where Adafactor starts.
    """
    files = [experiment.prompt.file] if experiment.prompt.init == "file" else []
    if unused := load.describe_unused_prompt(experiment.checkpoint, files):
        yield unused
    path = load.find_path(experiment.checkpoint)
    optimizer = experiment.optimizer
    if step or optimizer.name != "adafactor" or not huggingface.is_huggingface(path):
        return
    if optimizer.start_step is not None:
        yield f"backbone: a Hugging Face folder, step 0; Adafactor starts at {optimizer.start_step}"
        return
    yield (
        "backbone: a Hugging Face folder, which has no step, so steps and Adafactor start at 0. "
        "The paper's Adafactor started at the step of the LM-adapted checkpoint: "
        "--gin.OPTIMIZER_START_STEP=1100000"
    )


def resolve_sizes(loaded: Loaded[RunT]) -> Loaded[RunT]:
    """The settings with the checkpoint's sizes in place of "from_checkpoint" (gin/models/).

    Raises:
      ConfigError: no checkpoint is named, it cannot be read, or a field is not a size.
    """
    if not loaded.open_sizes:
        return loaded
    for name in loaded.open_sizes:
        if name not in architecture.SIZES and name not in architecture.FORM:
            raise ConfigError(
                f"{name.upper()} = 'from_checkpoint': a checkpoint does not contain it. Give a "
                "value."
            )
    macro = "initial_checkpoint_path" if loaded.kind is Experiment else "checkpoint_path"
    spec = loaded.fields[f"{loaded.kind.__name__}.{macro}"]
    if not isinstance(spec, str):
        raise ConfigError(
            "the model's sizes are 'from_checkpoint', but no checkpoint is named. Set "
            "INITIAL_CHECKPOINT_PATH (t5x train) or CHECKPOINT_PATH."
        )
    model = load.read_model(spec)
    return loaded.fill_sizes({name: getattr(model, name) for name in loaded.open_sizes})
