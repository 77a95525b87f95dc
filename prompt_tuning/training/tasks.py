"""The objective of a run on tasks: their rows, their scores, and the prompts that are saved.

`loop.py` calls its methods. The other objective is a corpus (`pretraining/run.py`).
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

from prompt_tuning.batches import batching, groups
from prompt_tuning.checkpoints import retry, run_state
from prompt_tuning.config import ConfigError, Experiment
from prompt_tuning.evaluation.analysis import analyse, describe, illegal_line, to_json
from prompt_tuning.evaluation.evaluate import (
    Evaluator,
    best_constant,
    describe_choice,
    evaluate,
    from_records,
    majority,
    mean_score,
)
from prompt_tuning.evaluation.intervals import score_intervals
from prompt_tuning.evaluation.records import METRICS, draw_curves, read_records
from prompt_tuning.model import sharding
from prompt_tuning.model.prompt import no_prompt
from prompt_tuning.prompts import prompt_file
from prompt_tuning.runtime import processes, signals
from prompt_tuning.session import setup
from prompt_tuning.session.checks import refuse_many_processes
from prompt_tuning.session.overview import describe_data
from prompt_tuning.session.session import Backbone, Session, describe_start
from prompt_tuning.training import health
from prompt_tuning.training import model_dir as model_dirs
from prompt_tuning.training import run as runs
from prompt_tuning.training import step as steps
from prompt_tuning.training.run import EvalStatus, LoopState, Run, TrainResult, check_patience


@dataclasses.dataclass(frozen=True)
class Tasks:
    """The rows of a run on tasks, and their evaluator."""

    experiment: Experiment
    mesh: Mesh
    data: setup.Data
    evaluator: Evaluator
    cutting: groups.Cutting
    entropy: float | None  # of the targets, see health.py
    description: str
    has_small_states: bool = True  # saved at every evaluation

    # ---- before the rows are read

    @staticmethod
    def check(experiment: Experiment, mesh: Mesh) -> None:
        """Raises ConfigError for invalid settings, before anything is read."""
        if not run_state.saved_steps(Path(experiment.model_dir).expanduser() / "checkpoints"):
            _make_cutting(experiment, mesh)
        if processes.count() > 1:
            refuse_many_processes(experiment)

    @staticmethod
    def open_store(
        experiment: Experiment, shared: Path, own: Path, start: int
    ) -> run_state.RunStateStore:
        """The run's states, in Orbax's format; saving is a collective of all processes."""
        return run_state.RunStateStore(str(shared / "checkpoints"))

    @staticmethod
    def describe_saved(model_dir: Path) -> str:
        """A sentence on the newest saved state of a run."""
        return runs.describe_saved(model_dir)

    @classmethod
    def load(
        cls,
        experiment: Experiment,
        session: Session,
        model_dir: Path,
        meta: Mapping[str, Any] | None,
    ) -> Tasks:
        """Reads the rows; `meta` is the metadata of a resumed run, else None.

        Raises:
          ConfigError: a task, its data or its vocabulary is missing or does not fit.
        """
        for line in describe_start(experiment, session.step):
            print(line, flush=True)
        config = experiment.data
        data = setup.load_data(
            config, experiment.eval, experiment.model, class_labels=experiment.prompt.class_labels
        )
        description = describe_data(
            data, config.task_feature_lengths, config.eval_split, config.truncate
        )
        choice = describe_choice(data.eval_tasks, experiment.eval)
        return cls(
            experiment=experiment,
            mesh=session.mesh,
            data=data,
            evaluator=Evaluator(session.model, session.mesh, experiment.eval, config),
            cutting=_make_cutting(experiment, session.mesh, (meta or {}).get("cutting")),
            entropy=health.target_entropy(data.train, data.rates),
            description="\n".join(filter(None, (description, choice))),
        )

    @property
    def name(self) -> str:
        """The task or mixture that is trained on."""
        return self.experiment.data.names[0]

    @property
    def identities(self) -> dict[str, str]:
        """Fingerprints that must be the same when the run is resumed."""
        return {"vocabulary": self.data.vocabulary_identity, "files": self.data.files_identity}

    @property
    def metadata(self) -> dict[str, Any]:
        """Metadata that is saved with each state, for `load`."""
        return {"cutting": groups.record_cutting(self.cutting)}

    def fingerprint(self) -> str:
        """A digest of all rows; every process of a run must have the same."""
        return setup.fingerprint(self.data)

    def first_params(self, backbone: Backbone) -> tuple[dict[str, np.ndarray], str]:
        """The prompt method's parameters before the first step, and a description of them."""
        return setup.first_params(self.experiment, backbone, self.data)

    def restore_optimizer(self, state: steps.TrainState) -> steps.TrainState:
        """The state unchanged: RESTORE_OPTIMIZER is for pre-training."""
        return state

    def repair(self, model_dir: Path, status: EvalStatus) -> None:
        """Restores `prompts/best` if it was damaged or removed."""
        model_dirs.repair_best(model_dir, status.best_step)

    def batches(self, numbers: range) -> Iterator[list[dict[str, jax.Array]]]:
        """The length groups of each step, on the devices."""
        for number in numbers:
            length_groups = batching.train_groups(
                self.data.train,
                self.data.rates,
                self.cutting,
                seed=self.experiment.train.random_seed,
                step=number,
                batch_size=self.experiment.data.batch_size,
            )
            yield [sharding.shard_batch(group, self.mesh) for group in length_groups]

    def name_rows(self, number: int) -> str:
        """A text that names the rows in the batch of a step; steps are counted from 1."""
        config, seed = self.experiment.data, self.experiment.train.random_seed
        return health.name_rows(self.data, config, seed, number)

    # ---- during the run

    def begin(self, run: Run, loop: LoopState) -> None:
        """Records the baselines, and saves the state before the first step."""
        if self.experiment.eval.baselines:
            split = self.experiment.data.eval_split
            empty = no_prompt(self.experiment.model)
            for task in self.data.eval_tasks:
                values = majority(task, self.experiment.eval)
                run.log.scores(loop.step, values, task=task.name, split=split, prompt="majority")
                with signals.current().allowed():
                    result = evaluate(self.evaluator, (run.backbone.params, empty), task)
                values = result.metrics
                run.log.scores(loop.step, values, task=task.name, split=split, prompt="none")
        runs.save(run, loop)

    def evaluate(self, run: Run, loop: LoopState) -> tuple[EvalStatus, list[str]]:
        """The new status, and lines to show; scores the state, writes records and prompt."""
        status, step = loop.status, loop.step
        _, params = steps.split_prompt({**run.frozen, **loop.state.trainable})
        # Evaluate and save the same array.
        prompt = run.programs.fold_for_use(loop.state, run.frozen)
        with signals.current().allowed():  # this block writes no file
            results = {
                t.name: evaluate(self.evaluator, (params, prompt), t) for t in self.data.eval_tasks
            }
        parts: list[str] = []
        for task in self.data.eval_tasks:
            result = results[task.name]
            analysis = analyse(task, result)
            split = self.experiment.data.eval_split
            run.log.scores(step, result.metrics, task=task.name, split=split)
            run.log.predictions(step, task.name, result.metrics, result.rows)
            run.log.analysis(step, task.name, to_json(analysis))
            values = ", ".join(f"{name} {value:.1f}" for name, value in result.metrics.items())
            text = "; ".join(filter(None, (values, illegal_line(analysis))))
            parts.append(text if len(self.data.eval_tasks) == 1 else f"{task.name}: {text}")
        score = mean_score((r.metrics for r in results.values()), self.experiment.eval)
        is_best = status.best_score is None or score > status.best_score
        status = EvalStatus(
            best_score=score if is_best else status.best_score,
            best_step=step if is_best else status.best_step,
            evals_since_best=0 if is_best else status.evals_since_best + 1,
        )
        if prompt.rows.shape[0]:
            host = jax.device_get(prompt)
            metadata = self.describe_prompt(run, step, score)
            folder = run.log.model_dir / "prompts"
            for name in (f"step_{step:06d}", *(["best"] if is_best else [])):
                save = functools.partial(prompt_file.save_prompt, folder / name, host, metadata)
                retry.write_with_retries(save, folder)
        lines = ["; ".join(parts)]
        learned = functools.partial(self._has_learned, score)
        if problem := health.describe_problem(_losses(run, loop), self.entropy, learned):
            lines.append(problem)
        return check_patience(status, self.experiment.eval), lines

    def _has_learned(self, score: float) -> bool:
        """Whether a score is clearly above that of the best constant answer."""
        tasks = self.data.eval_tasks
        try:
            constants = [best_constant(task, self.experiment.eval) for task in tasks]
        except ConfigError:  # a user's metric may not accept constant answers
            return False
        baselines = [baseline for baseline in constants if baseline is not None]
        margin = health.clear_margin(min(len(task.rows) for task in tasks))
        return bool(baselines and score > np.mean(baselines) + margin)

    def describe_prompt(
        self, run: Run, step: int, score: float | None = None
    ) -> prompt_file.PromptMetadata:
        """The metadata of a prompt of this run."""
        metadata = setup.describe_prompt(
            self.experiment,
            backbone=run.backbone.identity,
            vocabulary=self.data.vocabulary_identity,
            init=run.init,
            step=step,
        )
        names = ", ".join(task.name for task in self.data.eval_tasks)
        score_name = "" if score is None else f"mean of {names}"
        return dataclasses.replace(metadata, score=score, score_name=score_name)

    def save_last_good(self, run: Run, state: steps.TrainState, step: int) -> str:
        """A sentence on the prompt of a state, which it writes to `prompts/last_good`."""
        prompt = jax.device_get(run.programs.fold_for_use(state, run.frozen))
        if not prompt.rows.shape[0]:
            return f"The last good state, of step {step}, is in {run.log.model_dir}."
        folder = run.log.model_dir / "prompts" / "last_good"
        prompt_file.save_prompt(folder, prompt, self.describe_prompt(run, step))
        return f"The last good prompt, of step {step}, is in {folder}."

    # ---- at the end

    def finish(self, run: Run, loop: LoopState, model_dir: Path) -> TrainResult:
        """The result: the closing table with its intervals, and the last prompt; draws curves."""
        best_step, folder = loop.status.best_step, run.log.model_dir
        curves = draw_curves(folder)
        reports: dict[str, model_dirs.TaskReport] = {}
        for task in self.data.eval_tasks:
            rows = run.log.read_predictions(best_step, task.name) if best_step is not None else []
            if len(rows) == len(task.rows):
                result = from_records(task, rows, self.experiment.eval)
                resamples = self.experiment.eval.bootstrap
                intervals = score_intervals(task, result.predictions, resamples)
                reports[task.name] = intervals, describe(analyse(task, result))
        summary = model_dirs.describe_result(folder, best_step, curves, reports)
        rows = run.programs.fold_for_use(loop.state, run.frozen).rows
        return TrainResult(
            model_dir, loop.step, summary, best_step, np.asarray(jax.device_get(rows))
        )


def _make_cutting(
    experiment: Experiment, mesh: Mesh, recorded: Mapping[str, int] | None = None
) -> groups.Cutting:
    data_parts, length = mesh.shape["data"], experiment.prompt.length
    return groups.make_cutting(experiment.train, experiment.data, length, data_parts, recorded)


def _losses(run: Run, loop: LoopState) -> list[float]:
    """The cross entropy per token of every step of the run.

    For steps before a resume it is the mean of their record.
    """
    values, last = [], run.backbone.step
    for record in read_records(run.log.model_dir / METRICS):
        if record["name"] == "cross_entropy" and record["step"] <= loop.step - len(loop.losses):
            values += [record["value"]] * (record["step"] - last)
            last = record["step"]
    return values + loop.losses
