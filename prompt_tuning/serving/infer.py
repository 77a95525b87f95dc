"""`t5x infer`: answers the rows of a task, or the lines of a file, as JSON lines.

After `predictor.py`; `cli.py` calls it. Only the rows of a task need TensorFlow, and only then is
it imported.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tqdm

from prompt_tuning.checkpoints import load, manifest
from prompt_tuning.config import ConfigError, InferRun, RankScore
from prompt_tuning.model import sharding
from prompt_tuning.prompts import prompt_file
from prompt_tuning.runtime.replace_folder import local_folder, replace_text, writing
from prompt_tuning.serving import lines
from prompt_tuning.serving.predictor import Predictor
from prompt_tuning.tasks.file_examples import fill_inputs
from prompt_tuning.tasks.file_reader import read_rows

BATCHES_PER_REPORT = 8  # rows are sorted by length within so many batches


@dataclasses.dataclass(frozen=True, eq=False)
class Questions:
    """Rows that are answered into one place."""

    name: str  # the task, or what the file is called without its suffix
    records: list[dict[str, Any]]  # what the answers carry along; "inputs" as it came
    prompts: list[str | None]
    tokens: list[Sequence[int]] | None = None  # None: the text under "inputs" is tokenised
    label_words: tuple[str, ...] = ()
    cut: int = 0  # of the tokens, how many were too long


class Rows(NamedTuple):
    """What the predictor needs of some rows."""

    tokens: Sequence[Sequence[int]]
    prompts: Sequence[str | None]
    words: Sequence[tuple[str, ...]]  # to rank
    first: int  # number of the first one


def run_infer(
    run: InferRun, *, input: str | None = None, output: str | None = None, config_text: str = ""
) -> list[dict[str, Any]]:
    """Answers the lines of `input`, or else the rows of the run's tasks; returns what it writes.

    The answers go to `output`, or to one file for each task in INFER_OUTPUT_DIR, under T5X's name;
    "-" is standard input and output. A file is replaced when all of its answers are there.

    Raises:
      ConfigError: a row, a prompt, the model or the place to write to is not as it should be.
    """
    _check_memory(run)
    asked = [_read_file(run, input)] if input else _read_tasks(run)
    prompts = {name: name for questions in asked for name in questions.prompts if name}
    if said := load.say_unused_prompt(run.checkpoint_path, prompts):
        print(said, file=sys.stderr)
    if run.verify_checkpoint:
        print(manifest.check_checkpoint(load.find_path(run.checkpoint_path)), file=sys.stderr)
    with contextlib.ExitStack() as stack:
        files = _open_outputs(run, [questions.name for questions in asked], output, stack)
        predictor = Predictor.from_checkpoint(
            run.checkpoint_path,
            run.model,
            run.data.vocabulary,
            prompts,
            num_model_partitions=run.num_model_partitions,
            max_input_length=run.data.task_feature_lengths["inputs"],
            max_target_length=run.data.task_feature_lengths["targets"],
            batch_size=run.eval.batch_size or run.data.batch_size,
            sentinel_targets=run.data.sentinel_targets,
        )
        answers = []
        for questions, file in zip(asked, files, strict=True):
            for answer in _answer(predictor, questions, run):
                lines.write_line(file, answer)
                answers.append(answer)
    if config_text and not output:
        config = local_folder(run.infer_output_dir, "INFER_OUTPUT_DIR") / "config.gin"
        with writing(str(config)):
            replace_text(config, config_text)
    if output != lines.STANDARD:
        how = "" if prompts else ", without a prompt"
        print(f"{len(answers)} answers{how}: {output or run.infer_output_dir}", flush=True)
    return answers


def _check_memory(run: InferRun) -> None:
    """Refuses a batch whose tokens and targets' logits alone cannot fit the devices."""
    rows = run.eval.batch_size or run.data.batch_size
    name = "EVAL_BATCH_SIZE" if run.eval.batch_size else "BATCH_SIZE"
    lengths = run.data.task_feature_lengths
    sizes = lengths["inputs"], lengths["targets"]
    mesh = sharding.make_mesh(run.num_model_partitions)
    sharding.check_memory(mesh, 4 * rows * sum(sizes), f"{name} = {rows}", sizes)


def _read_file(run: InferRun, path: str) -> Questions:
    files = run.data.files
    if lines.is_table(path) or (files.given and lines.holds_objects(path)):
        return _read_own(run, path)
    found = lines.read_lines(path, prompt=run.prompt_file or None)
    for prompt, line in {line.prompt: line for line in reversed(found)}.items():
        if prompt and prompt != run.prompt_file:
            try:
                prompt_file.load_prompt(prompt)
            except ConfigError as error:
                raise ConfigError(f"{line.where}: {error}") from error
    name = "stdin" if path == lines.STANDARD else Path(path).stem
    records = [{"inputs": line.text, **line.rest} for line in found]
    return Questions(name, records, [line.prompt for line in found])


def _read_own(run: InferRun, path: str) -> Questions:
    """The rows of a file like those the run was trained on: INPUT_TEMPLATE says what is asked."""
    files = run.data.files
    rows = read_rows(path, files)
    records = [
        {"inputs": text, "row": dict(row.fields)}
        for text, row in zip(fill_inputs(rows, files), rows, strict=True)
    ]
    prompts = [run.prompt_file or None] * len(rows)
    return Questions(Path(path).stem, records, prompts, label_words=files.words)


def _read_tasks(run: InferRun) -> list[Questions]:
    """The rows of the run's tasks, tokenised by seqio; a mixture stands for its tasks."""
    from prompt_tuning.tasks import task_rows

    if not run.data.names:
        raise ConfigError(
            "there is nothing to answer: give --input=FILE, or a task (MIXTURE_OR_TASK_NAME)."
        )
    loaded = task_rows.load_eval_rows(
        run.data, class_labels=run.class_labels, limit=run.eval.num_examples
    )
    asked = []
    for task, rows, words in loaded:
        of_several = {"task": task.name} if len(loaded) > 1 else {}
        asked.append(
            Questions(
                task.name,
                [{"inputs": _texts(example)} | of_several for example in rows.examples],
                [run.prompt_file or None] * len(rows),
                [ids.tolist() for ids in rows.inputs],
                words,
                rows.truncated_inputs,
            )
        )
    return asked


def _texts(example: dict[str, Any]) -> dict[str, str]:
    """The texts of a row before they were tokens, as T5X writes them."""
    return {
        key: value.decode("utf-8", errors="replace")
        for key, value in example.items()
        if key.endswith("_pretokenized") and isinstance(value, bytes)
    }


def _open_outputs(
    run: InferRun, names: Sequence[str], output: str | None, stack: contextlib.ExitStack
) -> list[Any]:
    """A file for each name; they are kept when `stack` is left without an error."""
    if output:
        return [stack.enter_context(lines.replace_file(output))] * len(names)
    if not run.infer_output_dir:
        raise ConfigError(
            "there is no place for the answers: give --output=FILE, or INFER_OUTPUT_DIR."
        )
    folder = local_folder(run.infer_output_dir, "INFER_OUTPUT_DIR")
    return [
        stack.enter_context(lines.replace_file(folder / f"{name}-predict.jsonl-00000-of-00001"))
        for name in names
    ]


def _answer(predictor: Predictor, questions: Questions, run: InferRun) -> Iterator[dict[str, Any]]:
    """The record of every row with its answer, in order."""
    tokens, cut = questions.tokens, questions.cut
    if tokens is None:
        tokens, numbers = predictor.tokenize([record["inputs"] for record in questions.records])
        cut = len(numbers)
    if cut:
        print(
            f"{questions.name}: {cut} of {len(tokens)} inputs are longer than "
            f"{predictor.max_input_length} tokens (TASK_FEATURE_LENGTHS) and were cut.",
            file=sys.stderr,
        )
    words = [()] * len(tokens) if run.eval.method == "generate" else _words(questions, run)
    size = BATCHES_PER_REPORT * predictor.batch_size
    with tqdm.tqdm(total=len(tokens), unit="row", disable=not sys.stderr.isatty()) as bar:
        for start in range(0, len(tokens), size):
            part = slice(start, start + size)
            rows = Rows(tokens[part], questions.prompts[part], words[part], start)
            answers = _predict(predictor, rows, run)
            for record, answer in zip(questions.records[part], answers, strict=True):
                yield record | answer
            bar.update(len(answers))


def _words(questions: Questions, run: InferRun) -> list[tuple[str, ...]]:
    """What to rank for every row: the task's words, else CLASS_LABELS, else its prompt's."""
    if common := questions.label_words or run.class_labels:
        return [common] * len(questions.prompts)
    words: dict[str | None, tuple[str, ...]] = {None: ()}
    for prompt in filter(None, set(questions.prompts)):
        _, metadata = prompt_file.load_prompt(prompt)
        words[prompt] = metadata.label_words if metadata else ()
    for prompt in questions.prompts:
        if not words[prompt]:
            raise ConfigError(
                f"ranking needs label words, and neither {questions.name} nor the prompt "
                f"{prompt or '(none)'} names any: set CLASS_LABELS, or EVAL_METHOD = 'generate'."
            )
    return [words[prompt] for prompt in questions.prompts]


def _predict(predictor: Predictor, rows: Rows, run: InferRun) -> list[dict[str, Any]]:
    """Prediction, prompt and score of every row, by generation if the method includes it."""
    config = run.eval
    answers: list[dict[str, Any]] = [{"prompt": prompt} for prompt in rows.prompts]
    if config.method != "rank":
        generated = predictor.generate_all_rows(
            rows.tokens,
            rows.prompts,
            num_decodes=config.num_decodes,
            decoding=config.decoding,
            first_row=rows.first,
        )
        for answer, decodes in zip(answers, generated, strict=True):
            said = [{"prediction": one.text, "score": one.score} for one in decodes]
            answer |= said[0]
            if run.return_all_decodes:
                answer["decodes"] = said
    if config.method != "generate":
        for answer, scores in zip(answers, _rank(predictor, rows, config.rank_score), strict=True):
            best = max(scores, key=scores.__getitem__)
            answer.setdefault("prediction", best)
            answer.setdefault("score", scores[best])
            answer["label_scores"] = scores
    return answers


def _rank(predictor: Predictor, rows: Rows, score: RankScore) -> list[dict[str, float]]:
    """The score of every label of every row; rows with the same labels share batches."""
    scores: list[dict[str, float]] = [{} for _ in rows.tokens]
    for labels in dict.fromkeys(rows.words):
        places = [place for place, own in enumerate(rows.words) if own == labels]
        found = predictor.score_rows(
            [rows.tokens[place] for place in places],
            labels,
            [rows.prompts[place] for place in places],
        )
        if score == "mean":
            found = found / predictor.label_lengths(labels)
        for place, values in zip(places, found, strict=True):
            scores[place] = dict(zip(labels, values.tolist(), strict=True))
    return scores
