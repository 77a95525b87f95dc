"""Prompts by tasks: which prompts are meant, what the table says, and what is written of it."""

import csv
import json

import numpy as np
import pytest
from tiny_models import as_prompt

from prompt_tuning.config import ConfigError
from prompt_tuning.evaluation import pictures, prompts
from prompt_tuning.evaluation.analysis import Agreement, Analysis, IllegalOutputs
from prompt_tuning.evaluation.matrix import NO_PROMPT
from prompt_tuning.evaluation.results import OWN, SUPERGLUE, Cell, Matrix, mean_name
from prompt_tuning.model.prompt import Prompt
from prompt_tuning.prompts import prompt_file

CB, RTE = "super_glue_cb_v102", "taskless_super_glue_rte_v102"


def cell(**metrics):
    counts = Analysis(
        rows=4,
        illegal=IllegalOutputs(1, (("?", 1),)),
        words=("no", "yes"),
        confusion={"generate": [[1, 0, 1], [0, 2, 0]]},
        agreement=Agreement(3, 2, 1, 0, 1),
    )
    return Cell(4, counts, {name: (value - 5, value + 5) for name, value in metrics.items()})


def make(rows, **settings):
    return Matrix(
        rows,
        cells={p: {t: cell(**m) for t, m in row.items()} for p, row in rows.items()},
        methods=("generate",),
        **settings,
    )


TWO = {
    "a": {CB: {"f1/generate": 40.0, "accuracy/generate": 60.0}, RTE: {"accuracy/generate": 80.0}},
    "b": {CB: {"f1/generate": 10.0, "accuracy/generate": 20.0}, RTE: {"accuracy/generate": 30.0}},
}


def test_a_task_counts_with_the_metric_that_task_metric_names():
    matrix = make(TWO, metric="f1")
    assert matrix.means("generate") == {"a": {CB: 40.0}, "b": {CB: 10.0}}
    end = [line.split() for line in str(matrix).splitlines()[-3:]]
    assert end[0][:3] == ["f1", "/", "generate"]
    assert end[1:] == [["a", "40.0", "-", "-"], ["b", "10.0", "-", "-"]]


def test_a_task_counts_with_the_mean_of_its_metrics():
    matrix = make(TWO, majority={CB: {"f1/generate": 20.0, "accuracy/generate": 50.0}})
    assert matrix.means("generate")["a"] == {CB: 50.0, RTE: 80.0}
    lines = str(matrix).splitlines()
    assert lines[0].split() == [CB, "f1/generate", "accuracy/generate"]
    assert lines[1].split() == ["majority", "class", "20.0", "50.0"]
    assert lines[2].split() == ["a", "40.0", "(35.0,", "45.0)", "60.0", "(55.0,", "65.0)"]
    assert lines[4] == "  a: illegal outputs: 1 of 4 (25.0 %): '?' 1"
    end = [line.split() for line in lines[-4:]]
    # The lengths of its columns set apart, this is the table of means.
    assert end[0][-5:] == ["cb", RTE.split("_")[3], "mean", "of", "2"]
    assert end[1] == ["majority", "class", "35.0", "-", "-"]
    assert end[2:] == [["a", "50.0", "80.0", "65.0"], ["b", "15.0", "30.0", "22.5"]]


def test_superglue_is_the_mean_of_all_eight_and_of_nothing_else():
    names = [f"super_glue_{t}_v102" for t in SUPERGLUE if t != "wsc"]
    names.append("super_glue_wsc_v102_simple_eval")
    assert mean_name(names) == "SuperGLUE"
    assert mean_name(names[:-1]) == "mean of 7"
    assert mean_name([*names, "super_glue_axb_v102"]) == "mean of 9"


def test_prompts_on_their_own_tasks_make_up_a_line_together():
    matrix = make({"a": {CB: TWO["a"][CB]}, "b": {RTE: TWO["b"][RTE]}})
    assert matrix.means("generate")[OWN] == {CB: 50.0, RTE: 30.0}
    assert str(matrix).splitlines()[-1].split()[-3:] == ["50.0", "30.0", "40.0"]
    assert OWN not in make(TWO).means("generate")
    with_bare = make({NO_PROMPT: TWO["b"], "a": {CB: TWO["a"][CB]}, "b": {RTE: TWO["b"][RTE]}})
    assert with_bare.means("generate")[OWN] == {CB: 50.0, RTE: 30.0}


def test_files_hold_every_number(tmp_path):
    matrix = make(TWO, majority={RTE: {"accuracy/generate": 55.0}})
    matrix.write(tmp_path)
    with (tmp_path / "matrix.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 6
    assert lines[2] == {
        "prompt": "a",
        "task": RTE,
        "metric": "accuracy",
        "method": "generate",
        "value": "80.0",
        "low": "75.0",
        "high": "85.0",
        "majority": "55.0",
        "rows": "4",
        "illegal": "1",
    }
    content = json.loads((tmp_path / "matrix.json").read_text())
    assert content["prompts"]["b"][CB]["metrics"] == TWO["b"][CB]
    assert content["prompts"]["b"][CB]["analysis"]["agreement"]["same"] == 3
    assert content["means"]["generate"]["a"] == {CB: 50.0, RTE: 80.0, "mean of 2": 65.0}


def test_pictures_are_drawn_where_there_is_something_to_see(tmp_path):
    assert pictures.draw_matrix(make(TWO), tmp_path).stat().st_size > 5_000
    assert pictures.draw_matrix(make({"a": {CB: TWO["a"][CB]}}), tmp_path) is None
    assert pictures.draw_confusion(cell().analysis, "cb", tmp_path).stat().st_size > 5_000
    assert pictures.draw_confusion(Analysis(4, None), "cb", tmp_path) is None


# Which prompts.


@pytest.fixture
def folder(tmp_path):
    for run in ("x", "y"):
        metadata = prompt_file.PromptMetadata(task=CB, step=3)
        array = np.ones((2, 4), np.float32)
        prompt_file.save_prompt(tmp_path / run / "prompts" / "best", as_prompt(array), metadata)
    np.save(tmp_path / "bare.npy", np.ones((2, 4), np.float32))
    (tmp_path / "x" / "prompts" / "notes.txt").write_text("not a prompt")
    return tmp_path


def test_patterns_and_folders_stand_for_the_prompts_in_them(folder):
    best = [str(folder / run / "prompts" / "best") for run in ("x", "y")]
    assert prompts.find_prompts(f"{folder}/*/prompts/best") == tuple(best)
    assert prompts.find_prompts(f"{folder}/**/prompts/*") == tuple(best)
    assert prompts.find_prompts((str(folder / "x" / "prompts"), best[1])) == tuple(best)
    assert prompts.find_prompts(best[0]) == (best[0],)
    assert prompts.find_prompts("") == ()
    with pytest.raises(ConfigError, match="pattern"):
        prompts.find_prompts(f"{folder}/z*/best")
    with pytest.raises(ConfigError, match="best"):
        prompts.find_prompts((best[0], f"{folder}/x/prompts/*"))


def test_a_prompt_without_a_task_has_no_own_one(folder):
    bare = prompts.NamedPrompt("bare.npy", Prompt(np.ones((2, 4), np.float32)), 0)
    with pytest.raises(ConfigError, match=r"bare\.npy"):
        prompts.tuned_tasks(bare)
