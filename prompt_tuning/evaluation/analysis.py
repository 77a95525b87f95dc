"""What stands behind a score: illegal outputs, confusions, classes, and how far methods agree.

Counts over the answers of one prompt on one task, after `evaluate.py`; `evaluation/` and
`training/` write them beside the metrics and show them.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from prompt_tuning.evaluation.evaluate import Scored
from prompt_tuning.evaluation.score_table import table
from prompt_tuning.tasks.eval_task import EvalTask, is_right

COMMONEST = 5  # illegal outputs that are shown
MOST_CLASSES = 20  # more of them make no table that can be read
ILLEGAL = "(none)"


@dataclasses.dataclass(frozen=True)
class Class:
    """One class of a task; per cent, and 0 where there is nothing to divide by."""

    word: str
    rows: int
    answered: int
    precision: float
    recall: float
    f1: float


@dataclasses.dataclass(frozen=True)
class Illegal:
    """Outputs that are none of the words that their rows may be answered with."""

    count: int
    commonest: tuple[tuple[str, int], ...]


@dataclasses.dataclass(frozen=True)
class Agreement:
    """Two methods on the same rows: how many have the same answer, and which are right."""

    same: int
    both_right: int
    generate_right: int  # and ranking wrong
    rank_right: int
    both_wrong: int


@dataclasses.dataclass(frozen=True)
class Analysis:
    """The counts of one prompt on one task, by method where there are several."""

    rows: int
    illegal: Illegal | None  # of generation, where it is known what is legal
    words: tuple[str, ...] = ()  # the classes; () of a task that has none
    # confusion[method][i][j]: rows of class i answered with class j, or in the last column none.
    confusion: dict[str, list[list[int]]] = dataclasses.field(default_factory=dict)
    classes: dict[str, list[Class]] = dataclasses.field(default_factory=dict)
    agreement: Agreement | None = None


def analyse(task: EvalTask, scored: Scored) -> Analysis:
    """Counts what the answers are, apart from how many are right."""
    words = task.label_words if not task.row_words else ()
    targets = task.rows.target_texts
    known = set(targets) <= set(words) and len(words) <= MOST_CLASSES
    confusion = {
        method: confusion_matrix(targets, outputs, words)
        for method, outputs in scored.outputs.items()
        if known
    }
    return Analysis(
        rows=len(task.rows),
        illegal=_illegal(task, scored),
        words=words if known else (),
        confusion={method: matrix.tolist() for method, matrix in confusion.items()},
        classes={method: class_scores(words, matrix) for method, matrix in confusion.items()},
        agreement=_agreement(task, scored),
    )


def confusion_matrix(
    targets: Sequence[str], outputs: Sequence[str], words: Sequence[str]
) -> Int[np.ndarray, "C C+1"]:
    """Rows of each class by what they were answered with; the last column counts other outputs.

    >>> confusion_matrix(["no", "yes", "yes"], ["no", "no", "maybe"], ["no", "yes"]).tolist()
    [[1, 0, 0], [1, 0, 1]]
    """
    from sklearn import metrics  # half a second, needed at evaluation only

    index = {word: i for i, word in enumerate(words)}
    true = [index[text] for text in targets]
    answered = [index.get(text, len(words)) for text in outputs]
    found = metrics.confusion_matrix(true, answered, labels=range(len(words) + 1))
    return found[: len(words)]


def class_scores(words: Sequence[str], matrix: Int[np.ndarray, "C C+1"]) -> list[Class]:
    """Rows, precision, recall and F1 of every class.

    >>> class_scores(["no"], np.array([[3, 1]]))
    [Class(word='no', rows=4, answered=3, precision=100.0, recall=75.0, f1=85.71428571428571)]
    """

    def percent(part: int, whole: int) -> float:
        return 100.0 * part / whole if whole else 0.0

    classes = []
    for i, word in enumerate(words):
        hits, rows, answered = (int(n) for n in (matrix[i, i], matrix[i].sum(), matrix[:, i].sum()))
        scores = percent(hits, answered), percent(hits, rows), percent(2 * hits, rows + answered)
        classes.append(Class(word, rows, answered, *scores))
    return classes


def _illegal(task: EvalTask, scored: Scored) -> Illegal | None:
    if "generate" not in scored.outputs or not task.can_rank:
        return None
    outputs = enumerate(scored.outputs["generate"])
    found = collections.Counter(text for row, text in outputs if text not in task.words(row))
    return Illegal(found.total(), tuple(found.most_common(COMMONEST)))


def _agreement(task: EvalTask, scored: Scored) -> Agreement | None:
    if set(scored.outputs) != {"generate", "rank"}:
        return None
    right = {
        method: [is_right(t, p) for t, p in zip(task.targets, predictions, strict=True)]
        for method, predictions in scored.predictions.items()
    }
    counts = collections.Counter(zip(right["generate"], right["rank"], strict=True))
    outputs = zip(scored.outputs["generate"], scored.outputs["rank"], strict=True)
    return Agreement(
        same=sum(generated == ranked for generated, ranked in outputs),
        both_right=counts[True, True],
        generate_right=counts[True, False],
        rank_right=counts[False, True],
        both_wrong=counts[False, False],
    )


def to_json(analysis: Analysis) -> dict[str, Any]:
    """The analysis as JSON holds it."""
    return dataclasses.asdict(analysis)


def describe(analysis: Analysis) -> str:
    """The analysis in a few lines, the confusions as tables."""
    parts = [illegal_line(analysis), agreement_line(analysis)]
    for method, matrix in analysis.confusion.items():
        columns = (*analysis.words, ILLEGAL, "rows", "recall", "precision", "F1")
        rows: list[tuple[str, ...]] = [(f"target / {method}", *columns)]
        for one, counts in zip(analysis.classes[method], matrix, strict=True):
            scores = (f"{x:.1f}" for x in (one.recall, one.precision, one.f1))
            rows.append((one.word, *map(str, counts), str(one.rows), *scores))
        parts.append(table(rows))
    return "\n".join(part for part in parts if part)


def illegal_line(analysis: Analysis) -> str:
    """How many outputs are illegal, and the commonest; "" where none is.

    >>> illegal_line(Analysis(rows=50, illegal=Illegal(3, (("", 2), ("maybe", 1)))))
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
    """How far generation and ranking agree; "" where only one of them was used."""
    if (found := analysis.agreement) is None:
        return ""
    share = 100 * found.same / analysis.rows
    return (
        f"generation and ranking agree on {found.same} of {analysis.rows} rows ({share:.1f} %); "
        f"right: both {found.both_right}, only generation {found.generate_right}, only ranking "
        f"{found.rank_right}, neither {found.both_wrong}"
    )
