"""Submission files: written from prompts by the command, and what the checker lets pass."""

import json
import re
import zipfile

import numpy as np
import pytest
import superglue_rows
from tiny_models import CONFIG, as_prompt, random_params

from prompt_tuning import cli
from prompt_tuning.checkpoints.t5x import write_t5x
from prompt_tuning.config import ConfigError, to_dict
from prompt_tuning.evaluation import submission_format as form
from prompt_tuning.evaluation import submit as submit_command
from prompt_tuning.evaluation.prompts import NamedPrompt
from prompt_tuning.prompts.prompt_file import PromptMetadata, save_prompt
from prompt_tuning.tasks import registry

slow = pytest.mark.slow
TASKS = ("boolq", "cb", "copa", "multirc", "record", "rte", "wic")
NAMES = {task: f"taskless_super_glue_{task}_v102" for task in TASKS}
NAMES["wsc"] = "taskless_super_glue_wsc_v102_simple_train"
FOLDERS = ("BoolQ", "CB", "COPA", "MultiRC", "ReCoRD", "RTE", "WiC", "WSC")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """The rows of the tests as official files, a random backbone, and a prompt for each task."""
    folder = tmp_path_factory.mktemp("submit")
    superglue_rows.write_all(folder / "jsonl")
    for name in FOLDERS:
        rows = superglue_rows.unlabelled(superglue_rows.labelled(name))
        superglue_rows.write_rows(folder / "jsonl" / name / "test.jsonl", rows)
    flags = [f"--jsonl_dir={folder / 'jsonl'}", f"--tfds_data_dir={folder / 'tfds'}"]
    assert cli.main(["prepare-superglue", *flags]) == 0
    write_t5x(folder / "checkpoint_3", random_params(), 3)
    for seed, (task, name) in enumerate(NAMES.items()):
        array = np.random.default_rng(seed).normal(size=(2, CONFIG.embed_dim)).astype(np.float32)
        save_prompt(folder / "prompts" / task, as_prompt(array), PromptMetadata(task=name))
    macros = {
        **{name.upper(): value for name, value in to_dict(CONFIG).items()},
        "VOCABULARY": "bytes",
        "CHECKPOINT_PATH": str(folder / "checkpoint_3"),
        "PROMPT_FILE": str(folder / "prompts"),
        "BATCH_SIZE": 8,
        "TASK_FEATURE_LENGTHS": {"inputs": 8, "targets": 6},
    }
    (folder / "small.gin").write_text("".join(f"{k} = {v!r}\n" for k, v in macros.items()))
    return folder


def submit(work, *flags, **macros):
    return cli.main(
        [
            "submit-superglue",
            "--gin_file=runs/eval.gin",
            f"--gin_file={work / 'small.gin'}",
            *(f"--gin.{name}={value!r}" for name, value in macros.items()),
            f"--tfds_data_dir={work / 'tfds'}",
            *flags,
        ]
    )


@pytest.fixture(scope="module")
def submission(work):
    assert submit(work, f"--submission_dir={work / 'out'}", "--zip") == 0
    return work / "out"


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@slow
def test_every_task_has_its_file_in_its_own_form(submission):
    found = {path.name: lines(path) for path in submission.glob("*.jsonl")}
    assert set(found) == {f"{file.name}.jsonl" for file in form.FILES.values()}
    assert [row["idx"] for row in found["BoolQ.jsonl"]] == [0, 1, 2]
    labels = {
        name: {type(row["label"]) for row in rows}
        for name, rows in found.items()
        if name != "MultiRC.jsonl"
    }
    assert labels.pop("COPA.jsonl") == {int}
    assert set.union(*labels.values()) == {str}
    assert {row["label"] for row in found["BoolQ.jsonl"]} <= {"true", "false"}
    assert {row["label"] for row in found["WSC.jsonl"]} <= {"True", "False"}
    assert [row["idx"] for row in found["ReCoRD.jsonl"]] == [9, 10]
    assert {row["label"] for row in found["ReCoRD.jsonl"]} <= {"Bo", "Łucja"}
    (passage,) = found["MultiRC.jsonl"]
    assert passage["idx"] == 3
    shape = {q["idx"]: [a["idx"] for a in q["answers"]] for q in passage["passage"]["questions"]}
    assert shape == {7: [20, 21], 8: [22]}


@slow
def test_what_is_written_passes_the_check_and_is_in_the_zip(work, submission, capsys):
    capsys.readouterr()
    archive = submission / "submission.zip"
    for place in (submission, archive):
        flags = [f"--check={place}", f"--jsonl_dir={work / 'jsonl'}"]
        assert cli.main(["submit-superglue", *flags]) == 0
        assert capsys.readouterr().out.count(": in order") == 10
    assert len(zipfile.ZipFile(archive).namelist()) == 10
    # Without the test files the official numbers of rows are asked for.
    assert cli.main(["submit-superglue", f"--check={submission}"]) == 2
    assert "CB.jsonl: 5 answers" in capsys.readouterr().err


@slow
def test_two_prompts_for_one_task_are_refused(work, submission, capsys):
    save = np.ones((2, CONFIG.embed_dim), np.float32)
    save_prompt(work / "second", as_prompt(save), PromptMetadata(task="super_glue_cb_v102"))
    save_prompt(work / "third", as_prompt(save), PromptMetadata(task="super_glue_cb_v102"))
    files = [str(work / "second"), str(work / "third")]
    assert submit(work, f"--submission_dir={work / 'twice'}", PROMPT_FILE=files) == 2
    assert "super_glue_cb_v102" in capsys.readouterr().err


@slow
@pytest.mark.parametrize("name", ["v102_proportional", "v102_proportional_examples"])
def test_one_prompt_of_a_mixture_answers_all_tasks(name):
    """The mixture has the diagnostics itself, and WSC's training half, which has no test rows."""
    registry.register("bytes")
    prompt = as_prompt(np.ones((2, CONFIG.embed_dim), np.float32))
    named = NamedPrompt("one", prompt, 0, f"taskless_super_glue_{name}")
    found = submit_command.assign_tasks([named])
    assert sorted(map(form.find_task, found)) == sorted(form.FILES)
    assert not [name for name in found if "train" in name]


@slow
def test_flags_that_are_missing_are_named(capsys):
    assert cli.main(["submit-superglue", "--gin_file=runs/eval.gin"]) == 2
    assert "--submission_dir=FOLDER" in capsys.readouterr().err


# The checker by itself.


@pytest.mark.parametrize(
    ("task", "text", "problem"),
    [
        ("cb", '{"idx": 0, "label": "maybe"}', "line 1: label 'maybe', expected 'entailment'"),
        ("boolq", '{"idx": 0, "label": true}', "label True, expected 'false', 'true'"),
        ("copa", '{"idx": 0, "label": true}', "label True, expected 0, 1"),
        ("record", '{"idx": 0, "label": " "}', "label ' ', expected a text"),
        ("wsc", '{"idx": 0, "label": "true"}', "label 'true', expected 'False', 'True'"),
        ("cb", '{"idx": "0", "label": "neutral"}', "'idx' must be a whole number, found '0'"),
        ("axb", '{"idx": "00", "label": "entailment"}', "'idx' must be a whole number"),
        ("cb", '{"idx": 0}', r"the fields are \['idx'\]"),
        ("cb", '{"idx": 0, "label": "neutral", "p": 1}', "expected idx and label"),
        ("cb", '{"idx": 0, "label": "neutral", "idx": 1}', r"the fields \['idx'\] are repeated"),
        ("cb", "[0]", "line 1: not a line of this file"),
        ("cb", "0", "line 1: not a line of this file"),
        ("cb", '{"idx": 0, "label"', "line 1: not a line of this file"),
        ("cb", "[" * 100_000, "line 1: not a line of this file"),
        ("cb", '{"idx": 0, "label": ' + "[" * 500 + "]" * 500 + "}", "line 1: label"),
        ("multirc", '{"idx": 0, "label": 1}', "line 1: not a line of this file"),
        ("multirc", '{"idx": 0, "passage": {"questions": 3}}', "'passage.questions' must be a"),
        (
            "multirc",
            '{"idx": 0, "passage": {"text": "x", "questions": []}}',
            r"of 'passage' are \['questions', 'text'\], expected questions",
        ),
        ("cb", b'{"idx": 0, "label": "neutral"}\n{"idx": 1, "label": "\xe9"}', "line 2: not UTF-8"),
    ],
)
def test_lines_that_are_wrong_are_named(task, text, problem):
    problems = form.check_file(task, text if isinstance(text, bytes) else text.encode())
    assert re.search(problem, problems[0]), problems


def as_file(*rows: tuple) -> bytes:
    return "".join(f"{json.dumps({'idx': i, 'label': word})}\n" for i, word in rows).encode()


def test_every_idx_is_answered_once_and_in_order():
    data = as_file((0, "neutral"), (2, "neutral"), (2, "entailment"), (7, "neutral"))
    assert form.check_file("cb", data, {(0,): (), (1,): (), (2,): ()}) == [
        "line 3: idx 2 repeats line 2",
        "1 idx not answered: 1",
        "1 idx not of the test set: 7",
    ]
    data = as_file((0, "neutral"), (2, "neutral"), (1, "entailment"))
    assert form.check_file("cb", data, {(0,): (), (1,): (), (2,): ()}) == [
        "line 3: idx 1 comes after 2. Sort the lines by idx"
    ]


def test_the_idx_of_ax_b_may_be_a_text_as_in_the_release():
    keys = {(i,): () for i in range(3)}
    numbers, texts = (as_file(*((kind(i), "entailment") for i in range(3))) for kind in (int, str))
    assert form.check_file("axb", numbers, keys) == form.check_file("axb", texts, keys) == []


def test_an_answer_of_record_is_an_entity_of_its_row(tmp_path):
    superglue_rows.write_rows(tmp_path / "ReCoRD" / "test.jsonl", superglue_rows.OTHERS["ReCoRD"])
    keys = form._read_test_keys(tmp_path)["record"]
    assert keys == {(9,): ("Łucja", "Bo"), (10,): ("Łucja", "Bo")}
    assert form.check_file("record", as_file((9, "Bo"), (10, "bo")), keys) == [
        "line 2: label 'bo', expected an entity of its row: 'Łucja', 'Bo'"
    ]


def test_lines_of_multirc_are_nested_and_sorted():
    answers = {(1, 5, 9): 0, (0, 4, 8): 1, (0, 4, 7): 0}
    text = form.to_lines("multirc", answers)
    assert [json.loads(line)["idx"] for line in text] == [0, 1]
    keys = dict.fromkeys(answers, ())
    assert form.check_file("multirc", "\n".join(text).encode(), keys) == []
    assert form.check_file("multirc", "\n".join(text[::-1]).encode(), keys) == [
        "line 2: idx 0/4/7 comes after 1/5/9. Sort the lines by idx",
        "line 2: idx 0/4/8 comes after 1/5/9. Sort the lines by idx",
    ]


def test_only_a_line_feed_ends_a_line(tmp_path):
    """Others, such as U+2028, stand in JSON as they are."""
    (row,) = superglue_rows.unlabelled(superglue_rows.OTHERS["ReCoRD"])
    row["passage"] = {"text": "a\u2028b\x85", "entities": [{"start": 0, "end": 3}]}
    (tmp_path / "ReCoRD").mkdir()
    text = json.dumps(row, ensure_ascii=False)
    (tmp_path / "ReCoRD" / "test.jsonl").write_text(text, encoding="utf-8")
    keys = form._read_test_keys(tmp_path)["record"]
    lines = form.to_lines("record", dict.fromkeys(keys, "a\u2028b\x85"))
    assert form.check_file("record", ("\n".join(lines) + "\n").encode(), keys) == []
    assert form.check_file("record", b"", keys) == ["2 idx not answered: 9, 10"]


def test_a_place_that_is_no_submission(tmp_path):
    (tmp_path / "x.zip").write_text("no zip")
    with pytest.raises(ConfigError):
        form.check(tmp_path / "x.zip")
    with pytest.raises(ConfigError, match=r"(?s)BoolQ\.jsonl.*WSC\.jsonl.*AX-g\.jsonl: missing"):
        form.check(tmp_path)


def test_a_zip_names_what_is_not_to_be_submitted(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("__MACOSX/._CB.jsonl", b"\x00\x05\xff")
        archive.writestr("CB.jsonl", b"\xff")
        archive.writestr("RTE.jsonl", b"")
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("RTE.jsonl", b"")
    with pytest.raises(ConfigError) as raised:
        form.check(tmp_path / "x.zip")
    problems = str(raised.value).splitlines()
    assert "  __MACOSX/._CB.jsonl: no file of a submission" in problems
    assert (
        "  CB.jsonl: line 1: not UTF-8 (invalid start byte). Write the file in UTF-8." in problems
    )
    assert "  RTE.jsonl: 2 files of this name" in problems


def test_the_release_may_be_archives(tmp_path):
    """One for each task, or the one of all tasks; a task's folder is preferred."""
    rows = superglue_rows.unlabelled(superglue_rows.labelled("CB"))
    text = "\n".join(map(json.dumps, rows))
    with zipfile.ZipFile(tmp_path / "combined.zip", "w") as archive:
        archive.writestr("CB/test.jsonl", text)
        archive.writestr("RTE/test.jsonl", text)
        archive.writestr("__MACOSX/CB/._test.jsonl", "no JSON")
    assert sorted(form._read_test_keys(tmp_path)) == ["cb", "rte"]
    with zipfile.ZipFile(tmp_path / "CB.zip", "w") as archive:
        archive.writestr("CB/test.jsonl", text.splitlines()[0])
    assert len(form._read_test_keys(tmp_path)["cb"]) == 1
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "CB.jsonl").write_bytes(as_file((0, "neutral")))
    (tmp_path / "files" / "WiC.jsonl").write_bytes(b"")
    with pytest.raises(ConfigError) as raised:
        form.check(tmp_path / "files", tmp_path)
    assert "CB.jsonl" not in str(raised.value)
    assert "WiC.jsonl: neither its test file nor WiC.zip is in --jsonl_dir" in str(raised.value)


def test_the_official_numbers_of_rows():
    """Lester et al., table 7, and the diagnostics of Wang et al. (2019)."""
    assert sum(file.rows for file in form.FILES.values() if file.required) == 28_234
    assert (form.FILES["axb"].rows, form.FILES["axg"].rows) == (1_104, 356)


def test_names_of_tasks_and_files():
    assert form.find_task("taskless_super_glue_wsc_v102_simple_eval") == "wsc"
    assert form.find_task("super_glue_axb_v102") == "axb"
    assert form.find_task("tiny_mood") == form.find_task("glue_rte_v002") == ""
