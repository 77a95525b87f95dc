"""The text of a corpus, wherever it lies, as documents of token ids."""

import gzip
import json
import sys
import types
from pathlib import Path

import pytest
import seqio

from prompt_tuning.config import ConfigError, CorpusConfig, DataConfig
from prompt_tuning.pretraining import documents
from prompt_tuning.vocabularies.vocabulary import load_vocabulary

TEXTS = ["tea is hot", "rain is wet", "fog is a cloud"]


def data(**settings) -> DataConfig:
    return DataConfig(
        **{
            "mixture_or_task_name": (),
            "task_feature_lengths": {"inputs": 8},
            "vocabulary": "bytes",
            **settings,
        }
    )


def load(corpus: CorpusConfig, **settings) -> tuple[str, list[str], list[str]]:
    name, _ = documents.describe(corpus, data(**settings))
    decode = load_vocabulary("bytes").decode
    parts: dict[bool, list[str]] = {False: [], True: []}
    for held_out, ids in documents.read_documents(corpus, data(**settings)):
        parts[held_out].append(decode(ids))
    return name, parts[False], parts[True]


def refusal(corpus: CorpusConfig, **settings) -> str:
    with pytest.raises(ConfigError) as error:
        load(corpus, **settings)
    return str(error.value)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("paragraph", ["one\ntwo", "three", "four"]),
        ("line", ["one", "two", "three", "four"]),
        ("file", ["one\ntwo\n\nthree\n \n\nfour"]),
    ],
)
def test_a_text_file_is_cut_where_it_is_said(tmp_path: Path, kind: str, expected: list[str]):
    """With a byte order mark and the line ends of another system, as old texts have them."""
    text = "one\ntwo\n\nthree\n \n\nfour\n"
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    found = documents.read_texts(str(tmp_path / "*.txt"), CorpusConfig(documents=kind))
    assert list(found) == expected


def test_json_lines_and_gzip(tmp_path: Path):
    lines = "".join(json.dumps({"body": text, "id": i}) + "\n" for i, text in enumerate(TEXTS))
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write(lines)
    (tmp_path / "b.txt").write_text("one more")
    corpus = CorpusConfig(files=(str(tmp_path / "a*"), str(tmp_path / "b.txt")), field="body")
    assert list(documents.read_texts(corpus.files, corpus)) == [*TEXTS, "one more"]


def test_every_hundredth_document_is_held_out(tmp_path: Path):
    (tmp_path / "a.txt").write_text("\n".join(f"line {i}" for i in range(250)))
    _, train, held_out = load(CorpusConfig(files=str(tmp_path / "a.txt"), documents="line"))
    assert held_out == ["line 99", "line 199"]
    assert len(train) == 248
    assert not set(train) & set(held_out)


def test_a_short_corpus_holds_out_its_last_document(tmp_path: Path):
    (tmp_path / "a.txt").write_text("\n\n".join(TEXTS))
    name, train, held_out = load(CorpusConfig(files=str(tmp_path / "a.txt")))
    assert (name, train, held_out) == ("a.txt", TEXTS[:2], TEXTS[2:])


def test_held_out_files_of_its_own(tmp_path: Path):
    (tmp_path / "a.txt").write_text(TEXTS[0])
    (tmp_path / "b.txt").write_text(TEXTS[1])
    corpus = CorpusConfig(files=str(tmp_path / "a.txt"), eval_files=str(tmp_path / "b.txt"))
    assert load(corpus)[1:] == (TEXTS[:1], TEXTS[1:2])


def test_what_is_missing_is_named(tmp_path: Path):
    assert "no file matches 'nowhere/*.txt'" in refusal(CorpusConfig(files="nowhere/*.txt"))
    (tmp_path / "a.txt").write_text("  \n\n")
    assert "TEXT_FILES has 0 documents" in refusal(CorpusConfig(files=str(tmp_path / "a.txt")))
    (tmp_path / "a.txt").write_text("one")
    assert "EVAL_TEXT_FILES" in refusal(CorpusConfig(files=str(tmp_path / "a.txt")))
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    assert "UTF-8" in refusal(CorpusConfig(files=str(tmp_path / "a.txt")))
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"texts": "two"}\n')
    assert "line 2: the field 'text'" in refusal(CorpusConfig(files=str(tmp_path / "a.jsonl")))
    assert "Set TEXT_FILES" in refusal(CorpusConfig())


@pytest.fixture
def task_module():
    """A user's module with seqio tasks: of text alone, with inputs, and not tokenised."""
    import tensorflow as tf

    def rows(split, shuffle_files=False, seed=None):
        texts = TEXTS[:2] if split == "train" else TEXTS[2:]
        return tf.data.Dataset.from_tensor_slices({"targets": texts})

    def with_inputs(dataset):
        return dataset.map(lambda row: {**row, "inputs": row["targets"]})

    tokenize, append = seqio.preprocessors.tokenize, seqio.preprocessors.append_eos_after_trim
    vocabulary = seqio.ByteVocabulary()
    features = {name: seqio.Feature(vocabulary, required=False) for name in ("inputs", "targets")}
    for name, preprocessors in {
        "my_text": [tokenize, append],
        "my_pairs": [with_inputs, tokenize, append],
        "my_strings": [],
    }.items():
        seqio.TaskRegistry.add(
            name,
            source=seqio.FunctionDataSource(rows, splits=["train", "validation"]),
            preprocessors=preprocessors,
            output_features={k: features[k] for k in features if k in name or name != "my_text"}
            | {"targets": features["targets"]},
        )
    sys.modules["my_corpus"] = types.ModuleType("my_corpus")
    yield "my_corpus"
    del sys.modules["my_corpus"]
    for name in ("my_text", "my_pairs", "my_strings"):
        seqio.TaskRegistry.remove(name)


def test_a_seqio_task_of_the_users(task_module: str):
    settings = {"mixture_or_task_module": task_module}
    found = load(CorpusConfig(), mixture_or_task_name="my_text", **settings)
    assert found == ("my_text", TEXTS[:2], TEXTS[2:])  # whole, and without EOS
    assert "has inputs" in refusal(CorpusConfig(), mixture_or_task_name="my_pairs", **settings)
    said = refusal(CorpusConfig(), mixture_or_task_name="my_strings", **settings)
    assert "my_strings" in said
    said = refusal(CorpusConfig(), mixture_or_task_name="my_text", vocabulary="tiny", **settings)
    assert "with VOCABULARY" in said


def test_a_tfds_corpus(tmp_path: Path):
    import tensorflow_datasets as tfds

    class MyCorpus(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return self.dataset_info_from_configs(
                features=tfds.features.FeaturesDict({"text": tfds.features.Text()})
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(TEXTS)}

        def _generate_examples(self, texts):
            for i, text in enumerate(texts):
                yield i, {"text": text}

    MyCorpus.pkg_dir_path = tmp_path
    MyCorpus(data_dir=tmp_path).download_and_prepare()
    settings = {"tfds_data_dir": str(tmp_path), "train_split": "train[:2]"}
    corpus = CorpusConfig(tfds="my_corpus")
    name, train, held_out = load(corpus, eval_split="train[2:]", **settings)
    assert name == "my_corpus"
    assert sorted(train + held_out) == sorted(TEXTS)
    assert "'validation'" in refusal(corpus, **settings)
    said = refusal(CorpusConfig(tfds="my_corpus", field="body"), eval_split="train", **settings)
    assert "'body'" in said


def test_ids_are_those_of_the_vocabulary(tmp_path: Path):
    (tmp_path / "a.txt").write_text("lovely soup.\n\nnasty cake.")
    corpus = CorpusConfig(files=str(tmp_path / "a.txt"))
    (_, ids), (held_out, _) = documents.read_documents(corpus, data(vocabulary="tiny"))
    vocabulary = load_vocabulary("tiny")
    assert list(ids) == list(vocabulary.encode("lovely soup."))
    assert max(ids) < vocabulary.vocab_size
    assert held_out
