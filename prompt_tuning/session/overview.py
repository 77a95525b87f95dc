"""A description of a run's data: sizes, answers, lengths, and problems of the rows.

`training/loop.py` and `upstream/engine.py` print it before the first step.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from prompt_tuning.batches import batching
from prompt_tuning.config import ConfigError, Truncate
from prompt_tuning.session.setup import Data
from prompt_tuning.tasks.eval_task import EvalTask
from prompt_tuning.tasks.metrics import parse_number
from prompt_tuning.tasks.spec import UNLABELLED
from prompt_tuning.tasks.task_rows import CLASSES
from prompt_tuning.vocabularies.coverage import CURE, describe_lost
from prompt_tuning.vocabularies.truncate import describe_losses
from prompt_tuning.vocabularies.vocabulary import Vocabulary

LONG = 4  # a label word of this many tokens is reported
SHOWN = 400  # characters shown of a text


def describe_data(
    data: Data, lengths: Mapping[str, int], split: str, truncate: Truncate = "end"
) -> str:
    """A few lines on the training and evaluation rows of every task; `split` is the latter's."""
    tasks: dict[str, dict[str, batching.Rows]] = {rows.task: {"train": rows} for rows in data.train}
    for task in data.eval_tasks:
        tasks.setdefault(task.name, {})[split if split != "train" else "scored"] = task.rows
    words = {task.name: task.label_words for task in data.eval_tasks}
    described = [
        _describe_task(name, splits, words.get(name, ()), lengths, data, truncate)
        for name, splits in tasks.items()
    ]
    return "\n".join(described)


def _describe_task(
    name: str,
    splits: Mapping[str, batching.Rows],
    words: Sequence[str],
    lengths: Mapping[str, int],
    data: Data,
    truncate: Truncate,
) -> str:
    width = max(map(len, splits))
    lines = [f"{name}:"]
    for split, rows in splits.items():
        lines.append(f"  {split:<{width}}  {_describe_lengths(rows, lengths, data)}")
    for split, rows in splits.items():
        lines.append(f"  {split:<{width}}  answers: {_describe_answers(rows, words)}")
    losses = _describe_losses(splits, lengths["inputs"], data, truncate)
    lines += [f"  {line}" for line in losses]
    lines += [f"  {line}" for line in _find_problems(splits, words)]
    for split, rows in splits.items():
        task = next((task for task in data.eval_tasks if task.rows is rows), None)
        lines += [f"  {line}" for line in find_lost(split, rows, task, data.vocabulary)]
    first = next(iter(splits.values()))
    seen = [data.vocabulary.decode(ids[0].tolist()) for ids in (first.inputs, first.targets)]
    lines.append(f"  the first row, as the model sees it: {_short(seen[0])} -> {_short(seen[1])}")
    return "\n".join(lines)


def _describe_losses(
    splits: Mapping[str, batching.Rows], length: int, data: Data, truncate: Truncate
) -> Iterable[str]:
    """A line for each split on the fields that its longest rows lose."""
    for split, rows in splits.items():
        if not rows.truncated_inputs:
            continue
        full = [i for i in range(len(rows)) if len(rows.inputs[i]) == length]
        texts = [rows.input_texts[i] for i in full]
        if lost := describe_losses(data.vocabulary, texts, length, truncate):
            yield (
                f"note: of the {rows.truncated_inputs} inputs of {split} that are longer than "
                f"{length} tokens {lost}"
            )


def _describe_lengths(rows: batching.Rows, lengths: Mapping[str, int], data: Data) -> str:
    whole = [_whole_length(rows, i, lengths["inputs"], data) for i in range(len(rows))]
    count = len(rows)
    return (
        f"{count} rows; inputs of {np.mean(whole):.0f} tokens on average, {_at_95(whole)} at 95%, "
        f"{max(whole)} at most; cut: {rows.truncated_inputs / count:.1%} of the inputs (at "
        f"{lengths['inputs']}), {rows.truncated_targets / count:.1%} of the targets (at "
        f"{lengths['targets']})"
    )


def _whole_length(rows: batching.Rows, row: int, limit: int, data: Data) -> int:
    """The number of tokens of an input before it was cut, end-of-sequence included."""
    length = len(rows.inputs[row])
    if length < limit or not rows.truncated_inputs:
        return length
    return max(length, len(data.vocabulary.encode(rows.input_texts[row])) + 1)


def _at_95(values: Sequence[int]) -> int:
    return int(np.percentile(values, 95, method="inverted_cdf"))


def _describe_answers(rows: batching.Rows, words: Sequence[str]) -> str:
    counts = collections.Counter(rows.target_texts)
    if len(counts) > CLASSES and not words:
        (text, n), *_ = counts.most_common(1)
        return f"{len(counts)} different, {_short(text)} the most frequent ({n})"
    order = [word for word in words if word in counts]
    order += [text for text, _ in counts.most_common() if text not in order]
    shown = [f"{_short(text)} {counts[text]} ({counts[text] / len(rows):.1%})" for text in order]
    return ", ".join(shown[: 2 * CLASSES]) + (", ..." if len(shown) > 2 * CLASSES else "")


def _find_problems(splits: Mapping[str, batching.Rows], words: Sequence[str]) -> Iterable[str]:
    """A line on each problem of the rows."""
    of_files = "row" in next(iter(splits.values())).examples[0]
    for split, rows in splits.items():
        empty = [i for i in range(len(rows)) if _is_empty(rows, i)]
        if empty:
            place = rows.examples[empty[0]].get("row", b"")
            where = f" (the first: {place.decode()})" if place else ""
            yield f"note: {len(empty)} rows of {split} have an empty text{where}"
        if absent := [word for word in words if word not in rows.target_texts]:
            left_out = "; macro_f1 is over the classes that occur" if of_files else ""
            yield (
                f"note: no row of {split} has the answer {', '.join(map(repr, absent))}"
                f"{left_out if split != 'train' else ''}"
            )
    yield from _find_bad_targets(splits, words)
    scored = list(splits)[-1]
    free = of_files and not words  # the answers are not named
    numeric = free and None not in map(parse_number, splits[scored].target_texts)
    if numeric:
        yield (
            f"note: the answers of {scored} are numbers: they have correlations instead of an F1. "
            "If they stand for classes, give LABEL_WORDS"
        )
    if "train" not in splits:
        return
    different = len(set(splits["train"].target_texts))
    few = different <= min(CLASSES, len(splits["train"]) // 3)
    if free and not numeric and few:
        yield f"note: only {different} different answers; LABEL_WORDS would make classes of them"
    answers: dict[str, set[str]] = collections.defaultdict(set)
    for text, answer in zip(splits["train"].input_texts, splits["train"].target_texts, strict=True):
        answers[text].add(answer)
    again = len(splits["train"]) - len(answers)
    if again:
        ambiguous = sum(len(targets) > 1 for targets in answers.values())
        more = f"; {ambiguous} texts have more than one answer" if ambiguous else ""
        yield f"note: {again} rows of train repeat the text of another{more}"
    for split, rows in splits.items():
        common = sum(text in answers for text in rows.input_texts)
        if split != "train" and common:
            yield (
                f"note: {common} of the {len(rows)} texts of {split} are also training texts: its "
                "scores are too high"
            )


def find_lost(
    split: str, rows: batching.Rows, task: EvalTask | None, vocabulary: Vocabulary
) -> Iterable[str]:
    """A line on the inputs, and one on the answers, that the vocabulary cannot write.

    With the `task` that is scored on the rows, also the best scores that are left: those of a model
    that writes exactly the tokens of every answer.
    """
    if lost := describe_lost(rows.input_texts, rows.inputs, vocabulary):
        yield f"note: inputs of {split}: {lost}. The model reads an unknown piece there. {CURE}"
    answered = [row for row, text in enumerate(rows.target_texts) if text != UNLABELLED]
    texts = [rows.target_texts[row] for row in answered]
    if lost := describe_lost(texts, [rows.targets[row] for row in answered], vocabulary):
        best = "" if task is None else _describe_best(task)
        yield f"note: answers of {split}: {lost}. The model cannot write them.{best} {CURE}"


def _describe_best(task: EvalTask) -> str:
    outputs = [task.vocabulary.decode(ids.tolist()) for ids in task.rows.targets]
    try:
        best = task.metrics([task.postprocess(row, text) for row, text in enumerate(outputs)])
    except ConfigError:  # a user's metric may not accept every output
        return ""
    scores = ", ".join(f"{name} {value:.1f}" for name, value in best.items())
    return f" The best score that is left: {scores}."


def _find_bad_targets(splits: Mapping[str, batching.Rows], words: Sequence[str]) -> Iterable[str]:
    for split, rows in splits.items():
        if cut := rows.truncated_targets:
            yield (
                f"note: {cut} of the {len(rows)} answers of {split} are truncated, so no output "
                "can match them: raise TASK_FEATURE_LENGTHS['targets']"
            )
    if "train" not in splits or "row" not in splits["train"].examples[0]:
        return  # the words of a registered task are T5's
    train = splits["train"]
    tokens = {t: len(ids) - 1 for t, ids in zip(train.target_texts, train.targets, strict=True)}
    if long := [f"{word!r} ({tokens[word]})" for word in words if tokens.get(word, 0) >= LONG]:
        yield f"note: label words of many tokens: {', '.join(long)}; one or two are easier to learn"


def _is_empty(rows: batching.Rows, row: int) -> bool:
    return bool(rows.examples[row].get("empty", not rows.input_texts[row].strip()))


def _short(text: str) -> str:
    return repr(text if len(text) <= SHOWN else text[: SHOWN - 3] + "...")
