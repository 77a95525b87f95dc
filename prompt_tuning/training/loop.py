"""The run: from an `Experiment` to a tuned prompt in MODEL_DIR.

One function, read from top to bottom: devices, data, backbone, prompt, resume, loop, result. A
killed run that is started again ends with the same bits, because all that changes is the
`TrainState`, and batch and dropout are functions of (seed, step) alone.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

import prompt_tuning
from prompt_tuning.checkpoint import prompt_file, run_state
from prompt_tuning.checkpoint import t5x as t5x_checkpoint
from prompt_tuning.config import ConfigError, Experiment, to_dict
from prompt_tuning.data import features
from prompt_tuning.training import optim, report, setup, sharding
from prompt_tuning.training import step as steps
from prompt_tuning.training.evaluate import Evaluator, Scored, evaluate, majority, mean_score

# What may change between two calls on one MODEL_DIR: how long, how often, where, on what devices.
_MAY_CHANGE = frozenset(
    {
        "model_dir",
        "num_model_partitions",
        "train.train_steps",
        "train.train_steps_relative",
        "train.checkpoint_period",
        "eval.period",
    }
)


@dataclasses.dataclass(frozen=True)
class Standing:
    """How the run stands apart from its arrays; saved beside them."""

    best_score: float | None = None
    best_step: int | None = None
    evals_since_best: int = 0
    stopped_early: bool = False


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
    data: setup.Data
    backbone: setup.Backbone
    frozen: Mapping[str, jax.Array]
    evaluator: Evaluator
    log: report.RunLog
    init: str  # how the prompt began

    @property
    def name(self) -> str:
        """The task or mixture trained on."""
        return "+".join(self.experiment.data.names)


def train(experiment: Experiment, *, config_text: str = "") -> TrainResult:
    """Trains what the mask allows, evaluates as it goes, and leaves everything in MODEL_DIR.

    The same experiment again continues a killed run, prints the result of a finished one, and goes
    on where more steps are asked for.

    Raises:
      ConfigError: the experiment, its data, its checkpoint or its MODEL_DIR does not fit.
    """
    # ---- devices and folder
    mesh = sharding.make_mesh(experiment.num_model_partitions)
    sharding.check_batch_size(experiment.data.batch_size, mesh)
    model_dir = Path(experiment.model_dir).expanduser().absolute()
    setup.make_dir(model_dir, "MODEL_DIR")
    store = run_state.RunStateStore(str(model_dir / "checkpoints"))
    _refuse_other_experiment(store, experiment, model_dir)

    # ---- data, backbone, first prompt
    data = setup.load_data(experiment)
    for rows in data.train:
        print(setup.describe_rows(rows), flush=True)
    backbone = setup.load_backbone(experiment, mesh)
    end = setup.last_step(experiment.train, backbone.step)
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
    if store.latest_step() is not None:
        state, meta = store.restore(state)
        standing = Standing(**meta["standing"])
    log = report.RunLog(model_dir, step=int(state.step))
    evaluator = Evaluator(experiment, mesh)
    run = Run(experiment, mesh, data, backbone, frozen, evaluator, log, init)
    if store.latest_step() is None:
        _write_info(model_dir, params, mesh, config_text)
        _baselines(run)
        _save(run, store, state, standing)
    elif int(state.step) < end and not standing.stopped_early:
        print(f"continuing at step {int(state.step)}", flush=True)

    # ---- loop
    state, standing = _loop(run, store, state, standing, optimizer, end)

    # ---- result
    store.close()
    log.close()
    curves = report.draw_curves(model_dir)
    summary = result_text(model_dir, standing, curves)
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
    train_step = jax.jit(
        steps.make_train_step(experiment.model, experiment.train, optimizer), donate_argnums=0
    )
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
        batch = features.train_batch(
            run.data.train,
            run.data.rates,
            seed=experiment.train.random_seed,
            step=now - start,
            batch_size=config.batch_size,
            lengths=config.task_feature_lengths,
        )
        state, metrics = train_step(state, run.frozen, sharding.shard_batch(dict(batch), run.mesh))
        sums.append(metrics)
        now += 1
        shown: dict[str, str] = {}
        if (now - start) % log_every == 0 or now == end:
            shown["loss"] = f"{_log_training(run, now, sums):.3f}"
            sums = []
        evaluated = (now - start) % experiment.eval.period == 0 or now == end
        if evaluated:
            standing, said = _evaluate(run, state, standing)
            shown["best"] = f"{standing.best_score:.1f}"
            progress.say(f"step {now - start}/{end - start} ({now}): {said}")
        if evaluated or (now - start) % save_every == 0:
            _save(run, store, state, standing)
        progress.update(now - start, shown)
    progress.close()
    return state, standing


def _log_training(run: Run, step: int, sums: list[Mapping[str, jax.Array]]) -> float:
    """Records the means since the last record and returns the loss per target token."""
    totals = {k: float(sum(m[k] for m in jax.device_get(sums))) for k in sums[0]}
    tokens = max(totals["tokens"], 1.0)
    loss = totals["loss"] / tokens
    if not np.isfinite(loss):
        raise FloatingPointError(
            f"the loss became {loss} between the last record and step {step}. The last good state "
            f"is in {run.log.model_dir / 'checkpoints'}. Lower LEARNING_RATE, or use float32."
        )
    values = {
        "loss": loss,
        "cross_entropy": totals["cross_entropy"] / tokens,
        "z_loss": totals["z_loss"] / tokens,
        "token_accuracy": 100.0 * totals["correct"] / tokens,
        "gradient_norm": totals["gradient_norm"] / len(sums),
    }
    run.log.record(step, values, task=run.name, split="train")
    return loss


def _evaluate(run: Run, state: steps.TrainState, standing: Standing) -> tuple[Standing, str]:
    """Scores the state, writes records and prompt, and updates what is best."""
    params = {**run.frozen, **state.trainable}
    prompt = params.pop("prompt")
    step = int(state.step)
    scored = {t.name: evaluate(run.evaluator, (params, prompt), t) for t in run.data.eval_tasks}
    split = run.experiment.data.eval_split
    for name, one in scored.items():
        run.log.record(step, one.metrics, task=name, split=split)
        run.log.predictions(step, name, one.metrics, one.rows)
    score = mean_score(scored, run.experiment.eval)
    better = standing.best_score is None or score > standing.best_score
    since = 0 if better else standing.evals_since_best + 1
    patience = run.experiment.eval.early_stopping_evals
    standing = Standing(
        best_score=score if better else standing.best_score,
        best_step=step if better else standing.best_step,
        evals_since_best=since,
        stopped_early=patience is not None and since >= patience,
    )
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
    experiment = run.experiment
    words = dict.fromkeys(word for task in run.data.eval_tasks for word in task.label_words)
    text = json.dumps(to_dict(experiment), sort_keys=True)
    return prompt_file.PromptMetadata(
        task=run.name,
        label_words=tuple(words),
        backbone=run.backbone.identity,
        vocabulary=run.data.vocabulary_sha256,
        init=run.init,
        step=step,
        score=score,
        score_name="mean of " + ", ".join(task.name for task in run.data.eval_tasks),
        config_hash=hashlib.sha256(text.encode()).hexdigest(),
        prompt_tuning_version=prompt_tuning.__version__,
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
            targets = setup.train_targets(rows_of[task.name], task)
            values = majority(task, targets, experiment.eval)
            run.log.record(step, values, task=task.name, split=split, prompt="majority")
        values = evaluate(run.evaluator, (run.backbone.params, nothing), task).metrics
        run.log.record(step, values, task=task.name, split=split, prompt="none")


def _save(
    run: Run, store: run_state.RunStateStore, state: steps.TrainState, standing: Standing
) -> None:
    meta = {
        "experiment": to_dict(run.experiment),
        "standing": dataclasses.asdict(standing),
        "backbone": run.backbone.identity,
    }
    step = int(state.step)
    store.save(step, state, meta)
    if run.experiment.train.trainable == "model":
        path = run.log.model_dir / f"checkpoint_{step}"
        t5x_checkpoint.write_t5x(str(path), state.trainable, step)


def _refuse_other_experiment(
    store: run_state.RunStateStore, experiment: Experiment, model_dir: Path
) -> None:
    """Stops when MODEL_DIR holds the state of a different experiment."""
    meta = store.read_meta()
    if meta is None:
        return
    old, new = _flat(meta["experiment"]), _flat(to_dict(experiment))
    changed = [
        f"{key}: {old.get(key)!r} there, {new.get(key)!r} now"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and key not in _MAY_CHANGE
    ]
    if changed:
        raise ConfigError(
            f"MODEL_DIR {model_dir} holds a different experiment:\n  "
            + "\n  ".join(changed)
            + "\nChoose another MODEL_DIR, or remove that one."
        )


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _write_info(
    model_dir: Path, params: Mapping[str, jax.Array], mesh: Mesh, config_text: str
) -> None:
    """Writes config.gin, which can be fed back, and T5X's list of variables."""
    if config_text:
        (model_dir / "config.gin").write_text(config_text, encoding="utf-8")
    lines = []
    for name, value in sorted(params.items()):
        axes = zip(sharding.logical_axes(name), value.shape, strict=True)
        shape = ", ".join(f"{axis}={size}" for axis, size in axes)
        spec = sharding.partition_spec(name, value.shape, mesh)
        lines.append(f"Variable {name:<70} size {value.size:<12} shape ({shape}) spec {spec}")
    total = sum(value.size for value in params.values())
    lines.append(f"Total number of parameters: {total}")
    (model_dir / "model-info.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def result_text(model_dir: Path, standing: Standing, curves: Path | None) -> str:
    """The closing table: majority class, no prompt, best and last prompt, and where it lies."""
    records = report.read_records(model_dir / report.METRICS)
    records = [r for r in records if r["split"] != "train"]
    last = max((r["step"] for r in records if "prompt" not in r), default=None)
    tables: dict[str, dict[str, dict[str, float]]] = {}
    for r in records:
        if r.get("prompt") == "majority":
            name = "majority class"
        elif r.get("prompt") == "none":
            name = "no prompt"
        elif r["step"] == standing.best_step:
            name = f"tuned, best (step {r['step']})"
        elif r["step"] == last:
            name = f"tuned, last (step {r['step']})"
        else:
            continue
        tables.setdefault(r["task"], {}).setdefault(name, {})[r["name"]] = r["value"]
    text = [report.score_table(task, rows) for task, rows in tables.items()]
    best = model_dir / "prompts" / "best"
    if best.exists():
        text.append(f"prompt: {best}")
    if curves:
        text.append(f"curves: {curves}")
    return "\n".join(text)
