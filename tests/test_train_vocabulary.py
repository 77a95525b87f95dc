"""`t5x train-vocabulary`: T5's special ids, the same file every time, and a message otherwise."""

import sys
from pathlib import Path

import pytest
import sentencepiece

from prompt_tuning import cli
from prompt_tuning.pretraining import train_vocabulary
from prompt_tuning.vocabularies.vocabulary import load_vocabulary

sys.path.append(str(Path(__file__).parents[1] / "benchmarks" / "world"))
import language  # noqa: E402

sys.path.pop()
TEXTS = list(language.corpus(600, 1))


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_the_command_makes_a_vocabulary(tmp_path: Path, capsys, model_type: str):
    (tmp_path / "a.txt").write_text("\n".join(TEXTS[:300]))
    (tmp_path / "b.txt").write_text("\n".join(TEXTS[300:]))
    out = tmp_path / "made" / "pieces.model"
    flags = [f"--input={tmp_path}/*.txt", f"--output={out}", "--size=300"]
    assert cli.main(["train-vocabulary", *flags, f"--model_type={model_type}"]) == 0
    assert "NUM_EMBEDDINGS = 400 or more" in capsys.readouterr().out
    model = sentencepiece.SentencePieceProcessor(model_file=str(out))
    assert (model.pad_id(), model.eos_id(), model.unk_id(), model.bos_id()) == (0, 1, 2, -1)
    vocabulary = load_vocabulary(str(out))
    assert vocabulary.vocab_size == 400
    assert vocabulary.decode(vocabulary.encode(TEXTS[0])) == TEXTS[0]
    assert 2 not in vocabulary.encode(train_vocabulary.ASCII)


def test_the_same_text_gives_the_same_file():
    one, other = (train_vocabulary.train_pieces(TEXTS[:200], 250) for _ in range(2))
    assert one == other


def test_long_lines_are_cut_between_words_and_not_left_out():
    line = " ".join(f"word{i}" for i in range(2000))
    cut = list(train_vocabulary.cut_sentences([line, "", "short\nlines"]))
    assert " ".join(cut) == f"{line} short lines"
    assert max(len(sentence.encode()) for sentence in cut) <= train_vocabulary.LONGEST


@pytest.mark.parametrize("size", [20, 100_000])
def test_a_size_that_cannot_be_is_refused(tmp_path: Path, capsys, size: int):
    (tmp_path / "a.txt").write_text("\n".join(TEXTS[:50]))
    flags = [f"--input={tmp_path}/a.txt", f"--output={tmp_path}/m.model", f"--size={size}"]
    assert cli.main(["train-vocabulary", *flags]) == 2
    assert f"{size} pieces" in capsys.readouterr().err
    assert not (tmp_path / "m.model").exists()
