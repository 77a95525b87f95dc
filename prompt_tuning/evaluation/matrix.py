"""`t5x eval`: scores every prompt on every task, and the model without a prompt, as one table.

It opens the same session and evaluator as a training run, so both give the same scores.
"""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import jax
import numpy as np

from prompt_tuning.checkpoints import load
from prompt_tuning.config import ConfigError, EvalRun, config_hash
from prompt_tuning.evaluation import pictures
from prompt_tuning.evaluation.analysis import analyse, describe
from prompt_tuning.evaluation.evaluate import (
    Evaluator,
    TaskResult,
    check_metric,
    evaluate,
    majority,
    methods,
)
from prompt_tuning.evaluation.intervals import score_intervals
from prompt_tuning.evaluation.prompts import (
    NamedPrompt,
    file_suffixes,
    find_prompts,
    load_prompts,
    tuned_tasks,
)
from prompt_tuning.evaluation.records import RunLog
from prompt_tuning.evaluation.results import Cell, Matrix
from prompt_tuning.model import sharding
from prompt_tuning.model.prompt import no_prompt
from prompt_tuning.prompts.prompt_file import check_stored_prompt
from prompt_tuning.runtime import agreement, processes
from prompt_tuning.runtime.replace_folder import replace_text, writing
from prompt_tuning.session import setup
from prompt_tuning.session.overview import find_lost
from prompt_tuning.session.session import Session, make_dir, open_session
from prompt_tuning.tasks.eval_task import EvalTask

NO_PROMPT = "no prompt"


def run_eval(run: EvalRun, *, session: Session | None = None, config_text: str = "") -> Matrix:
    """The scores of every prompt of `run` on every task; writes EVAL_OUTPUT_DIR.

    If there is no prompt, the model is scored without one. If `eval.baselines` is set, the table
    begins with the majority class and the model without a prompt. An open `session` can be passed:
    its backbone is already being read.

    Raises:
      ConfigError: a prompt, task or checkpoint is missing or does not fit the others.
    """
    with session or open_session(run) as session:
        mesh = session.mesh
        agreement.check("settings", f"{config_hash(run)} {mesh.shape}")
        evaluator = Evaluator(session.model, mesh, run.eval, run.data)
        files = find_prompts(run.prompt_file)
        for file in files:
            check_stored_prompt(file, run.model)
        labels = run.class_labels
        data = setup.load_data(run.data, run.eval, run.model, class_labels=labels, train=False)
        for task in data.eval_tasks:
            for line in find_lost(run.data.eval_split, task.rows, task, data.vocabulary):
                print(f"{task.name}: {line}", flush=True)
        check_metric(data.eval_tasks, run.eval)
        backbone = session.load_backbone()
    if unused := load.describe_unused_prompt(run.checkpoint_path, files):
        print(unused, flush=True)
    prompts = load_prompts(files, run.model, backbone, data.vocabulary_identity)
    if processes.count() > 1:
        read = f"{setup.fingerprint(data)} {data.vocabulary_identity} {backbone.identity}"
        agreement.check("rows, vocabulary or backbone", read)
        arrays = [np.asarray(leaf) for p in prompts for leaf in jax.tree.leaves(p.prompt)]
        agreement.check("prompts", b"".join(array.tobytes() for array in arrays))
    pairs = _pair(run, prompts, data.eval_tasks)
    if run.eval.baselines or not prompts:
        bare = NamedPrompt(NO_PROMPT, no_prompt(run.model), backbone.step)
        pairs = [*((bare, task) for task in data.eval_tasks), *pairs]

    output_dir = make_dir(run.eval_output_dir, "EVAL_OUTPUT_DIR")
    _refuse_model_dir(output_dir)
    what = f"EVAL_OUTPUT_DIR {output_dir}"
    with writing(what), processes.writing_folder(output_dir) as folder:
        if config_text:
            replace_text(folder / "config.gin", config_text)
        log = RunLog(folder, step=-1)  # an earlier evaluation's records go
        matrix = Matrix({}, methods=methods(run.eval), metric=run.eval.metric)
        if run.eval.baselines:
            for task in data.eval_tasks:
                values = matrix.majority[task.name] = majority(task, run.eval)
                log.scores(0, values, task=task.name, split=run.data.eval_split, prompt="majority")
        suffixes = file_suffixes(files) or {NO_PROMPT: ""}
        for prompt, group in itertools.groupby(pairs, key=lambda pair: pair[0]):
            placed = sharding.replicate(prompt.prompt, mesh)
            for _, task in group:
                scored = evaluate(evaluator, (backbone.params, placed), task)
                suffix = suffixes.get(prompt.name)
                cell = _write(run, log, (prompt, task), scored, suffix)
                matrix.metrics.setdefault(prompt.name, {})[task.name] = scored.metrics
                matrix.cells.setdefault(prompt.name, {})[task.name] = cell
        log.close()
        _finish(matrix, folder)
        return matrix


def _pair(
    run: EvalRun, prompts: list[NamedPrompt], tasks: tuple[EvalTask, ...]
) -> list[tuple[NamedPrompt, EvalTask]]:
    """The pairs of a prompt and a task to score, by EVAL_PAIRS."""
    if run.pairs == "all":
        return [(prompt, task) for prompt in prompts for task in tasks]
    pairs = []
    for prompt in prompts:
        names = tuned_tasks(prompt)
        matching = [(prompt, task) for task in tasks if task.name in names]
        if not matching:
            raise ConfigError(
                f"EVAL_PAIRS = 'own': {prompt.name} was tuned for {prompt.task}, which is none of "
                f"{', '.join(task.name for task in tasks)} (MIXTURE_OR_TASK_NAME)."
            )
        pairs += matching
    return pairs


def _write(
    run: EvalRun,
    log: RunLog,
    pair: tuple[NamedPrompt, EvalTask],
    scored: TaskResult,
    suffix: str | None,
) -> Cell:
    """Writes the records of one prompt on one task; a file of rows only if there is a suffix."""
    prompt, task = pair
    label = "none" if prompt.name == NO_PROMPT else prompt.name
    split = run.data.eval_split
    log.scores(prompt.step, scored.metrics, task=task.name, split=split, prompt=label)
    analysis = analyse(task, scored)
    intervals = score_intervals(task, scored.predictions, run.eval.bootstrap)
    if suffix is not None:
        name = task.name + suffix
        log.predictions(prompt.step, name, scored.metrics, scored.rows)
        log.analysis(prompt.step, name, dataclasses.asdict(analysis))
        pictures.draw_confusion(analysis, name, log.model_dir / "inference_eval")
    return Cell(len(task.rows), analysis, intervals)


def _finish(matrix: Matrix, output_dir: Path) -> None:
    """Prints the table and writes it, with all details, to files."""
    matrix.write(output_dir)
    picture = pictures.draw_matrix(matrix, output_dir)
    cells = [
        (prompt, task, cell)
        for prompt, row in matrix.cells.items()
        for task, cell in row.items()
        if prompt != NO_PROMPT or len(matrix.cells) == 1
    ]
    details = [
        f"{prompt} on {task}:\n{text}"
        for prompt, task, cell in cells
        if (text := describe(cell.analysis))
    ]
    text = "\n\n".join([str(matrix), *details])
    replace_text(output_dir / "matrix.txt", text + "\n")
    shown = text if len(cells) <= 2 else str(matrix)
    print(f"{shown}\nrows and metrics: {output_dir}", flush=True)
    if picture is not None:
        print(f"matrix: {picture}", flush=True)


def _refuse_model_dir(output_dir: Path) -> None:
    """Raises ConfigError for a MODEL_DIR: the evaluation would overwrite the run's records."""
    if (output_dir / "checkpoints").is_dir() or (output_dir / "prompts").is_dir():
        raise ConfigError(
            f"EVAL_OUTPUT_DIR {output_dir} is the MODEL_DIR of a run, whose records would be "
            "overwritten. Choose another folder."
        )
