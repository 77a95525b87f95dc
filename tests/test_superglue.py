"""Raw rows to text: T5's format to the letter, on inline rows and on T5's own conversions."""

import json
import re
from pathlib import Path

import pytest
import superglue_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from prompt_tuning.config import ConfigError
from prompt_tuning.text import superglue

SPECS = list(superglue.TASKS.values())
TEXTS = {
    "boolq": (
        "boolq passage: Tea -- Tea is a hot drink. question: is tea a drink",
        "True",
    ),
    "cb": (
        "cb hypothesis: it will stop premise: It rains. I think it will stop.",
        "entailment",
    ),
    "rte": ("rte hypothesis: Norway has Oslo. premise: Oslo is in Norway.", "entailment"),
}


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_first_row_of_each_task(spec):
    row = superglue_rows.labelled(spec.folder)[0]
    inputs, targets = TEXTS[spec.name]
    assert superglue.to_text(spec, row) == {"inputs": inputs, "targets": targets}
    without = inputs.removeprefix(f"{spec.name} ")
    assert superglue.to_text(spec, row, task_word=False) == {"inputs": without, "targets": targets}


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_equals_what_t5_makes_of_real_rows(spec, shared_dir):
    folder = shared_dir / "goldens" / "t5_text"
    raw = read(folder / f"{spec.name}.train.raw.jsonl")
    expected = read(folder / f"{spec.name}.train.jsonl")
    assert len(raw) == len(expected) == 32
    for row, example in zip(raw, expected, strict=True):
        text = superglue.to_text(spec, row)
        assert text == {key: example[key] for key in ("inputs", "targets")}
        # The original removes the first word with a regular expression.
        taskless = superglue.to_text(spec, row, task_word=False)
        assert taskless["inputs"] == re.sub(r"^\S+ ", "", example["inputs"], count=1)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_without_a_label_have_the_unknown_target():
    row = superglue_rows.ROWS["CB"][0]
    assert superglue.to_text(superglue.CB, row)["targets"] == "<unk>"
    assert superglue.to_text(superglue.CB, {**row, "label": -1})["targets"] == "<unk>"


@settings(deadline=None)
@given(st.sampled_from(SPECS), st.data())
def test_label_forms_agree(spec, data):
    index = data.draw(st.integers(0, len(spec.labels) - 1))
    assert superglue.label_index(spec, index) == index
    assert superglue.label_index(spec, spec.labels[index]) == index
    if spec.labels == ("False", "True"):
        assert superglue.label_index(spec, bool(index)) == index


@settings(deadline=None)
@given(st.sampled_from(SPECS), st.text(), st.text())
def test_texts_are_passed_through_unchanged(spec, one, two):
    first, second = spec.features
    inputs = superglue.to_text(spec, {first: one, second: two, "label": 0})["inputs"]
    assert inputs == f"{spec.name} {first}: {one} {second}: {two}"


@pytest.mark.parametrize("label", [3, -2, "maybe", True, None, 1.0])
def test_impossible_label(label):
    row = {**superglue_rows.ROWS["CB"][0], "label": label}
    with pytest.raises(ConfigError, match=r"entailment, contradiction, neutral.*found"):
        superglue.to_text(superglue.CB, row)


@pytest.mark.parametrize("premise", [{}, {"premise": None}, {"premise": 3}])
def test_missing_or_wrong_feature(premise):
    with pytest.raises(ConfigError, match="a row of cb needs the text field 'premise'"):
        superglue.to_text(superglue.CB, {"hypothesis": "x", "label": 0, **premise})
