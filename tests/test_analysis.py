"""Counts, confusions and intervals of answers that were made up."""

import dataclasses

import numpy as np
import pytest
import seqio

from prompt_tuning.batches import batching
from prompt_tuning.config import ConfigError, EvalConfig
from prompt_tuning.evaluation import analysis, intervals
from prompt_tuning.evaluation.evaluate import (
    TaskResult,
    best_constant,
    from_records,
    majority,
    mean_score,
)
from prompt_tuning.tasks import metrics, task_rows
from prompt_tuning.tasks.eval_task import EvalTask, is_right, make_eval_task, make_eval_tasks

VOCABULARY = seqio.ByteVocabulary()
FEATURES = {key: seqio.Feature(VOCABULARY) for key in ("inputs", "targets")}


def as_is(output, **_):
    return output


def no_rows(split, shuffle_files=False, seed=None):
    raise AssertionError("nothing here reads rows")


def make_task(
    targets,
    words=("no", "yes"),
    metric_fns=(metrics.accuracy,),
    postprocess=as_is,
    name="made_up",
):
    """A task with these targets; its rows have no inputs, which nothing here looks at."""
    task = seqio.Task(
        name,
        source=seqio.FunctionDataSource(no_rows, splits=["validation"]),
        preprocessors=[],
        output_features=FEATURES,
        postprocess_fn=postprocess,
        metric_fns=list(metric_fns),
    )
    nothing = [np.zeros(0, np.int32)] * len(targets)
    examples = [{"number": row} for row in range(len(targets))]
    texts = [""] * len(targets)
    rows = batching.Rows(name, nothing, nothing, texts, list(targets), examples, 0, 0)
    return EvalTask(task, rows, list(targets), label_words=words)


def answered(task, **outputs):
    predictions = {
        method: [task.postprocess(row, text) for row, text in enumerate(texts)]
        for method, texts in outputs.items()
    }
    return TaskResult({}, [], outputs, predictions)


def test_illegal_outputs_confusions_and_classes():
    task = make_task(["no", "no", "yes", "yes", "yes"])
    found = analysis.analyse(task, answered(task, generate=["no", "yes", "yes", "", "Yes"]))
    assert found.illegal == analysis.IllegalOutputs(2, (("", 1), ("Yes", 1)))
    assert found.confusion == {"generate": [[1, 1, 0], [0, 1, 2]]}
    no, yes = found.classes["generate"]
    assert (no.rows, no.answered, no.precision, no.recall) == (2, 1, 100.0, 50.0)
    assert (yes.rows, yes.answered, yes.precision) == (3, 2, 50.0)
    assert yes.recall == pytest.approx(100 / 3)
    assert found.agreement is None
    text = analysis.describe(found).splitlines()
    assert text[0] == "illegal outputs: 2 of 5 (40.0 %): '' 1, 'Yes' 1"
    assert text[1].split() == [
        *("target", "/", "generate", "no", "yes", "(none)", "rows", "recall", "precision", "F1")
    ]
    assert text[3].split() == ["yes", "0", "1", "2", "3", "33.3", "50.0", "40.0"]


def test_class_scores_are_scikit_learns():
    from sklearn.metrics import precision_recall_fscore_support

    rng = np.random.default_rng(0)
    words = ("a", "b", "c", "never")
    targets = [words[i] for i in rng.integers(0, 3, 60)]
    outputs = [(*words[:3], "?")[i] for i in rng.integers(0, 4, 60)]
    task = make_task(targets, words)
    found = analysis.analyse(task, answered(task, generate=outputs)).classes["generate"]
    expected = precision_recall_fscore_support(targets, outputs, labels=words, zero_division=0)
    for name, values in zip(("precision", "recall", "f1"), expected[:3], strict=True):
        np.testing.assert_allclose([getattr(c, name) for c in found], 100 * values)
    assert [c.rows for c in found] == expected[3].tolist()


def test_agreement_of_the_methods():
    task = make_task(["no", "no", "yes", "yes"])
    outputs = {"generate": ["no", "yes", "yes", "?"], "rank": ["no", "no", "no", "no"]}
    found = analysis.analyse(task, answered(task, **outputs))
    assert found.agreement == analysis.Agreement(1, 1, 1, 1, 1)
    assert analysis.agreement_line(found) == (
        "generation and ranking agree on 1 of 4 rows (25.0 %); right: both 1, only generation 1, "
        "only ranking 1, neither 1"
    )


def test_rows_with_words_of_their_own_have_no_confusion():
    task = make_task(["Ann", "Bob"], words=())
    task = dataclasses.replace(task, row_words=(("Ann", "Al"), ("Bob",)))
    found = analysis.analyse(task, answered(task, generate=["Al", "Ann"]))
    assert found.illegal == analysis.IllegalOutputs(1, (("Ann", 1),))
    assert found.confusion == {}
    anything = make_task(["Ann"], words=())
    assert analysis.analyse(anything, answered(anything, generate=["?"])).illegal is None


def test_right_is_equal_or_one_of_the_answers():
    assert is_right({"value": ["x", "y"], "group": (0, 1)}, {"value": "y"})
    assert not is_right({"value": ["x", "y"], "group": (0, 1)}, {"value": "z"})
    assert not is_right(1, -1)
    assert is_right(np.float32(2.5), 2.5)


# Intervals.


def test_wilsons_interval_has_the_published_values():
    # Wilson (1927) at z = 1.96; Newcombe (1998), table I: 81 of 263, and 0 of 20.
    assert intervals.wilson(81, 263) == pytest.approx((25.53, 36.62), abs=0.01)
    assert intervals.wilson(0, 20) == pytest.approx((0.0, 16.11), abs=0.01)


def test_the_interval_of_accuracy_is_wilsons_and_that_of_f1_a_bootstrap():
    rng = np.random.default_rng(1)
    targets = rng.integers(0, 2, 60).tolist()
    given = [t if rng.random() < 0.8 else 1 - t for t in targets]
    task = make_task(["x"] * 60, metric_fns=(metrics.accuracy, metrics.mean_multiclass_f1(2)))
    task = dataclasses.replace(task, targets=targets)
    found = intervals.score_intervals(task, {"rank": given}, resamples=300)
    right = sum(t == p for t, p in zip(targets, given, strict=True))
    assert found["accuracy/rank"] == intervals.wilson(right, 60)
    low, high = found["mean_2class_f1/rank"]
    value = task.metrics(given)["mean_2class_f1"]
    assert low < value < high
    assert found["mean_2class_f1/rank"] == pytest.approx(found["accuracy/rank"], abs=4.0)
    assert intervals.score_intervals(task, {"rank": given}, resamples=300) == found
    assert intervals.score_intervals(task, {"rank": given}, resamples=0) == {}


def exact_match(targets, predictions):
    """All answers of a group right."""
    groups = {}
    for target, prediction in zip(targets, predictions, strict=True):
        right = groups.get(target["group"], True)
        groups[target["group"]] = right and target["value"] == prediction["value"]
    return {"em": 100.0 * float(np.mean(list(groups.values())))}


def test_groups_are_drawn_whole_and_one_drawn_twice_counts_twice():
    targets = [{"value": 1, "group": row // 5} for row in range(200)]
    wrong_groups = [{"value": int(row // 5 >= 10)} for row in range(200)]  # 10 of 40 groups
    task = make_task(["x"] * 200, metric_fns=(exact_match,))
    task = dataclasses.replace(task, targets=targets)
    low, high = intervals.bootstrap(task, wrong_groups, 500)["em"]
    # The spread of a share of 40 groups, not of 200 rows.
    assert task.metrics(wrong_groups) == {"em": 75.0}
    spread = 100 * 1.96 * np.sqrt(0.75 * 0.25 / 40)
    assert (high - low) / 2 == pytest.approx(spread, rel=0.2)


@pytest.mark.filterwarnings("error")
def test_a_score_that_is_no_number_has_no_interval():
    """The parity of rows none of which has its pair."""
    targets = [{"value": 1, "group": row} for row in range(5)]
    task = make_task(["x"] * 5, metric_fns=(metrics.gender_parity,))
    assert intervals.bootstrap(dataclasses.replace(task, targets=targets), targets, 300) == {}


def test_too_many_rows_have_no_bootstrap():
    task = make_task(["x"] * 60, metric_fns=(exact_match,))
    rows = 2 * intervals.MOST_WORK // intervals.FEWEST_RESAMPLES
    targets = [{"value": 1, "group": row} for row in range(rows)]
    task = dataclasses.replace(task, targets=targets)
    assert intervals.score_intervals(task, {"rank": [{"value": 1}] * rows}, 1000) == {}


# What cannot be scored.


def one_task(targets, **settings):
    task = make_task(targets, **settings)
    return task_rows.EvalRows(task.task, task.rows, task.label_words)


def test_rows_without_labels_are_refused_even_if_they_are_few():
    with pytest.raises(ConfigError, match="2 of 3 rows of EVAL_SPLIT"):
        make_eval_task(one_task(["yes", "<unk>", "<unk>"]), EvalConfig())


def test_tasks_without_metrics_are_left_out_where_there_are_others(capsys):
    with_metrics, without = one_task(["yes"]), one_task(["yes"], metric_fns=())
    assert len(make_eval_tasks([with_metrics, without], EvalConfig())) == 1
    assert "made_up: not scored, since it has no metrics" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="metric_fns"):
        make_eval_tasks([without], EvalConfig())


def test_a_task_of_any_text_is_generated_beside_others_that_are_ranked(capsys):
    loaded = [one_task(["yes"]), one_task(["Ann"], words=())]
    assert len(make_eval_tasks(loaded, EvalConfig(method="both"))) == 2
    assert "made_up: scored by generation only" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="made_up"):
        make_eval_tasks(loaded, EvalConfig(method="rank"))


def test_a_task_of_the_project_may_be_of_any_text_and_alone(capsys):
    """`EVAL_METHOD = 'both'` suits all of them; here there is nothing to rank."""
    squad = one_task(["Ann"], words=(), name="squad_v010_allanswers")
    assert len(make_eval_tasks([squad], EvalConfig(method="both"))) == 1
    assert "squad_v010_allanswers: scored by generation only" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="squad_v010"):
        make_eval_tasks([squad], EvalConfig(method="rank"))


def broken_metric(targets, predictions):
    raise ZeroDivisionError("no rows of class 7")


def test_a_metric_that_fails_is_one_message():
    task = make_task(["yes"], metric_fns=(broken_metric,))
    with pytest.raises(ConfigError, match=r"broken_metric.*made_up") as error:
        task.metrics(["no"])
    assert "ZeroDivisionError" in str(error.value)


def picky(output, **_):
    return int(output)


def test_a_postprocessing_that_fails_is_one_message():
    task = make_task(["1"], postprocess=picky)
    with pytest.raises(ConfigError, match=r"postprocess_fn.*made_up"):
        task.postprocess(0, "")


# The majority, and what was written.


def test_the_majority_is_the_commonest_target_of_the_rows():
    task = make_task(["no", "yes", "yes", "no", "yes"])
    assert majority(task, EvalConfig(method="both")) == {
        "accuracy/generate": 60.0,
        "accuracy/rank": 60.0,
    }


def f1_of_yes(targets, predictions):
    hits = sum(t == p == "yes" for t, p in zip(targets, predictions, strict=True))
    return {"f1": 200.0 * hits / max(1, targets.count("yes") + predictions.count("yes"))}


def test_the_best_constant_answer_is_not_always_the_majority():
    task = make_task(["no", "yes", "no", "no"], metric_fns=(f1_of_yes,))
    assert majority(task, EvalConfig()) == {"f1/generate": 0.0}
    assert best_constant(task, EvalConfig()) == pytest.approx(40.0)

    def nothing(targets, predictions):
        return {"pearson": float("nan")}

    undefined = make_task(["no", "yes"], metric_fns=(nothing,))
    assert best_constant(undefined, EvalConfig()) is None


def with_number(output, example=None, is_target=False):
    return {"value": output, **({"group": example["number"]} if is_target else {})}


def values_accuracy(targets, predictions):
    pairs = zip(targets, predictions, strict=True)
    return {"accuracy": 100.0 * float(np.mean([t["value"] == p["value"] for t, p in pairs]))}


def test_the_majority_of_targets_that_are_all_different_is_that_of_their_texts():
    task = make_task(["a", "b", "b"], postprocess=with_number, metric_fns=(values_accuracy,))
    targets = [{"value": v, "group": i} for i, v in enumerate("abb")]
    task = dataclasses.replace(task, targets=targets)
    assert majority(task, EvalConfig())["accuracy/generate"] == pytest.approx(200 / 3)


def test_scores_are_read_back_from_what_was_written():
    task = make_task(["no", "yes"])
    records = [
        {"output": "?", "label_scores": {"no": -1.0, "yes": -2.0}},
        {"output": "yes", "label_scores": {"no": -1.0, "yes": -2.0}},
    ]
    scored = from_records(task, records, EvalConfig(method="both"))
    assert scored.outputs == {"generate": ["?", "yes"], "rank": ["no", "no"]}
    assert scored.metrics == {"accuracy/generate": 50.0, "accuracy/rank": 50.0}
    ranked = from_records(task, [{**r, "output": "no"} for r in records], EvalConfig(method="rank"))
    assert list(ranked.outputs) == ["rank"]


def test_a_task_that_is_not_ranked_does_not_count_in_the_mean_by_rank():
    scored = [{"accuracy/rank": 50.0, "accuracy/generate": 10.0}, {"accuracy/generate": 90.0}]
    assert mean_score(scored, EvalConfig(method="rank")) == 50.0
    assert mean_score(scored, EvalConfig(method="both")) == 50.0
