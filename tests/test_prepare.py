"""SuperGLUE's JSONL as a TFDS directory: all of it, or one message and nothing."""

import json
from pathlib import Path

import pytest
import superglue_rows
import tensorflow_datasets as tfds

from prompt_tuning.config import ConfigError
from prompt_tuning.data import prepare


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
    kept = {t.task: t.kept for t in prepare.prepare_superglue(jsonl_dir, tmp_path / "tfds")}
    assert kept == {"boolq": True, "cb": False, "rte": True}
    after = snapshot(tmp_path / "tfds")
    assert {path: after[path] for path in before} == before


def snapshot(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


ROW = superglue_rows.labelled("CB")[0]
BAD = {
    "a feature is missing": ({**ROW, "premise": None}, "'premise' must be text, found None"),
    "a feature is a number": ({**ROW, "hypothesis": 3}, "'hypothesis' must be text, found 3"),
    "no idx": ({k: v for k, v in ROW.items() if k != "idx"}, "'idx' must be a whole number"),
    "idx is text": ({**ROW, "idx": "9"}, "'idx' must be a whole number, found '9'"),
    "idx twice": (ROW, "the 'idx' 0 is that of line 1 too"),
    "label is no label": ({**ROW, "idx": 9, "label": "yes"}, "'label' must be one of.*'yes'"),
    "label is another task's": ({**ROW, "idx": 9, "label": True}, "'label' must be one of.*True"),
    "label -1": ({**ROW, "idx": 9, "label": -1}, "'label' must be one of.*-1"),
    "no label": ({**superglue_rows.ROWS["CB"][0], "idx": 9}, "'label' must be one of.*None"),
    "a list": ([1, 2], r"a row must be a JSON object, found \[1, 2\]"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_row_is_named_and_nothing_is_written(case, jsonl_dir, tmp_path):
    row, message = BAD[case]
    superglue_rows.write_rows(jsonl_dir / "CB" / "val.jsonl", [ROW, row])
    with pytest.raises(ConfigError, match=f"CB/val.jsonl, line 2: .*{message}"):
        prepare.prepare_superglue(jsonl_dir, tmp_path / "tfds")
    assert not (tmp_path / "tfds").exists()


@pytest.mark.parametrize("line", [b"{", b"", b'"\xff"', b"premise,hypothesis"])
def test_a_line_that_is_not_json(line, jsonl_dir, tmp_path):
    path = jsonl_dir / "RTE" / "train.jsonl"
    path.write_bytes(path.read_bytes() + line + b"\n")
    with pytest.raises(ConfigError, match=r"RTE/train.jsonl, line 3: this is not JSON"):
        prepare.prepare_superglue(jsonl_dir, tmp_path / "tfds")


def test_an_empty_file(jsonl_dir, tmp_path):
    (jsonl_dir / "RTE" / "train.jsonl").write_text("")
    with pytest.raises(ConfigError, match=r"RTE/train.jsonl has no rows"):
        prepare.prepare_superglue(jsonl_dir, tmp_path / "tfds")


def test_a_folder_too_deep(jsonl_dir, tmp_path):
    with pytest.raises(
        ConfigError, match=r"none of the folders BoolQ, CB.* is in .*CB,.*BoolQ.zip"
    ):
        prepare.prepare_superglue(jsonl_dir / "CB", tmp_path / "tfds")


def test_a_target_that_is_a_file_or_remote(jsonl_dir, tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(ConfigError, match="taken cannot be written"):
        prepare.prepare_superglue(jsonl_dir, tmp_path / "taken")
    with pytest.raises(ConfigError, match="gs://bucket/tfds is not a local directory"):
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
