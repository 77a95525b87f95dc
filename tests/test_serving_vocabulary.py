"""Tokenising without TensorFlow gives seqio's ids, and seqio's text back."""

import http.server
import importlib.resources
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import seqio
from hypothesis import given, settings
from hypothesis import strategies as st

from prompt_tuning.config import OFFICIAL_VOCABULARY, ConfigError
from prompt_tuning.tasks import vocabulary as training
from prompt_tuning.vocabularies.tokenizer_json import ModelProto
from prompt_tuning.vocabularies.vocabulary import ByteVocabulary, load_vocabulary

SMALL = str(
    importlib.resources.files("seqio") / "test_data" / "sentencepiece" / "sentencepiece.model"
)

SENTINELS = st.integers(0, 120).map("<extra_id_{}>".format)
WORDS = st.sampled_from(["this is", "a test", "entailment", "True", "naïve", "日本語", "🙂", "▁"])
TEXTS = st.lists(
    st.text() | SENTINELS | WORDS | st.sampled_from([" ", "  ", "\n", "\t", "</s>", "<pad>"]),
    max_size=8,
).map("".join)


@pytest.fixture(scope="module")
def pairs(shared_dir) -> list[tuple]:
    """Our vocabulary beside seqio's, for every kind."""
    official = str(shared_dir / "data" / "t5_vocab" / "sentencepiece.model")
    theirs = [
        seqio.SentencePieceVocabulary(SMALL, extra_ids=100),
        seqio.SentencePieceVocabulary(official, extra_ids=100),
        seqio.ByteVocabulary(),
    ]
    return list(zip(map(load_vocabulary, (SMALL, official, "bytes")), theirs, strict=True))


@pytest.fixture(scope="module")
def public_pairs() -> list[tuple]:
    """The same with what is on every machine."""
    return [
        (load_vocabulary(SMALL), seqio.SentencePieceVocabulary(SMALL, extra_ids=100)),
        (load_vocabulary("bytes"), seqio.ByteVocabulary()),
    ]


def assert_encodes_alike(pairs, text):
    for ours, theirs in pairs:
        assert ours.encode(text) == list(theirs.encode(text))
        # What training does: inside TensorFlow.
        assert ours.encode(text) == theirs.encode_tf(text).numpy().tolist()
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text))


def assert_decodes_alike(pairs, ids):
    for ours, theirs in pairs:
        size = ours.vocab_size
        near_the_end = [size - 110 + i % 230 if i >= 300 else i for i in ids]
        near_the_end = [max(i, 0) for i in near_the_end]
        assert ours.decode(near_the_end) == theirs.decode(near_the_end)


@settings(deadline=None, max_examples=150)
@given(text=TEXTS)
def test_encodes_as_seqio(public_pairs, text):
    assert_encodes_alike(public_pairs, text)


@settings(deadline=None, max_examples=150)
@given(text=TEXTS)
def test_encodes_as_seqio_with_t5s_vocabulary(pairs, text):
    assert_encodes_alike(pairs, text)


@settings(deadline=None)
@given(ids=st.lists(st.integers(0, 600)))
def test_decodes_as_seqio(public_pairs, ids):
    """Special ids, ends in the middle, sentinels, and ids beyond the vocabulary."""
    assert_decodes_alike(public_pairs, ids)


@settings(deadline=None)
@given(ids=st.lists(st.integers(0, 600)))
def test_decodes_as_seqio_with_t5s_vocabulary(pairs, ids):
    assert_decodes_alike(pairs, ids)


def test_numpy_ids_and_negative_bytes(public_pairs):
    for ours, theirs in public_pairs:
        ids = np.asarray([5, 9, 0, 1, 7], np.int32)
        assert ours.decode(ids) == theirs.decode(ids) == ours.decode([5, 9])
    assert ByteVocabulary().decode([-4, 107]) == seqio.ByteVocabulary().decode([-4, 107]) == "h"


def test_the_first_sentinel_is_the_last_id(shared_dir):
    ours = load_vocabulary(str(shared_dir / "data" / "t5_vocab" / "sentencepiece.model"))
    assert (ours.vocab_size, ours.eos_id) == (32100, 1)
    assert ours.encode("<extra_id_0> <extra_id_99>") == [32099, 32000]
    assert ours.decode([32099, 8774, 1, 5]) == "<extra_id_0> Hello"
    # Known ids of the released models.
    assert ours.encode("Translate English to German: That is good.") == [
        30355, 15, 1566, 12, 2968, 10, 466, 19, 207, 5,
    ]  # fmt: skip


def test_sentinels_are_not_added_twice(tmp_path):
    """The official file, cc_all.32000.100extra, has them already."""
    with_sentinels = tmp_path / "with.model"
    with_sentinels.write_bytes(seqio.SentencePieceVocabulary(SMALL, extra_ids=100).sp_model)
    once, twice = load_vocabulary(SMALL), load_vocabulary(str(with_sentinels))
    assert once.vocab_size == twice.vocab_size == 126
    assert once.encode("<extra_id_7> a") == twice.encode("<extra_id_7> a")
    assert once.sha256 == twice.sha256  # a prompt for one is a prompt for the other
    assert once.sha256 != load_vocabulary("tiny").sha256


@pytest.mark.parametrize("spec", ["bytes", SMALL])
def test_serving_and_training_agree_on_the_vocabulary(spec):
    ours, theirs = load_vocabulary(spec), training.load_seqio_vocabulary(spec)
    assert ours.vocab_size == theirs.vocab_size
    assert ours.encode("é <extra_id_3>") == list(theirs.encode("é <extra_id_3>"))
    assert training.same_vocabulary(theirs, ours)


def test_the_bundled_vocabulary():
    ours, theirs = load_vocabulary("tiny"), training.load_seqio_vocabulary("tiny")
    assert ours.vocab_size == theirs.vocab_size == 512
    assert ours.encode("Any words <extra_id_0>") == list(theirs.encode("Any words <extra_id_0>"))


def test_a_file_that_is_no_model(tmp_path):
    for content in (b"", b"plain text", Path(SMALL).read_bytes()[:205]):
        (tmp_path / "broken.model").write_bytes(content)
        with pytest.raises(ConfigError, match=r"broken\.model"):
            load_vocabulary(str(tmp_path / "broken.model"))


def test_a_model_that_was_cut_between_two_pieces(tmp_path):
    whole, path = Path(SMALL).read_bytes(), tmp_path / "cut.model"
    head = ModelProto(pieces=ModelProto.FromString(whole).pieces[:300]).SerializeToString()
    assert whole.startswith(head)
    path.write_bytes(head)
    for load in (load_vocabulary, training.load_seqio_vocabulary):
        with pytest.raises(ConfigError, match=r"cut\.model"):
            load(str(path))


@pytest.mark.parametrize("spec", ["nowhere.model", "ftp://a/b.model", "/"])
def test_a_path_that_cannot_be_read(spec):
    with pytest.raises(ConfigError, match=f"VOCABULARY.*'{spec}'.*'bytes'"):
        load_vocabulary(spec)


class _Bucket(http.server.BaseHTTPRequestHandler):
    """One object of Google Cloud Storage, at gs://models/a/sentencepiece.model."""

    def do_GET(self):
        found = "models/o/a%2Fsentencepiece.model" in self.path
        body = Path(SMALL).read_bytes() if found else b"{}"
        self.send_response(200 if found else 404)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("x-goog-generation", "1")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def bucket(monkeypatch) -> Iterator[None]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Bucket)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://127.0.0.1:{server.server_port}")
    yield
    server.shutdown()
    server.server_close()


def test_reads_from_a_bucket(bucket):
    remote, local = load_vocabulary("gs://models/a/sentencepiece.model"), load_vocabulary(SMALL)
    assert remote.sha256 == local.sha256
    assert remote.encode("this is <extra_id_0>") == local.encode("this is <extra_id_0>")
    with pytest.raises(ConfigError, match=r"gsutil cp gs://models/a/b\.model"):
        load_vocabulary("gs://models/a/b.model")


def test_an_unreachable_bucket_says_how_to_copy(monkeypatch):
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", "http://127.0.0.1:9")
    with pytest.raises(ConfigError, match=r"VOCABULARY.*gs://t5-data/") as error:
        load_vocabulary(OFFICIAL_VOCABULARY)
    assert f"gsutil cp {OFFICIAL_VOCABULARY} ." in str(error.value)
    assert "curl -O https://storage.googleapis.com/t5-data/vocabs/" in str(error.value)
    assert "--gin.VOCABULARY=\"'sentencepiece.model'\"" in str(error.value)
    assert "checkpoint" not in str(error.value)


def test_no_tensorflow_is_loaded():
    code = (
        "import sys, prompt_tuning.vocabularies.vocabulary as v; v.load_vocabulary('bytes');"
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'tensorflow', 'seqio', 'gin'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
