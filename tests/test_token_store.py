"""The tokens of a corpus on the disk: as they were given, or refused by name."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prompt_tuning.config import ConfigError
from prompt_tuning.pretraining import examples, token_store

DOCUMENTS = [(False, [3, 4, 5]), (True, [6, 7]), (False, []), (False, [8]), (True, [9])]


def write(
    folder: Path, documents=DOCUMENTS, vocab_size: int = 100, **more
) -> token_store.TokenStore:
    token_store.write(folder, iter(documents), vocab_size=vocab_size, **more)
    return token_store.TokenStore(folder, "text")


def ids(part: examples.Documents) -> list[list[int]]:
    bounds = zip(part.starts[:-1], part.starts[1:], strict=True)
    return [part.tokens[start:stop].tolist() for start, stop in bounds]


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.booleans(), st.lists(st.integers(0, 70_000), max_size=9)), max_size=9),
    st.sampled_from([70_001, 1 << 16]),
)
def test_what_is_written_is_what_is_read(tmp_path_factory, documents, vocab_size):
    documents = [(h, [i % vocab_size for i in d]) for h, d in documents]
    documents += [(False, [1, 2]), (True, [3, 4])]  # something in each part
    store = write(tmp_path_factory.mktemp("store") / "s", documents, vocab_size)
    for held_out, part in ((False, store.train), (True, store.held_out)):
        assert ids(part) == [d for h, d in documents if h is held_out and d]
        assert part.tokens.itemsize == (2 if vocab_size == 1 << 16 else 4)
        assert isinstance(part.tokens, np.memmap)


def test_the_identity_is_of_the_documents_and_their_ends(tmp_path):
    first = write(tmp_path / "a", made_of={"files": ["x", 1]})
    assert first.made_of == {"files": ["x", 1]}
    assert write(tmp_path / "b").identity == first.identity
    for number, other in enumerate(
        [
            [(False, [3, 4]), (False, [5]), *DOCUMENTS[1:]],
            [(False, [3, 4, 6]), *DOCUMENTS[1:]],
            [(True, [3, 4, 5]), *DOCUMENTS[2:], (False, [6, 7])],
        ]
    ):
        assert write(tmp_path / f"other{number}", other).identity != first.identity


def test_a_part_without_text_is_refused_and_nothing_is_left(tmp_path):
    with pytest.raises(ConfigError, match="1 documents"):
        write(tmp_path / "a", [(False, [1, 2]), (True, [3])])
    with pytest.raises(ConfigError, match="0 documents"):
        write(tmp_path / "a", [(True, [1, 2])])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["train.tokens", "train.starts", "held_out.tokens"])
def test_a_damaged_file_is_named(tmp_path, name):
    folder = tmp_path / "a"
    whole = write(folder)
    data = (folder / name).read_bytes()
    for damaged in (data[:-1] + bytes([data[-1] ^ 1]), data[:-2], data + b"\0\0", b""):
        (folder / name).write_bytes(damaged)
        with pytest.raises(ConfigError):
            token_store.TokenStore(folder, "text")
    (folder / name).write_bytes(data)
    assert token_store.TokenStore(folder, "text").identity == whole.identity
    index = json.loads((folder / "corpus.json").read_text())
    del index["train"]["dtype"]
    (folder / "corpus.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError):
        token_store.TokenStore(folder, "text")
