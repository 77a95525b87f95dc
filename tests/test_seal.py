"""JSON with a checksum of itself."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prompt_tuning.config import ConfigError
from prompt_tuning.runtime import seal

VALUES = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=4).filter(lambda key: key != "sha256"), VALUES))
def test_what_is_written_holds(tmp_path_factory: pytest.TempPathFactory, content):
    file = tmp_path_factory.mktemp("seal") / "a.json"
    try:
        file.write_bytes(seal.write(content).encode())
    except UnicodeEncodeError:  # half of a surrogate pair is no text
        return
    seal.check(file)
    assert {k: v for k, v in json.loads(file.read_text()).items() if k != "sha256"} == content


@pytest.mark.parametrize("at", range(0, 90, 7))
def test_a_flipped_bit_or_a_cut_is_found(tmp_path: Path, at: int):
    file = tmp_path / "a.json"
    text = seal.write({"score": 61.25, "name": "café"}).encode()
    assert len(text) > 90
    for damaged in (text[:at] + bytes([text[at] ^ 1]) + text[at + 1 :], text[:at], text + b" "):
        file.write_bytes(damaged)
        with pytest.raises(ConfigError, match=r"a\.json"):
            seal.check(file)
