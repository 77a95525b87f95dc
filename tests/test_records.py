"""Records: lines that are written on, what a run that goes on drops of them, curves."""

import json
import resource

import pytest
from matplotlib.figure import Figure

from prompt_tuning.evaluation import pictures, records


def write(folder, step=-1):
    log = records.RunLog(folder, step=step)
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
    assert [records.is_score(line) for line in lines] == [False, True, True]
    assert (
        json.loads((tmp_path / "inference_eval/cb-000004.jsonl").read_text())["output"] == "\u00e9"
    )
    for folder in ("train", "inference_eval/cb"):
        assert len(list((tmp_path / folder).glob("events*"))) == 1


def test_opening_drops_what_is_later_and_what_was_cut_off(tmp_path):
    write(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "ta')
    records.RunLog(tmp_path, step=3)
    assert [r["step"] for r in records.read_records(tmp_path / "metrics.jsonl")] == [3, 3]
    assert (tmp_path / "inference_eval/cb-metrics.jsonl").read_text() == ""
    records.RunLog(tmp_path, step=-1)
    assert records.read_records(tmp_path / "metrics.jsonl") == []


def test_later_steps_are_written_on(tmp_path):
    write(tmp_path)
    whole = (tmp_path / "metrics.jsonl").read_text()
    log = records.RunLog(tmp_path, step=3)
    log.scores(4, {"accuracy/rank": 75.0}, task="cb", split="train")
    log.close()
    assert (tmp_path / "metrics.jsonl").read_text() == whole


def test_an_evaluation_that_was_broken_off_is_dropped(tmp_path):
    write(tmp_path)
    records.RunLog(tmp_path, step=4, evaluation_due=True)
    metrics = records.read_records(tmp_path / "metrics.jsonl")
    assert [(r["step"], r["name"]) for r in metrics] == [(3, "loss"), (3, "accuracy/rank")]
    assert (tmp_path / "inference_eval/cb-metrics.jsonl").read_text() == ""


@pytest.mark.parametrize(
    "harm",
    [
        b"\xff\0" * 9,
        b"",
        b"{" * 99_999,
        b"[]",
        b'{"step": "3", "task": "cb", "name": "loss", "value": 1}',
        b'{"step": 3, "task": "cb", "name": 7, "value": 1}',
    ],
)
def test_a_damaged_record_costs_itself(tmp_path, harm):
    write(tmp_path)
    path = tmp_path / "metrics.jsonl"
    _, *others = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([harm, b"\n", *others]))
    assert len(records.read_records(path)) == len(others) == 2
    records.RunLog(tmp_path, step=9)
    assert path.read_bytes() == b"".join(others)


def test_rows_of_an_evaluation_are_read_again(tmp_path):
    log = records.RunLog(tmp_path, step=-1)
    rows = [{"output": "a\u2028b"}, {"output": ""}]
    log.predictions(7, "cb", {"accuracy/rank": 75.0}, rows)
    assert log.read_predictions(7, "cb") == rows
    assert log.read_predictions(8, "cb") == []


def test_of_lines_that_do_not_fit_the_disk_nothing_stays(tmp_path):
    path = tmp_path / "metrics.jsonl"
    records.append_text(path, '{"step": 1}\n')
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            records.append_text(path, '{"step": 2}\n')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_text() == '{"step": 1}\n'
    records.append_text(path, '{"step": 3}\n')
    assert path.read_text() == '{"step": 1}\n{"step": 3}\n'


def test_the_legend_names_each_score_and_each_kind_of_baseline_once():
    axes = Figure().subplots()
    names = ("cb accuracy/generate", "cb accuracy/rank")
    scores = {name: [(1, 50.0), (2, 75.0)] for name in names}
    pictures.draw_scores(axes, scores, {name: {"majority": 40.0, "none": 0.0} for name in names})
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == [
        *names,
        "majority class",
        "no prompt",
    ]
    styles = [line.get_linestyle() for line in axes.get_lines()]
    assert styles == ["-", "--", ":", "-", "--", ":", "--", ":"]


def test_there_is_no_picture_without_records(tmp_path):
    assert pictures.draw_curves(tmp_path) is None
