"""Error analysis: illegal outputs, confusion matrices, scores of classes, agreement of methods.

Counts over the answers of one prompt on one task, after `evaluate.py`. `evaluation/` and
`training/` write them beside the metrics and show them.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from prompt_tuning.evaluation.evaluate import TaskResult
from prompt_tuning.evaluation.score_table import table
from prompt_tuning.tasks.eval_task import EvalTask, is_right

COMMONEST = 5  # illegal outputs that are shown
MOST_CLASSES = 20  # a table of more classes is too wide to read
ILLEGAL = "(none)"


@dataclasses.dataclass(frozen=True)
class ClassScores:
    """The scores of one class of a task in per cent; 0 if there is nothing to divide by."""

    word: str
    rows: int
    answered: int
    precision: float
    recall: float
    f1: float


@dataclasses.dataclass(frozen=True)
class IllegalOutputs:
    """Outputs that are not among the label words of their rows."""

    count: int
    commonest: tuple[tuple[str, int], ...]


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Generation and ranking on the same rows: how often they agree, and which one is right."""

    same: int
    both_right: int
    generate_right: int  # generation is right, ranking is wrong
    rank_right: int
    both_wrong: int


@dataclasses.dataclass(frozen=True)
class Analysis:
    """The counts of one prompt on one task, by method."""

    rows: int
    illegal: IllegalOutputs | None  # of generation; None if a row may be answered with any text
    words: tuple[str, ...] = ()  # the classes; () if the task has none
    # confusion[method][i][j]: rows of class i that were answered with class j. The last column
    # counts answers that are no class.
    confusion: dict[str, list[list[int]]] = dataclasses.field(default_factory=dict)
    classes: dict[str, list[ClassScores]] = dataclasses.field(default_factory=dict)
    agreement: Agreement | None = None


def analyse(task: EvalTask, result: TaskResult) -> Analysis:
    """The error analysis of one prompt on one task."""
    words = task.label_words if not task.row_words else ()
    targets = task.rows.target_texts
    has_classes = set(targets) <= set(words) and len(words) <= MOST_CLASSES
    confusion = {
        method: confusion_matrix(targets, outputs, words)
        for method, outputs in result.outputs.items()
        if has_classes
    }
    return Analysis(
        rows=len(task.rows),
        illegal=_count_illegal(task, result),
        words=words if has_classes else (),
        confusion={method: matrix.tolist() for method, matrix in confusion.items()},
        classes={method: class_scores(words, matrix) for method, matrix in confusion.items()},
        agreement=_count_agreement(task, result),
    )


def confusion_matrix(
    targets: Sequence[str], outputs: Sequence[str], words: Sequence[str]
) -> Int[np.ndarray, "C C+1"]:
    """Counts [target, answer], one row a class; the last column counts outputs that are no class.

    >>> confusion_matrix(["no", "yes", "yes"], ["no", "no", "maybe"], ["no", "yes"]).tolist()
    [[1, 0, 0], [1, 0, 1]]
    """
    from sklearn import metrics  # slow to import

    index = {word: i for i, word in enumerate(words)}
    true = [index[text] for text in targets]
    answered = [index.get(text, len(words)) for text in outputs]
    counts = metrics.confusion_matrix(true, answered, labels=range(len(words) + 1))
    return counts[: len(words)]


def class_scores(words: Sequence[str], matrix: Int[np.ndarray, "C C+1"]) -> list[ClassScores]:
    """Rows, precision, recall and F1 of every class.

    >>> scores = class_scores(["no"], np.array([[3, 1]]))[0]
    >>> scores.rows, scores.answered, scores.precision, scores.recall, scores.f1
    (4, 3, 100.0, 75.0, 85.71428571428571)
    """

    def percent(part: int, whole: int) -> float:
        return 100.0 * part / whole if whole else 0.0

    classes = []
    for i, word in enumerate(words):
        hits, rows, answered = (int(n) for n in (matrix[i, i], matrix[i].sum(), matrix[:, i].sum()))
        scores = percent(hits, answered), percent(hits, rows), percent(2 * hits, rows + answered)
        classes.append(ClassScores(word, rows, answered, *scores))
    return classes


def _count_illegal(task: EvalTask, result: TaskResult) -> IllegalOutputs | None:
    if "generate" not in result.outputs or not task.can_rank:
        return None
    outputs = enumerate(result.outputs["generate"])
    counts = collections.Counter(text for row, text in outputs if text not in task.words(row))
    return IllegalOutputs(counts.total(), tuple(counts.most_common(COMMONEST)))


def _count_agreement(task: EvalTask, result: TaskResult) -> Agreement | None:
    if set(result.outputs) != {"generate", "rank"}:
        return None
    right = {
        method: [is_right(t, p) for t, p in zip(task.targets, predictions, strict=True)]
        for method, predictions in result.predictions.items()
    }
    counts = collections.Counter(zip(right["generate"], right["rank"], strict=True))
    outputs = zip(result.outputs["generate"], result.outputs["rank"], strict=True)
    return Agreement(
        same=sum(generated == ranked for generated, ranked in outputs),
        both_right=counts[True, True],
        generate_right=counts[True, False],
        rank_right=counts[False, True],
        both_wrong=counts[False, False],
    )


def describe(analysis: Analysis) -> str:
    """A few lines of text, with a confusion table for each method."""
    parts = [illegal_line(analysis), agreement_line(analysis)]
    for method, matrix in analysis.confusion.items():
        columns = (*analysis.words, ILLEGAL, "rows", "recall", "precision", "F1")
        rows: list[tuple[str, ...]] = [(f"target / {method}", *columns)]
        for label, counts in zip(analysis.classes[method], matrix, strict=True):
            scores = (f"{x:.1f}" for x in (label.recall, label.precision, label.f1))
            rows.append((label.word, *map(str, counts), str(label.rows), *scores))
        parts.append(table(rows))
    return "\n".join(part for part in parts if part)


def illegal_line(analysis: Analysis) -> str:
    """The number of illegal outputs and the most frequent ones; "" if there are none.

    >>> illegal_line(Analysis(rows=50, illegal=IllegalOutputs(3, (("", 2), ("maybe", 1)))))
    "illegal outputs: 3 of 50 (6.0 %): '' 2, 'maybe' 1"
    """
    if analysis.illegal is None or not analysis.illegal.count:
        return ""
    count = analysis.illegal.count
    shown = ", ".join(f"{text!r} {n}" for text, n in analysis.illegal.commonest)
    rest = count - sum(n for _, n in analysis.illegal.commonest)
    more = f", others {rest}" if rest else ""
    share = 100 * count / analysis.rows
    return f"illegal outputs: {count} of {analysis.rows} ({share:.1f} %): {shown}{more}"


def agreement_line(analysis: Analysis) -> str:
    """How often generation and ranking agree; "" if only one of them was used."""
    if (agreement := analysis.agreement) is None:
        return ""
    share = 100 * agreement.same / analysis.rows
    return (
        f"generation and ranking agree on {agreement.same} of {analysis.rows} rows "
        f"({share:.1f} %); right: both {agreement.both_right}, only generation "
        f"{agreement.generate_right}, only ranking {agreement.rank_right}, neither "
        f"{agreement.both_wrong}"
    )
