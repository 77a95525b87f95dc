"""Vocabularies by name: which one, with which sentinels, and what is said when it is not there."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import sentencepiece
import seqio

from prompt_tuning.config import OFFICIAL_VOCABULARY, ConfigError
from prompt_tuning.tasks import vocabulary
from prompt_tuning.vocabularies.vocabulary import load_vocabulary

TEXT = "a small piece of text, and another one; some words twice: text, words, small words.\n"


def train(path: Path, symbols: Sequence[str] = ()) -> str:
    """A SentencePiece model as T5's: padding 0, end 1, unknown 2."""
    corpus = path.with_suffix(".txt")
    corpus.write_text(TEXT * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(path.with_suffix("")),
        vocab_size=40 + len(symbols),
        user_defined_symbols=list(symbols),
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return str(path)


def test_bytes():
    loaded = vocabulary.load_seqio_vocabulary("bytes")
    assert isinstance(loaded, seqio.ByteVocabulary)
    assert loaded.encode("a") == [ord("a") + 3]


def test_sentinels_are_added_only_where_the_model_has_none(tmp_path):
    plain = train(tmp_path / "plain.model")
    pieces = sentencepiece.SentencePieceProcessor(model_file=plain).vocab_size()
    loaded = vocabulary.load_seqio_vocabulary(plain)
    assert loaded.vocab_size == pieces + 100
    assert loaded.encode("<extra_id_0>") == [pieces + 99]

    sentinels = [f"\u2581<extra_id_{i}>" for i in range(99, -1, -1)]
    with_them = train(tmp_path / "with.model", sentinels)
    loaded = vocabulary.load_seqio_vocabulary(with_them)
    held = sentencepiece.SentencePieceProcessor(model_file=with_them)
    assert loaded.vocab_size == held.vocab_size()
    assert loaded.encode("<extra_id_0>") == [held.piece_to_id("\u2581<extra_id_0>")]


def test_the_official_one_is_named_without_a_network():
    lazy = vocabulary.seqio_vocabulary(OFFICIAL_VOCABULARY)
    assert lazy.extra_ids == 0  # it brings its sentinels along: "100extra"
    assert lazy.sentencepiece_model_file == OFFICIAL_VOCABULARY


def test_the_same_model_elsewhere_is_the_same_vocabulary(tmp_path):
    first = train(tmp_path / "first.model")
    (tmp_path / "copy.model").write_bytes(Path(first).read_bytes())
    one, other = (
        vocabulary.load_seqio_vocabulary(str(tmp_path / f"{n}.model")) for n in ("first", "copy")
    )
    assert one != other  # to seqio
    loaded = load_vocabulary(first)
    for of_task in (one, other, vocabulary.SentinelTargets(one)):
        assert vocabulary.same_vocabulary(of_task, loaded)
    less = seqio.SentencePieceVocabulary(first)  # no sentinels
    assert not vocabulary.same_vocabulary(less, loaded)
    assert not vocabulary.same_vocabulary(seqio.ByteVocabulary(), loaded)
    assert not vocabulary.same_vocabulary(one, load_vocabulary("bytes"))
    assert vocabulary.same_vocabulary(seqio.ByteVocabulary(), load_vocabulary("bytes"))


def test_a_model_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match=r"'nowhere\.model'.*'bytes'"):
        vocabulary.load_seqio_vocabulary("nowhere.model")
    (tmp_path / "text.model").write_text("no model")
    with pytest.raises(ConfigError, match=r"text\.model"):
        vocabulary.load_seqio_vocabulary(str(tmp_path / "text.model"))
    with pytest.raises(ConfigError, match=r"nosuch://x\.model"):
        vocabulary.load_seqio_vocabulary("nosuch://x.model")


@pytest.mark.parametrize(
    "ids",
    [
        {},
        {"pad_id": 0, "eos_id": 2, "unk_id": 1, "bos_id": -1},
        {"pad_id": -1, "eos_id": 1, "unk_id": 0, "bos_id": -1},
    ],
)
def test_other_special_ids_than_a_t5s_are_refused(tmp_path, ids):
    (tmp_path / "a.txt").write_text(TEXT * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "a.txt"),
        model_prefix=str(tmp_path / "a"),
        vocab_size=40,
        hard_vocab_limit=False,
        minloglevel=2,
        **ids,  # by default: unknown 0, begin 1, end 2, no padding
    )
    for load in (load_vocabulary, vocabulary.load_seqio_vocabulary):
        with pytest.raises(ConfigError, match=r"a\.model.*pad_id=0, eos_id=1, unk_id=2"):
            load(str(tmp_path / "a.model"))


def test_the_real_vocabulary(shared_dir):
    loaded = vocabulary.load_seqio_vocabulary(
        str(shared_dir / "data" / "t5_vocab" / "sentencepiece.model")
    )
    assert loaded.vocab_size == 32100
    assert loaded.encode("<extra_id_0> <extra_id_99>") == [32099, 32000]
    assert loaded.encode("True") == [10998]
