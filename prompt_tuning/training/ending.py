"""How a run ends that cannot go on: what there is is kept, and the error says where it lies.

`loop.py` calls this for whatever its steps raise: a signal, a full disk, a loss that is not finite.
"""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import jax

from prompt_tuning.checkpoints import run_state
from prompt_tuning.config import ConfigError
from prompt_tuning.evaluation.ranking import NotRankableError
from prompt_tuning.runtime import processes, signals
from prompt_tuning.training import course as courses
from prompt_tuning.training import health
from prompt_tuning.training.course import Course, Run


def end_badly(run: Run, course: Course, error: BaseException) -> NoReturn:
    """Saves what can be saved.

    Raises:
      Stopped: a signal was received; says which step is saved.
      ConfigError: MODEL_DIR cannot be written to.
      NotRankableError: an evaluation could not rank; names the last good prompt.
      FloatingPointError: the loss is not finite; names the step and the rows.
      BaseException: the error itself, for all else.
    """
    if isinstance(error, NotRankableError):  # of what the steps before have made, or the backbone
        raise NotRankableError(f"{error} {_keep_last_good(run, course)}") from error
    if isinstance(error, FloatingPointError):
        raise _describe_divergence(run, course, error) from error
    if isinstance(error, run_state.SaveError) and course.saved is not None:
        course.saved = -1, course.standing  # what was thought to be saved may not be
    said = _keep(run, course)
    if isinstance(error, signals.Stopped):
        raise signals.Stopped(error.signum, said) from error
    if isinstance(error, (OSError, run_state.SaveError)):
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot write to {run.log.model_dir}: {reason}. {said}") from error
    error.add_note(said)
    raise error


def _keep(run: Run, course: Course) -> str:
    describe_saved = run.work.describe_saved
    if processes.count() > 1:  # the others are not at the same step, or are gone
        return describe_saved(Path(run.experiment.model_dir))
    if course.saved is None and not course.sums:  # nothing is trained yet
        return describe_saved(run.log.model_dir)
    try:
        health.check_finite(jax.device_get(course.sums), course.step)
        return courses.keep(run, course)
    except Exception as error:  # the devices have failed, or the state is not finite
        return f"This step is not saved ({error!s:.200}). {describe_saved(run.log.model_dir)}"


def _describe_divergence(run: Run, course: Course, error: FloatingPointError) -> FloatingPointError:
    """The error with the step, its rows, and the last good prompt, which is written."""
    step, description = health.describe_not_finite(error, course.step)
    rows = run.work.name_rows(step - run.backbone.step)
    return FloatingPointError(
        f"{description}. The rows of its batch: {rows}. {_keep_last_good(run, course)} Start again "
        "in another MODEL_DIR with a lower LEARNING_RATE, a warm-up (WARMUP_STEPS), or "
        "DTYPE = 'float32'."
    )


def _keep_last_good(run: Run, course: Course) -> str:
    """Writes what the newest saved state has, which is finite, and says where."""
    run.store.wait()
    if run.store.latest_step() is None:
        return run.work.describe_saved(run.log.model_dir)
    good = courses.restore(run.store, course.state)
    return run.work.save_last_good(run, good.state, good.step)
