"""Records, what a resumed run drops of them, and the lines and tables that a person reads."""

import io
import json
import re

import pytest
from matplotlib.figure import Figure

from prompt_tuning.scoring.score_table import score_table
from prompt_tuning.training import model_dir, report


def write(folder, step=-1):
    log = report.RunLog(folder, step=step)
    log.training(3, {"loss": 1.5}, task="cb")
    log.scores(3, {"accuracy/rank": 50.0}, task="cb", split="validation[:10]", prompt="none")
    log.scores(4, {"accuracy/rank": 75.0}, task="cb", split="train")
    log.predictions(4, "cb", {"accuracy/rank": 75.0}, [{"output": "\u00e9"}])
    log.close()


def test_a_record_is_one_line(tmp_path):
    write(tmp_path)
    lines = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [
        {"step": 3, "task": "cb", "split": "train", "name": "loss", "value": 1.5},
        {
            "step": 3,
            "task": "cb",
            "split": "validation",
            "name": "accuracy/rank",
            "value": 50.0,
            "prompt": "none",
        },
        {"step": 4, "task": "cb", "split": "train", "name": "accuracy/rank", "value": 75.0},
    ]
    # Scores of the training split are scores.
    assert [report.is_score(line) for line in lines] == [False, True, True]
    assert (
        json.loads((tmp_path / "inference_eval/cb-000004.jsonl").read_text())["output"] == "\u00e9"
    )
    for folder in ("train", "inference_eval/cb"):
        assert len(list((tmp_path / folder).glob("events*"))) == 1


def test_opening_drops_what_is_later_and_what_was_cut_off(tmp_path):
    write(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "ta')
    report.RunLog(tmp_path, step=3)
    assert [r["step"] for r in report.read_records(tmp_path / "metrics.jsonl")] == [3, 3]
    assert (tmp_path / "inference_eval/cb-metrics.jsonl").read_text() == ""
    report.RunLog(tmp_path, step=-1)
    assert report.read_records(tmp_path / "metrics.jsonl") == []


def test_piped_progress_is_plain_lines(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr", io.StringIO())
    progress = report.Progress(start=10, total=40, rows_per_step=8)
    progress._last_line -= 5.0  # as if five seconds had passed
    progress.update(20, {"loss": "1.500"})
    progress.update(21)
    progress.say("step 21/40: accuracy 50.0")
    progress.close()
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("step 20/40: loss 1.500, ")
    assert "examples/s" in first
    assert first.endswith(" s left")
    assert second == "step 21/40: accuracy 50.0"


def test_progress_before_the_first_value_is_no_empty_list(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr", io.StringIO())
    progress = report.Progress(start=0, total=40, rows_per_step=8)
    progress._last_line -= 5.0
    progress.update(1)
    assert re.match(r"step 1/40: \d+ examples/s, ", capsys.readouterr().out)


def test_the_legend_names_each_score_and_each_kind_of_baseline_once():
    axes = Figure().subplots()
    names = ("cb accuracy/generate", "cb accuracy/rank")
    scores = {name: [(1, 50.0), (2, 75.0)] for name in names}
    report.draw_scores(axes, scores, {name: {"majority": 40.0, "none": 0.0} for name in names})
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == [
        *names,
        "majority class",
        "no prompt",
    ]
    styles = [line.get_linestyle() for line in axes.get_lines()]
    assert styles == ["-", "--", ":", "-", "--", ":", "--", ":"]


def summary(folder, tuned):
    log = report.RunLog(folder, step=-1)
    log.scores(0, {"accuracy/rank": 50.0}, task="cb", split="validation", prompt="majority")
    log.scores(4, {"accuracy/rank": tuned}, task="cb", split="validation")
    log.close()
    return model_dir.result_text(folder, 4, None)


@pytest.mark.parametrize(("tuned", "said"), [(49.0, True), (50.0, True), (51.0, False)])
def test_a_prompt_that_does_not_beat_the_majority_is_said(tmp_path, tuned, said):
    assert ("note: no score of the best prompt on cb is above" in summary(tmp_path, tuned)) == said


def test_there_is_no_picture_without_records(tmp_path):
    assert report.draw_curves(tmp_path) is None


@pytest.mark.parametrize("values", [{"a": {"x/rank": 1.0}, "b": {"y/rank": 2.0}}])
def test_a_score_that_is_missing_is_a_dash(values):
    assert score_table("cb", values).splitlines() == [
        "cb  x/rank  y/rank",
        "a      1.0       -",
        "b        -     2.0",
    ]
