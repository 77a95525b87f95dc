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
from prompt_tuning.checkpoints import run_state
from prompt_tuning.config import ConfigError, Experiment
from prompt_tuning.evaluation.analysis import analyse, describe, illegal_line
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
from prompt_tuning.evaluation.pictures import draw_curves
from prompt_tuning.evaluation.records import METRICS, read_records
from prompt_tuning.methods.table import find_method
from prompt_tuning.model import sharding
from prompt_tuning.model.prompt import Prompt, no_prompt, other_fields, take_member
from prompt_tuning.prompts import prompt_file
from prompt_tuning.runtime import processes, signals
from prompt_tuning.runtime.replace_folder import write_with_retries
from prompt_tuning.session import setup
from prompt_tuning.session.checks import refuse_many_processes
from prompt_tuning.session.overview import describe_data
from prompt_tuning.session.session import Backbone, Session, describe_start
from prompt_tuning.tasks import registry
from prompt_tuning.training import health
from prompt_tuning.training import model_dir as model_dirs
from prompt_tuning.training import run as runs
from prompt_tuning.training import step as steps
from prompt_tuning.training.run import (
    EvalStatus,
    LoopState,
    Objective,
    Run,
    TrainResult,
    check_patience,
)

Scores = Mapping[str, Mapping[str, float]]  # the metrics of each task
# The folder of the rows that all members share. Names of seqio have no hyphen: it is no task's.
ALL_TASKS = "all-tasks"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tasks(Objective):
    """The rows of a run on tasks, and their evaluator."""

    data: setup.Data
    evaluator: Evaluator
    cutting: groups.Cutting
    members: tuple[str, ...]  # the tasks that have a member of the prompt each; () without members
    entropy: float | None  # of the targets, see health.py
    has_small_states = True

    # ---- before the rows are read

    @staticmethod
    def check(experiment: Experiment, mesh: Mesh) -> None:
        if not run_state.saved_steps(Path(experiment.model_dir).expanduser() / "checkpoints"):
            _make_cutting(experiment, mesh)
        if processes.count() > 1:
            refuse_many_processes(experiment)

    @staticmethod
    def open_store(
        experiment: Experiment, shared: Path, own: Path, start: int
    ) -> run_state.RunStateStore:
        return run_state.RunStateStore(str(shared / "checkpoints"))

    @staticmethod
    def describe_saved(model_dir: Path) -> str:
        return runs.describe_saved(model_dir)

    @classmethod
    def load(cls, experiment: Experiment, session: Session, model_dir: Path, meta: Any) -> Tasks:
        for line in describe_start(experiment, session.step):
            print(line, flush=True)
        config, members = experiment.data, setup.find_members(experiment)
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
            name=config.names[0],
            identities={"vocabulary": data.vocabulary_identity, "files": data.files_identity},
            data=data,
            evaluator=Evaluator(session.model, session.mesh, experiment.eval, config),
            cutting=_make_cutting(experiment, session.mesh, (meta or {}).get("cutting")),
            members=members,
            entropy=health.target_entropy(data.train, data.rates),
            description="\n".join(filter(None, (description, choice))),
        )

    @property
    def metadata(self) -> dict[str, Any]:
        return {"cutting": groups.record_cutting(self.cutting)}

    def fingerprint(self) -> str:
        return setup.fingerprint(self.data)

    def first_params(self, backbone: Backbone) -> tuple[dict[str, np.ndarray], str]:
        return setup.first_params(self.experiment, backbone, self.data)

    def repair(self, model_dir: Path, status: EvalStatus) -> None:
        for name in self._folders:
            model_dirs.repair_best(model_dir, status.best_step, name)

    def batches(self, numbers: range) -> Iterator[list[dict[str, jax.Array]]]:
        members = [self.members.index(rows.task) for rows in self.data.train if self.members]
        for number in numbers:
            length_groups = batching.train_groups(
                self.data.train,
                self.data.rates,
                self.cutting,
                seed=self.experiment.train.random_seed,
                step=number,
                batch_size=self.experiment.data.batch_size,
                members=members or None,
            )
            yield [sharding.shard_batch(group, self.mesh) for group in length_groups]

    def name_rows(self, number: int) -> str:
        config, seed = self.experiment.data, self.experiment.train.random_seed
        return health.name_rows(self.data.train, self.data.rates, config, seed, number)

    # ---- during the run

    def begin(self, run: Run, loop: LoopState) -> None:
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
        status, step = loop.status, loop.step
        _, params = steps.split_prompt({**run.frozen, **loop.state.trainable})
        # Evaluate and save the same array.
        prompt = run.programs.fold_for_use(loop.state, run.frozen)
        with signals.current().allowed():  # this block writes no file
            results = {
                t.name: evaluate(self.evaluator, (params, self._prompt_for(prompt, t.name)), t)
                for t in self.data.eval_tasks
            }
        parts: list[str] = []
        for task in self.data.eval_tasks:
            result = results[task.name]
            analysis = analyse(task, result)
            split = self.experiment.data.eval_split
            run.log.scores(step, result.metrics, task=task.name, split=split)
            run.log.predictions(step, task.name, result.metrics, result.rows)
            run.log.analysis(step, task.name, dataclasses.asdict(analysis))
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
        scores = {name: result.metrics for name, result in results.items()}
        if prompts := self._to_save(run, loop.state, prompt, step, scores):
            folder = run.log.model_dir / "prompts"
            for name in (f"step_{step:06d}", *(["best"] if is_best else [])):
                save = functools.partial(prompt_file.save_prompts, folder / name, prompts)
                write_with_retries(save, folder)
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

    def _prompt_for(self, prompt: Prompt, task: str) -> Prompt:
        """The prompt that a task is scored with: its member, if there are members."""
        if not self.members:
            return prompt
        return take_member(prompt, self.members.index(registry.trained_task(task)))

    @property
    def _folders(self) -> tuple[str, ...]:
        """The names of the prompts of a step in its folder; "" is the folder itself."""
        method = find_method(self.experiment.prompt.method)
        return (*self.members, *([ALL_TASKS] if method.shared else [])) if self.members else ("",)

    def _to_save(
        self, run: Run, state: steps.TrainState, folded: Prompt, step: int, scores: Scores
    ) -> dict[str, tuple[Prompt, prompt_file.PromptMetadata]]:
        """The prompts of a state for use, on the host, by folder; {} in model tuning."""
        if self.experiment.train.trainable == "model":
            return {}
        method, prompts = find_method(self.experiment.prompt.method), {}
        for name in self._folders:
            if name in self.members:
                prompt = take_member(folded, self.members.index(name))
            elif name == ALL_TASKS:
                prompt = Prompt(steps.for_use(state)[method.shared])
            else:
                is_shared = method.visibility == "prompt"
                prompt = Prompt(steps.for_use(state)["prompt"]) if is_shared else folded
            prompts[name] = jax.device_get(prompt), self._describe(run, step, scores, name)
        return prompts

    def _describe(
        self, run: Run, step: int, scores: Scores, name: str
    ) -> prompt_file.PromptMetadata:
        """The metadata of the prompt of that name in `_folders`, with the scores that are its."""
        metadata = setup.describe_prompt(
            self.experiment,
            backbone=run.backbone.identity,
            vocabulary=self.data.vocabulary_identity,
            init=run.init,
            step=step,
            task=name if name in self.members else None,
        )
        own = [task for task in scores if name in ("", registry.trained_task(task))]
        if not own:
            return metadata
        score = mean_score((scores[task] for task in own), self.experiment.eval)
        return dataclasses.replace(metadata, score=score, score_name=f"mean of {', '.join(own)}")

    def save_last_good(self, run: Run, state: steps.TrainState, step: int) -> str:
        """A sentence on the prompt of a state, which it writes to `prompts/last_good`."""
        folded = run.programs.fold_for_use(state, run.frozen)
        prompts = self._to_save(run, state, folded, step, {})
        if not prompts:
            return f"The last good state, of step {step}, is in {run.log.model_dir}."
        folder = run.log.model_dir / "prompts" / "last_good"
        prompt_file.save_prompts(folder, prompts)
        return f"The last good prompt, of step {step}, is in {folder}."

    # ---- at the end

    def finish(self, run: Run, loop: LoopState, model_dir: Path) -> TrainResult:
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
        prompt = jax.device_get(run.programs.fold_for_use(loop.state, run.frozen))
        last = prompt if other_fields(prompt) else np.asarray(prompt.rows)
        return TrainResult(model_dir, loop.step, summary, best_step, last)


def _make_cutting(
    experiment: Experiment, mesh: Mesh, recorded: Mapping[str, int] | None = None
) -> groups.Cutting:
    return groups.make_cutting(experiment.train, experiment.data, mesh.shape["data"], recorded)


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
