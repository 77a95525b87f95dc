"""A run on tasks: their rows, how they are scored, and the prompts that are saved.

`loop.py` calls these; the other objective is a corpus (`pretraining/run.py`).
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
from prompt_tuning.session.overview import describe_data
from prompt_tuning.session.session import (
    Backbone,
    Session,
    refuse_many_processes,
    say_start,
)
from prompt_tuning.training import course as courses
from prompt_tuning.training import health
from prompt_tuning.training import model_dir as model_dirs
from prompt_tuning.training import step as steps
from prompt_tuning.training.course import Course, Run, Standing, TrainResult, judge


@dataclasses.dataclass(frozen=True)
class Tasks:
    """The rows of a run on tasks, and what scores them."""

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
        """Raises ConfigError for settings that do not fit; says what a run should know first."""
        if not run_state.saved_steps(Path(experiment.model_dir) / "checkpoints"):
            _make_cutting(experiment, mesh)
        if processes.count() > 1:
            refuse_many_processes(experiment)

    @staticmethod
    def open_store(
        experiment: Experiment, shared: Path, own: Path, start: int
    ) -> run_state.RunStateStore:
        """The run's states: small, in Orbax's format, saved by all processes together."""
        return run_state.RunStateStore(str(shared / "checkpoints"))

    @staticmethod
    def describe_saved(model_dir: Path) -> str:
        """The newest state of a run, as a sentence."""
        return courses.describe_saved(model_dir)

    @classmethod
    def load(
        cls,
        experiment: Experiment,
        session: Session,
        model_dir: Path,
        meta: Mapping[str, Any] | None,
    ) -> Tasks:
        """Reads the rows; `meta` is of a run that goes on.

        Raises:
          ConfigError: a task, its data or its vocabulary is missing or does not fit.
        """
        for line in say_start(experiment, session.step):
            print(line, flush=True)
        config = experiment.data
        data = setup.load_data(
            config, experiment.eval, experiment.model, class_labels=experiment.prompt.class_labels
        )
        return cls(
            experiment=experiment,
            mesh=session.mesh,
            data=data,
            evaluator=Evaluator(session.model, session.mesh, experiment.eval, config),
            cutting=_make_cutting(experiment, session.mesh, (meta or {}).get("cutting")),
            entropy=health.target_entropy(data.train, data.rates),
            description=describe_data(data, config.task_feature_lengths, config.eval_split),
        )

    @property
    def name(self) -> str:
        """The task or mixture that is trained on."""
        return self.experiment.data.names[0]

    @property
    def identities(self) -> dict[str, str]:
        """Fingerprints of what must be the same if the run goes on."""
        return {"vocabulary": self.data.vocabulary_identity, "files": self.data.files_identity}

    @property
    def saved(self) -> dict[str, Any]:
        """What a saved state holds beside, for `load`."""
        return {"cutting": groups.record_cutting(self.cutting)}

    def fingerprint(self) -> str:
        """A digest of all rows: every process of a run has to have read them alike."""
        return setup.fingerprint(self.data)

    def first_params(self, backbone: Backbone) -> tuple[dict[str, np.ndarray], str]:
        """The prompt method's parameters before the first step, and a sentence on them."""
        return setup.first_params(self.experiment, backbone, self.data)

    def restore_optimizer(self, state: steps.TrainState) -> steps.TrainState:
        """The state as it is: RESTORE_OPTIMIZER is for pre-training."""
        return state

    def repair(self, model_dir: Path, standing: Standing) -> None:
        """Makes `prompts/best` anew if it was damaged or removed."""
        model_dirs.mend_best(model_dir, standing.best_step)

    def batches(self, numbers: range) -> Iterator[list[dict[str, jax.Array]]]:
        """The length groups of one step after another, on the devices."""
        for number in numbers:
            cut = batching.train_groups(
                self.data.train,
                self.data.rates,
                self.cutting,
                seed=self.experiment.train.random_seed,
                step=number,
                batch_size=self.experiment.data.batch_size,
            )
            yield [sharding.shard_batch(group, self.mesh) for group in cut]

    def name_rows(self, number: int) -> str:
        """The rows in the batch of a step, counted from 1 in this run."""
        config, seed = self.experiment.data, self.experiment.train.random_seed
        return health.name_rows(self.data, config, seed, number)

    # ---- as it goes

    def begin(self, run: Run, course: Course) -> None:
        """Records what any prompt has to beat, and saves the state before the first step."""
        if self.experiment.eval.baselines:
            split = self.experiment.data.eval_split
            nothing = no_prompt(self.experiment.model)
            for task in self.data.eval_tasks:
                values = majority(task, self.experiment.eval)
                run.log.scores(course.step, values, task=task.name, split=split, prompt="majority")
                with signals.current().allowed():
                    scored = evaluate(self.evaluator, (run.backbone.params, nothing), task)
                values = scored.metrics
                run.log.scores(course.step, values, task=task.name, split=split, prompt="none")
        courses.save(run, course)

    def evaluate(self, run: Run, course: Course) -> tuple[Standing, list[str]]:
        """Scores the state, writes records and prompt; the new standing, and lines to show."""
        standing, step = course.standing, course.step
        _, params = steps.split_prompt({**run.frozen, **course.state.trainable})
        prompt = run.programs.fold_for_use(course.state, run.frozen)  # what is scored is saved
        with signals.current().allowed():  # nothing is written in here
            scored = {
                t.name: evaluate(self.evaluator, (params, prompt), t) for t in self.data.eval_tasks
            }
        parts: list[str] = []
        for task in self.data.eval_tasks:
            result = scored[task.name]
            analysis = analyse(task, result)
            split = self.experiment.data.eval_split
            run.log.scores(step, result.metrics, task=task.name, split=split)
            run.log.predictions(step, task.name, result.metrics, result.rows)
            run.log.analysis(step, task.name, to_json(analysis))
            values = ", ".join(f"{name} {value:.1f}" for name, value in result.metrics.items())
            text = "; ".join(filter(None, (values, illegal_line(analysis))))
            parts.append(text if len(self.data.eval_tasks) == 1 else f"{task.name}: {text}")
        score = mean_score((r.metrics for r in scored.values()), self.experiment.eval)
        is_best = standing.best_score is None or score > standing.best_score
        standing = Standing(
            best_score=score if is_best else standing.best_score,
            best_step=step if is_best else standing.best_step,
            evals_since_best=0 if is_best else standing.evals_since_best + 1,
        )
        if prompt.rows.shape[0]:
            rows = np.asarray(jax.device_get(prompt.rows))
            metadata = self.describe_prompt(run, step, score)
            folder = run.log.model_dir / "prompts"
            for name in (f"step_{step:06d}", *(["best"] if is_best else [])):
                save = functools.partial(prompt_file.save_prompt, folder / name, rows, metadata)
                retry.retried(save, folder)
        lines = ["; ".join(parts)]
        learned = functools.partial(self._has_learned, score)
        if trouble := health.describe_trouble(_losses(run, course), self.entropy, learned):
            lines.append(trouble)
        return judge(standing, self.experiment.eval), lines

    def _has_learned(self, score: float) -> bool:
        """Whether a score is far above the best that the same answer to every row reaches."""
        tasks = self.data.eval_tasks
        try:
            constants = [best_constant(task, self.experiment.eval) for task in tasks]
        except ConfigError:  # a metric of the user's that takes no such answers
            return False
        bars = [bar for bar in constants if bar is not None]
        margin = health.clearly(min(len(task.rows) for task in tasks))
        return bool(bars and score > np.mean(bars) + margin)

    def describe_prompt(
        self, run: Run, step: int, score: float | None = None
    ) -> prompt_file.PromptMetadata:
        """What the folder of a prompt of this run says of it."""
        described = setup.describe_prompt(
            self.experiment,
            backbone=run.backbone.identity,
            vocabulary=self.data.vocabulary_identity,
            init=run.init,
            step=step,
        )
        names = ", ".join(task.name for task in self.data.eval_tasks)
        score_name = "" if score is None else f"mean of {names}"
        return dataclasses.replace(described, score=score, score_name=score_name)

    def save_last_good(self, run: Run, state: steps.TrainState, step: int) -> str:
        """Writes the prompt of a state to `prompts/last_good`, and says where."""
        rows = np.asarray(jax.device_get(run.programs.fold_for_use(state, run.frozen).rows))
        if not rows.shape[0]:
            return f"The last good state, of step {step}, is in {run.log.model_dir}."
        folder = run.log.model_dir / "prompts" / "last_good"
        prompt_file.save_prompt(folder, rows, self.describe_prompt(run, step))
        return f"The last good prompt, of step {step}, is in {folder}."

    # ---- at the end

    def finish(self, run: Run, course: Course, model_dir: Path) -> TrainResult:
        """Curves, the closing table with its intervals, and the last prompt."""
        best_step, folder = course.standing.best_step, run.log.model_dir
        curves = draw_curves(folder)
        findings: dict[str, model_dirs.Finding] = {}
        for task in self.data.eval_tasks:
            rows = run.log.read_predictions(best_step, task.name) if best_step is not None else []
            if len(rows) == len(task.rows):
                scored = from_records(task, rows, self.experiment.eval)
                resamples = self.experiment.eval.bootstrap
                intervals = score_intervals(task, scored.predictions, resamples)
                findings[task.name] = intervals, describe(analyse(task, scored))
        summary = model_dirs.result_text(folder, best_step, curves, findings)
        rows = run.programs.fold_for_use(course.state, run.frozen).rows
        return TrainResult(
            model_dir, course.step, summary, best_step, np.asarray(jax.device_get(rows))
        )


def _make_cutting(
    experiment: Experiment, mesh: Mesh, recorded: Mapping[str, int] | None = None
) -> groups.Cutting:
    data_parts, length = mesh.shape["data"], experiment.prompt.length
    return groups.make_cutting(experiment.train, experiment.data, length, data_parts, recorded)


def _losses(run: Run, course: Course) -> list[float]:
    """The cross entropy per token of every step; of those before this start, by their records."""
    values, last = [], run.backbone.step
    for record in read_records(run.log.model_dir / METRICS):
        if record["name"] == "cross_entropy" and record["step"] <= course.step - len(course.losses):
            values += [record["value"]] * (record["step"] - last)
            last = record["step"]
    return values + course.losses
