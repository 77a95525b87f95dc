"""T5's metrics against values worked out by hand and against their definitions."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from prompt_tuning.tasks import answers, metrics, superglue

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


# Metrics of groups and texts.


def test_f1_counts_what_is_no_class_as_the_wrong_one():
    # Two of three ones found, one zero taken for a one, one illegal answer for a one: 2 / (2 + 1).
    assert metrics.f1_with_invalid([1, 1, 1, 0, 0], [1, 1, -1, 1, 0])["f1"] == pytest.approx(
        200 / 3
    )
    given = np.array([5, -1])
    assert metrics.f1_with_invalid(np.array([0, 1]), given) == {"f1": 0.0}
    assert given.tolist() == [5, -1]  # T5 writes into arrays that it is given


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(-1, 2)), min_size=1, max_size=30))
def test_f1_is_scikit_learns_of_the_mended_predictions(pairs):
    targets, predictions = zip(*pairs, strict=True)
    mended = [p if p in (0, 1) else 1 - t for t, p in pairs]
    expected = 100 * f1_score(targets, mended, zero_division=0)
    assert metrics.f1_with_invalid(targets, predictions) == {"f1": pytest.approx(expected)}


def test_multirc_is_scored_by_answers_and_by_questions():
    def row(value, group):
        return {"value": value, "group": group}

    targets = [row(1, 4), row(0, 5), row(1, 4), row(1, 5)]
    predictions = [{"value": v} for v in (1, 0, 1, -1)]
    assert metrics.multirc_exact_match(targets, predictions) == {"exact_match": 50.0}
    assert metrics.multirc_f1(targets, predictions) == {"f1": pytest.approx(80.0)}
    # A part of a question is a question.
    assert metrics.multirc_exact_match(targets[:3], predictions[:3]) == {"exact_match": 100.0}


def test_ax_g_is_scored_by_pairs():
    """Rows 4 and 5 are a pair, wherever they stand; 6 is without its other one."""
    rows = [(4, "entailment"), (3, "entailment"), (5, "not_entailment"), (2, "maybe"), (6, "x")]
    gold = superglue.AXG.postprocess("entailment", example={"idx": np.int32(5)}, is_target=True)
    assert gold == {"value": 0, "group": 2}
    targets = [{**gold, "group": idx // 2} for idx, _ in rows]
    scores = {}
    for last in ("entailment", "not_entailment"):
        texts = [*(text for _, text in rows[:2]), last, *(text for _, text in rows[3:])]
        predictions = [superglue.AXG.postprocess(text) for text in texts]
        for metric in superglue.AXG.metrics:
            scores[last, metric.__name__] = metric(targets, predictions)
    assert scores == {
        ("entailment", "gender_parity"): {"gender_parity": 50.0},
        ("entailment", "accuracy"): {"accuracy": 60.0},
        ("not_entailment", "gender_parity"): {"gender_parity": 0.0},
        ("not_entailment", "accuracy"): {"accuracy": 40.0},
    }
    assert np.isnan(metrics.gender_parity(targets[:1], [{"value": 0}])["gender_parity"])


def test_record_counts_a_query_once():
    example = {
        "idx/passage": np.int32(1),
        "idx/query": np.int32(2),
        "answers": [b"Bo", b"Zo\xc3\xab"],
    }
    other = {**example, "idx/query": np.int32(3)}
    targets = [
        answers.record_answer("", example=e, is_target=True) for e in (example, example, other)
    ]
    assert targets[0] == {"value": ["Bo", "Zoë"], "group": (1, 2)}
    given = [answers.record_answer(text) for text in ("zoë!", "wrong", "Bo Lee")]
    found = metrics.record_squad(targets, given)
    assert found == {"em": 50.0, "f1": pytest.approx(100 * (1 + 2 / 3) / 2)}


@pytest.mark.parametrize(
    ("wanted", "given", "em", "f1"),
    [
        (["The  Eiffel-Tower."], "eiffeltower", 1, 1),
        (["the"], "", 1, 0),  # nothing is left of either: equal, and no word in common
        (["x"], "", 0, 0),
        (["a b b"], "b b c", 0, 0.8),  # articles go: "b b" and "b b c"
        (["a b b", "B B c"], "b b c", 1, 1),
        (["1889\u00a0Paris"], "1889 Paris", 1, 1),
        (["Zoë"], "ZOË", 1, 1),
        ([], "anything", 0, 0),
    ],
)
def test_squad(wanted, given, em, f1):
    found = metrics.squad([wanted], [given])
    assert found == {"em": 100.0 * em, "f1": pytest.approx(100.0 * f1)}


def test_correlations():
    assert metrics.pearson_corrcoef([1.0, 2.0, 3.0], [2.0, 4.0, 6.0])["pearson_corrcoef"] > 99.99
    ranked = metrics.spearman_corrcoef([1.0, 2.0, 3.0], [9.0, 4.0, 1.0])
    assert ranked == {"spearman_corrcoef": pytest.approx(-100.0)}
    # 2x2 table of 2 right ones, 1 right zero and 1 wrong: (2 * 1 - 0 * 1) / sqrt(3 * 2 * 2 * 1)
    found = metrics.matthews_corrcoef([1, 1, 0, 0], [1, 1, 0, 1])
    assert found == {"matthews_corrcoef": pytest.approx(100 * 2 / 12**0.5)}


@pytest.mark.parametrize(
    ("output", "referent", "expected"),
    [
        ("Bob", "Bob", 1),
        ("  the BOB ", "Bob", 1),
        ("fluffy bunny", "the bunny", 1),
        ("bunny", "The fluffy bunny", 1),
        ("Bob's", "Bob", 0),
        ("Bob", "Bob's hat", 0),
        ("Bob's", "Bob's hat", 1),
        ("Bob's hat", "hat", 0),  # a possessive among the words counts, too
        ("Ann", "Bob", 0),
        ("", "Bob", -1),
        (" the ", "Bob", -1),
        ("the  a", "Bob", -1),
        ("the   a", "Bob", 0),  # as T5 has it: two empty words are a text
        ("Zoë", "zoë lee", 1),
        ("Bob", "the", 0),
    ],
)
def test_referents(output, referent, expected):
    example = {"targets_pretokenized": referent.encode(), "label": np.int64(0)}
    assert answers.names_referent(output, example=example) == expected
    assert answers.names_referent(output, example=example, is_target=True) == 0


def test_answers_of_groups_and_numbers():
    example = {"idx/question": np.int32(7), "answers": [b"a", "b"]}
    assert answers.multirc_label("True", example=example, is_target=True) == {
        "value": 1,
        "group": 7,
    }
    assert answers.multirc_label("true", example=example) == {"value": -1}
    assert answers.any_answer("x", example=example, is_target=True) == ["a", "b"]
    assert answers.any_answer("x", example=example) == "x"
    assert [answers.number(text) for text in ("3.4", "", "-1", "nan ", "x")][:3] == [
        3.4,
        -1.0,
        -1.0,
    ]
    swap = answers.to_label_of({"duplicate": "equivalent"}, "not_equivalent", "equivalent")
    assert [swap(w) for w in ("not_duplicate", "duplicate", "equivalent", "copy")] == [0, 1, 1, -1]


def test_majority_class():
    assert metrics.majority_predictions([1, 0, 0, 1, 1], 3) == [1, 1, 1]
    assert metrics.majority_predictions(["b", "a"], 1) == ["b"]
    # Postprocessed targets of a user's task need not be hashable.
    assert metrics.majority_predictions([["x"], ["y"], ["y"]], 2) == [["y"], ["y"]]
