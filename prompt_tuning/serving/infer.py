"""`t5x infer`: answers the rows of a task, or the lines of a file, as JSON lines.

`commands/runs.py` calls it, and it calls the predictor. TensorFlow is imported only if the rows are
those of a task.
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
from prompt_tuning.config import ConfigError, FileTask, InferRun, RankScore
from prompt_tuning.model import sharding
from prompt_tuning.prompts import prompt_file
from prompt_tuning.runtime.replace_folder import local_folder, replace_text, writing
from prompt_tuning.serving import lines
from prompt_tuning.serving.predictor import Predictor
from prompt_tuning.session import checks
from prompt_tuning.tasks.file_examples import field_names, fill_inputs, rows_to_answer
from prompt_tuning.tasks.file_reader import STANDARD, Source, read_source
from prompt_tuning.vocabularies.coverage import CURE, describe_lost, refuse_alike
from prompt_tuning.vocabularies.truncate import describe_losses
from prompt_tuning.vocabularies.vocabulary import load_vocabulary

BATCHES_PER_CALL = 8  # rows are sorted by length within this many batches


@dataclasses.dataclass(frozen=True, eq=False)
class InferRows:
    """The rows of one task or file; their answers go to one file."""

    name: str  # the task, or the file's name without its suffix
    records: list[dict[str, Any]]  # copied to the answers; "inputs" is the text of the row
    prompts: list[str | None]
    tokens: list[Sequence[int]] | None = None  # None: the text under "inputs" is tokenised
    label_words: tuple[str, ...] = ()
    cut: int = 0  # how many of the tokenised rows were truncated
    losses: str = ""  # what of their fields these have lost


class RowSlice(NamedTuple):
    """Tokens, prompts and label words of consecutive rows."""

    tokens: Sequence[Sequence[int]]
    prompts: Sequence[str | None]
    words: Sequence[tuple[str, ...]]  # to rank
    first: int  # number of the first row


def run_infer(
    run: InferRun, *, input: str | None = None, output: str | None = None, config_text: str = ""
) -> list[dict[str, Any]]:
    """The answers to the lines of `input` or, without `input`, to the rows of the run's tasks.

    They are written to `output`, or to one file for each task in INFER_OUTPUT_DIR, under T5X's
    name; "-" is standard input and output. A file is replaced once all of its answers are written.

    Raises:
      ConfigError: a row, a prompt, the model or the output path is wrong.
    """
    _check_memory(run)
    sources = [read_file(run, input)] if input else _read_tasks(run)
    prompts = {name: name for rows in sources for name in rows.prompts if name}
    if note := load.describe_unused_prompt(run.checkpoint_path, prompts):
        print(note, file=sys.stderr)
    if run.verify_checkpoint:
        print(manifest.check_checkpoint(load.find_path(run.checkpoint_path)), file=sys.stderr)
    with contextlib.ExitStack() as stack:
        files = _open_outputs(run, [rows.name for rows in sources], output, stack)
        predictor = Predictor.from_checkpoint(
            run.checkpoint_path,
            run.model,
            run.data.vocabulary,
            prompts,
            num_model_partitions=run.num_model_partitions,
            max_input_length=run.data.task_feature_lengths["inputs"],
            max_target_length=run.data.task_feature_lengths["targets"],
            batch_size=run.eval.batch_size or run.data.batch_size,
            truncate=run.data.truncate,
            sentinel_targets=run.data.sentinel_targets,
        )
        answers = []
        for rows, file in zip(sources, files, strict=True):
            for answer in _answer(predictor, rows, run):
                lines.write_line(file, answer)
                answers.append(answer)
    if config_text and not output:
        config = local_folder(run.infer_output_dir, "INFER_OUTPUT_DIR") / "config.gin"
        with writing(str(config)):
            replace_text(config, config_text)
    if output != STANDARD:
        suffix = "" if prompts else ", without a prompt"
        print(f"{len(answers)} answers{suffix}: {output or run.infer_output_dir}", flush=True)
    return answers


def _check_memory(run: InferRun) -> None:
    """Raises ConfigError if the tokens of a batch alone cannot fit the devices."""
    rows = run.eval.batch_size or run.data.batch_size
    name = "EVAL_BATCH_SIZE" if run.eval.batch_size else "BATCH_SIZE"
    lengths = run.data.task_feature_lengths
    sizes = lengths["inputs"], lengths["targets"]
    mesh = sharding.make_mesh(run.num_model_partitions)
    checks.check_memory(mesh, 4 * rows * sum(sizes), f"{name} = {rows}", sizes)


def read_file(run: InferRun, path: str) -> InferRows:
    """The rows of a file: those of a table are read as training reads them.

    So are all rows if there is a task of the user's own files, or an INPUT_TEMPLATE. Otherwise a
    line, or what JSON has under "inputs", is the whole text.
    """
    files = run.data.files
    source = read_source(path, field_names(files), files)
    name = "stdin" if path == STANDARD else Path(path).stem
    if not _fills_in(files) and source.form in ("json", "lines"):
        return _read_lines(run, name, source)
    rows = rows_to_answer(source, files)
    if source.form == "lines":
        print(
            f"{source.name}: each line is the field {field_names(files)[0]!r} of INPUT_TEMPLATE = "
            f"{files.input_template!r}",
            file=sys.stderr,
        )
    inputs = zip(fill_inputs(rows, files), rows, strict=True)
    records = [{"inputs": text, "row": dict(row.fields)} for text, row in inputs]
    return InferRows(name, records, [run.prompt_file or None] * len(rows), label_words=files.words)


def _fills_in(files: FileTask) -> bool:
    """Whether rows have fields of which INPUT_TEMPLATE makes the text."""
    return files.given or files.input_template != FileTask().input_template


def _read_lines(run: InferRun, name: str, source: Source) -> InferRows:
    inputs = lines.read_lines(source, prompt=run.prompt_file or None)
    for prompt, line in {line.prompt: line for line in reversed(inputs)}.items():
        if prompt and prompt != run.prompt_file:
            try:
                prompt_file.read_prompt(prompt)
            except ConfigError as error:
                raise ConfigError(f"{line.where}: {error}") from error
    records = [{"inputs": line.text, **line.rest} for line in inputs]
    return InferRows(name, records, [line.prompt for line in inputs])


def _read_tasks(run: InferRun) -> list[InferRows]:
    """The rows of the run's tasks, tokenised by seqio; a mixture counts as its tasks."""
    from prompt_tuning.session.overview import find_lost
    from prompt_tuning.tasks import task_rows
    from prompt_tuning.tasks.eval_task import make_eval_task

    if not run.data.names:
        raise ConfigError(
            "there is nothing to answer. Give --input=FILE, or set MIXTURE_OR_TASK_NAME."
        )
    loaded = task_rows.load_eval_rows(
        run.data, class_labels=run.class_labels, limit=run.eval.num_examples
    )
    vocabulary = load_vocabulary(run.data.vocabulary)
    length = run.data.task_feature_lengths["inputs"]
    sources = []
    for part in loaded:
        task, rows, words = part
        refuse_alike(rows.input_texts, rows.inputs, vocabulary, f"the inputs of {task.name}")
        is_scored = task.predict_metric_fns and all(map(part.is_labelled, range(len(rows))))
        scored = make_eval_task(part, run.eval) if is_scored else None
        for line in find_lost(run.data.eval_split, rows, scored, vocabulary):
            print(f"{task.name}: {line}", file=sys.stderr)
        name = {"task": task.name} if len(loaded) > 1 else {}
        full = [t for t, i in zip(rows.input_texts, rows.inputs, strict=True) if len(i) == length]
        sources.append(
            InferRows(
                task.name,
                [{"inputs": _texts(example)} | name for example in rows.examples],
                [run.prompt_file or None] * len(rows),
                [ids.tolist() for ids in rows.inputs],
                words,
                rows.truncated_inputs,
                describe_losses(vocabulary, full, length, run.data.truncate),
            )
        )
    return sources


def _texts(example: dict[str, Any]) -> dict[str, str]:
    """The texts of a row before tokenisation, under T5X's names."""
    return {
        key: value.decode("utf-8", errors="replace")
        for key, value in example.items()
        if key.endswith("_pretokenized") and isinstance(value, bytes)
    }


def _open_outputs(
    run: InferRun, names: Sequence[str], output: str | None, stack: contextlib.ExitStack
) -> list[Any]:
    """A file for each name; they take their names when `stack` closes without an error."""
    if output:
        return [stack.enter_context(lines.replace_file(output))] * len(names)
    if not run.infer_output_dir:
        raise ConfigError(
            "there is no output path for the answers. Give --output=FILE, or set INFER_OUTPUT_DIR."
        )
    folder = local_folder(run.infer_output_dir, "INFER_OUTPUT_DIR")
    return [
        stack.enter_context(lines.replace_file(folder / f"{name}-predict.jsonl-00000-of-00001"))
        for name in names
    ]


def _answer(predictor: Predictor, rows: InferRows, run: InferRun) -> Iterator[dict[str, Any]]:
    """The record of every row with its answer, in order."""
    tokens, cut, losses = rows.tokens, rows.cut, rows.losses
    if tokens is None:
        texts = [record["inputs"] for record in rows.records]
        tokens, numbers = predictor.tokenize(texts)
        cut, full = len(numbers), [texts[number] for number in numbers]
        losses = describe_losses(
            predictor.vocabulary, full, predictor.max_input_length, run.data.truncate
        )
        refuse_alike(texts, tokens, predictor.vocabulary, f"the inputs of {rows.name}")
        if lost := describe_lost(texts, tokens, predictor.vocabulary):
            print(
                f"{rows.name}: inputs: {lost}. The model reads an unknown piece there. {CURE}",
                file=sys.stderr,
            )
    if cut:
        print(
            f"{rows.name}: {cut} of {len(tokens)} inputs are longer than "
            f"{predictor.max_input_length} tokens (TASK_FEATURE_LENGTHS) and were cut"
            f"{f': {losses}' if losses else ''}.",
            file=sys.stderr,
        )
    words = [()] * len(tokens) if run.eval.method == "generate" else _rank_words(rows, run)
    size = BATCHES_PER_CALL * predictor.batch_size
    with tqdm.tqdm(total=len(tokens), unit="row", disable=not sys.stderr.isatty()) as bar:
        for start in range(0, len(tokens), size):
            part = slice(start, start + size)
            answers = _predict(
                predictor, RowSlice(tokens[part], rows.prompts[part], words[part], start), run
            )
            for record, answer in zip(rows.records[part], answers, strict=True):
                yield record | answer
            bar.update(len(answers))


def _rank_words(rows: InferRows, run: InferRun) -> list[tuple[str, ...]]:
    """The words to rank for every row: the task's, else CLASS_LABELS, else its prompt's."""
    if common := rows.label_words or run.class_labels:
        return [common] * len(rows.prompts)
    words: dict[str | None, tuple[str, ...]] = {None: ()}
    for prompt in filter(None, set(rows.prompts)):
        metadata = prompt_file.read_prompt(prompt).metadata
        words[prompt] = metadata.label_words if metadata else ()
    for prompt in rows.prompts:
        if not words[prompt]:
            setting = "LABEL_WORDS" if _fills_in(run.data.files) else "CLASS_LABELS"
            raise ConfigError(
                f"ranking needs label words, and neither {rows.name} nor the prompt "
                f"{prompt or '(none)'} has any. Set {setting}, or EVAL_METHOD = 'generate'."
            )
    return [words[prompt] for prompt in rows.prompts]


def _predict(predictor: Predictor, rows: RowSlice, run: InferRun) -> list[dict[str, Any]]:
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
            outputs = [{"prediction": output.text, "score": output.score} for output in decodes]
            answer |= outputs[0]
            if run.return_all_decodes:
                answer["decodes"] = outputs
    if config.method != "generate":
        for answer, scores in zip(answers, _rank(predictor, rows, config.rank_score), strict=True):
            best = max(scores, key=scores.__getitem__)
            answer.setdefault("prediction", best)
            answer.setdefault("score", scores[best])
            answer["label_scores"] = scores
    return answers


def _rank(predictor: Predictor, rows: RowSlice, score: RankScore) -> list[dict[str, float]]:
    """The score of every label of every row; rows with the same labels share batches."""
    scores: list[dict[str, float]] = [{} for _ in rows.tokens]
    for labels in dict.fromkeys(rows.words):
        numbers = [number for number, words in enumerate(rows.words) if words == labels]
        label_scores = predictor.score_rows(
            [rows.tokens[number] for number in numbers],
            labels,
            [rows.prompts[number] for number in numbers],
        )
        if score == "mean":
            label_scores = label_scores / predictor.label_lengths(labels)
        for number, values in zip(numbers, label_scores, strict=True):
            scores[number] = dict(zip(labels, values.tolist(), strict=True))
    return scores
