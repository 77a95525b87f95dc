"""Ends a failed run: saves its state if possible, and adds to the error where it is saved.

`loop.py` calls this for any exception of its steps: a signal, a full disk, a loss that is not
finite.
"""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import jax

from prompt_tuning.checkpoints import run_state
from prompt_tuning.config import ConfigError
from prompt_tuning.evaluation.ranking import NotRankableError
from prompt_tuning.runtime import processes, signals
from prompt_tuning.training import health
from prompt_tuning.training import run as runs
from prompt_tuning.training.run import LoopState, Run


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
    saved = _save(run, loop)
    if isinstance(error, signals.Stopped):
        raise signals.Stopped(error.signum, saved) from error
    if isinstance(error, OSError):
        reason = error.strerror or error
        raise ConfigError(
            f"MODEL_DIR {run.log.model_dir} cannot be written to: {reason}. {saved}"
        ) from error
    error.add_note(saved)
    raise error


def _save(run: Run, loop: LoopState) -> str:
    """A sentence on what is saved, after trying to save the loop state."""
    describe_saved = run.work.describe_saved
    if processes.count() > 1:  # the others may be at another step or have ended
        return describe_saved(Path(run.experiment.model_dir).expanduser())
    if loop.last_saved is None and not loop.sums:  # before the first step
        return describe_saved(run.log.model_dir)
    try:
        health.check_finite(jax.device_get(loop.sums), loop.step)
        return runs.save_anywhere(run, loop)
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
    good = runs.restore(run.store, loop.state)
    return run.work.save_last_good(run, good.state, good.step)
