"""The texts, answers and metrics of our tasks against those of T5 itself, where it is installed.

`pip install --no-deps t5` beside seqio, with what its metrics import (sacrebleu, rouge_score,
editdistance, pandas, ...), is enough. T5's converters run on the same rows as ours: on all rows of
the reference data, where they are there, and on random ones.
"""

import functools
import random

import pytest
import seqio
import superglue_rows
import tensorflow as tf
from rows_as_examples import convert, plain, signature

from prompt_tuning.tasks import glue, prepare, qa, registry, superglue
from prompt_tuning.tasks.spec import TaskSpec, to_examples

pytest.importorskip("t5.data.glue_utils", reason="T5 itself is not installed")

from t5.data import glue_utils, postprocessors, preprocessors
from t5.evaluation import metrics as t5_metrics


class Config:
    """What T5 reads of a TFDS configuration."""

    def __init__(self, spec: TaskSpec) -> None:
        self.name, self.label_classes = spec.config, list(spec.labels)


def converter(spec: TaskSpec):
    """T5's own conversion of the rows of a task."""
    if spec.convert is superglue.wsc:
        return functools.partial(preprocessors.wsc_simple, correct_referent_only=False)
    if spec.convert is superglue.wsc_right:
        return functools.partial(preprocessors.wsc_simple, correct_referent_only=True)
    if spec is superglue.DPR:
        return preprocessors.definite_pronoun_resolution_simple
    if spec.convert is qa.question:
        return preprocessors.squad
    if spec is superglue.AXB:
        keys = {"premise": "sentence1", "hypothesis": "sentence2", "label": "label", "idx": "idx"}
        convert = glue_utils.get_glue_text_preprocessor(Config(spec))
        return lambda rows: convert(preprocessors.rekey(rows, key_map=keys))
    return glue_utils.get_glue_text_preprocessor(Config(spec))


def compare(spec: TaskSpec, rows: tf.data.Dataset) -> int:
    """Holds our conversion to T5's on all rows; returns how many examples there were."""
    ours = [plain(e) for e in to_examples(rows, spec).as_numpy_iterator()]
    theirs = [plain(e) for e in converter(spec)(rows).as_numpy_iterator()]
    for example in ours:
        example.pop("entities", None)  # kept for ranking
        example.pop("candidates", None)
    assert ours == theirs
    return len(ours)


@pytest.mark.parametrize("folder", ["fewglue", "superglue"])
def test_all_rows_of_the_reference_data(folder, shared_dir, tmp_path):
    prepare.prepare_superglue(shared_dir / "data" / folder, tmp_path)
    registry.register("bytes", tfds_data_dir=str(tmp_path))
    counts = {}
    for name, spec in superglue.TASKS.items():
        if not (tmp_path / "super_glue" / spec.config).exists():
            continue
        source = seqio.get_mixture_or_task(name).source
        there = source.tfds_dataset.info.splits
        for split in there:
            if spec.splits is None or split in spec.splits:
                counts[name, split] = compare(spec, source.get_dataset(split, shuffle=False))
    print(folder, sum(counts.values()), counts)
    assert sum(counts.values()) > 700


def test_the_rows_of_the_tests(tmp_path):
    """Nested rows, test splits without answers, and the diagnostic sets."""
    prepare.prepare_superglue(superglue_rows.write_all(tmp_path / "jsonl"), tmp_path / "tfds")
    registry.register("bytes", tfds_data_dir=str(tmp_path / "tfds"))
    for name, spec in superglue.TASKS.items():
        if spec.convert in (superglue.dpr, superglue.wsc, superglue.wsc_right):
            continue  # one of our rows is odd in a way that T5 refuses
        source = seqio.get_mixture_or_task(name).source
        for split in source.splits:
            compare(spec, source.get_dataset(split, shuffle=False))


PIECES = [
    "",
    " ",
    "a",
    "Zoë",
    "日本",
    "<br>",
    "<b>",
    "</b>",
    "\n@highlight\n",
    ".",
    '"',
    "(x)",
    "\t",
    "\v",
]


def random_rows(spec: TaskSpec, chance: random.Random, count: int):
    def text() -> str:
        return "".join(chance.choices(PIECES, k=chance.randint(0, 7)))

    for i in range(count):
        if spec.convert is superglue.record:
            entities = [text() for _ in range(chance.randint(1, 4))]
            row = {"passage": text(), "query": text(), "entities": entities}
            row["answers"] = entities[: chance.randint(0, 3)]
            row["idx"] = {"passage": i, "query": i}
        elif spec.convert is qa.question:
            row = {"id": str(i), "context": text(), "question": text()}
            row["answers"] = {"text": [text() for _ in range(chance.randint(1, 3))]}
        else:
            row = {name: text() for name in spec.columns or spec.features}
            row["label"] = chance.randint(-1, len(spec.labels) - 1)
            row["idx"] = i
            if spec.convert is glue.similarity:
                row["label"] = chance.choice([-1.0, 5.0, chance.uniform(0, 5), 0.3, 0.1, 2.5])
            if spec is superglue.MULTIRC:
                row["idx"] = {"paragraph": i, "question": i, "answer": i}
        yield row


RANDOM = [
    spec
    for spec in (*superglue.SUPER_GLUE, *glue.TASKS.values(), qa.SQUAD)
    if spec.convert not in (superglue.dpr, superglue.wsc, superglue.wsc_right)
    and not spec.words
    and "v200" not in spec.name
]


@pytest.mark.parametrize("spec", RANDOM, ids=lambda spec: spec.name)
def test_random_rows(spec):
    rows = list(random_rows(spec, random.Random(0), 150))
    dataset = tf.data.Dataset.from_generator(
        lambda: rows, output_signature=signature(rows[0])
    ).cache()
    assert compare(spec, dataset) >= 150


def test_random_pronouns():
    chance = random.Random(0)
    words = ["he", "him", "X", "", "Zoë", "a", "he,"]
    rows = []
    for i in range(300):
        text = [*chance.choices(words, k=chance.randint(1, 8)), ""]
        at = chance.randint(1, len(text) - 1)
        text[at] = "he"
        row = {"text": " ".join(text), "span2_index": at, "span2_text": "he"}
        rows.append({**row, "span1_text": chance.choice(words), "label": chance.randint(0, 1)})
        rows[-1]["idx"] = i
    dataset = tf.data.Dataset.from_generator(lambda: rows, output_signature=signature(rows[0]))
    assert compare(superglue.WSC_EVAL, dataset) == 300
    assert compare(superglue.WSC_TRAIN, dataset) > 100


def test_random_dpr():
    chance = random.Random(0)
    words = [" he", " he,", " he.", "Zoë", " (he)", " ", "he"]
    rows = [
        {
            "sentence": "".join(chance.choices(words, k=6)),
            "pronoun": "he",
            "candidates": ["Tom", "Zoë"],
            "label": chance.randint(0, 1),
        }
        for _ in range(300)
    ]
    dataset = tf.data.Dataset.from_generator(lambda: rows, output_signature=signature(rows[0]))
    theirs = [
        plain(e)
        for e in preprocessors.definite_pronoun_resolution_simple(dataset).as_numpy_iterator()
    ]
    ours = convert(superglue.DPR, *rows)
    assert [{k: e[k] for k in ("inputs", "targets")} for e in ours] == theirs


# Answers and metrics.

WSC_WORDS = [
    "the",
    "a",
    "Bob",
    "bob's",
    "Bob's hat",
    "her",
    "",
    " ",
    "  the ",
    "fuzzy bunny",
    "Zoë",
]


def test_the_referent_of_wsc():
    chance = random.Random(0)
    for _ in range(3000):
        output, target = (" ".join(chance.choices(WSC_WORDS, k=chance.randint(0, 3))) for _ in "ab")
        example = {"targets_pretokenized": target.encode(), "label": 1}
        ours = superglue.WSC_EVAL.postprocess(output, example=example, is_target=False)
        assert ours == postprocessors.wsc_simple(output, example=example), (output, target)


def their_metrics(spec: TaskSpec):
    if spec in superglue.WSC or spec is superglue.DPR:
        return [t5_metrics.accuracy] if spec.metrics else []
    if spec.convert is qa.question:
        return [t5_metrics.squad]
    mapping = (
        glue_utils.GLUE_METRICS if "glue/" in spec.source[:5] else glue_utils.SUPERGLUE_METRICS
    )
    return mapping[spec.config]


def their_postprocess(spec: TaskSpec):
    if spec in superglue.WSC:
        return postprocessors.wsc_simple
    if spec is superglue.DPR:
        return lambda output, **_: output
    if spec.convert is qa.question:
        return postprocessors.qa
    return glue_utils.get_glue_postprocess_fn(Config(spec))


def random_outputs(spec: TaskSpec, chance: random.Random) -> list[tuple[str, str, dict]]:
    """(target, prediction, example): right, wrong, illegal, empty, and several of a group."""
    words = list(spec.labels) or [
        "the Bo",
        "bo!",
        "Ann Lee",
        "ann",
        "A",
        "Zoë",
        "3.4",
        "1.0",
        "2.6",
    ]
    if spec.convert is glue.similarity:
        words = [f"{i / 5:.1f}" for i in range(26)]
    odd = ["", "<unk>", words[0].lower(), f"{words[0]} ", "the", "true false"]
    found = []
    for _ in range(chance.choice([1, 5, 60])):
        target = chance.choice(words)
        output = chance.choice([target, *words, chance.choice(odd)])
        example = {
            "idx/question": chance.randint(0, 9),
            "idx/passage": chance.randint(0, 2),
            "idx/query": chance.randint(0, 5),
            "answers": [word.encode() for word in chance.choices(words, k=chance.randint(1, 3))],
            "label": chance.randint(0, 1),
            "targets_pretokenized": target.encode(),
        }
        found.append((target, output, example))
    return found


SCORED = [spec for spec in RANDOM if spec not in (superglue.AXB, superglue.AXG)]  # not by T5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("spec", [*SCORED, superglue.WSC_EVAL, superglue.DPR], ids=lambda s: s.name)
def test_random_predictions(spec):
    chance = random.Random(0)
    theirs, convert = their_metrics(spec), their_postprocess(spec)
    ours = spec.postprocess or convert
    assert len(theirs) == len(spec.metrics)
    for _ in range(100):
        rows = random_outputs(spec, chance)
        if spec.convert is glue.similarity and len(rows) < 2:
            continue  # no correlation of one pair
        expected, found = {}, {}
        for values, post, fns in ((expected, convert, theirs), (found, ours, spec.metrics)):
            targets = [post(t, example=e, is_target=True) for t, _, e in rows]
            outputs = [post(o, example=e, is_target=False) for _, o, e in rows]
            for metric in fns:
                values |= metric(targets, outputs)
        assert found == pytest.approx(expected, abs=1e-9, nan_ok=True)
        assert all(type(value) is float for value in found.values())
