"""The run: from an `Experiment` to a tuned prompt in MODEL_DIR.

One function, read from top to bottom: devices, data, backbone, prompt, resume, loop, result. A
killed run that is started again ends with the same bits, because all that changes is the
`TrainState`, and batch and dropout are functions of (seed, step) alone.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from prompt_tuning.batches import batching, groups
from prompt_tuning.checkpoints import load, retry, run_state
from prompt_tuning.config import ConfigError, Experiment, config_hash
from prompt_tuning.evaluation.analysis import analyse, describe, illegal_line, to_json
from prompt_tuning.evaluation.evaluate import (
    Evaluator,
    best_constant,
    evaluate,
    from_records,
    majority,
    mean_score,
)
from prompt_tuning.evaluation.intervals import score_intervals
from prompt_tuning.evaluation.records import METRICS, RunLog, draw_curves, read_records
from prompt_tuning.model import sharding, t5
from prompt_tuning.model.device import choose_device
from prompt_tuning.model.prompt import no_prompt
from prompt_tuning.prompts import prompt_file
from prompt_tuning.runtime import agreement, lock, processes, signals
from prompt_tuning.runtime.prefetch import BATCHES, Ahead
from prompt_tuning.session import overview, setup
from prompt_tuning.training import course as courses
from prompt_tuning.training import health, optim
from prompt_tuning.training import model_dir as model_dirs
from prompt_tuning.training import step as steps
from prompt_tuning.training.course import (
    Course,
    Run,
    Standing,
    describe_saved,
    judge,
    say_stopped,
)
from prompt_tuning.training.ending import end_badly
from prompt_tuning.training.progress import Progress, describe_training, mean_values

Reading = Ahead[tuple[str, jax.Array]]


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What a run ends with."""

    model_dir: Path
    step: int
    best_step: int | None
    prompt: np.ndarray  # float32 [P, D]; the last one
    summary: str


def train(
    experiment: Experiment,
    *,
    config_text: str = "",
    debug_nans: bool = False,
    reading: Reading | None = None,
) -> TrainResult:
    """Trains what the mask allows, evaluates as it goes, and leaves everything in MODEL_DIR.

    The same experiment again continues a killed run, prints the result of a finished one, and goes
    on where more steps are asked for. With `debug_nans` JAX looks for NaNs after each operation of
    a step that ends in one. `reading` is the backbone, where its reading has begun already.

    Raises:
      ConfigError: the experiment, its data, its checkpoint or its MODEL_DIR does not fit.
    """
    # ---- devices, steps, folder: what can be refused before anything is read
    mesh = sharding.make_mesh(experiment.num_model_partitions)
    sharding.check_batch_size(experiment.data.batch_size, mesh)
    setup.check_memory(experiment, mesh)
    sharding.check_attention(experiment.model, mesh)
    if not run_state.saved_steps(Path(experiment.model_dir) / "checkpoints"):
        groups.make_cutting(experiment, mesh.shape["data"])
    start = load.read_step(experiment.checkpoint)
    end = setup.last_step(experiment.train, start)
    for said in setup.say_start(experiment, start):
        print(said, flush=True)
    model_dir = setup.make_dir(experiment.model_dir, "MODEL_DIR")
    signals.current().saved = lambda: describe_saved(model_dir)
    if processes.count() > 1:
        setup.refuse_many_processes(experiment)
    with (
        processes.writing_folder(model_dir) as folder,
        lock.hold(folder, "MODEL_DIR"),
        jax.debug_nans(debug_nans),
    ):
        return _train(experiment, mesh, (model_dir, folder), end, (config_text, reading))


def _train(
    experiment: Experiment,
    mesh: Mesh,
    folders: tuple[Path, Path],
    end: int,
    given: tuple[str, Reading | None],
) -> TrainResult:
    """`train`, in a MODEL_DIR that is this run's alone, and where this process writes of it."""
    (shared, model_dir), (config_text, reading) = folders, given
    store = run_state.RunStateStore(str(shared / "checkpoints"))
    agreement.agree("settings", f"{config_hash(experiment)} {experiment.num_model_partitions}")
    agreement.agree("saved states", str(store.latest_step()))
    meta = store.read_meta()
    model_dirs.refuse_other_experiment(meta, experiment, shared)

    # ---- data, backbone, first prompt
    with reading or load.read_ahead(experiment, mesh) as reading:
        data, lengths = setup.load_data(experiment), experiment.data.task_feature_lengths
        print(overview.describe_data(data, lengths, experiment.data.eval_split), flush=True)
        backbone = setup.load_backbone(experiment, mesh, reading)
    model_dirs.refuse_other_contents(meta, backbone, data, shared)
    if processes.count() > 1:
        agreement.agree("rows, vocabulary or backbone", setup.fingerprint(data, backbone))
    first, init = setup.first_params(experiment, backbone, data)
    agreement.agree("first prompt", b"".join(v.tobytes() for _, v in sorted(first.items())))
    print(f"prompt: {init}", flush=True)

    # ---- what is trained, and how
    rules = optim.RULES[experiment.train.trainable]
    prompt = {name: sharding.replicate(value, mesh) for name, value in first.items()}
    params = {**backbone.params, **prompt}
    trainable, frozen = optim.split_params(params, rules)
    recipe = steps.make_recipe(
        t5.T5(experiment.model, choose_device(experiment.model, mesh.devices.flat)),
        experiment.prompt,
        experiment.optimizer,
        experiment.train,
        start_step=backbone.step,
    )
    init_state = functools.partial(steps.init_state, optimizer=recipe.optimizer, step=backbone.step)
    state = jax.jit(init_state)(trainable)
    programs = steps.compile_step(recipe, state)

    # ---- resume, or begin; from here on there is something to lose
    with signals.current().postponed():
        course = Course(backbone.step, state, Standing(), [])
        if store.latest_step() is not None:
            course = courses.restore(store, state)
            course.standing = judge(course.standing, experiment.eval)
            model_dirs.mend_best(model_dir, course.standing.best_step)
        run = Run(
            experiment=experiment,
            mesh=mesh,
            cutting=groups.make_cutting(
                experiment, mesh.shape["data"], (meta or {}).get("cutting")
            ),
            data=data,
            backbone=backbone,
            frozen=frozen,
            evaluator=Evaluator(experiment, mesh),
            programs=programs,
            log=_open_log(model_dir, course),
            init=init,
            store=store,
            entropy=health.target_entropy(data.train, data.rates),
        )
        model_dirs.write_info(model_dir, params, mesh, config_text)
        try:
            _begin(run, course, end)
            _loop(run, course, end)
            store.wait()
        except BaseException as error:
            end_badly(run, course, error)
        store.close()
        run.log.close()

    # ---- result
    curves = draw_curves(model_dir)
    findings = _look_closer(run, course.standing.best_step)
    summary = model_dirs.result_text(model_dir, course.standing.best_step, curves, findings)
    print(summary, flush=True)
    last = np.asarray(jax.device_get(programs.fold_for_use(course.state, frozen).rows))
    return TrainResult(shared, course.step, course.standing.best_step, last, summary)


def _open_log(model_dir: Path, course: Course) -> RunLog:
    """The records up to where the run stands; those after it will be written again.

    Without a saved state, what is there was written by a run that was killed before its first.
    """
    due = course.standing.evaluation_due
    step = -1 if course.saved is None else course.step
    return RunLog(model_dir, step=step, evaluation_due=due)


def _begin(run: Run, course: Course, end: int) -> None:
    """What comes before the first step of a run, or of its continuation."""
    if course.saved is None:
        _baselines(run)
        courses.save(run, course)
    elif course.standing.stopped_early:
        print(say_stopped(course.standing, run.experiment.eval), flush=True)
    elif course.step < end:
        print(f"continuing at step {course.step}", flush=True)
    elif not course.standing.evaluation_due:
        print(f"nothing is left to train: the run is at its last step, {course.step}", flush=True)


def _loop(run: Run, course: Course, end: int) -> None:
    """Steps until `end` or until evaluations stop getting better."""
    experiment, start = run.experiment, run.backbone.step
    config, watch = experiment.data, signals.current()
    if course.standing.evaluation_due:
        end = max(end, course.step)
    elif course.step >= end or course.standing.stopped_early:
        return
    progress = Progress(
        start=course.step - start, total=end - start, rows_per_step=config.batch_size
    )
    if course.standing.evaluation_due:
        _finish_step(run, course, progress, end)
    with Ahead(_batches(run, range(course.step - start, end - start)), most=BATCHES) as batches:
        while course.step < end and not course.standing.stopped_early:
            watch.check()
            groups = course.pace.wait(batches, course.sums)
            course.state, metrics = steps.train_step(run.programs, course.state, run.frozen, groups)
            course.sums.append(metrics)
            course.step += 1
            watch.unsaved = True
            _finish_step(run, course, progress, end)
    watch.check()
    progress.close()
    if course.standing.stopped_early:
        print(say_stopped(course.standing, experiment.eval), flush=True)


def _batches(run: Run, numbers: range) -> Iterator[list[dict[str, jax.Array]]]:
    """The length groups of one step after another, on the devices."""
    for number in numbers:
        cut = batching.train_groups(
            run.data.train,
            run.data.rates,
            run.cutting,
            seed=run.experiment.train.random_seed,
            step=number,
            batch_size=run.experiment.data.batch_size,
        )
        yield [sharding.shard_batch(group, run.mesh) for group in cut]


def _finish_step(run: Run, course: Course, progress: Progress, end: int) -> None:
    """What follows the step that the course has just made: records, evaluation, saving."""
    experiment = run.experiment
    done, total = course.step - run.backbone.step, end - run.backbone.step
    evaluates = done % experiment.eval.period == 0 or done == total
    evaluates = evaluates or course.standing.evaluation_due
    save_every = experiment.train.checkpoint_period or experiment.eval.period
    saves = evaluates or done % save_every == 0
    shown: dict[str, str] = {}
    # A mean never reaches over a saved state, so that a resumed run records the same ones; and
    # nothing that is not finite is ever saved.
    if course.sums and (saves or done % max(1, experiment.eval.period // 10) == 0):
        shown = _log_training(run, course)
    if evaluates:
        course.standing = dataclasses.replace(course.standing, evaluation_due=True)
        course.standing, score, said = _evaluate(run, course)
        shown["best"] = f"{course.standing.best_score:.1f}"
        progress.say(f"step {done}/{total} ({course.step}): {said}")
        learned = functools.partial(_has_learned, run, score)
        if trouble := health.describe_trouble(_losses(run, course), run.entropy, learned):
            progress.say(f"step {done}/{total}: {trouble}")
    if saves:
        courses.save(run, course)
    progress.update(done, shown)


def _has_learned(run: Run, score: float) -> bool:
    """Whether an evaluation's score is far above what the same answer to every row reaches."""
    tasks = run.data.eval_tasks
    try:
        found = [best_constant(task, run.experiment.eval) for task in tasks]
    except ConfigError:  # a metric of the user's that takes no such answers
        return False
    bars = [bar for bar in found if bar is not None]
    return bool(bars and score > np.mean(bars) + health.clearly(min(len(t.rows) for t in tasks)))


def _losses(run: Run, course: Course) -> list[float]:
    """The cross entropy per token of every step; of those before this start, by their records."""
    losses, last = [], run.backbone.step
    for record in read_records(run.log.model_dir / METRICS):
        if record["name"] == "cross_entropy" and record["step"] <= course.step - len(course.losses):
            losses += [record["value"]] * (record["step"] - last)
            last = record["step"]
    return losses + course.losses


def _log_training(run: Run, course: Course) -> dict[str, str]:
    """Records means since the last record, and how long the steps took; returns what to show."""
    sums = jax.device_get(course.sums)
    timing = course.pace.values(sums, run.experiment.data.batch_size)
    health.check_finite(sums, course.step)
    course.losses += [float(one["cross_entropy"] / max(one["tokens"], 1.0)) for one in sums]
    values = mean_values(sums)
    run.log.training(course.step, values, task=run.experiment.data.names[0], timing=timing)
    course.sums = []
    return describe_training(values, timing)


def _evaluate(run: Run, course: Course) -> tuple[Standing, float, str]:
    """Scores the state, writes records and prompt, and updates what is best.

    Returns the standing, this evaluation's score, and what is said of it.
    """
    standing, step = course.standing, course.step
    _, params = steps.split_prompt({**run.frozen, **course.state.trainable})
    prompt = run.programs.fold_for_use(course.state, run.frozen)  # what is scored is what is saved
    with signals.current().allowed():  # nothing is written in here
        scored = {t.name: evaluate(run.evaluator, (params, prompt), t) for t in run.data.eval_tasks}
    split = run.experiment.data.eval_split
    parts: list[str] = []
    for task in run.data.eval_tasks:
        one = scored[task.name]
        analysis = analyse(task, one)
        run.log.scores(step, one.metrics, task=task.name, split=split)
        run.log.predictions(step, task.name, one.metrics, one.rows)
        run.log.analysis(step, task.name, to_json(analysis))
        values = ", ".join(f"{name} {value:.1f}" for name, value in one.metrics.items())
        said = "; ".join(filter(None, (values, illegal_line(analysis))))
        parts.append(said if len(run.data.eval_tasks) == 1 else f"{task.name}: {said}")
    score = mean_score((one.metrics for one in scored.values()), run.experiment.eval)
    better = standing.best_score is None or score > standing.best_score
    standing = Standing(
        best_score=score if better else standing.best_score,
        best_step=step if better else standing.best_step,
        evals_since_best=0 if better else standing.evals_since_best + 1,
    )
    if prompt.rows.shape[0]:
        metadata = courses.describe_prompt(run, step, score)
        folder = run.log.model_dir / "prompts"
        array = np.asarray(jax.device_get(prompt.rows))
        for name in (f"step_{step:06d}", *(["best"] if better else [])):
            save = functools.partial(prompt_file.save_prompt, folder / name, array, metadata)
            retry.retried(save, folder)
    return judge(standing, run.experiment.eval), score, "; ".join(parts)


def _look_closer(run: Run, best_step: int | None) -> dict[str, model_dirs.Finding]:
    """The intervals and counts of the best prompt's answers, from what was written of them."""
    findings: dict[str, model_dirs.Finding] = {}
    config = run.experiment.eval
    for task in run.data.eval_tasks:
        rows = run.log.read_predictions(best_step, task.name) if best_step is not None else []
        if len(rows) == len(task.rows):
            try:
                scored = from_records(task, rows, config)
            except (LookupError, TypeError, ValueError):  # somebody has edited them
                continue
            intervals = score_intervals(task, scored.predictions, config.bootstrap)
            findings[task.name] = intervals, describe(analyse(task, scored))
    return findings


def _baselines(run: Run) -> None:
    """Records what any prompt has to beat: the majority class and the model without a prompt."""
    experiment, step = run.experiment, run.backbone.step
    if not experiment.eval.baselines:
        return
    split = experiment.data.eval_split
    nothing = no_prompt(experiment.model)
    for task in run.data.eval_tasks:
        values = majority(task, experiment.eval)
        run.log.scores(step, values, task=task.name, split=split, prompt="majority")
        with signals.current().allowed():
            values = evaluate(run.evaluator, (run.backbone.params, nothing), task).metrics
        run.log.scores(step, values, task=task.name, split=split, prompt="none")
