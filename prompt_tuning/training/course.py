"""Where a run stands at a step, and how that is kept: in MODEL_DIR, or elsewhere if it must be.

`loop.py` moves a `Course` on; what is saved here is all it needs to go on from there bit for bit.
"""

from __future__ import annotations

import dataclasses
import functools
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from prompt_tuning.checkpoints import manifest, retry, run_state
from prompt_tuning.checkpoints import t5x as t5x_checkpoint
from prompt_tuning.config import EvalConfig, Experiment, to_dict
from prompt_tuning.evaluation.records import RunLog
from prompt_tuning.runtime import processes
from prompt_tuning.session.session import Backbone, Session
from prompt_tuning.training import step as steps
from prompt_tuning.training.progress import Pace


@dataclasses.dataclass(frozen=True)
class Standing:
    """How the run stands apart from its arrays; saved beside them."""

    best_score: float | None = None
    best_step: int | None = None
    evals_since_best: int = 0
    stopped_early: bool = False  # follows from the one before and from the setting
    evaluation_due: bool = False  # the evaluation of this step was broken off


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What a run ends with."""

    model_dir: Path
    step: int
    summary: str
    best_step: int | None = None
    prompt: np.ndarray | None = None  # float32 [P, D]; the last one
    checkpoint: Path | None = None  # of a pre-training run
    held_out_loss: float | None = None  # of a pre-training run: nats per token


class Store(Protocol):
    """The saved states of a run."""

    def latest_step(self) -> int | None:
        """The step of the newest state, None if there is no state."""
        ...

    def read_meta(self) -> dict[str, Any] | None:
        """What was saved with the newest state that can be read."""
        ...

    def restore(self, abstract: Any) -> tuple[Any, dict[str, Any]]:
        """The newest undamaged state, in the place of `abstract`, and what was saved with it."""
        ...

    def save(
        self, step: int, state: Any, meta: Mapping[str, Any] | None = None, *, replace: bool = False
    ) -> None:
        """Saves a state, perhaps in the background."""
        ...

    def wait(self) -> None:
        """Returns when everything is on disk."""
        ...

    def close(self) -> None:
        """Waits, and ends what runs in the background."""
        ...


class Objective(Protocol):
    """What a run trains on, how that is scored, and where its states are saved.

    `training.tasks.Tasks` and `pretraining.run.Pretraining` are the two.
    """

    @property
    def name(self) -> str:
        """What is trained on, in the records."""
        ...

    @property
    def description(self) -> str:
        """What is trained on, for the user."""
        ...

    @property
    def identities(self) -> Mapping[str, str]:
        """Fingerprints of what must be the same if the run goes on, besides the backbone's."""
        ...

    @property
    def saved(self) -> Mapping[str, Any]:
        """What a saved state holds beside, for `load`."""
        ...

    @property
    def has_small_states(self) -> bool:
        """Whether a state is saved at every evaluation, whatever CHECKPOINT_PERIOD."""
        ...

    @staticmethod
    def check(experiment: Experiment, mesh: Mesh) -> None:
        """Raises ConfigError for settings that do not fit, before anything is read."""
        ...

    @staticmethod
    def open_store(experiment: Experiment, shared: Path, own: Path, start: int) -> Store:
        """The saved states in MODEL_DIR, of a run that begins at the step `start`.

        `shared` is MODEL_DIR; `own` is where this process writes.
        """
        ...

    @staticmethod
    def describe_saved(model_dir: Path) -> str:
        """What is saved in MODEL_DIR, as a sentence."""
        ...

    @classmethod
    def load(
        cls, experiment: Experiment, session: Session, model_dir: Path, meta: Any
    ) -> Objective:
        """Reads what is trained on; `meta` is of a run that goes on."""
        ...

    def fingerprint(self) -> str:
        """A digest of the rows, which every process of a run has to have read alike."""
        ...

    def first_params(self, backbone: Backbone) -> tuple[dict[str, np.ndarray], str]:
        """The prompt's parameters before the first step, and a sentence on them."""
        ...

    def restore_optimizer(self, state: steps.TrainState) -> steps.TrainState:
        """The first state, with the optimiser of the checkpoint if RESTORE_OPTIMIZER is set."""
        ...

    def repair(self, model_dir: Path, standing: Standing) -> None:
        """Makes anew what a run that goes on finds damaged in MODEL_DIR."""
        ...

    def batches(self, numbers: range) -> Iterator[list[dict[str, jax.Array]]]:
        """The length groups of one step after another, on the devices."""
        ...

    def name_rows(self, number: int) -> str:
        """The rows in the batch of a step, counted from 1 in this run."""
        ...

    def begin(self, run: Run, course: Course) -> None:
        """What comes before the first step: scores to compare with, and a first state."""
        ...

    def evaluate(self, run: Run, course: Course) -> tuple[Standing, list[str]]:
        """Scores the state and writes what it is worth; the new standing, and lines to show."""
        ...

    def save_last_good(self, run: Run, state: steps.TrainState, step: int) -> str:
        """After a step that was not finite: writes what the newest saved state has, and says it."""
        ...

    def finish(self, run: Run, course: Course, model_dir: Path) -> TrainResult:
        """Pictures and tables at the end of a run."""
        ...


@dataclasses.dataclass(frozen=True)
class Run:
    """The fixed parts of a run."""

    experiment: Experiment
    mesh: Mesh
    work: Objective
    backbone: Backbone
    frozen: Mapping[str, jax.Array]
    programs: steps.Programs
    log: RunLog
    identities: Mapping[str, str]  # fingerprints of backbone, vocabulary, files
    init: str  # how the prompt began
    store: Store


@dataclasses.dataclass
class Course:
    """What changes as a run goes on."""

    step: int  # absolute; counted on the host, so that nobody waits for the device
    state: steps.TrainState
    standing: Standing
    sums: list[Mapping[str, Any]]  # of each step since the last record, see model/loss.py
    saved: tuple[int, Standing] | None = None  # what the newest saved state is of
    losses: list[float] = dataclasses.field(default_factory=list)  # of each step since the start
    pace: Pace = dataclasses.field(default_factory=Pace)


def restore(store: Store, state: steps.TrainState) -> Course:
    """The course as it was saved."""
    state, meta = store.restore(state)
    standing = Standing(**meta.get("standing", {}))
    sums: list[Mapping[str, Any]] = [
        {k: np.float32(v) for k, v in one.items()} for one in meta.get("sums", [])
    ]
    step = int(state.step)
    return Course(step, state, standing, sums, (step, standing))


def save(run: Run, course: Course) -> None:
    """Saves the course in MODEL_DIR, in the background, unless that is done already.

    Raises:
      SaveError: it cannot be written, and waiting for a little while has not helped.
    """
    now = course.step, course.standing
    if course.saved == now:
        return
    if run.experiment.train.trainable == "model" and run.work.has_small_states:
        keep = {course.step, course.standing.best_step}
        _write_checkpoint(run.log.model_dir, course, keep)
    replace = course.saved is not None  # so a step that is there already has to be another
    described = _describe(run, course)
    write = functools.partial(run.store.save, course.step, course.state, described, replace=replace)
    if processes.count() == 1:
        retry.retried(write, run.log.model_dir / "checkpoints")
    else:  # all take part in it: one alone cannot do it again
        write()
    course.saved = now


def _describe(run: Run, course: Course) -> dict[str, Any]:
    sums = jax.device_get(course.sums)
    return {
        "experiment": to_dict(run.experiment),
        "standing": dataclasses.asdict(course.standing),
        "sums": [{k: float(v) for k, v in one.items()} for one in sums],
        **run.identities,
        **run.work.saved,
    }


def _write_checkpoint(model_dir: Path, course: Course, keep: set[int | None]) -> None:
    """The tuned model in T5X's format, before the state that says so; last and best are kept."""
    path = model_dir / f"checkpoint_{course.step}"
    t5x_checkpoint.write_t5x(str(path), course.state.trainable, course.step)
    manifest.record(path)
    for folder in model_dir.glob("checkpoint_*"):
        if int(folder.name.removeprefix("checkpoint_")) not in keep:
            shutil.rmtree(folder)


def keep(run: Run, course: Course) -> str:
    """Saves the course wherever it can, and says where: for a run that has to end here."""
    step, place = course.step, run.log.model_dir
    if any(leaf.is_deleted() for leaf in jax.tree.leaves(course.state)):
        return run.work.describe_saved(place)  # it ended within a step
    try:
        save(run, course)
        run.store.wait()
        return run.work.describe_saved(place)
    except (run_state.SaveError, OSError):
        pass
    if not run.work.has_small_states:
        return run.work.describe_saved(place)
    try:
        elsewhere = Path(tempfile.mkdtemp(prefix="t5x-saved-"))
        with run_state.RunStateStore(elsewhere) as store:
            store.save(step, course.state, _describe(run, course))
    except (run_state.SaveError, OSError):
        return f"The state of step {step} could be saved nowhere. {run.work.describe_saved(place)}"
    return (
        f"The state of step {step} is saved in {elsewhere}. Once {place} can be written to, "
        f"`cp -r {elsewhere}/{step} {place / 'checkpoints'}`, and the same command continues from "
        "there."
    )


def describe_saved(model_dir: Path) -> str:
    """The newest state of a run, as a sentence."""
    saved = run_state.saved_steps(model_dir / "checkpoints")
    if not saved:
        return f"No state is saved yet in {model_dir}: the same command starts from the beginning."
    return (
        f"The state of step {saved[-1]} is saved in {model_dir}; the same command continues from "
        "there."
    )


def judge(standing: Standing, config: EvalConfig) -> Standing:
    """Whether the run has to stop early, by the setting of today."""
    patience = config.early_stopping_evals
    stops = patience is not None and standing.evals_since_best >= patience
    return dataclasses.replace(standing, stopped_early=stops)


def say_stopped(standing: Standing, config: EvalConfig) -> str:
    """That the run has stopped early, and how it goes on."""
    return (
        f"stopped early: {standing.evals_since_best} evaluations without a better one than that of "
        f"step {standing.best_step} (EARLY_STOPPING_EVALS = {config.early_stopping_evals}; with a "
        "larger one, or None, the same command goes on)"
    )
