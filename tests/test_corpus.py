"""The corpus beside its run: tokenised once, and again where it has changed."""

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest

from prompt_tuning.config import ConfigError, CorpusConfig
from prompt_tuning.pretraining import corpus
from prompt_tuning.vocabularies.vocabulary import load_vocabulary
from tests.test_pretrain import experiment


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "a.txt"
    path.write_text("\n".join(f"the soup number {i} was lovely." for i in range(150)))
    return path


def load(tmp_path: Path, text: Path, **changes) -> corpus.Corpus:
    return corpus.load_corpus(experiment(tmp_path, str(text), **changes), tmp_path / "run")


def written(tmp_path: Path) -> int:
    return (tmp_path / "run" / "corpus" / "train.tokens").stat().st_ino


def test_a_corpus_is_tokenised_once(tmp_path, text):
    first = load(tmp_path, text)
    before = written(tmp_path)
    again = load(tmp_path, text)
    assert written(tmp_path) == before
    assert again.identity == first.identity
    assert again.description == first.description
    assert "149 documents" in first.description
    assert first.name == "a.txt"
    for name, value in first.train.batch(0, 4).items():
        np.testing.assert_array_equal(value, again.train.batch(0, 4)[name])


def test_unknown_pieces_are_counted(tmp_path, text):
    assert "unknown" not in load(tmp_path, text).description
    text.write_text("the soup \u6c64\n" * 150, encoding="utf-8")
    description = load(tmp_path, text).description
    ids = load_vocabulary("tiny").encode("the soup \u6c64")
    assert f"{ids.count(2) / len(ids):.1%} of the held-out tokens" in description
    assert ids.count(2) == 1


def test_and_again_where_it_has_changed(tmp_path, text, capsys):
    first, before = load(tmp_path, text), written(tmp_path)
    text.write_text(text.read_text().replace("soup number 7 ", "cake number 7 "))
    os.utime(text, ns=(1, 1))
    second = load(tmp_path, text)
    assert written(tmp_path) != before
    assert second.identity != first.identity
    assert "again" not in capsys.readouterr().out
    paragraphs = CorpusConfig(
        objective="span_corruption", files=(str(text), str(text)), eval_files=str(text)
    )
    assert load(tmp_path, text, corpus=paragraphs).identity != second.identity


def test_damaged_tokens_are_made_anew(tmp_path, text, capsys):
    first = load(tmp_path, text)
    path = tmp_path / "run" / "corpus" / "train.tokens"
    data = bytearray(path.read_bytes())
    data[10] ^= 4
    path.write_bytes(data)
    assert load(tmp_path, text).identity == first.identity
    assert "tokenised again" in capsys.readouterr().out
    path.unlink()
    assert load(tmp_path, text).identity == first.identity


def test_another_vocabulary_gives_other_tokens(tmp_path, text):
    first = load(tmp_path, text)
    config = experiment(tmp_path, str(text))
    other = dataclasses.replace(config, data=dataclasses.replace(config.data, vocabulary="bytes"))
    found = corpus.load_corpus(other, tmp_path / "run")
    assert found.identity != first.identity
    with pytest.raises(ConfigError, match="no file matches"):
        load(tmp_path, tmp_path / "nowhere.txt")
