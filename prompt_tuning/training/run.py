"""The parts of a run: those that are fixed (`Run`), its `LoopState`, and its `Objective`.

`loop.py` advances a `LoopState`. This module saves and restores it, and ends a failed run: it adds
to the error where the state is saved. A run that is resumed ends with the same bits.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import jax
import numpy as np
from jax.sharding import Mesh

from prompt_tuning.checkpoints import manifest, run_state, t5x_states
from prompt_tuning.checkpoints import t5x as t5x_checkpoint
from prompt_tuning.config import ConfigError, EvalConfig, Experiment, to_dict
from prompt_tuning.evaluation.records import RunLog
from prompt_tuning.model.loss import NotRankableError
from prompt_tuning.model.prompt import Prompt
from prompt_tuning.runtime import processes, signals
from prompt_tuning.runtime.replace_folder import write_with_retries
from prompt_tuning.session.session import Backbone, Session
from prompt_tuning.training import health
from prompt_tuning.training import step as steps
from prompt_tuning.training.progress import StepTimer


@dataclasses.dataclass(frozen=True)
class EvalStatus:
    """The best score so far, and early stopping; saved beside the arrays."""

    best_score: float | None = None
    best_step: int | None = None
    evals_since_best: int = 0
    stopped_early: bool = False  # follows from `evals_since_best` and EARLY_STOPPING_EVALS
    evaluation_due: bool = False  # the evaluation of this step was interrupted


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """The result of a run."""

    model_dir: Path
    step: int
    summary: str
    best_step: int | None = None
    # Of the last step: float32[P, D], if it is rows; [M, P, D], if it has members.
    prompt: np.ndarray | Prompt | None = None
    checkpoint: Path | None = None  # of a pre-training run
    held_out_loss: float | None = None  # of a pre-training run: nats per token


Store = run_state.RunStateStore | t5x_states.CheckpointStore


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective(abc.ABC):
    """The rows that a run trains on, how it is scored, and where its states are saved.

    There are two: `training.tasks.Tasks` and `pretraining.run.Pretraining`.
    """

    experiment: Experiment
    mesh: Mesh
    name: str  # of the task or corpus, in the records
    description: str  # of the rows, for the user
    # Fingerprints that must be the same when the run is resumed, besides the backbone's.
    identities: Mapping[str, str]
    # Whether a state is saved at every evaluation, regardless of CHECKPOINT_PERIOD.
    has_small_states: ClassVar[bool]

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Metadata that is saved with each state, for `load`."""
        return {}

    @staticmethod
    @abc.abstractmethod
    def check(experiment: Experiment, mesh: Mesh) -> None:
        """Raises ConfigError for invalid settings, before anything is read."""

    @staticmethod
    @abc.abstractmethod
    def open_store(experiment: Experiment, shared: Path, own: Path, start: int) -> Store:
        """The saved states of a run that begins at the step `start`.

        `shared` is MODEL_DIR; `own` is the folder that this process writes to.
        """

    @staticmethod
    @abc.abstractmethod
    def describe_saved(model_dir: Path) -> str:
        """A sentence on the newest saved state in MODEL_DIR."""

    @classmethod
    @abc.abstractmethod
    def load(
        cls, experiment: Experiment, session: Session, model_dir: Path, meta: Any
    ) -> Objective:
        """Reads the rows; `meta` is the metadata of a resumed run, else None.

        Raises:
          ConfigError: the rows or their vocabulary are missing, or do not fit the model.
        """

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """A digest of the rows; every process of a run must have the same."""

    @abc.abstractmethod
    def first_params(self, backbone: Backbone) -> tuple[dict[str, np.ndarray], str]:
        """The prompt's parameters before the first step, and a description of them."""

    def restore_optimizer(self, state: steps.TrainState) -> steps.TrainState:
        """The first state, with the optimiser of the checkpoint if RESTORE_OPTIMIZER is set."""
        return state

    def repair(self, model_dir: Path, status: EvalStatus) -> None:  # noqa: B027
        """Restores damaged files in MODEL_DIR when a run is resumed; there may be none."""

    @abc.abstractmethod
    def batches(self, numbers: range) -> Iterator[list[dict[str, jax.Array]]]:
        """The length groups of each step, on the devices."""

    @abc.abstractmethod
    def name_rows(self, number: int) -> str:
        """A text that names the rows in the batch of a step; steps are counted from 1."""

    @abc.abstractmethod
    def begin(self, run: Run, loop: LoopState) -> None:
        """Before the first step: scores the baselines, and saves a first state."""

    @abc.abstractmethod
    def evaluate(self, run: Run, loop: LoopState) -> tuple[EvalStatus, list[str]]:
        """The new status, and lines to show; scores the state and writes records."""

    @abc.abstractmethod
    def save_last_good(self, run: Run, state: steps.TrainState, step: int) -> str:
        """A sentence on the last good prompt or checkpoint, which it writes; after a divergence."""

    @abc.abstractmethod
    def finish(self, run: Run, loop: LoopState, model_dir: Path) -> TrainResult:
        """The result of the run, with pictures and tables."""


@dataclasses.dataclass(frozen=True)
class Run:
    """The parts of a run that no step changes."""

    experiment: Experiment
    mesh: Mesh
    work: Objective
    backbone: Backbone
    frozen: Mapping[str, jax.Array]
    programs: steps.Programs
    log: RunLog
    identities: Mapping[str, str]  # fingerprints of backbone, vocabulary, files
    init: str  # a description of the prompt's initialisation
    store: Store
    after_evaluation: Callable[[], object] | None = None


@dataclasses.dataclass
class LoopState:
    """The parts of a run that each step changes."""

    step: int  # absolute; counted on the host, so that reading it does not wait for the device
    state: steps.TrainState
    status: EvalStatus
    sums: list[Mapping[str, Any]]  # metrics of each step since the last record, see model/loss.py
    last_saved: tuple[int, EvalStatus] | None = None  # of the newest saved state
    losses: list[float] = dataclasses.field(default_factory=list)  # of each step of this process
    timer: StepTimer = dataclasses.field(default_factory=StepTimer)


def restore(store: Store, state: steps.TrainState) -> LoopState:
    """The loop state of the newest saved state."""
    state, meta = store.restore(state)
    status = EvalStatus(**meta.get("standing", {}))
    sums: list[Mapping[str, Any]] = [
        {k: np.float32(v) for k, v in metrics.items()} for metrics in meta.get("sums", [])
    ]
    step = int(state.step)
    return LoopState(step, state, status, sums, (step, status))


def save(run: Run, loop: LoopState) -> None:
    """Saves the loop state in MODEL_DIR, in the background, unless it is saved already.

    Raises:
      SaveError: it cannot be written, even after some retries.
    """
    now = loop.step, loop.status
    if loop.last_saved == now:
        return
    if run.experiment.train.trainable == "model" and run.work.has_small_states:
        keep = {loop.step, loop.status.best_step}
        _write_checkpoint(run.log.model_dir, loop, keep)
    replace = loop.last_saved is not None  # an existing state of this step has another status
    described = _describe(run, loop)
    write = functools.partial(run.store.save, loop.step, loop.state, described, replace=replace)
    if processes.count() == 1:
        write_with_retries(write, run.log.model_dir / "checkpoints")
    else:  # a collective: a single process cannot retry it
        write()
    loop.last_saved = now


def _describe(run: Run, loop: LoopState) -> dict[str, Any]:
    sums = jax.device_get(loop.sums)
    return {
        "experiment": to_dict(run.experiment),
        "standing": dataclasses.asdict(loop.status),
        "sums": [{k: float(v) for k, v in metrics.items()} for metrics in sums],
        **run.identities,
        **run.work.metadata,
    }


def _write_checkpoint(model_dir: Path, loop: LoopState, keep: set[int | None]) -> None:
    """Writes the tuned model in T5X's format; removes all checkpoints but those of `keep`.

    It must be written before the state that refers to it.
    """
    path = model_dir / f"checkpoint_{loop.step}"
    t5x_checkpoint.write_t5x(str(path), loop.state.trainable, loop.step)
    manifest.record(path)
    for folder in model_dir.glob("checkpoint_*"):
        if int(folder.name.removeprefix("checkpoint_")) not in keep:
            shutil.rmtree(folder)


def save_anywhere(run: Run, loop: LoopState) -> str:
    """A sentence on where the loop state is saved: in MODEL_DIR, else in a temporary folder."""
    step, place = loop.step, run.log.model_dir
    if any(leaf.is_deleted() for leaf in jax.tree.leaves(loop.state)):
        return run.work.describe_saved(place)  # the step that failed had donated the state
    try:
        save(run, loop)
        run.store.wait()
        return run.work.describe_saved(place)
    except OSError:
        pass
    if not run.work.has_small_states:
        return run.work.describe_saved(place)
    try:
        elsewhere = Path(tempfile.mkdtemp(prefix="t5x-saved-"))
        with run_state.RunStateStore(elsewhere) as store:
            store.save(step, loop.state, _describe(run, loop))
    except OSError:
        return f"The state of step {step} could not be saved. {run.work.describe_saved(place)}"
    return (
        f"The state of step {step} is saved in {elsewhere}. Once {place} can be written to, "
        f"`cp -r {elsewhere}/{step} {place / 'checkpoints'}`, and the same command continues from "
        "there."
    )


def describe_saved(model_dir: Path) -> str:
    """A sentence on the newest saved state of a run."""
    saved = run_state.saved_steps(model_dir / "checkpoints")
    if not saved:
        return f"No state is saved yet in {model_dir}: the same command starts from the beginning."
    return (
        f"The state of step {saved[-1]} is saved in {model_dir}; the same command continues from "
        "there."
    )


def check_patience(status: EvalStatus, config: EvalConfig) -> EvalStatus:
    """The status with `stopped_early` set by the current EARLY_STOPPING_EVALS."""
    patience = config.early_stopping_evals
    stops = patience is not None and status.evals_since_best >= patience
    return dataclasses.replace(status, stopped_early=stops)


def describe_early_stop(status: EvalStatus, config: EvalConfig) -> str:
    """A sentence on early stopping, and on how to continue."""
    return (
        f"stopped early: {status.evals_since_best} evaluations without a better score than at step "
        f"{status.best_step} (EARLY_STOPPING_EVALS = {config.early_stopping_evals}). To continue, "
        "give the same command with a larger value, or None."
    )


# A failed run ----------------------------------------------------------------------------------


def end_failed_run(run: Run, loop: LoopState, error: BaseException) -> NoReturn:
    """Saves the state if possible, then raises the error with a sentence on what is saved.

    Raises:
      Stopped: a signal was received; names the saved step.
      ConfigError: MODEL_DIR cannot be written to.
      NotRankableError: log probabilities are not finite; names the last good prompt.
      FloatingPointError: the loss is not finite; names the step and the rows.
      BaseException: any other `error`, with a note.
    """
    if isinstance(error, NotRankableError):  # the state itself is bad: it is not saved
        raise NotRankableError(f"{error} {_save_last_good(run, loop)}") from error
    if isinstance(error, FloatingPointError):
        raise _describe_divergence(run, loop, error) from error
    if isinstance(error, run_state.SaveError) and loop.last_saved is not None:
        loop.last_saved = -1, loop.status  # the last save may have failed in the background
    saved = _try_save(run, loop)
    if isinstance(error, signals.Stopped):
        raise signals.Stopped(error.signum, saved) from error
    if isinstance(error, OSError):
        reason = error.strerror or error
        raise ConfigError(
            f"MODEL_DIR {run.log.model_dir} cannot be written to: {reason}. {saved}"
        ) from error
    error.add_note(saved)
    raise error


def _try_save(run: Run, loop: LoopState) -> str:
    """A sentence on what is saved, after trying to save the loop state."""
    describe_saved = run.work.describe_saved
    if processes.count() > 1:  # the others may be at another step or have ended
        return describe_saved(Path(run.experiment.model_dir).expanduser())
    if loop.last_saved is None and not loop.sums:  # before the first step
        return describe_saved(run.log.model_dir)
    try:
        health.check_finite(jax.device_get(loop.sums), loop.step)
        return save_anywhere(run, loop)
    except Exception as error:  # a device has failed, or the state is not finite
        return f"This step is not saved ({error!s:.200}). {describe_saved(run.log.model_dir)}"


def _describe_divergence(
    run: Run, loop: LoopState, error: FloatingPointError
) -> FloatingPointError:
    """The error with the step, its rows, and the path of the last good prompt."""
    step, description = health.describe_not_finite(error, loop.step)
    rows = run.work.name_rows(step - run.backbone.step)
    return FloatingPointError(
        f"{description}. The rows of its batch: {rows}. {_save_last_good(run, loop)} Start again "
        "in another MODEL_DIR with a lower LEARNING_RATE, a warm-up (WARMUP_STEPS), or "
        "DTYPE = 'float32'."
    )


def _save_last_good(run: Run, loop: LoopState) -> str:
    """A sentence on the prompt or checkpoint of the newest saved state, which is finite."""
    run.store.wait()
    if run.store.latest_step() is None:
        return run.work.describe_saved(run.log.model_dir)
    good = restore(run.store, loop.state)
    return run.work.save_last_good(run, good.state, good.step)
