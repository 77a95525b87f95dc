"""The run: from an `Experiment` to a tuned prompt, a tuned model or a pre-trained one in MODEL_DIR.

One function, read from top to bottom. What a run trains on, how that is scored and where its states
are saved are an `Objective`'s: tasks (`tasks.py`) or a corpus (`pretraining/run.py`). A killed run
that is started again ends with the same bits, because all that changes is the `TrainState`, and
batch and dropout are functions of (seed, step) alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from pathlib import Path

import jax

from prompt_tuning.config import Experiment, config_hash
from prompt_tuning.evaluation.records import RunLog
from prompt_tuning.model import sharding
from prompt_tuning.runtime import agreement, lock, processes, signals
from prompt_tuning.runtime.prefetch import BATCHES, Ahead
from prompt_tuning.session.session import Session, last_step, make_dir, open_session
from prompt_tuning.training import course as courses
from prompt_tuning.training import health, optim
from prompt_tuning.training import model_dir as model_dirs
from prompt_tuning.training import step as steps
from prompt_tuning.training.course import Course, Objective, Run, Standing, TrainResult, judge
from prompt_tuning.training.ending import end_badly
from prompt_tuning.training.progress import Progress, describe_training, mean_values
from prompt_tuning.training.tasks import Tasks


def train(
    experiment: Experiment,
    *,
    objective: type[Objective] = Tasks,
    session: Session | None = None,
    config_text: str = "",
    debug_nans: bool = False,
) -> TrainResult:
    """Trains what the mask allows, evaluates as it goes, and leaves everything in MODEL_DIR.

    The same experiment again continues a killed run, prints the result of a finished run, and goes
    on if more steps are asked for. With `debug_nans` JAX looks for NaNs after each operation of a
    step that ends in one. A `session` that is given has begun to read the backbone.

    Raises:
      ConfigError: the experiment, its data, its checkpoint or its MODEL_DIR does not fit.
    """
    with contextlib.ExitStack() as stack:
        # ---- devices: what can be refused before anything is read
        session = stack.enter_context(session or open_session(experiment))
        mesh = session.mesh
        objective.check(experiment, mesh)
        start = session.step
        end = last_step(experiment.train, start)

        # ---- folder: this run's alone; only the first process writes to it
        shared = make_dir(experiment.model_dir, "MODEL_DIR")
        signals.current().saved = lambda: objective.describe_saved(shared)
        model_dir = stack.enter_context(processes.writing_folder(shared))
        stack.enter_context(lock.hold(model_dir, "MODEL_DIR"))
        stack.enter_context(jax.debug_nans(debug_nans))
        store = objective.open_store(experiment, shared, model_dir, start)
        agreement.agree("settings", f"{config_hash(experiment)} {experiment.num_model_partitions}")
        agreement.agree("saved states", str(store.latest_step()))
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
            agreement.agree("rows, vocabulary or backbone", work.fingerprint() + str(identities))

        # ---- prompt
        first, init = work.first_params(backbone)
        agreement.agree("first prompt", b"".join(v.tobytes() for _, v in sorted(first.items())))
        print(f"prompt: {init}", flush=True)

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
        init_state = functools.partial(steps.init_state, optimizer=recipe.optimizer, step=start)
        state = work.restore_optimizer(jax.jit(init_state)(trainable))
        programs = steps.compile_step(recipe, state)

        # ---- resume, or begin: from here on there is something to lose
        stack.enter_context(signals.current().postponed())
        course = Course(start, state, Standing(), [])
        if store.latest_step() is not None:
            course = courses.restore(store, state)
            course.standing = judge(course.standing, experiment.eval)
            work.repair(model_dir, course.standing)
        run = Run(
            experiment=experiment,
            mesh=mesh,
            work=work,
            backbone=backbone,
            frozen=frozen,
            programs=programs,
            log=_open_log(model_dir, course),
            identities=identities,
            init=init,
            store=store,
        )
        model_dirs.write_info(model_dir, params, mesh, config_text)

        # ---- loop
        watch, had_stopped = signals.current(), course.standing.stopped_early
        try:
            end = _begin(run, course, end)
            progress = Progress(
                start=course.step - start,
                total=end - start,
                rows_per_step=experiment.data.batch_size,
            )
            numbers = range(course.step - start, end - start)
            with Ahead(work.batches(numbers), most=BATCHES) as batches:
                if course.standing.evaluation_due:
                    _finish_step(run, course, progress, end)
                while course.step < end and not course.standing.stopped_early:
                    watch.check()
                    groups = course.pace.wait(batches, course.sums)
                    course.state, metrics = steps.train_step(programs, course.state, frozen, groups)
                    course.sums.append(metrics)
                    course.step += 1
                    watch.unsaved = True
                    _finish_step(run, course, progress, end)
            watch.check()
            progress.close()
            if course.standing.stopped_early and not had_stopped:
                print(courses.say_stopped(course.standing, experiment.eval), flush=True)
            store.wait()
        except BaseException as error:
            end_badly(run, course, error)
        store.close()
        run.log.close()

        # ---- result
        result = work.finish(run, course, shared)
        print(result.summary, flush=True)
        return result


def _open_log(model_dir: Path, course: Course) -> RunLog:
    """The records up to the run's step; those after it will be written again.

    Without a saved state, records were written by a run that was killed before its first state.
    """
    due = course.standing.evaluation_due
    return RunLog(model_dir, step=-1 if course.saved is None else course.step, evaluation_due=due)


def _begin(run: Run, course: Course, end: int) -> int:
    """What comes before the first step of a run, or of its continuation; returns the last step."""
    if course.saved is None:
        run.work.begin(run, course)
    elif course.standing.stopped_early:
        print(courses.say_stopped(course.standing, run.experiment.eval), flush=True)
    elif course.step < end:
        print(f"continuing at step {course.step}", flush=True)
    elif not course.standing.evaluation_due:
        print(f"nothing is left to train: the run is at its last step, {course.step}", flush=True)
    return max(end, course.step)


def _finish_step(run: Run, course: Course, progress: Progress, end: int) -> None:
    """What follows the step that the course has just made: records, evaluation, saving."""
    config, save_every = run.experiment.eval, run.experiment.train.checkpoint_period
    done, total = course.step - run.backbone.step, end - run.backbone.step
    evaluates = done % config.period == 0 or done == total or course.standing.evaluation_due
    saves = done % (save_every or config.period) == 0 or done == total
    saves = saves or (evaluates and run.work.has_small_states)
    shown: dict[str, str] = {}
    # A mean never reaches over a saved state, so that a resumed run records the same means; and
    # nothing that is not finite is ever saved.
    if course.sums and (saves or evaluates or done % max(1, config.period // 10) == 0):
        shown = _log_training(run, course)
    if evaluates:
        course.standing = dataclasses.replace(course.standing, evaluation_due=True)
        course.standing, lines = run.work.evaluate(run, course)
        if course.standing.best_score is not None:
            shown["best"] = f"{course.standing.best_score:.1f}"
        for line in lines:
            progress.say(f"step {done}/{total} ({course.step}): {line}")
    if saves:
        courses.save(run, course)
    progress.update(done, shown)


def _log_training(run: Run, course: Course) -> dict[str, str]:
    """Records means since the last record, and how long the steps took; returns what to show."""
    sums = jax.device_get(course.sums)
    timing = course.pace.values(sums, run.experiment.data.batch_size)
    health.check_finite(sums, course.step)
    course.losses += [float(one["cross_entropy"] / max(one["tokens"], 1.0)) for one in sums]
    values = mean_values(sums)
    run.log.training(course.step, values, task=run.work.name, timing=timing)
    course.sums = []
    return describe_training(values, timing)
