"""The tasks of GLUE, in two TFDS versions, and transfer between its two paraphrase tasks.

T5's tasks are `_v002`; `_v200` reads the later version that TFDS still builds.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import tensorflow as tf

from prompt_tuning.tasks import answers, metrics
from prompt_tuning.tasks.spec import (
    Example,
    Row,
    TaskSpec,
    each_row,
    index_features,
    named_inputs,
    named_texts,
)

VERSIONS = MappingProxyType({"v002": "1.0.0", "v200": "2.0.0"})
MNLI = ("entailment", "neutral", "contradiction")
ENTAILMENT = ("entailment", "not_entailment")
EQUIVALENT = ("not_equivalent", "equivalent")
DUPLICATE = ("not_duplicate", "duplicate")
TWO = ("sentence1", "sentence2")


@each_row
def similarity(spec: TaskSpec, row: Row, word: str) -> Example:
    """A pair of sentences and how alike they are, from 0 to 5 in steps of 0.2, as a number."""
    return {
        **index_features(row),
        **named_inputs(word, named_texts(spec, row)),
        "targets": tf.as_string(tf.round(row["label"] * 5) / 5, precision=1),
    }


def _glue(config: str, version: str, **columns: Any) -> TaskSpec:
    labels = columns.get("labels", ())
    common = {
        "name": f"glue_{config}_{version}",
        "source": f"glue/{config}:{VERSIONS[version]}",
        "word": config,
        "metrics": (metrics.accuracy,),
        "postprocess": answers.to_label(*labels),
    }
    return TaskSpec(**{**common, **columns})


def _tasks(version: str) -> tuple[TaskSpec, ...]:
    f1 = (metrics.f1_with_invalid, metrics.accuracy)
    mnli = {"word": "mnli", "features": ("hypothesis", "premise"), "labels": MNLI}
    return (
        _glue(
            "cola",
            version,
            features=("sentence",),
            labels=("unacceptable", "acceptable"),
            metrics=(metrics.matthews_corrcoef,),
            rows=8_551.0,
        ),
        _glue(
            "sst2",
            version,
            features=("sentence",),
            labels=("negative", "positive"),
            rows=67_349.0,
        ),
        _glue("mrpc", version, features=TWO, labels=EQUIVALENT, metrics=f1, rows=3_668.0),
        _glue(
            "qqp",
            version,
            features=("question1", "question2"),
            labels=DUPLICATE,
            metrics=f1,
            rows=363_849.0,
        ),
        _glue(
            "stsb",
            version,
            features=TWO,
            convert=similarity,
            postprocess=answers.number,
            metrics=(metrics.pearson_corrcoef, metrics.spearman_corrcoef),
            rows=5_749.0,
        ),
        _glue("mnli", version, rows=392_702.0, **mnli),
        _glue("mnli_mismatched", version, **mnli),
        _glue("mnli_matched", version, **mnli),
        _glue(
            "qnli", version, features=("question", "sentence"), labels=ENTAILMENT, rows=104_743.0
        ),
        _glue("rte", version, features=TWO, labels=ENTAILMENT, rows=2_490.0),
        _glue("wnli", version, features=TWO, labels=ENTAILMENT[::-1]),
        _glue("ax", version, splits=("test",), **{**mnli, "metrics": ()}),
    )


def _transfer(
    target: str, source: str, labels: tuple[str, str], source_labels: tuple[str, str]
) -> TaskSpec:
    """The rows of `target` for a prompt that was trained on `source`, and answers in its words."""
    row = next(spec for spec in _tasks("v002") if spec.config == target)
    return TaskSpec(
        name=f"glue_{target}_from_{source}_v002",
        source=row.source,
        word=row.word,
        features=row.features,
        labels=labels,
        words=source_labels,
        splits=("validation",),
        metrics=row.metrics,
        postprocess=answers.to_label_of({source_labels[1]: labels[1]}, *labels),
    )


TRANSFER = (
    _transfer("mrpc", "qqp", EQUIVALENT, DUPLICATE),
    _transfer("qqp", "mrpc", DUPLICATE, EQUIVALENT),
)
TASKS = MappingProxyType(
    {spec.name: spec for version in VERSIONS for spec in _tasks(version)}
    | {spec.name: spec for spec in TRANSFER}
)


def _mixtures() -> dict[str, tuple[tuple[str, float], ...]]:
    """MNLI with its two development sets, which are tasks of their own; T5's GLUE; transfer."""
    mixtures = {
        f"glue_mnli_and_dev_{version}": tuple(
            (f"glue_{name}_{version}", 1.0) for name in ("mnli", "mnli_mismatched", "mnli_matched")
        )
        for version in VERSIONS
    }
    # T5 trains on WSC instead of WNLI.
    weighted = [spec for spec in _tasks("v002") if spec.config != "wnli"]
    mixtures["glue_v002_proportional"] = tuple((spec.name, spec.rows) for spec in weighted)
    for target, source in (("mrpc", "qqp"), ("qqp", "mrpc")):
        names = (f"glue_{source}_v002", f"glue_{target}_from_{source}_v002")
        name = f"glue_{target}_from_{source}_zeroshot_v002"
        mixtures[name] = tuple((task, 1.0) for task in names)
    return mixtures


MIXTURES = MappingProxyType(_mixtures())
