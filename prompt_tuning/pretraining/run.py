"""The pre-training run: from an `Experiment` with an objective to T5X checkpoints in MODEL_DIR.

A loop of its own beside `training/loop.py`: it has no tasks to score, trains every weight, and what
it saves is the model. Each checkpoint is whole, with optimiser and step, so that the run resumes
from its newest one, bit for bit, and so does upstream T5X.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from prompt_tuning.checkpoints import identity, load, retry, slots
from prompt_tuning.checkpoints import t5x as t5x_checkpoint
from prompt_tuning.config import ConfigError, Experiment, config_hash, to_dict
from prompt_tuning.evaluation.records import RunLog
from prompt_tuning.model import loss, sharding, t5
from prompt_tuning.model.device import choose_device
from prompt_tuning.model.prompt import no_prompt
from prompt_tuning.pretraining import corpus as corpora
from prompt_tuning.pretraining import curves, examples, saved
from prompt_tuning.runtime import agreement, lock, processes, signals
from prompt_tuning.runtime.prefetch import BATCHES, Ahead
from prompt_tuning.session import setup
from prompt_tuning.training import health, optim
from prompt_tuning.training import model_dir as model_dirs
from prompt_tuning.training import step as steps
from prompt_tuning.training.progress import Pace, describe_training, mean_values
from prompt_tuning.training.progress import Progress as Bar

HELD_OUT = "held_out"


@dataclasses.dataclass(frozen=True)
class Run:
    """The fixed parts of a run."""

    experiment: Experiment
    mesh: Mesh
    corpus: corpora.Corpus
    start: int  # the step of the checkpoint that it began with
    meta: Mapping[str, Any]
    log: RunLog


@dataclasses.dataclass
class Progress:
    """The moving parts of a run."""

    state: steps.TrainState
    step: int
    sums: list[Mapping[str, Array]]  # of the steps since the last record
    pace: Pace = dataclasses.field(default_factory=Pace)


@dataclasses.dataclass(frozen=True)
class PretrainResult:
    """What a run ends with."""

    model_dir: Path
    step: int
    checkpoint: Path
    held_out_loss: float  # cross entropy per token, in nats
    summary: str


def pretrain(
    experiment: Experiment, *, config_text: str = "", debug_nans: bool = False
) -> PretrainResult:
    """Trains every weight on a corpus and leaves T5X checkpoints in MODEL_DIR.

    The same experiment again continues a killed run, or goes on where more steps are asked for.
    With `debug_nans` JAX looks for NaNs after each operation of a step that ends in one.

    Raises:
      ConfigError: the experiment, its corpus, its checkpoint or its MODEL_DIR does not fit.
    """
    # ---- devices, steps, folder: what can be refused before anything is read
    _check(experiment)
    mesh = sharding.make_mesh(experiment.num_model_partitions)
    sharding.check_batch_size(experiment.data.batch_size, mesh)
    sharding.check_microbatches(experiment.data.batch_size, experiment.train.microbatches, mesh)
    sharding.check_attention(experiment.model, mesh)
    model_dir = setup.make_dir(experiment.model_dir, "MODEL_DIR")
    signals.current().saved = lambda: saved.describe_saved(model_dir)
    with (
        processes.writing_folder(model_dir) as folder,
        lock.hold(folder, "MODEL_DIR"),
        jax.debug_nans(debug_nans),
    ):
        return _pretrain(experiment, mesh, (model_dir, folder), config_text)


def _pretrain(
    experiment: Experiment, mesh: Mesh, places: tuple[Path, Path], config_text: str
) -> PretrainResult:
    """`pretrain`, in a MODEL_DIR that is this run's alone, and where this process writes of it."""
    shared, model_dir = places
    folders = saved.find_checkpoints(shared)
    agreement.agree("settings", f"{config_hash(experiment)} {experiment.num_model_partitions}")
    agreement.agree("saved states", str([folder.name for folder in folders]))
    old = saved.read_meta(folders)
    model_dirs.refuse_other_experiment(old, experiment, shared)
    start = 0 if experiment.from_scratch else load.read_step(experiment.checkpoint)
    end = setup.last_step(experiment.train, start)

    # ---- corpus, weights, optimiser
    corpus = corpora.load_corpus(experiment, model_dir)
    print(corpus.described, flush=True)
    state, optimizer = _first_state(experiment, mesh, start)
    meta = {
        "experiment": to_dict(experiment),
        "start": start,
        "backbone": identity.backbone_identity(state.trainable),
        "vocabulary": setup.vocabulary_identity(experiment.data.vocabulary),
        "corpus": corpus.identity,
    }

    # ---- resume, or begin
    _refuse_other_contents(old, meta, shared)
    kinds = ("backbone", "vocabulary", "corpus")
    agreement.agree("backbone, vocabulary or corpus", repr([meta[kind] for kind in kinds]))
    if folders:
        state = saved.restore(folders, state, start)
        if int(state.step) < end:
            print(f"continuing at step {int(state.step)}", flush=True)
    log = RunLog(model_dir, step=int(state.step) if folders else -1)
    run = Run(experiment, mesh, corpus, start, meta, log)
    model_dirs.write_info(model_dir, state.trainable, mesh, config_text)

    # ---- loop
    progress = Progress(state, int(state.step), [])
    with signals.current().postponed():
        try:
            _loop(run, progress, optimizer, end)
        except signals.Stopped as stopped:
            _save_what_there_is(run, progress)
            raise signals.Stopped(stopped.signum, saved.describe_saved(shared)) from None
        except FloatingPointError as error:
            raise _describe_divergence(run, progress, error) from error

    # ---- result
    log.close()
    return _result(run, progress.step, shared)


def _check(experiment: Experiment) -> None:
    if experiment.train.trainable != "model" or experiment.prompt.length:
        raise ConfigError(
            f"OBJECTIVE = {experiment.corpus.objective!r} trains the model itself: set TRAINABLE = "
            "'model' and PROMPT_LENGTH = 0, as runs/pretrain.gin does."
        )
    if experiment.optimizer.name != "adafactor":
        raise ConfigError(
            f"OPTIMIZER = {experiment.optimizer.name!r}: pre-training has Adafactor, whose state a "
            "T5X checkpoint holds. Set OPTIMIZER = 'adafactor'."
        )
    if experiment.from_scratch and experiment.train.restore_optimizer:
        raise ConfigError(
            "RESTORE_OPTIMIZER = True, but INITIAL_CHECKPOINT_PATH names no checkpoint: random "
            "weights have no optimizer state. Name one, or set RESTORE_OPTIMIZER = False."
        )


def _first_state(experiment: Experiment, mesh: Mesh, start: int) -> tuple[steps.TrainState, Any]:
    """The state before the first step, and the optimizer."""
    shapes = t5.param_shapes(experiment.model)
    places = sharding.param_shardings(shapes, mesh)
    if experiment.from_scratch:
        make = functools.partial(t5.init_params, experiment.model)
        key = jax.random.key(experiment.train.random_seed)
        params = jax.jit(make, out_shardings=places)(key)
    else:
        setup.verify_checkpoint(experiment)
        params, _ = load.read_backbone(
            experiment.checkpoint, experiment.model, dtype="float32", shardings=places
        )
    rules = optim.RULES[experiment.train.trainable]
    optimizer = optim.make_optimizer(experiment.optimizer, rules, start_step=start)
    init = functools.partial(steps.init_state, optimizer=optimizer, step=start)
    state = jax.jit(init)(params)
    if experiment.train.restore_optimizer:
        path = load.find_path(experiment.checkpoint)
        found = t5x_checkpoint.read_slots(path, slots.get_slots(state.opt_state))
        state = state._replace(opt_state=slots.set_slots(state.opt_state, found, count=0))
    return state, optimizer


def _refuse_other_contents(
    old: Mapping[str, Any] | None, new: Mapping[str, Any], model_dir: Path
) -> None:
    """Raises ConfigError where the weights, vocabulary or text that the run began with changed."""
    for what in ("backbone", "vocabulary", "corpus"):
        if old is not None and old[what] != new[what]:
            raise ConfigError(
                f"the {what} is not the one that the run in MODEL_DIR {model_dir} began with "
                f"({new[what][:12]}... now, {old[what][:12]}... then): its files were changed. Put "
                "the old ones back, or choose another MODEL_DIR."
            )


def _save(run: Run, state: steps.TrainState) -> None:
    signals.current().unsaved = True
    keep = run.experiment.train.keep_checkpoints
    save = functools.partial(saved.save, run.log.model_dir, state, run.meta, keep)
    if processes.count() == 1:
        retry.retried(save, run.log.model_dir)
    else:  # all take part in it: one alone cannot do it again
        save()
    signals.current().unsaved = False


# The loop ---------------------------------------------------------------------------------------


def _loop(run: Run, progress: Progress, optimizer: Any, end: int) -> None:
    """Steps until `end`, with evaluations and checkpoints at their periods and at the end."""
    experiment, start, watch = run.experiment, run.start, signals.current()
    if progress.step >= end:
        return
    device = choose_device(experiment.model, run.mesh.devices.flat)
    model = t5.T5(experiment.model, device)
    recipe = steps.make_recipe(
        model, experiment.prompt, experiment.optimizer, experiment.train, start_step=start
    )
    programs = steps.compile_step(recipe, progress.state)
    frozen = {"prompt": no_prompt(experiment.model).rows}
    score = jax.jit(functools.partial(_sums, model))
    size = experiment.data.batch_size
    bar = Bar(start=progress.step - start, total=end - start, rows_per_step=size)
    if progress.step == start:
        _log_held_out(run, start, held_out(run, score, progress.state.trainable))
    with Ahead(_batches(run, range(progress.step - start, end - start)), most=BATCHES) as batches:
        while progress.step < end:
            watch.check()
            placed = progress.pace.wait(batches, progress.sums)
            progress.state, metrics = steps.train_step(programs, progress.state, frozen, placed)
            progress.sums.append(metrics)
            progress.step += 1
            watch.unsaved = True
            _finish_step(run, progress, score, bar, end)
    bar.close()


def _batches(run: Run, numbers: range) -> Iterator[list[dict[str, Array]]]:
    """The microbatches of one step after another, on the devices."""
    experiment = run.experiment
    for number in numbers:
        batch = run.corpus.train.batch(number, experiment.data.batch_size)
        parts = split_batch(batch, experiment.train.microbatches)
        yield [sharding.shard_batch(part, run.mesh) for part in parts]


def _finish_step(run: Run, progress: Progress, score: Any, bar: Bar, end: int) -> None:
    """What follows a step: records, evaluation, a checkpoint."""
    evaluation, train, now = run.experiment.eval, run.experiment.train, progress.step
    done, last, shown = now - run.start, now == end, {}
    evaluates = done % evaluation.period == 0 or last
    saves = done % (train.checkpoint_period or evaluation.period) == 0 or last
    # A mean never reaches over a saved state, so that a resumed run records the same ones; and
    # nothing that is not finite is ever saved.
    if saves or evaluates or done % max(1, evaluation.period // 10) == 0:
        shown = _log_training(run, progress)
    if evaluates:
        with signals.current().allowed():
            values = held_out(run, score, progress.state.trainable)
        said = _log_held_out(run, now, values)
        bar.say(f"step {done}/{end - run.start} ({now}): {said}")
    if saves:
        _save(run, progress.state)
    bar.update(done, shown)


def _save_what_there_is(run: Run, progress: Progress) -> None:
    """After a signal: the steps since the last checkpoint are not lost."""
    # A checkpoint takes all processes, and the others may be at another step, or gone.
    if signals.current().unsaved and processes.count() == 1:
        if progress.sums:
            _log_training(run, progress)
        _save(run, progress.state)
    run.log.close()


def split_batch(batch: examples.Batch, parts: int) -> list[examples.Batch]:
    """The batch in so many parts of equal size, which are gone through one after the other.

    >>> [part["x"].tolist() for part in split_batch({"x": np.arange(4)}, 2)]
    [[0, 1], [2, 3]]
    """
    cut = {name: np.split(array, parts) for name, array in batch.items()}
    return [{name: arrays[i] for name, arrays in cut.items()} for i in range(parts)]


def _sums(model: t5.T5, params: t5.Params, batch: Mapping[str, Array]) -> loss.Metrics:
    logits = loss.forward(model, params, no_prompt(model.config), batch)
    return loss.loss_fn(logits, batch, z_loss=0.0)[1]


def held_out(run: Run, score: Any, params: t5.Params) -> dict[str, float]:
    """Cross entropy per token, in nats, and accuracy, in per cent, on text never trained on.

    The same text is hidden each time; EVALUATOR_NUM_EXAMPLES limits the rows.
    """
    evaluation = run.experiment.eval
    size = evaluation.batch_size or run.experiment.data.batch_size
    totals = {"cross_entropy": 0.0, "correct": 0.0, "tokens": 0.0}
    for batch in run.corpus.held_out.batches(0, size, limit=evaluation.num_examples):
        found = jax.device_get(score(params, sharding.shard_batch(batch, run.mesh)))
        totals = {name: value + float(found[name]) for name, value in totals.items()}
    return {
        "cross_entropy/held_out": totals["cross_entropy"] / totals["tokens"],
        "token_accuracy/held_out": 100.0 * totals["correct"] / totals["tokens"],
    }


def _log_held_out(run: Run, step: int, values: Mapping[str, float]) -> str:
    run.log.scores(step, values, task=run.corpus.name, split=HELD_OUT)
    return ", ".join(f"{name} {value:.3f}" for name, value in values.items())


def _log_training(run: Run, progress: Progress) -> dict[str, str]:
    """Records means since the last record, and how long the steps took; returns what to show."""
    sums, progress.sums = jax.device_get(progress.sums), []
    timing = progress.pace.values(sums, run.experiment.data.batch_size)
    health.check_finite(sums, progress.step)
    values = mean_values(sums)
    run.log.training(progress.step, values, task=run.corpus.name, timing=timing)
    return describe_training(values, timing)


def _describe_divergence(
    run: Run, progress: Progress, error: FloatingPointError
) -> FloatingPointError:
    """The error with the step, the documents of its rows, and what is saved."""
    step, said = health.describe_not_finite(error, progress.step)
    rows = run.corpus.train.sources(step - 1 - run.start, run.experiment.data.batch_size)
    named = "; ".join(", ".join(map(str, row)) for row in rows)
    kept = saved.describe_saved(Path(run.experiment.model_dir), go_on=False)
    return FloatingPointError(
        f"{said}. The documents of {run.corpus.name} in the rows of its batch, from 0: {named}. "
        f"{kept} Start again in another MODEL_DIR with a lower LEARNING_RATE, more WARMUP_STEPS, "
        "or DTYPE = 'float32'."
    )


def _result(run: Run, step: int, model_dir: Path) -> PretrainResult:
    points = curves.held_out_points(model_dir)
    picture = curves.draw_losses(run.log.model_dir) if processes.is_first() else None
    checkpoint = model_dir / f"checkpoint_{step}"
    last, value = points[-1] if points else (step, float("nan"))  # its record was damaged
    first = f", {points[0][1]:.3f} at {points[0][0]}" if len(points) > 1 else ""
    lines = [f"held-out cross entropy: {value:.3f} at step {last}{first}"]
    lines += [f"checkpoint: {checkpoint}", *([f"curves: {picture}"] if picture else [])]
    summary = "\n".join(lines)
    print(summary, flush=True)
    return PretrainResult(model_dir, step, checkpoint, value, summary)
