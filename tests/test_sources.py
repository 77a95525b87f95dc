"""Whether the rows are there: what is missing is said in one sentence, with the cure."""

import time

import pytest
import seqio
import superglue_rows

from prompt_tuning.config import ConfigError
from prompt_tuning.tasks import prepare, registry, sources, task_rows

LENGTHS = {"inputs": 64, "targets": 16}


@pytest.fixture
def tfds_dir(tmp_path) -> str:
    prepare.prepare_superglue(superglue_rows.write_jsonl(tmp_path / "jsonl"), tmp_path / "tfds")
    return str(tmp_path / "tfds")


def test_splits_that_are_there(tfds_dir):
    registry.register("bytes", tfds_data_dir=tfds_dir)
    cb = seqio.get_mixture_or_task("super_glue_cb_v102")
    for split in ("train", "test", "train[:2]", "train[50%:]", "train+validation[:1]"):
        sources.check_source(cb, split)
    sources.check_source(seqio.get_mixture_or_task("tiny_mood"), "validation")


@pytest.mark.parametrize("split", ["test", "dev", "test[:2]", "train+dev", ""])
def test_splits_that_are_not(split, tfds_dir):
    registry.register("bytes", tfds_data_dir=tfds_dir)
    boolq = seqio.get_mixture_or_task("super_glue_boolq_v102")
    with pytest.raises(ConfigError, match=r"boolq_v102.*train, validation"):
        sources.check_source(boolq, split)


def test_only_tfds_slices():
    registry.register("bytes")
    demo = seqio.get_mixture_or_task("tiny_mood")
    with pytest.raises(ConfigError, match=r"tiny_mood.*'train\[:5\]'"):
        sources.check_source(demo, "train[:5]")


def test_splits_that_the_user_named(tfds_dir):
    registry.register("bytes", tfds_data_dir=tfds_dir)
    task = seqio.Task(
        "renamed",
        source=seqio.TfdsDataSource("super_glue/cb:1.0.2", splits={"few": "train[:2]"}),
        output_features={},
    )
    sources.check_source(task, "few")
    for split in ("train", "few[:1]"):
        with pytest.raises(ConfigError, match=r"renamed.*few"):
            sources.check_source(task, split)


def test_missing_data_says_how_to_get_it(tmp_path, monkeypatch):
    """Offline: nothing answers, as behind a proxy that is down. In seconds, not minutes."""
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    registry.register("bytes", tfds_data_dir=str(tmp_path / "tfds"))
    cure = r"super_glue/cb:1.0.2\) is not at .*cannot be downloaded.*t5x prepare-superglue --jsonl"
    start = time.monotonic()
    with pytest.raises(ConfigError, match=cure):
        task_rows.load_rows("super_glue_cb_v102", "train", LENGTHS)
    assert time.monotonic() - start < 60
    # Following the advice in the same process helps.
    prepare.prepare_superglue(superglue_rows.write_jsonl(tmp_path / "jsonl"), tmp_path / "tfds")
    assert len(task_rows.load_rows("super_glue_cb_v102", "train", LENGTHS)) == 5


def test_a_file_that_is_not_there(tmp_path):
    """Not TFDS: seqio finds out when it reads."""
    byte_features = {key: seqio.Feature(seqio.ByteVocabulary()) for key in ("inputs", "targets")}
    seqio.TaskRegistry.add(
        "from_a_file",
        source=seqio.TextLineDataSource({"train": str(tmp_path / "nothing.txt")}),
        preprocessors=[lambda dataset: dataset.map(lambda line: {"inputs": line, "targets": line})],
        output_features=byte_features,
    )
    try:
        with pytest.raises(ConfigError, match=r"'train'.*from_a_file"):
            task_rows.load_rows("from_a_file", "train", LENGTHS)
    finally:
        seqio.TaskRegistry.remove("from_a_file")
