"""Hugging Face's vocabulary files give SentencePiece's ids, in training and in serving."""

import base64
import importlib.resources
import json
from pathlib import Path
from typing import Any

import pytest
import seqio
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_files import make_tokenizer_json, write_tokenizer_json

from prompt_tuning import cli
from prompt_tuning.config import ConfigError
from prompt_tuning.tasks import vocabulary as training
from prompt_tuning.vocabularies.identity import vocabulary_identity
from prompt_tuning.vocabularies.tokenizer_json import to_sentencepiece
from prompt_tuning.vocabularies.vocabulary import ByteVocabulary, find_vocabulary, load_vocabulary
from prompt_tuning.world import assets

TINY = Path(assets.tiny_vocabulary())
GOLDEN = json.loads((Path(__file__).parent / "golden" / "tokenizer_ids.json").read_text())
SMALL = Path(
    str(importlib.resources.files("seqio") / "test_data" / "sentencepiece" / "sentencepiece.model")
)
CONTROL = ("\x00", "\x07", "\x85", "\u00a0", "\u200b", "\u2028", "\ufeff")
MARKS = ("\ufb01", "\u00bd", "\u212b", "e\u0301", "\u0300\u0301", "\U0001f642", "\u2581")
SPELLED = ("<extra_id_0>", " <extra_id_7>", "</s>", "<pad>", "<unk>", "this is", " a test")
HOSTILE = st.sampled_from([" ", "  ", "\t", "\n", "\r\n", *CONTROL, *MARKS, *SPELLED])
TEXTS = st.lists(st.text(max_size=6) | HOSTILE, max_size=8).map("".join)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("tokenizers")
    write_tokenizer_json(work / "small", SMALL.read_bytes())
    write_tokenizer_json(work / "tiny", TINY.read_bytes())
    return work


@pytest.fixture(scope="module")
def small(folder: Path) -> list[Any]:
    """One vocabulary four times: both files, each read for serving and for training."""
    ours = [load_vocabulary(str(SMALL)), load_vocabulary(str(folder / "small"))]
    specs = [str(SMALL), str(folder / "small" / "tokenizer.json")]
    return [*ours, *map(training.load_seqio_vocabulary, specs)]


@settings(deadline=None, max_examples=150)
@given(text=TEXTS)
def test_the_same_ids_whatever_the_file(small: list[Any], text: str) -> None:
    first, *others = [list(vocabulary.encode(text)) for vocabulary in small]
    assert all(ids == first for ids in others)
    assert small[-1].encode_tf(text).numpy().tolist() == first
    assert len({vocabulary.decode(first) for vocabulary in small}) == 1


def test_one_identity(folder: Path) -> None:
    assert load_vocabulary(str(folder / "small")).sha256 == load_vocabulary(str(SMALL)).sha256
    assert load_vocabulary(str(SMALL)).sha256 == vocabulary_identity(SMALL.read_bytes())
    # The bundled model is BPE: read as Unigram its pieces give other ids.
    assert load_vocabulary(str(folder / "tiny")).sha256 != load_vocabulary("tiny").sha256
    for name in ("small", "tiny"):
        spec = str(folder / name)
        assert training.same_vocabulary(training.load_seqio_vocabulary(spec), load_vocabulary(spec))
    again = [training.load_seqio_vocabulary(str(folder / "small")) for _ in range(2)]
    assert again[0] == again[1]


def test_hugging_faces_own_ids(folder: Path) -> None:
    """Equal, but where the library departs from the SentencePiece that T5 was trained with."""
    vocabulary = load_vocabulary(str(folder / "tiny"))
    for text, ids in GOLDEN["same"]:
        assert vocabulary.encode(text) == ids, text
    for text, ids in GOLDEN["different"]:
        assert vocabulary.encode(text) != ids, text
    assert vocabulary.vocab_size == 512


def test_transformers_says_the_same_of_t5s_vocabulary(shared_dir: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    model = shared_dir / "data" / "t5_vocab" / "sentencepiece.model"
    (tmp_path / "sp").mkdir()
    (tmp_path / "sp" / "spiece.model").write_bytes(model.read_bytes())
    config = {"tokenizer_class": "T5Tokenizer"}
    (tmp_path / "sp" / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "sp"))
    theirs.save_pretrained(str(tmp_path / "json"))
    ours = [load_vocabulary(str(tmp_path / name)) for name in ("sp", "json")]
    assert ours[0].sha256 == ours[1].sha256 == load_vocabulary(str(model)).sha256
    written = json.loads((tmp_path / "json" / "tokenizer.json").read_text())
    made = make_tokenizer_json(model.read_bytes())
    for part in ("normalizer", "pre_tokenizer", "model"):
        assert written[part] == made[part]  # `tokenizer_files.py` writes what transformers does

    @settings(deadline=None, max_examples=150)
    @given(text=st.text(st.characters(codec="ascii", exclude_characters="<>"), max_size=30))
    def check(text: str) -> None:
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours[0].encode(text) == ours[1].encode(text) == ids

    check()
    for group in ("same", "different"):
        for text, _ in GOLDEN[group]:
            ids = theirs(text, add_special_tokens=False)["input_ids"]
            assert (ours[1].encode(text) == ids) == (group == "same"), text
            assert ours[0].encode(text) == ours[1].encode(text)
    # A second mark on a letter is a piece of its own, and the library loses it.
    marked = "a\u0300\u0301"
    assert theirs(marked, add_special_tokens=False)["input_ids"] == [3, 85]
    assert ours[0].encode(marked) == ours[1].encode(marked) == [3, 85, 2]


# Folders


def test_which_file_of_a_folder(folder: Path, tmp_path: Path) -> None:
    assert find_vocabulary(str(folder / "tiny")) == str(folder / "tiny" / "tokenizer.json")
    write_tokenizer_json(tmp_path, SMALL.read_bytes())
    (tmp_path / "spiece.model").write_bytes(SMALL.read_bytes())
    assert find_vocabulary("tiny") == str(TINY)
    assert find_vocabulary(str(tmp_path)) == str(tmp_path / "spiece.model")
    for spec in ("bytes", "gs://a/b.model", "nowhere.model"):
        assert find_vocabulary(spec) == spec


ADDED = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", {"added_tokens": [{"id": 126, "content": "{", **ADDED}]}),
        ("tokenizer.json", {"added_tokens": [{"id": 9, "content": "s", **ADDED}]}),  # a plain piece
        ("tokenizer.json", {"added_tokens": [{"id": 225, "content": "<extra_id_0>", **ADDED}]}),
        ("added_tokens.json", {"<extra_id_0>": 125, "{": 126}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"126": {"content": "{"}}}),
        ("tokenizer_config.json", {"extra_special_tokens": ["<pad>", "{"]}),
        ("special_tokens_map.json", {"additional_special_tokens": [{"content": "{"}]}),
        ("added_tokens.json", {"{": "first"}),
        ("added_tokens.json", [1]),
    ],
)
def test_a_folder_that_adds_tokens_is_refused(tmp_path: Path, name: str, content: Any) -> None:
    (tmp_path / "spiece.model").write_bytes(SMALL.read_bytes())
    (tmp_path / "added_tokens.json").write_text('{"<extra_id_0>": 125, "</s>": 1}')  # no additions
    specs = [str(tmp_path), str(tmp_path / "spiece.model")]
    for load in (load_vocabulary, training.load_seqio_vocabulary):
        assert [load(spec).vocab_size for spec in specs] == [126, 126]
    (tmp_path / name).write_text(json.dumps(content))
    for load in (load_vocabulary, training.load_seqio_vocabulary):
        with pytest.raises(ConfigError, match=r"VOCABULARY: .*('.+' \(|'{'|added_tokens)"):
            load(specs[0])
        assert load(specs[1]).vocab_size == 126  # the model itself, by its name


def test_transformers_added_tokens_are_refused_by_name(shared_dir: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    model = (shared_dir / "data" / "t5_vocab" / "sentencepiece.model").read_bytes()
    (tmp_path / "spiece.model").write_bytes(model)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer"}')
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    theirs.save_pretrained(str(tmp_path))
    assert load_vocabulary(str(tmp_path)).vocab_size == len(theirs) == 32100
    assert theirs.add_tokens(["{", "}", "<ORG>"]) == 3
    theirs.save_pretrained(str(tmp_path))
    for spec in (tmp_path, tmp_path / "tokenizer.json"):
        with pytest.raises(ConfigError, match=r"'{' \(32100\), '}' \(32101\), '<ORG>' \(32102\)"):
            load_vocabulary(str(spec))


def test_byt5s_folder_is_bytes(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    assert load_vocabulary(str(tmp_path)) == ByteVocabulary()
    assert training.load_seqio_vocabulary(str(tmp_path)) == seqio.ByteVocabulary()


def test_a_folder_without_a_vocabulary(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    for load in (load_vocabulary, training.load_seqio_vocabulary):
        with pytest.raises(ConfigError, match=r"spiece\.model.*BertT"):
            load(str(tmp_path))


# Mistakes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"type": "BPE", "vocab": {}, "merges": []}}, "Unigram"),
        ({"model": {"type": "Unigram"}}, "tokenizer.json"),
        ({"model": {"type": "Unigram", "unk_id": 2, "vocab": [["a", 0]]}}, "pieces"),
        ({"normalizer": {"type": "Lowercase"}}, "Lowercase"),
        ({"pre_tokenizer": {"type": "ByteLevel"}}, "ByteLevel"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "!"}}, "damaged"),
        ({"added_tokens": [{"id": 900, "content": "x"}]}, "'x' .*900"),
        ({"added_tokens": [{"id": 9, "content": "x"}]}, "'x' .*9"),
    ],
)
def test_other_tokenizers_are_refused(tmp_path: Path, changes: dict, message: str) -> None:
    file = write_tokenizer_json(tmp_path, SMALL.read_bytes(), **changes)
    for load in (load_vocabulary, training.load_seqio_vocabulary):
        with pytest.raises(ConfigError, match=f"VOCABULARY: .*{message}") as error:
            load(str(file))
        assert str(error.value).count("VOCABULARY: ") == 1


def test_tokens_added_behind_the_pieces_are_pieces() -> None:
    values = make_tokenizer_json(SMALL.read_bytes())
    values["model"]["vocab"] = values["model"]["vocab"][:26]  # as transformers 4 wrote mT5's
    expected = to_sentencepiece(json.dumps(make_tokenizer_json(SMALL.read_bytes())).encode(), "a")
    assert to_sentencepiece(json.dumps(values).encode(), "b") == expected


def test_a_truncated_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_tokenizer_json(tmp_path, SMALL.read_bytes())
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        load_vocabulary(str(file))
    (tmp_path / "rows").write_text("a\n")
    arguments = ["infer", "--gin_file=demo.gin", "--gin_file=runs/infer.gin"]
    places = [f"--input={tmp_path / 'rows'}", f"--output={tmp_path / 'answers'}"]
    assert cli.main([*arguments, f"--gin.VOCABULARY='{file}'", *places]) == 2
    assert "is not JSON" in capsys.readouterr().err


def test_the_normalisation_is_the_models(folder: Path) -> None:
    values = make_tokenizer_json(SMALL.read_bytes())
    charsmap = base64.b64decode(values["normalizer"]["precompiled_charsmap"])
    assert charsmap in to_sentencepiece(json.dumps(values).encode(), "a")
    values["normalizer"] = None
    assert charsmap not in to_sentencepiece(json.dumps(values).encode(), "a")
