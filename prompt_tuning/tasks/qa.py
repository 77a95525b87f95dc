"""Questions about a text: SQuAD, the MRQA sets, and zero-shot transfer from the one to the others.

Section 5 of the paper trains on SQuAD and scores on the sets of MRQA that are of other domains.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import tensorflow as tf

from prompt_tuning.tasks import answers, metrics
from prompt_tuning.tasks.spec import (
    UNLABELLED,
    Example,
    Row,
    TaskSpec,
    clean,
    each_row,
    named_inputs,
)

# ASCII punctuation stands free and white space is a single space, in RE2's syntax.
SPACED = ((r"([!-/:-@\[-`{-~])", r" \1 "), (r"[\t\n\f\r ]+", " "))
COLLAPSED = SPACED[1:]

OUT_OF_DOMAIN = ("bio_asq", "drop", "duo_rc", "race", "relation_extraction", "textbook_qa")
IN_DOMAIN = ("news_qa", "trivia_qa", "search_qa", "hotpot_qa", "natural_questions")


@each_row
def question(spec: TaskSpec, row: Row, word: str) -> Example:
    """The question and the text it is about; the target is the first answer, all are kept."""
    del spec, word  # T5 has no word for these
    texts = row["answers"]
    texts = clean(texts["text"] if isinstance(texts, Mapping) else texts, SPACED)
    asked, context = (clean(row[name], SPACED) for name in ("question", "context"))
    fields = {
        "question": clean(asked, ((r"^ | $", ""),)),
        "context": clean(context, ((r"^ ", ""),)),
    }
    example = named_inputs("", fields)
    return {
        **question_id(row),
        **example,
        "inputs": clean(example["inputs"], COLLAPSED),  # of an empty question
        "targets": tf.concat([texts, [UNLABELLED]], axis=0)[0],
        "question": asked,
        "context": context,
        "answers": texts,
    }


def question_id(row: Row) -> Example:
    """The identifier as T5 keeps SQuAD's, and the original MRQA's."""
    return {"id": row["id"]} if "id" in row else {"idx": row["qid"]}


def _qa(name: str, source: str, **columns: Any) -> TaskSpec:
    return TaskSpec(
        name=name,
        source=source,
        convert=question,
        postprocess=answers.any_answer,
        metrics=(metrics.squad,),
        **columns,
    )


SQUAD = _qa("squad_v010_allanswers", "squad/v1.1:3.0.0", rows=87_599.0)
MRQA = tuple(
    _qa(
        f"mrqa_{name}_v100",
        f"mrqa/{name}:1.0.0",
        # These have a test split alone, with answers: it is what transfer is scored on.
        splits={"validation": "test"} if name in OUT_OF_DOMAIN else None,
    )
    for name in (*OUT_OF_DOMAIN, *IN_DOMAIN)
)
TASKS = MappingProxyType({spec.name: spec for spec in (SQUAD, *MRQA)})

MIXTURES = MappingProxyType(
    {f"squad_to_{name}": ((SQUAD.name, 1.0), (f"mrqa_{name}_v100", 1.0)) for name in OUT_OF_DOMAIN}
    | {
        "squad_to_mrqa": (
            (SQUAD.name, 1.0),
            *((f"mrqa_{name}_v100", 1.0) for name in OUT_OF_DOMAIN),
        )
    }
)
