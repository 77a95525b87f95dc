"""The training loop: from an `Experiment` to a tuned prompt or model in MODEL_DIR.

One function, read from top to bottom. The rows, their scores and the saved states are those of an
`Objective`: tasks (`tasks.py`) or a corpus (`pretraining/run.py`). A resumed run ends with the same
bits as an unbroken one, because a step changes only the `TrainState`, and batch and dropout are
functions of (seed, step) alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import jax

from prompt_tuning.config import Experiment, config_hash
from prompt_tuning.evaluation.records import RunLog
from prompt_tuning.model import sharding
from prompt_tuning.runtime import agreement, lock, processes, signals
from prompt_tuning.runtime.prefetch import BATCHES, Prefetcher
from prompt_tuning.session.checks import last_step
from prompt_tuning.session.session import Session, make_dir, open_session
from prompt_tuning.training import health, optim
from prompt_tuning.training import model_dir as model_dirs
from prompt_tuning.training import run as runs
from prompt_tuning.training import step as steps
from prompt_tuning.training.progress import Progress, describe_training, mean_values
from prompt_tuning.training.run import (
    EvalStatus,
    LoopState,
    Objective,
    Run,
    TrainResult,
    check_patience,
)


def train(
    experiment: Experiment,
    objective: type[Objective],
    *,
    session: Session | None = None,
    config_text: str = "",
    debug_nans: bool = False,
    after_evaluation: Callable[[], object] | None = None,
) -> TrainResult:
    """The result of a run; trains what the mask allows, evaluates, and writes MODEL_DIR.

    If MODEL_DIR has a state of the same experiment, the run is resumed; a finished run prints its
    result, or trains on if TRAIN_STEPS was raised. With `debug_nans` JAX repeats a step that ends
    in a NaN operation by operation. An open `session` can be passed: its backbone is already being
    read. `after_evaluation` is called after each evaluation, when its records are written.

    Raises:
      ConfigError: the experiment, its data, its checkpoint or its MODEL_DIR does not fit.
    """
    with contextlib.ExitStack() as stack:
        # ---- devices: checks that need no file
        session = stack.enter_context(session or open_session(experiment))
        mesh = session.mesh
        objective.check(experiment, mesh)
        start = session.step
        end = last_step(experiment.train, start)

        # ---- folder: locked for this run; only the first process writes to it
        shared = make_dir(experiment.model_dir, "MODEL_DIR")
        signals.current().describe_saved = lambda: objective.describe_saved(shared)
        model_dir = stack.enter_context(processes.writing_folder(shared))
        stack.enter_context(lock.hold(model_dir, "MODEL_DIR"))
        stack.enter_context(jax.debug_nans(debug_nans))
        store = objective.open_store(experiment, shared, model_dir, start)
        agreement.check("settings", f"{config_hash(experiment)} {experiment.num_model_partitions}")
        agreement.check("saved states", str(store.latest_step()))
        meta = store.read_meta()
        model_dirs.refuse_other_experiment(meta, experiment, shared)

        # ---- rows, while the backbone is read
        work = objective.load(experiment, session, model_dir, meta)
        print(work.description, flush=True)

        # ---- backbone
        backbone = session.load_backbone(experiment.train.random_seed)
        identities = {"backbone": backbone.identity, **work.identities}
        model_dirs.refuse_other_contents(meta, identities, shared)
        if processes.count() > 1:
            agreement.check("rows, vocabulary or backbone", work.fingerprint() + str(identities))

        # ---- prompt
        first, init = work.first_params(backbone)
        agreement.check("first prompt", b"".join(v.tobytes() for _, v in sorted(first.items())))

        # ---- state: the trainable parameters and the optimiser's
        params = {**backbone.params, **sharding.replicate(first, mesh)}
        trainable, frozen = optim.split_params(params, optim.RULES[experiment.train.trainable])
        recipe = steps.make_recipe(
            session.model,
            experiment.prompt,
            experiment.optimizer,
            experiment.train,
            start_step=start,
        )
        init_state = functools.partial(
            steps.init_state,
            optimizer=recipe.optimizer,
            step=start,
            averaged=steps.averaged_names(recipe, trainable),
        )
        state = work.restore_optimizer(jax.jit(init_state)(trainable))
        programs = steps.compile_step(recipe, state)

        # ---- resume, or begin: from here on a signal waits for the end of a step
        stack.enter_context(signals.current().postponed())
        loop = LoopState(start, state, EvalStatus(), [])
        if store.latest_step() is not None:
            loop = runs.restore(store, state)
            loop.status = check_patience(loop.status, experiment.eval)
            work.repair(model_dir, loop.status)
        run = Run(
            experiment=experiment,
            mesh=mesh,
            work=work,
            backbone=backbone,
            frozen=frozen,
            programs=programs,
            log=_open_log(model_dir, loop),
            identities=identities,
            init=init,
            store=store,
            after_evaluation=after_evaluation,
        )
        model_dirs.write_info(model_dir, params, mesh, config_text)

        # ---- loop
        watch, had_stopped = signals.current(), loop.status.stopped_early
        try:
            end = _begin(run, loop, end)
            progress = Progress(
                start=loop.step - start,
                total=end - start,
                rows_per_step=experiment.data.batch_size,
            )
            numbers = range(loop.step - start, end - start)
            with (
                contextlib.closing(progress),
                Prefetcher(work.batches(numbers), most=BATCHES) as batches,
            ):
                if loop.status.evaluation_due:
                    _finish_step(run, loop, progress, end)
                while loop.step < end and not loop.status.stopped_early:
                    watch.check()
                    groups = loop.timer.next_batch(batches, loop.sums)
                    loop.state, metrics = steps.train_step(programs, loop.state, frozen, groups)
                    loop.sums.append(metrics)
                    loop.step += 1
                    watch.unsaved = True
                    _finish_step(run, loop, progress, end)
            watch.check()
            if loop.status.stopped_early and not had_stopped:
                print(runs.describe_early_stop(loop.status, experiment.eval), flush=True)
            store.wait()
        except BaseException as error:
            runs.end_failed_run(run, loop, error)
        store.close()
        run.log.close()

        # ---- result
        result = work.finish(run, loop, shared)
        print(result.summary, flush=True)
        return result


def _open_log(model_dir: Path, loop: LoopState) -> RunLog:
    """The log, with the records up to the run's step: a resumed run repeats the later ones.

    Without a saved state all records are dropped: the run was killed before its first state.
    """
    due = loop.status.evaluation_due
    return RunLog(model_dir, step=-1 if loop.last_saved is None else loop.step, evaluation_due=due)


def _begin(run: Run, loop: LoopState, end: int) -> int:
    """The last step of the run; scores the baselines of a new run, and describes a resumed one."""
    if loop.last_saved is None:
        run.work.begin(run, loop)
    elif loop.status.stopped_early:
        print(runs.describe_early_stop(loop.status, run.experiment.eval), flush=True)
    elif loop.step < end:
        print(f"continuing at step {loop.step}", flush=True)
    elif not loop.status.evaluation_due:
        print(f"nothing is left to train: the run is at its last step, {loop.step}", flush=True)
    return max(end, loop.step)


def _finish_step(run: Run, loop: LoopState, progress: Progress, end: int) -> None:
    """Records, evaluates and saves after a step, each if it is due."""
    config, save_every = run.experiment.eval, run.experiment.train.checkpoint_period
    done, total = loop.step - run.backbone.step, end - run.backbone.step
    evaluates = done % config.period == 0 or done == total or loop.status.evaluation_due
    saves = done % (save_every or config.period) == 0 or done == total
    saves = saves or (evaluates and run.work.has_small_states)
    shown: dict[str, str] = {}
    # Before each save the metrics are recorded and checked: a resumed run then records the same
    # means, and no state is saved that is not finite.
    if loop.sums and (saves or evaluates or done % max(1, config.period // 10) == 0):
        shown = _log_training(run, loop)
    if evaluates:
        loop.status = dataclasses.replace(loop.status, evaluation_due=True)
        loop.status, lines = run.work.evaluate(run, loop)
        if loop.status.best_score is not None:
            shown["best"] = f"{loop.status.best_score:.1f}"
        for line in lines:
            progress.print_line(f"step {done}/{total} ({loop.step}): {line}")
    if saves:
        runs.save(run, loop)
    progress.update(done, shown)
    if evaluates and run.after_evaluation is not None:
        run.after_evaluation()


def _log_training(run: Run, loop: LoopState) -> dict[str, str]:
    """Values to show; records the means since the last record, and the timing of the steps."""
    sums = jax.device_get(loop.sums)
    timing = loop.timer.values(sums, run.experiment.data.batch_size)
    health.check_finite(sums, loop.step)
    loop.losses += [float(m["cross_entropy"] / max(m["tokens"], 1.0)) for m in sums]
    values = mean_values(sums)
    run.log.training(loop.step, values, task=run.work.name, timing=timing)
    loop.sums = []
    return describe_training(values, timing)
