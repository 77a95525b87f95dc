"""T5's metrics against values worked out by hand and against their definitions."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prompt_tuning.text import answers, metrics

LABELS = ("entailment", "contradiction", "neutral")
mean_f1 = metrics.mean_multiclass_f1(3)
classes = st.lists(st.tuples(st.integers(0, 2), st.integers(-1, 2)), min_size=1, max_size=30)


def test_values_by_hand():
    targets, predictions = [0, 1, 2, 2], [0, 1, 1, -1]
    assert metrics.accuracy(targets, predictions) == {"accuracy": 50.0}
    # F1 of the classes: 1; 2 * (1/2 * 1) / (1/2 + 1) = 2/3; 0.
    assert mean_f1(targets, predictions) == {"mean_3class_f1": pytest.approx(100 * (5 / 3) / 3)}


@settings(deadline=None)
@given(classes)
def test_f1_is_its_definition(pairs):
    targets, predictions = np.array(pairs).T
    f1 = []
    for c in range(3):
        hits = np.sum((targets == c) & (predictions == c))
        found = np.sum(predictions == c) + np.sum(targets == c)
        f1.append(2 * hits / found if found else 0.0)
    (value,) = mean_f1(targets.tolist(), predictions.tolist()).values()
    assert value == pytest.approx(100 * np.mean(f1))


@settings(deadline=None)
@given(classes)
def test_bounds_and_perfection(pairs):
    targets, predictions = zip(*pairs, strict=True)
    for metric in (metrics.accuracy, mean_f1):
        (value,) = metric(targets, predictions).values()
        assert 0.0 <= value <= 100.0
    assert metrics.accuracy(targets, targets) == {"accuracy": 100.0}
    every_class = [0, 1, 2, *targets]
    assert mean_f1(every_class, every_class) == {"mean_3class_f1": pytest.approx(100.0)}


@settings(deadline=None)
@given(st.sampled_from(LABELS))
def test_labels_round_trip(label):
    assert LABELS[answers.label_index(label, labels=LABELS, example={}, is_target=True)] == label


@pytest.mark.parametrize("output", ["", "Entailment", " entailment", "entailment.", "<unk>"])
def test_anything_but_a_label_is_invalid(output):
    assert answers.label_index(output, labels=LABELS) == -1


def test_majority_class():
    assert metrics.majority_predictions([1, 0, 0, 1, 1], 3) == [1, 1, 1]
    assert metrics.majority_predictions(["b", "a"], 1) == ["b"]
    # Postprocessed targets of a user's task need not be hashable.
    assert metrics.majority_predictions([["x"], ["y"], ["y"]], 2) == [["y"], ["y"]]
