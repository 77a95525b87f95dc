"""`t5x submit-superglue`: answers the test rows of SuperGLUE and writes the official files.

Every prompt answers the task it was tuned for; a prompt for RTE also answers the diagnostics AX-b
and AX-g. An output that is no label is replaced by the most probable label, and counted.
"""

from __future__ import annotations

import dataclasses
import zipfile
from pathlib import Path
from typing import Any

from prompt_tuning.config import ConfigError, EvalRun
from prompt_tuning.evaluation import submission_format as form
from prompt_tuning.evaluation.evaluate import Evaluator, answer
from prompt_tuning.evaluation.prompts import NamedPrompt, find_prompts, load_prompts, tuned_tasks
from prompt_tuning.model import sharding
from prompt_tuning.runtime.replace_folder import replace_file, replace_text
from prompt_tuning.session import setup
from prompt_tuning.session.session import make_dir, open_session
from prompt_tuning.tasks import registry, task_rows
from prompt_tuning.tasks.eval_task import EvalTask, find_row_words

DIAGNOSTICS = ("axb", "axg")  # answered with RTE's prompt
_FIELDS = {  # the fields of an example that make up its key
    "multirc": ("idx/paragraph", "idx/question", "idx/answer"),
    "record": ("idx/query",),
}


def run_submit(run: EvalRun, submission_dir: str, *, make_zip: bool = False) -> list[Path]:
    """The paths of the files of all tasks that have a prompt; writes and checks them.

    Raises:
      ConfigError: a prompt is for no task of SuperGLUE, two prompts are for one task, a test split
        is missing, or an answer is not a label of the task.
    """
    files = find_prompts(run.prompt_file)
    if not files:
        raise ConfigError(
            "PROMPT_FILE is empty: there is nothing to submit. Set it to the prompts to submit."
        )
    with open_session(run) as session:
        mesh = session.mesh
        folder = make_dir(submission_dir, "--submission_dir")
        registry.register(run.data.vocabulary, tfds_data_dir=run.data.tfds_data_dir)
        backbone = session.load_backbone()
    vocabulary = setup.vocabulary_identity(run.data.vocabulary)
    prompts = load_prompts(files, run.model, backbone, vocabulary)
    evaluator = Evaluator(session.model, mesh, run.eval, run.data)
    written = []
    for name, prompt in assign_tasks(prompts).items():
        task = _load(run, name)
        if task is not None:
            placed = sharding.replicate(prompt.prompt, mesh)
            answers, replaced = _answers(evaluator, (backbone.params, placed), task)
            written.append(_write(folder, form.find_task(name), answers))
            note = f"; {replaced} were no label: replaced by the most probable" if replaced else ""
            print(f"{written[-1].name}: {len(answers)} answers of {prompt.name}{note}", flush=True)
    names = {path.stem for path in written}
    missing = [file for file in form.FILES.values() if file.name not in names]
    for required, reason in ((True, "the server needs all eight"), (False, "diagnostics")):
        if listed := ", ".join(file.name for file in missing if file.required is required):
            print(f"no answers for {listed}: {reason}", flush=True)
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
    if problems := form.check_file(key, text.encode(), dict.fromkeys(answers, ())):
        raise ConfigError(f"{path.name} would be rejected: " + "; ".join(problems))
    replace_text(path, text)
    return path


def assign_tasks(prompts: list[NamedPrompt]) -> dict[str, NamedPrompt]:
    """The seqio tasks to answer, each with its prompt; a mixture's prompt answers all its tasks.

    Raises:
      ConfigError: a prompt is for no task of SuperGLUE, or two prompts are for one task.
    """
    assigned: dict[str, NamedPrompt] = {}
    for prompt in prompts:
        names = [name for name in sorted(tuned_tasks(prompt)) if form.find_task(name)]
        names = [name for name in names if "_simple_train" not in name]
        if not names:
            raise ConfigError(f"{prompt.name} was tuned for {prompt.task}, no task of SuperGLUE.")
        names += [
            name.replace("_rte_", f"_{diagnostic}_")
            for name in names
            for diagnostic in DIAGNOSTICS
            if form.find_task(name) == "rte"
        ]
        for name in dict.fromkeys(names):  # a mixture may contain the diagnostics
            if name in assigned:
                raise ConfigError(
                    f"{assigned[name].name} and {prompt.name} are both for {name}. Give one of "
                    "them."
                )
            assigned[name] = prompt
    return assigned


def _load(run: EvalRun, name: str) -> EvalTask | None:
    """The test rows; None for a diagnostic whose data is missing."""
    data = dataclasses.replace(run.data, mixture_or_task_name=name, eval_split="test")
    try:
        (loaded,) = task_rows.load_eval_rows(data, limit=run.eval.num_examples)
    except ConfigError:
        if form.find_task(name) in DIAGNOSTICS:
            print(f"{name}: no test rows, so no file", flush=True)
            return None
        raise
    row_words = () if loaded.label_words else find_row_words(loaded)
    return EvalTask(loaded.task, loaded.rows, (), loaded.label_words, row_words)


def _answers(evaluator: Evaluator, params: Any, task: EvalTask) -> tuple[form.Answers, int]:
    """The label of every row in the format of the files, and how many outputs were no label."""
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
        idx = tuple(int(example[field]) for field in _FIELDS.get(key, ("idx",)))
        answers.setdefault(idx, _label(task, key, row, output))
    return answers, len(illegal)


def _label(task: EvalTask, key: str, row: int, output: str) -> Any:
    """The label of an output in the file; for WSC whether it names the right referent."""
    if key == "record":
        return output
    if key == "wsc":
        return "True" if task.postprocess(row, output) == 1 else "False"
    return form.FILES[key].labels[task.label_words.index(output)]
