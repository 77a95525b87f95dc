"""`t5x eval`: every prompt on every task, beside the model without a prompt, as one table.

Uses what a training run uses (`training/setup.py`, `scoring/evaluate.py`), so a score here is the
score there.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float

from prompt_tuning.checkpoint import prompt_file
from prompt_tuning.config import ConfigError, EvalRun
from prompt_tuning.model import sharding
from prompt_tuning.scoring.evaluate import Evaluator, evaluate
from prompt_tuning.scoring.score_table import score_table
from prompt_tuning.training import report, setup

NO_PROMPT = "no prompt"


@dataclasses.dataclass(frozen=True)
class Matrix:
    """`metrics[prompt][task]` is T5's metrics in per cent, named `<metric>/<method>`."""

    metrics: dict[str, dict[str, dict[str, float]]]

    def __str__(self) -> str:
        """For each task, a table with a line for each prompt."""
        names = list(dict.fromkeys(task for row in self.metrics.values() for task in row))
        return "\n\n".join(
            score_table(task, {prompt: row[task] for prompt, row in self.metrics.items()})
            for task in names
        )


def run_eval(run: EvalRun, *, config_text: str = "") -> Matrix:
    """Scores every prompt of `run` on every task and writes EVAL_OUTPUT_DIR.

    Without a prompt the model is scored as it is; with `eval.baselines` that line stands above the
    prompts too.

    Raises:
      ConfigError: a prompt, task or checkpoint is missing or does not fit the others.
    """
    experiment = run.experiment
    mesh = sharding.make_mesh(experiment.num_model_partitions)
    evaluator = Evaluator(experiment, mesh)
    data = setup.load_data(experiment, train=False)
    backbone = setup.load_backbone(experiment, mesh)
    prompts = load_prompts(run, backbone, data)

    output_dir = setup.make_dir(run.eval_output_dir, "EVAL_OUTPUT_DIR")
    _refuse_model_dir(output_dir)
    if config_text:
        (output_dir / "config.gin").write_text(config_text, encoding="utf-8")
    names = file_names([name for name in prompts if name != NO_PROMPT]) or {NO_PROMPT: ""}
    metrics: dict[str, dict[str, dict[str, float]]] = {}
    log = report.RunLog(output_dir, step=-1)
    for name, (prompt, step) in prompts.items():
        array = jax.device_put(prompt, sharding.replicated(mesh))
        metrics[name] = {}
        for task in data.eval_tasks:
            scored = evaluate(evaluator, (backbone.params, array), task)
            metrics[name][task.name] = scored.metrics
            label = "none" if name == NO_PROMPT else name
            split = run.data.eval_split
            log.scores(step, scored.metrics, task=task.name, split=split, prompt=label)
            if name in names:
                log.predictions(step, task.name + names[name], scored.metrics, scored.rows)
    log.close()
    matrix = Matrix(metrics)
    print(f"{matrix}\nrows and metrics: {output_dir}", flush=True)
    return matrix


def _refuse_model_dir(output_dir: Path) -> None:
    """Scores of an evaluation would take the place of the run's own records."""
    if (output_dir / "checkpoints").is_dir() or (output_dir / "prompts").is_dir():
        raise ConfigError(
            f"EVAL_OUTPUT_DIR {output_dir} is the MODEL_DIR of a run, whose records would be "
            "overwritten: choose a folder of its own."
        )


def file_names(prompts: Sequence[str]) -> dict[str, str]:
    """What is added to a file's name for each prompt: nothing for one, else what sets it apart.

    >>> list(file_names(["runs/mood/prompts/best", "runs/topic/prompts/best"]).values())
    ['-mood_prompts_best', '-topic_prompts_best']
    """
    if len(prompts) < 2:
        return dict.fromkeys(prompts, "")
    paths = {name: os.path.abspath(os.path.expanduser(name)) for name in prompts}
    common = os.path.commonpath(paths.values())
    return {
        name: "-" + os.path.relpath(path, common).replace(os.sep, "_")
        for name, path in paths.items()
    }


def load_prompts(
    run: EvalRun, backbone: setup.Backbone, data: setup.Data
) -> dict[str, tuple[Float[np.ndarray, "P D"], int]]:
    """Every prompt with its step, by the name it is called in the table."""
    width = run.model.embed_dim
    nothing = np.zeros((0, width), np.float32), backbone.step
    files = (run.prompt_file,) if isinstance(run.prompt_file, str) else run.prompt_file
    files = tuple(file for file in files if file)
    prompts = {NO_PROMPT: nothing} if run.eval.baselines or not files else {}
    for file in files:
        prompt, metadata = prompt_file.load_prompt(file)
        prompt_file.check_prompt(
            prompt,
            metadata,
            shape=(None, width),
            backbone=backbone.identity,
            vocabulary=data.vocabulary_identity,
            where=file,
        )
        if file in prompts:
            raise ConfigError(f"PROMPT_FILE names {file} twice.")
        prompts[file] = np.asarray(prompt, np.float32), metadata.step if metadata else 0
    return prompts
