"""Where a run stands at a step, and how that is kept: in MODEL_DIR, or elsewhere if it must be.

`loop.py` moves a `Course` on; what is saved here is all it needs to go on from there bit for bit.
"""

from __future__ import annotations

import dataclasses
import functools
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from prompt_tuning.batches import groups
from prompt_tuning.checkpoints import manifest, retry, run_state
from prompt_tuning.checkpoints import t5x as t5x_checkpoint
from prompt_tuning.config import EvalConfig, Experiment, to_dict
from prompt_tuning.evaluation.evaluate import Evaluator
from prompt_tuning.evaluation.records import RunLog
from prompt_tuning.prompts import prompt_file
from prompt_tuning.runtime import processes
from prompt_tuning.session import setup
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
class Run:
    """The fixed parts of a run."""

    experiment: Experiment
    mesh: Mesh
    cutting: groups.Cutting
    data: setup.Data
    backbone: setup.Backbone
    frozen: Mapping[str, jax.Array]
    evaluator: Evaluator
    programs: steps.Programs
    log: RunLog
    init: str  # how the prompt began
    store: run_state.RunStateStore
    entropy: float | None  # of the targets, see health.py


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


def restore(store: run_state.RunStateStore, state: steps.TrainState) -> Course:
    """The course as it was saved."""
    state, meta = store.restore(state)
    standing = Standing(**meta["standing"])
    sums: list[Mapping[str, Any]] = [
        {k: np.float32(v) for k, v in one.items()} for one in meta["sums"]
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
    if run.experiment.train.trainable == "model":
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
        "cutting": groups.record_cutting(run.cutting),
        "backbone": run.backbone.identity,
        "vocabulary": run.data.vocabulary_identity,
        "files": run.data.files_identity,
    }


def describe_prompt(run: Run, step: int, score: float | None = None) -> prompt_file.PromptMetadata:
    """What the folder of a prompt of this run says of it."""
    described = setup.describe_prompt(
        run.experiment,
        backbone=run.backbone.identity,
        vocabulary=run.data.vocabulary_identity,
        init=run.init,
        step=step,
    )
    names = ", ".join(task.name for task in run.data.eval_tasks)
    name = "" if score is None else f"mean of {names}"
    return dataclasses.replace(described, score=score, score_name=name)


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
        return describe_saved(place)  # it ended within a step
    try:
        save(run, course)
        run.store.wait()
        return describe_saved(place)
    except (run_state.SaveError, OSError):
        pass
    try:
        elsewhere = Path(tempfile.mkdtemp(prefix="t5x-saved-"))
        with run_state.RunStateStore(elsewhere) as store:
            store.save(step, course.state, _describe(run, course))
    except (run_state.SaveError, OSError):
        return f"The state of step {step} could be saved nowhere. {describe_saved(place)}"
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
