"""The run: from an `Experiment` to a tuned prompt in MODEL_DIR.

One function, read from top to bottom: devices, data, backbone, prompt, resume, loop, result. A
killed run that is started again ends with the same bits, because all that changes is the
`TrainState`, and batch and dropout are functions of (seed, step) alone.
"""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from prompt_tuning.checkpoint import prompt_file, run_state
from prompt_tuning.checkpoint import t5x as t5x_checkpoint
from prompt_tuning.config import EvalConfig, Experiment, to_dict
from prompt_tuning.data import features, groups
from prompt_tuning.model import sharding
from prompt_tuning.scoring.evaluate import Evaluator, Scored, evaluate, majority, mean_score
from prompt_tuning.training import model_dir as model_dirs
from prompt_tuning.training import optim, overview, report, setup
from prompt_tuning.training import step as steps


@dataclasses.dataclass(frozen=True)
class Standing:
    """How the run stands apart from its arrays; saved beside them."""

    best_score: float | None = None
    best_step: int | None = None
    evals_since_best: int = 0
    stopped_early: bool = False  # follows from the one before and from the setting


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What a run ends with."""

    model_dir: Path
    step: int
    best_step: int | None
    prompt: np.ndarray  # float32 [P, D]; the last one
    summary: str


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
    log: report.RunLog
    init: str  # how the prompt began


def train(experiment: Experiment, *, config_text: str = "") -> TrainResult:
    """Trains what the mask allows, evaluates as it goes, and leaves everything in MODEL_DIR.

    The same experiment again continues a killed run, prints the result of a finished one, and goes
    on where more steps are asked for.

    Raises:
      ConfigError: the experiment, its data, its checkpoint or its MODEL_DIR does not fit.
    """
    # ---- devices, steps, folder: what can be refused before anything is read
    mesh = sharding.make_mesh(experiment.num_model_partitions)
    sharding.check_batch_size(experiment.data.batch_size, mesh)
    cutting = setup.make_cutting(experiment, mesh)
    start = t5x_checkpoint.read_step(setup.checkpoint_path(experiment.initial_checkpoint_path))
    end = setup.last_step(experiment.train, start)
    model_dir = setup.make_dir(experiment.model_dir, "MODEL_DIR")
    store = run_state.RunStateStore(str(model_dir / "checkpoints"))
    meta = store.read_meta()
    model_dirs.refuse_other_experiment(meta, experiment, model_dir)

    # ---- data, backbone, first prompt
    data, lengths = setup.load_data(experiment), experiment.data.task_feature_lengths
    print(overview.describe_data(data, lengths, experiment.data.eval_split), flush=True)
    backbone = setup.load_backbone(experiment, mesh)
    model_dirs.refuse_other_contents(meta, backbone, data, model_dir)
    prompt, init = setup.first_prompt(experiment, backbone, data)
    print(f"prompt: {prompt.shape[0]} x {prompt.shape[1]}, {init}", flush=True)

    # ---- what is trained, and how
    rules = optim.RULES[experiment.train.trainable]
    params = {**backbone.params, "prompt": jax.device_put(prompt, sharding.replicated(mesh))}
    trainable, frozen = optim.split_params(params, rules)
    optimizer = optim.make_optimizer(experiment.optimizer, rules, start_step=backbone.step)
    state = jax.jit(functools.partial(steps.init_state, optimizer=optimizer, step=backbone.step))(
        trainable
    )

    # ---- resume, or begin
    standing = Standing()
    if meta is not None:
        state, meta = store.restore(state)
        standing = _judge(Standing(**meta["standing"]), experiment.eval)
    # Without a saved state, what is there was written by a run that was killed before its first.
    log = report.RunLog(model_dir, step=-1 if meta is None else int(state.step))
    evaluator = Evaluator(experiment, mesh)
    run = Run(experiment, mesh, cutting, data, backbone, frozen, evaluator, log, init)
    model_dirs.write_info(model_dir, params, mesh, config_text)
    if meta is None:
        _baselines(run)
        _save(run, store, state, standing)
    elif standing.stopped_early:
        print(_say_stopped(standing, experiment.eval), flush=True)
    elif int(state.step) < end:
        print(f"continuing at step {int(state.step)}", flush=True)

    # ---- loop
    state, standing = _loop(run, store, state, standing, optimizer, end)

    # ---- result
    store.close()
    log.close()
    curves = report.draw_curves(model_dir)
    summary = model_dirs.result_text(model_dir, standing.best_step, curves)
    print(summary, flush=True)
    last = np.asarray(jax.device_get({**frozen, **state.trainable}["prompt"]))
    return TrainResult(model_dir, int(state.step), standing.best_step, last, summary)


def _loop(
    run: Run,
    store: run_state.RunStateStore,
    state: steps.TrainState,
    standing: Standing,
    optimizer: Any,
    end: int,
) -> tuple[steps.TrainState, Standing]:
    """Steps until `end` or until evaluations stop getting better."""
    experiment, start = run.experiment, run.backbone.step
    config = experiment.data
    programs = steps.compile_step(experiment.model, experiment.train, optimizer, state)
    log_every = max(1, experiment.eval.period // 10)
    save_every = experiment.train.checkpoint_period or experiment.eval.period
    now = int(state.step)
    if now >= end or standing.stopped_early:
        return state, standing
    progress = report.Progress(
        start=now - start, total=end - start, rows_per_step=config.batch_size
    )
    sums: list[Mapping[str, jax.Array]] = []
    while now < end and not standing.stopped_early:
        cut = features.train_groups(
            run.data.train,
            run.data.rates,
            run.cutting,
            seed=experiment.train.random_seed,
            step=now - start,
            batch_size=config.batch_size,
        )
        placed = [sharding.shard_batch(group, run.mesh) for group in cut]
        state, metrics = steps.run_step(programs, state, run.frozen, placed)
        sums.append(metrics)
        now += 1
        shown: dict[str, str] = {}
        evaluates = (now - start) % experiment.eval.period == 0 or now == end
        saves = evaluates or (now - start) % save_every == 0
        # A mean never reaches over a saved state, so that a resumed run records the same ones; and
        # nothing that is not finite is ever saved.
        if saves or (now - start) % log_every == 0:
            shown["loss"] = f"{_log_training(run, now, sums):.3f}"
            sums = []
        if evaluates:
            standing, said = _evaluate(run, state, standing)
            shown["best"] = f"{standing.best_score:.1f}"
            progress.say(f"step {now - start}/{end - start} ({now}): {said}")
        if saves:
            _save(run, store, state, standing)
        progress.update(now - start, shown)
    progress.close()
    if standing.stopped_early:
        print(_say_stopped(standing, experiment.eval), flush=True)
    return state, standing


def _log_training(run: Run, step: int, sums: list[Mapping[str, jax.Array]]) -> float:
    """Records the means since the last record and returns the loss per target token."""
    totals = {k: float(sum(m[k] for m in jax.device_get(sums))) for k in sums[0]}
    tokens = max(totals["tokens"], 1.0)
    loss = totals["loss"] / tokens
    if not np.isfinite(loss + totals["gradient_norm"]):
        raise FloatingPointError(
            f"the loss ({loss}) or its gradient ({totals['gradient_norm']}) is not finite: the run "
            f"diverged in the {len(sums)} steps before step {step}, and stops. What was saved "
            f"before is in {run.log.model_dir}. Start again in another MODEL_DIR with a lower "
            "LEARNING_RATE, a warm-up (WARMUP_STEPS), or DTYPE = 'float32'."
        )
    values = {
        "loss": loss,
        "cross_entropy": totals["cross_entropy"] / tokens,
        "z_loss": totals["z_loss"] / tokens,
        "token_accuracy": 100.0 * totals["correct"] / tokens,
        "gradient_norm": totals["gradient_norm"] / len(sums),
    }
    run.log.training(step, values, task=run.experiment.data.names[0])
    return loss


def _evaluate(run: Run, state: steps.TrainState, standing: Standing) -> tuple[Standing, str]:
    """Scores the state, writes records and prompt, and updates what is best."""
    params = {**run.frozen, **state.trainable}
    prompt = params.pop("prompt")
    step = int(state.step)
    scored = {t.name: evaluate(run.evaluator, (params, prompt), t) for t in run.data.eval_tasks}
    split = run.experiment.data.eval_split
    for name, one in scored.items():
        run.log.scores(step, one.metrics, task=name, split=split)
        run.log.predictions(step, name, one.metrics, one.rows)
    score = mean_score(scored, run.experiment.eval)
    better = standing.best_score is None or score > standing.best_score
    since = 0 if better else standing.evals_since_best + 1
    standing = Standing(
        best_score=score if better else standing.best_score,
        best_step=step if better else standing.best_step,
        evals_since_best=since,
    )
    standing = _judge(standing, run.experiment.eval)
    if prompt.shape[0]:
        metadata = _metadata(run, step, score)
        folder = run.log.model_dir / "prompts"
        array = np.asarray(jax.device_get(prompt))
        prompt_file.save_prompt(folder / f"step_{step:06d}", array, metadata)
        if better:
            prompt_file.save_prompt(folder / "best", array, metadata)
    return standing, _describe(scored)


def _describe(scored: Mapping[str, Scored]) -> str:
    parts = []
    for name, one in scored.items():
        values = ", ".join(f"{k} {v:.1f}" for k, v in one.metrics.items())
        parts.append(values if len(scored) == 1 else f"{name}: {values}")
    return "; ".join(parts)


def _metadata(run: Run, step: int, score: float) -> prompt_file.PromptMetadata:
    described = setup.describe_prompt(
        run.experiment,
        backbone=run.backbone.identity,
        vocabulary=run.data.vocabulary_identity,
        init=run.init,
        step=step,
    )
    names = ", ".join(task.name for task in run.data.eval_tasks)
    return dataclasses.replace(described, score=score, score_name=f"mean of {names}")


def _judge(standing: Standing, config: EvalConfig) -> Standing:
    """Whether the run has to stop early, by the setting of today."""
    patience = config.early_stopping_evals
    stops = patience is not None and standing.evals_since_best >= patience
    return dataclasses.replace(standing, stopped_early=stops)


def _say_stopped(standing: Standing, config: EvalConfig) -> str:
    return (
        f"stopped early: {standing.evals_since_best} evaluations without a better one than that of "
        f"step {standing.best_step} (EARLY_STOPPING_EVALS = {config.early_stopping_evals}; with a "
        "larger one, or None, the same command goes on)"
    )


def _baselines(run: Run) -> None:
    """Records what any prompt has to beat: the majority class and the model without a prompt."""
    experiment, step = run.experiment, run.backbone.step
    if not experiment.eval.baselines:
        return
    split = experiment.data.eval_split
    nothing = jax.numpy.zeros((0, experiment.model.embed_dim), jax.numpy.float32)
    rows_of = {rows.task: rows for rows in run.data.train}
    for task in run.data.eval_tasks:
        if task.name in rows_of:  # a task that is only evaluated has no majority to know of
            values = majority(task, rows_of[task.name], experiment.eval)
            run.log.scores(step, values, task=task.name, split=split, prompt="majority")
        values = evaluate(run.evaluator, (run.backbone.params, nothing), task).metrics
        run.log.scores(step, values, task=task.name, split=split, prompt="none")


def _save(
    run: Run, store: run_state.RunStateStore, state: steps.TrainState, standing: Standing
) -> None:
    step = int(state.step)
    if run.experiment.train.trainable == "model":
        _write_checkpoint(run.log.model_dir, state, keep={step, standing.best_step})
    meta = {
        "experiment": to_dict(run.experiment),
        "standing": dataclasses.asdict(standing),
        "backbone": run.backbone.identity,
        "vocabulary": run.data.vocabulary_identity,
    }
    store.save(step, state, meta)


def _write_checkpoint(model_dir: Path, state: steps.TrainState, keep: set[int | None]) -> None:
    """The tuned model in T5X's format, before the state that says so; last and best are kept."""
    step = int(state.step)
    t5x_checkpoint.write_t5x(str(model_dir / f"checkpoint_{step}"), state.trainable, step)
    for folder in model_dir.glob("checkpoint_*"):
        if int(folder.name.removeprefix("checkpoint_")) not in keep:
            shutil.rmtree(folder)
