"""Records that were damaged are found, and made anew from what the state says of them."""

import json
import re

import pytest

from prompt_tuning.runtime import records
from prompt_tuning.training import report


@pytest.fixture
def written(tmp_path):
    """A folder with the records of a step, and what its state keeps of them."""
    log = report.RunLog(tmp_path, step=-1)
    log.training(3, {"loss": 1.5}, task="cb")
    log.scores(3, {"accuracy/rank": 75.0}, task="cb", split="validation")
    log.predictions(3, "cb", {"accuracy/rank": 75.0}, [{"output": "a"}])
    log.analysis(3, "cb", {"words": ["\u00e9\u2028"]})
    saved = log.pack()
    log.close()
    return tmp_path, saved, contents(tmp_path)


def damage(capsys, folder, saved, **more):
    """What is said when the records are opened at step 3."""
    capsys.readouterr()
    report.RunLog(folder, step=3, saved=saved, **more)
    return capsys.readouterr().out.splitlines()


def contents(folder):
    names = ("metrics.jsonl", "inference_eval/cb-metrics.jsonl", "inference_eval/cb-analysis.jsonl")
    return {name: (folder / name).read_bytes() for name in names}


def test_records_that_are_whole_are_left_alone(written, capsys):
    folder, saved, before = written
    assert damage(capsys, folder, saved) == []
    assert contents(folder) == before
    assert report.RunLog(folder, step=3, saved=saved).pack() == saved
    assert not list(folder.rglob("*.damaged"))


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda text: text.replace(b"1.5", b"1.4"), "line 1 of .*metrics.jsonl is not what was"),
        (lambda text: text[text.index(b"\n") + 1 :], "line 1 of .*metrics.jsonl is not what was"),
        (lambda text: text[: len(text) // 2], r"metrics.jsonl has \d+ bytes, and had \d+"),
        (lambda text: b"", "metrics.jsonl has 0 bytes"),
        (lambda text: b"\xff\0" * 99, "line 1 of .*metrics.jsonl is not"),
    ],
)
def test_records_that_were_damaged_are_made_anew(written, harm, said, capsys):
    folder, saved, before = written
    path = folder / "metrics.jsonl"
    path.write_bytes(harm(before["metrics.jsonl"]))
    (line,) = damage(capsys, folder, saved)
    assert re.search(said, line)
    assert "made anew from the saved state of step 3; what was there is metrics.jsonl.dam" in line
    assert contents(folder) == before
    assert (folder / "metrics.jsonl.damaged").read_bytes() == harm(before["metrics.jsonl"])


def test_records_that_are_gone_come_back(written, capsys):
    folder, saved, before = written
    for name in before:
        (folder / name).unlink()
    said = [line.split(":")[0].rsplit("/", 1)[1] for line in damage(capsys, folder, saved)]
    assert sorted(said) == [
        "cb-analysis.jsonl is missing",
        "cb-metrics.jsonl is missing",
        "metrics.jsonl is missing",
    ]
    assert contents(folder) == before


def test_what_came_after_the_state_is_dropped_and_a_torn_tail_is_said(written, capsys):
    folder, saved, before = written
    path = folder / "metrics.jsonl"
    later = json.dumps({"step": 4, "task": "cb", "name": "loss", "value": 1}) + "\n"
    path.write_bytes(before["metrics.jsonl"] + later.encode())
    assert damage(capsys, folder, saved) == []
    assert contents(folder) == before
    path.write_bytes(before["metrics.jsonl"] + later.encode() + b'{"step": 4, "ta')
    (line,) = damage(capsys, folder, saved)
    assert "ended in 15 bytes that cannot be read" in line
    assert contents(folder) == before


def test_an_evaluation_that_was_broken_off_is_not_kept(written):
    folder, _, before = written
    log = report.RunLog(folder, step=3)
    texts = records.unpack(log.pack(due=3))
    assert "accuracy" not in texts["metrics.jsonl"]
    assert "loss" in texts["metrics.jsonl"]
    assert texts["inference_eval/cb-metrics.jsonl"] == ""
    report.RunLog(folder, step=3, evaluation_due=True, saved=log.pack(due=3))
    assert b"accuracy" not in contents(folder)["metrics.jsonl"]
    assert len(contents(folder)["metrics.jsonl"]) < len(before["metrics.jsonl"])


def test_a_state_can_name_no_other_file():
    names = ("../x", "/etc/x", "prompts/best", "inference_eval/../../a-metrics.jsonl", "metrics")
    assert records.unpack(records.pack(dict.fromkeys(names, "x"))) == {}
