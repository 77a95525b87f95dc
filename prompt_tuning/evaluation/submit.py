"""`t5x submit-superglue`: the test rows of every prompt's task answered, as the official files.

Every prompt answers its own task, a prompt for RTE the diagnostics AX-b and AX-g as well. An output
that is no label is replaced by the most probable one, and counted.
"""

from __future__ import annotations

import dataclasses
import zipfile
from pathlib import Path
from typing import Any

from prompt_tuning.config import ConfigError, EvalRun
from prompt_tuning.evaluation import submission_format as form
from prompt_tuning.evaluation.evaluate import Evaluator, answer
from prompt_tuning.evaluation.prompts import NamedPrompt, find_prompts, load_prompts, own_tasks
from prompt_tuning.model import sharding
from prompt_tuning.runtime.replace_folder import replace_file, replace_text
from prompt_tuning.session import setup
from prompt_tuning.session.session import make_dir, open_session
from prompt_tuning.tasks import registry, task_rows
from prompt_tuning.tasks.eval_task import EvalTask, find_row_words

DIAGNOSTICS = ("axb", "axg")  # answered with RTE's prompt
_FIELDS = {  # of an example, that say what a line answers
    "multirc": ("idx/paragraph", "idx/question", "idx/answer"),
    "record": ("idx/query",),
}


def run_submit(run: EvalRun, submission_dir: str, *, make_zip: bool = False) -> list[Path]:
    """Writes and checks the files of all tasks that there is a prompt for; returns their paths.

    Raises:
      ConfigError: a prompt is for no task of SuperGLUE, two are for one, a test split is missing,
        or an answer is not one of the task's.
    """
    files = find_prompts(run.prompt_file)
    if not files:
        raise ConfigError("there is nothing to submit: PROMPT_FILE names no prompt.")
    with open_session(run) as session:
        mesh = session.mesh
        folder = make_dir(submission_dir, "--submission_dir")
        registry.register(run.data.vocabulary, tfds_data_dir=run.data.tfds_data_dir)
        backbone = session.load_backbone()
    vocabulary = setup.vocabulary_identity(run.data.vocabulary)
    prompts = load_prompts(files, run.model.embed_dim, backbone, vocabulary)
    evaluator = Evaluator(session.model, mesh, run.eval, run.data)
    written = []
    for name, prompt in assign_tasks(prompts).items():
        task = _load(run, name)
        if task is not None:
            placed = sharding.replicate(prompt.prompt, mesh)
            answers, replaced = _answers(evaluator, (backbone.params, placed), task)
            written.append(_write(folder, form.find_task(name), answers))
            note = f"; {replaced} were no label: the most probable one stands" if replaced else ""
            print(f"{written[-1].name}: {len(answers)} answers of {prompt.name}{note}", flush=True)
    names = {path.stem for path in written}
    missing = [f.name for f in form.FILES.values() if f.required and f.name not in names]
    if missing:
        print(f"no answers for {', '.join(missing)}: the server wants all eight tasks", flush=True)
    if make_zip:
        with (
            replace_file(folder / "submission.zip") as new,
            zipfile.ZipFile(new, "w", zipfile.ZIP_DEFLATED) as archive,
        ):
            for path in written:
                archive.write(path, path.name)
        print(f"zip: {folder / 'submission.zip'}", flush=True)
    return written


def _write(folder: Path, key: str, answers: form.Answers) -> Path:
    path = folder / f"{form.FILES[key].name}.jsonl"
    text = "".join(line + "\n" for line in form.to_lines(key, answers))
    if problems := form.check_file(key, text, set(answers)):
        raise ConfigError(f"{path.name} would not be taken: " + "; ".join(problems))
    replace_text(path, text)
    return path


def assign_tasks(prompts: list[NamedPrompt]) -> dict[str, NamedPrompt]:
    """The seqio tasks to answer, each with its prompt; a mixture's prompt answers all of it.

    Raises:
      ConfigError: a prompt is for no task of SuperGLUE, or two are for one.
    """
    found: dict[str, NamedPrompt] = {}
    for prompt in prompts:
        names = [name for name in sorted(own_tasks(prompt)) if form.find_task(name)]
        names = [name for name in names if "_simple_train" not in name]
        if not names:
            raise ConfigError(f"{prompt.name} was tuned for {prompt.task}, no task of SuperGLUE.")
        names += [
            name.replace("_rte_", f"_{diagnostic}_")
            for name in names
            for diagnostic in DIAGNOSTICS
            if form.find_task(name) == "rte"
        ]
        for name in dict.fromkeys(names):  # a mixture may have the diagnostics itself
            if name in found:
                raise ConfigError(
                    f"{found[name].name} and {prompt.name} are both for {name}: give one of them."
                )
            found[name] = prompt
    return found


def _load(run: EvalRun, name: str) -> EvalTask | None:
    """The test rows; None of a diagnostic that is not there."""
    data = dataclasses.replace(run.data, mixture_or_task_name=name, eval_split="test")
    try:
        (found,) = task_rows.load_eval_rows(data, limit=run.eval.num_examples)
    except ConfigError:
        if form.find_task(name) in DIAGNOSTICS:
            print(f"{name}: no test rows, so no file", flush=True)
            return None
        raise
    own = () if found.label_words else find_row_words(found)
    return EvalTask(found.task, found.rows, (), found.label_words, own)


def _answers(evaluator: Evaluator, params: Any, task: EvalTask) -> tuple[form.Answers, int]:
    """The label of every row, as the files have it, and how many outputs were none."""
    method = "rank" if evaluator.config.method == "rank" and task.can_rank else "generate"
    outputs = answer(evaluator, params, task, method)
    illegal = [
        row for row, text in enumerate(outputs) if task.can_rank and text not in task.words(row)
    ]
    if illegal:
        ranked = answer(evaluator, params, task, "rank")
        outputs = [ranked[row] if row in set(illegal) else text for row, text in enumerate(outputs)]
    key = form.find_task(task.name)
    answers: dict[form.Key, Any] = {}
    for row, (example, output) in enumerate(zip(task.rows.examples, outputs, strict=True)):
        place = tuple(int(example[field]) for field in _FIELDS.get(key, ("idx",)))
        answers.setdefault(place, _label(task, key, row, output))
    return answers, len(illegal)


def _label(task: EvalTask, key: str, row: int, output: str) -> Any:
    """An output in the form of the files: WSC says whether it names the referent in question."""
    if key == "record":
        return output
    if key == "wsc":
        return "True" if task.postprocess(row, output) == 1 else "False"
    return form.FILES[key].labels[task.label_words.index(output)]
