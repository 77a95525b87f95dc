"""SuperGLUE's JSONL as a TFDS directory: all of it, or one message and nothing."""

import functools
import json
import zipfile
from pathlib import Path

import pytest
import superglue_rows
import tensorflow_datasets as tfds

from prompt_tuning.config import ConfigError
from prompt_tuning.tasks import prepare, release
from prompt_tuning.tasks.release import RELEASE


@pytest.fixture
def jsonl_dir(tmp_path) -> Path:
    return superglue_rows.write_jsonl(tmp_path / "jsonl")


def test_tfds_reads_back_what_was_written(jsonl_dir, tmp_path, capsys):
    prepared = prepare.prepare_superglue(jsonl_dir, tmp_path / "tfds")
    assert [task.task for task in prepared] == ["boolq", "cb", "rte"]
    assert prepared[1].rows == {"train": 5, "validation": 2, "test": 3}
    said = capsys.readouterr().out.splitlines()
    assert said == [str(task) for task in prepared]
    assert said[0].startswith("boolq: train 3, validation 2 (no test.jsonl: skipped) -> ")
    # Nothing but the data itself: no download, no leftovers of the way there.
    assert [path.name for path in (tmp_path / "tfds").iterdir()] == ["super_glue"]

    for task in prepared:
        folder = {"boolq": "BoolQ", "cb": "CB", "rte": "RTE"}[task.task]
        data, info = tfds.load(
            f"super_glue/{task.task}:1.0.2",
            data_dir=str(tmp_path / "tfds"),
            split="train",
            download=False,
            with_info=True,
        )
        rows = {int(row["idx"]): row for row in data.as_numpy_iterator()}
        for row in superglue_rows.labelled(folder):
            read = rows[row["idx"]]
            assert info.features["label"].int2str(int(read["label"])) == str(row["label"])
            texts = {k: v for k, v in row.items() if isinstance(v, str) and k != "label"}
            assert {k: read[k].decode() for k in texts} == texts
    test = tfds.load("super_glue/cb", data_dir=str(tmp_path / "tfds"), split="test", download=False)
    assert [int(row["label"]) for row in test.as_numpy_iterator()] == [-1] * 3


def test_a_second_time_keeps_what_is_there_and_adds_the_rest(jsonl_dir, tmp_path):
    (jsonl_dir / "CB").rename(tmp_path / "CB")
    prepare.prepare_superglue(jsonl_dir, tmp_path / "tfds")
    before = snapshot(tmp_path / "tfds")
    (tmp_path / "CB").rename(jsonl_dir / "CB")
    kept = {t.task: t.existed for t in prepare.prepare_superglue(jsonl_dir, tmp_path / "tfds")}
    assert kept == {"boolq": True, "cb": False, "rte": True}
    after = snapshot(tmp_path / "tfds")
    assert {path: after[path] for path in before} == before


def snapshot(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


ROW = superglue_rows.labelled("CB")[0]
BAD = {
    "a feature is missing": ({**ROW, "premise": None}, "'premise'.*None"),
    "a feature is a number": ({**ROW, "hypothesis": 3}, "'hypothesis'.*3"),
    "no idx": ({k: v for k, v in ROW.items() if k != "idx"}, "'idx'"),
    "idx is text": ({**ROW, "idx": "9"}, "'idx'.*'9'"),
    "idx twice": (ROW, "'idx' 0 .*line 1"),
    "label is no label": ({**ROW, "idx": 9, "label": "yes"}, "'label'.*'yes'"),
    "label is another task's": ({**ROW, "idx": 9, "label": True}, "'label'.*True"),
    "label -1": ({**ROW, "idx": 9, "label": -1}, "'label'.*-1"),
    "no label": ({**superglue_rows.ROWS["CB"][0], "idx": 9}, "'label'.*None"),
    "a list": ([1, 2], r"\[1, 2\]"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_is_named_and_nothing_is_written(case, jsonl_dir, tmp_path):
    row, message = BAD[case]
    superglue_rows.write_rows(jsonl_dir / "CB" / "val.jsonl", [ROW, row])
    with pytest.raises(ConfigError, match=f"CB/val.jsonl, line 2: .*{message}"):
        prepare.prepare_superglue(jsonl_dir, tmp_path / "tfds")
    assert not (tmp_path / "tfds").exists()


# The last three are what a reader of bytes may take for JSON, and TFDS' builder does not.
NOT_JSON = [b"{", b"", b'"\xff"', b"premise,hypothesis"]
NOT_JSON += [b"\xef\xbb\xbf{}", "{}".encode("utf-16"), b"[" * 100_000]


@pytest.mark.parametrize("line", NOT_JSON, ids=range(len(NOT_JSON)))
def test_a_line_that_is_not_json(line, jsonl_dir, tmp_path):
    path = jsonl_dir / "RTE" / "train.jsonl"
    path.write_bytes(path.read_bytes() + line + b"\n")
    with pytest.raises(ConfigError, match=r"RTE/train\.jsonl, line 3"):
        prepare.prepare_superglue(jsonl_dir, tmp_path / "tfds")


def test_an_empty_file(jsonl_dir, tmp_path):
    (jsonl_dir / "RTE" / "train.jsonl").write_text("")
    with pytest.raises(ConfigError, match=r"RTE/train\.jsonl"):
        prepare.prepare_superglue(jsonl_dir, tmp_path / "tfds")


def test_a_folder_too_deep(jsonl_dir, tmp_path):
    with pytest.raises(ConfigError, match=r"BoolQ, CB.*BoolQ\.zip"):
        prepare.prepare_superglue(jsonl_dir / "CB", tmp_path / "tfds")


def test_a_target_that_is_a_file_or_remote(jsonl_dir, tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(ConfigError, match="taken"):
        prepare.prepare_superglue(jsonl_dir, tmp_path / "taken")
    with pytest.raises(ConfigError, match="gs://bucket/tfds"):
        prepare.prepare_superglue(jsonl_dir, "gs://bucket/tfds")


def test_labels_of_test_rows_may_be_there_or_not(jsonl_dir, tmp_path):
    rows = [superglue_rows.ROWS["RTE"][0], superglue_rows.labelled("RTE")[1]]
    superglue_rows.write_rows(jsonl_dir / "RTE" / "test.jsonl", rows)
    prepare.prepare_superglue(jsonl_dir, tmp_path / "tfds")
    test = tfds.load(
        "super_glue/rte", data_dir=str(tmp_path / "tfds"), split="test", download=False
    )
    labels = {int(row["idx"]): int(row["label"]) for row in test.as_numpy_iterator()}
    assert labels == {0: -1, 1: 1}


def test_the_order_is_that_of_tfds(shared_dir, tmp_path):
    """Rows come in the order that the official download would have."""
    prepare.prepare_superglue(shared_dir / "data" / "fewglue", tmp_path)
    raw = (shared_dir / "goldens" / "t5_text" / "cb.train.raw.jsonl").read_text().splitlines()
    data = tfds.load("super_glue/cb", data_dir=str(tmp_path), split="train", download=False)
    read = [int(row["idx"]) for row in data.as_numpy_iterator()]
    assert read == [json.loads(line)["idx"] for line in raw]


# All of the release.


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    superglue_rows.write_all(folder / "jsonl")
    prepare.prepare_superglue(folder / "jsonl", folder / "tfds")
    return folder


def test_every_configuration_is_prepared(whole):
    there = {path.name for path in (whole / "tfds" / "super_glue").iterdir()}
    assert there == set(RELEASE)
    data = tfds.load(
        "super_glue/multirc", data_dir=str(whole / "tfds"), split="train", download=False
    )
    first = next(data.as_numpy_iterator())
    assert {k: int(v) for k, v in first["idx"].items()}["paragraph"] == 3


def zipped(source: Path, archive: Path, inside: str) -> None:
    archive.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr(f"__MACOSX/{inside}/._train.jsonl", "not JSON")
        for path in source.iterdir():
            file.write(path, f"{inside}/{path.name}")


def test_archives_are_as_good_as_folders(whole, tmp_path, capsys):
    source = tmp_path / "zips"
    zipped(whole / "jsonl" / "CB", source / "CB.zip", "CB")
    zipped(whole / "jsonl" / "WSC", source / "wsc.zip", "WSC")
    zipped(whole / "jsonl" / "AX-b", source / "AX-b.zip", "AX-b")
    prepared = prepare.prepare_superglue(source, tmp_path / "tfds")
    assert [task.task for task in prepared] == ["cb", "wsc", "wsc.fixed", "axb"]
    assert "axb: test 2 -> " in capsys.readouterr().out
    for task in prepared:
        for ours in sorted(task.directory.glob("*.tfrecord*")):
            theirs = whole / "tfds" / ours.relative_to(tmp_path / "tfds")
            assert ours.read_bytes() == theirs.read_bytes()
    assert [path.name for path in (tmp_path / "tfds").iterdir()] == ["super_glue"]


def test_archives_that_are_none_or_bad(whole, tmp_path):
    (tmp_path / "CB.zip").write_text("no archive")
    with pytest.raises(ConfigError, match=r"CB\.zip"):
        prepare.prepare_superglue(tmp_path, tmp_path / "tfds")
    bad = tmp_path / "bad" / "CB"
    superglue_rows.write_rows(bad / "val.jsonl", [ROW, {**ROW, "idx": 7, "premise": 1}])
    zipped(bad, tmp_path / "CB.zip", "CB")
    with pytest.raises(ConfigError, match=r"CB\.zip/val\.jsonl, line 2: .*'premise'"):
        prepare.prepare_superglue(tmp_path, tmp_path / "tfds")
    assert not (tmp_path / "tfds").exists()


def test_few_shot_folders_have_another_validation_file(tmp_path, capsys):
    rows = superglue_rows.labelled("CB")
    superglue_rows.write_rows(tmp_path / "cb" / "train.jsonl", rows)  # in lower case, too
    superglue_rows.write_rows(tmp_path / "cb" / "dev32.jsonl", rows[:3])
    (task,) = prepare.prepare_superglue(tmp_path, tmp_path / "tfds")
    assert task.rows == {"train": 5, "validation": 3}
    said = "cb: train 5, validation 3 (no test.jsonl: skipped; validation is dev32.jsonl) -> "
    assert capsys.readouterr().out.startswith(said)
    superglue_rows.write_rows(tmp_path / "cb" / "val.jsonl", rows[:2])
    (task,) = prepare.prepare_superglue(tmp_path, tmp_path / "again")
    assert task.rows == {"train": 5, "validation": 2}


def changed(row: dict, path: str, value) -> dict:
    """A copy of a row with another value at a path such as `qas.0.query`; `del` takes it away."""
    row = json.loads(json.dumps(row))
    *way, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    place = functools.reduce(lambda inner, key: inner[key], way, row)
    if value is del_:
        del place[last]
    else:
        place[last] = value
    return row


del_ = object()
NESTED = {
    "MultiRC": [
        ("passage", "x", "'passage'"),
        ("passage.text", del_, r"'passage.text'.*None"),
        ("passage.questions", {}, r"'passage.questions'"),
        ("passage.questions.1.question", 3, r"'passage.questions\[1\].question'"),
        ("passage.questions.0.answers.1.text", del_, r"'passage.questions\[0\].answers\[1\].text'"),
        ("passage.questions.0.answers.1.label", 2, r"answers\[1\].label'.*0, 1"),
        ("passage.questions.0.answers.1.idx", 20, r"'idx' \(3, 7, 20\)"),
        ("idx", "3", "'idx'"),
    ],
    "ReCoRD": [
        ("passage.entities.0.end", "x", r"'passage.entities\[0\].end'"),
        ("passage.entities.1.start", 2, r"'passage.entities\[1\].start'"),
        ("passage.entities.2.end", 999, r"25 and 999.*83"),
        ("qas", del_, "'qas'.*None"),
        ("qas.1.query", None, r"'qas\[1\].query'"),
        ("qas.1.answers", del_, r"'qas\[1\].answers'"),
        ("qas.0.answers.1.text", 5, r"'qas\[0\].answers\[1\].text'"),
        ("qas.1.idx", 9, "'idx' 9 "),
        ("passage.text", "\ud83d", r"'passage.text'"),
    ],
    "WSC": [
        ("target", del_, "'target'.*None"),
        ("target.span2_index", 99, "'target.span2_index'.*99"),
        ("target.span1_text", "Ann", "'target.span1_text' must be in the text, found 'Ann'"),
        ("target.span1_text", "thanked bob", "'target.span1_text' must be in the text"),
        ("target.span2_text", "lp", r"the pronoun 'lp' \(span2_text\) is not a word of"),
        ("label", 1, "'label' must be one of False, True, found 1"),
    ],
    "COPA": [("label", "choice1", "'label' must be one of 0, 1, False, True, found 'choice1'")],
    "WiC": [("end2", 2.5, "'end2' must be a whole number, found 2.5")],
    "AX-b": [("label", "neutral", "'label' must be one of entailment, not_entailment")],
}


@pytest.mark.parametrize(
    ("folder", "path", "value", "message"),
    [(folder, *case) for folder, cases in NESTED.items() for case in cases],
)
def test_a_bad_row_of_any_task_is_named(folder, path, value, message, tmp_path):
    row = changed(superglue_rows.labelled(folder)[0], path, value)
    name = f"{folder}.jsonl" if folder.startswith("AX-") else "train.jsonl"
    superglue_rows.write_rows(tmp_path / folder / name, [row])
    with pytest.raises(ConfigError, match=rf"{folder}/{name}, line 1: .*{message}"):
        prepare.prepare_superglue(tmp_path, tmp_path / "tfds")
    assert not (tmp_path / "tfds").exists()


def test_the_reference_data_is_in_order(shared_dir):
    """The checks refuse none of the official rows."""
    seen = 0
    for folder in ("fewglue", "superglue"):
        with release.open_release(shared_dir / "data" / folder) as tasks:
            for task, files in tasks.items():
                for split, file in files.items():
                    seen += len(release.read_keys(file, task, split))
    assert seen > 8000
