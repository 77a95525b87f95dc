"""What is said of a prompt is what is known of it: rows that are tokens are found as those."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import as_prompt

from prompt_tuning import cli
from prompt_tuning.checkpoints.architecture import make_json
from prompt_tuning.checkpoints.names import to_huggingface
from prompt_tuning.checkpoints.t5x import read_param, read_shapes
from prompt_tuning.config import ConfigError
from prompt_tuning.model.prompt import Prompt
from prompt_tuning.prompts import embedding
from prompt_tuning.prompts.convert import convert_prompt
from prompt_tuning.prompts.embedding import EmbeddingTable
from prompt_tuning.prompts.inspection import describe, inspect_prompts, search, similarities
from prompt_tuning.prompts.prefix_inspection import are_prefixes
from prompt_tuning.prompts.prompt_file import PromptMetadata, load_prompt, save_prompt
from prompt_tuning.vocabularies.vocabulary import load_vocabulary
from prompt_tuning.world.assets import TINY_CONFIG, tiny_checkpoint, tiny_vocabulary

TABLE = np.asarray(read_param(tiny_checkpoint(), "token_embedder/embedding"), np.float32)
WORDS = load_vocabulary("tiny")
LABELS = ("up", "down")
INIT = "class labels 'up', 'down', then sampled vocabulary"


def embedded(word: str) -> np.ndarray:
    return TABLE[WORDS.encode(word)].mean(axis=0)


@pytest.fixture
def prompt(tmp_path: Path) -> Path:
    """Rows: three times "up", "down" a little moved, one long random row, zeros."""
    rng = np.random.default_rng(0)
    moved = embedded("down") + 0.1 * rng.standard_normal(128)
    rows = [3 * embedded("up"), moved, 100 * rng.standard_normal(128), np.zeros(128)]
    metadata = PromptMetadata(
        task="tiny_mood",
        label_words=LABELS,
        init=INIT,
        step=7,
        score=50.0,
        score_name="accuracy/rank",
        vocabulary=WORDS.sha256,
    )
    save_prompt(tmp_path / "p", as_prompt(np.stack(rows).astype(np.float32)), metadata)
    return tmp_path / "p"


def test_rows_norms_labels_and_distance(prompt: Path) -> None:
    found = inspect_prompts([prompt], "tiny", neighbours=3)
    assert found.embeddings == 512
    norms = np.linalg.norm(TABLE, axis=1)
    np.testing.assert_allclose(found.embedding_norms.mean, norms.mean(), rtol=1e-6)
    (one,) = found.prompts
    assert [row.neighbours[0].piece for row in one.rows[:2]] == ["\u2581up", "\u2581down"]
    assert one.rows[0].neighbours[0].cosine == pytest.approx(1, abs=1e-6)
    assert one.rows[3].norm == 0
    assert {near.cosine for near in one.rows[3].neighbours} == {0}
    up, down = one.labels
    assert (up.word, up.pieces, up.nearest_row) == ("up", ("\u2581up",), 0)
    assert 0 in up.neighbour_of
    assert down.nearest_row == 1
    assert one.distance is not None
    assert one.distance.rows == 2
    then = np.stack([embedded("up"), embedded("down")])
    relative = np.linalg.norm(one.array[:2] - then) / np.linalg.norm(then)
    assert one.distance.relative == pytest.approx(relative, rel=1e-5)
    assert one.distance.cosine == pytest.approx(1, abs=0.01)


def test_neighbours_are_those_of_the_whole_table_wherever_it_is_cut(monkeypatch) -> None:
    rng = np.random.default_rng(1)
    table = rng.standard_normal((57, 8)).astype(np.float32)
    table[40] = table[3]  # equal cosines: the smaller id first
    prompts = [rng.standard_normal((4, 8)).astype(np.float32), table[[3, 9]]]
    stored = EmbeddingTable((57, 8), lambda start, stop: table[start:stop])

    def unit(rows: np.ndarray) -> np.ndarray:
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    cosines = unit(np.concatenate(prompts)) @ unit(table[:50]).T
    expected = np.argsort(-cosines, axis=1, kind="stable")[:, :4]
    for rows in (1, 7, 50, 1000):
        monkeypatch.setattr(embedding, "CHUNK_VALUES", 8 * rows)
        norms, near = search(stored, prompts, limit=50, neighbours=4)
        np.testing.assert_array_equal(np.concatenate([ids for ids, _ in near])[:4], expected[:4])
        np.testing.assert_array_equal(near[1][0][0][:2], [3, 40])
        np.testing.assert_allclose(norms, np.linalg.norm(table[:50], axis=1), rtol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 5))
def test_similarities_by_their_definition(seed: int, one: int, other: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((one, 6)), rng.standard_normal((other, 6))

    def cosine(x: np.ndarray, y: np.ndarray) -> float:
        return float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))

    pooled, pairs = similarities([a, b])
    assert pooled[0, 1] == pytest.approx(cosine(a.mean(axis=0), b.mean(axis=0)), abs=1e-9)
    assert pairs[0, 1] == pytest.approx(np.mean([cosine(x, y) for x in a for y in b]), abs=1e-9)
    assert pooled[0, 0] == pytest.approx(1)


def test_the_beginning_of_a_prompt_may_be_given(prompt: Path, tmp_path: Path) -> None:
    rows = np.ones((4, 128), np.float32)
    np.save(tmp_path / "one.npy", rows)
    np.save(tmp_path / "two.npy", 3 * rows)
    (one,) = inspect_prompts([tmp_path / "two.npy"], "tiny", init=str(tmp_path / "one.npy")).prompts
    assert one.distance is not None
    assert (one.distance.rows, one.distance.relative) == (4, pytest.approx(2))
    assert one.distance.cosine == pytest.approx(1)
    np.save(tmp_path / "wide.npy", np.ones((4, 64), np.float32))
    with pytest.raises(ConfigError, match=r"--init .*64"):
        inspect_prompts([prompt], "tiny", init=str(tmp_path / "wide.npy"))


def test_without_a_vocabulary_pieces_are_numbers(prompt: Path) -> None:
    (one,) = inspect_prompts([prompt], tiny_checkpoint()).prompts
    assert one.rows[0].neighbours[0].piece == str(WORDS.encode("up")[0])
    assert one.labels == ()


def test_the_command(prompt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "other.npy", np.random.default_rng(2).standard_normal((70, 128)))
    files = [f"--plot={tmp_path / 'new' / 'p.png'}", f"--json={tmp_path / 'new' / 'p.json'}"]
    arguments = [str(prompt), str(tmp_path / "other.npy"), "--checkpoint=tiny", *files]
    assert cli.main(["inspect-prompt", *arguments, "--label_words=up, never"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"p: float32\[4, 128\], tiny_mood, step 7, accuracy/rank 50.0\n", said)
    assert "from its beginning (2 of 4 rows): moved" in said
    assert "label 'never' (\u2581never): " in said
    assert "similarity of the prompts: cosine of their mean rows" in said
    values = json.loads((tmp_path / "new" / "p.json").read_text())
    assert [len(one["rows"]) for one in values["prompts"]] == [4, 70]
    assert values["prompts"][0]["rows"][0]["neighbours"][0]["piece"] == "\u2581up"
    assert values["prompts"][0]["metadata"]["task"] == "tiny_mood"
    assert np.shape(values["similarity"]["mean_pooled"]) == (2, 2)
    picture = (tmp_path / "new" / "p.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 30_000  # not an empty canvas


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--checkpoint=nowhere"], "there is no T5X checkpoint at"),
        (["--checkpoint=tiny", "--vocabulary=bytes"], "was trained with another vocabulary"),
        (["--checkpoint=tiny", "--label_words=up", "--neighbours=0"], "must be at least 1"),
        (["--checkpoint=tiny", "--plot=gs://a/b.png"], "--plot must be a local file"),
        (["--checkpoint=tiny", "--plot=/tmp/p.picture"], "found .picture"),
        ([], "the following arguments are required: --checkpoint"),
    ],
)
def test_mistakes(
    prompt: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert cli.main(["inspect-prompt", str(prompt), *flags]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_prompt_of_another_width(tmp_path: Path) -> None:
    np.save(tmp_path / "wide.npy", np.ones((100, 768), np.float32))
    with pytest.raises(ConfigError, match="128"):
        describe(inspect_prompts([tmp_path / "wide.npy"], "tiny"))


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled backbone as Hugging Face keeps a T5, its vocabulary beside it."""
    folder = tmp_path_factory.mktemp("hf")
    tensors = {}
    for name in read_shapes(tiny_checkpoint()):
        theirs, array = to_huggingface(name), np.asarray(read_param(tiny_checkpoint(), name))
        tensors[theirs.name] = np.ascontiguousarray(array.T if theirs.transposed else array)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(make_json(TINY_CONFIG, None, 0)))
    (folder / "spiece.model").write_bytes(Path(tiny_vocabulary()).read_bytes())
    return folder


def test_a_hugging_face_folder_is_the_same_backbone(hugging_face: Path, prompt: Path) -> None:
    one, other = (inspect_prompts([prompt], str(path)) for path in ("tiny", hugging_face))
    assert one.to_json() == {**other.to_json(), "checkpoint": "tiny"}
    assert embedding.read_identity(str(hugging_face)) == embedding.read_identity("tiny")


def test_conversion_against_a_hugging_face_folder(hugging_face: Path, prompt: Path) -> None:
    new = prompt.parent / "new"
    convert_prompt(prompt, new, "ours", checkpoint=str(hugging_face))
    metadata = load_prompt(new)[1]
    assert metadata is not None
    assert metadata.backbone == embedding.read_identity("tiny")
    with pytest.raises(ConfigError, match="`t5x convert`"):
        convert_prompt(prompt, prompt.parent / "t5x", "t5x", checkpoint=str(hugging_face))


# Prompts that are more than rows ----------------------------------------------------------------


def save_prefix(folder: Path, **fields: Any) -> Path:
    save_prompt(folder, Prompt(jnp.zeros((0, 128)), **fields), PromptMetadata(task="tiny_mood"))
    return folder


def test_a_prefix_by_layer_and_head(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Keys of length 5 in head 3 of layer 1, else 1; its values are those of layer 0, turned."""
    prefix = np.zeros((2, 2, 3, 4, 32), np.float32)
    prefix[:, 0, ..., 0] = 1
    prefix[1, 0, :, 3] *= 5
    prefix[0, 1] = np.random.default_rng(0).standard_normal((3, 4, 32))
    prefix[1, 1] = -prefix[0, 1]
    folder = save_prefix(tmp_path / "p", encoder=prefix, cross=prefix[:, :, :1])
    files = [f"--plot={tmp_path / 'p.png'}", f"--json={tmp_path / 'p.json'}"]
    assert cli.main(["inspect-prompt", str(folder), "--checkpoint=tiny", *files]) == 0
    (one,) = json.loads((tmp_path / "p.json").read_text())["prompts"]
    assert one["metadata"]["task"] == "tiny_mood"
    assert one["encoder"]["shape"] == [2, 2, 3, 4, 32]
    assert one["cross"]["shape"] == [2, 2, 1, 4, 32]
    assert "decoder" not in one
    keys, values = one["encoder"]["keys"], one["encoder"]["values"]
    np.testing.assert_allclose(keys["norms"], [[1, 1, 1, 1], [1, 1, 1, 5]])
    cosine = 8 / np.sqrt(4 * 28)  # (1 + 1 + 1 + 5) / (2 sqrt(1 + 1 + 1 + 25))
    np.testing.assert_allclose(keys["similarity"], [[1, cosine], [cosine, 1]], rtol=1e-5)
    np.testing.assert_allclose(values["similarity"], [[1, -1], [-1, 1]], rtol=1e-5)
    mean = np.linalg.norm(prefix[0, 1], axis=-1).mean(axis=0)
    np.testing.assert_allclose(values["norms"], [mean, mean], rtol=1e-5)
    said = capsys.readouterr().out
    assert "encoder float32[2, 2, 3, 4, 32]\nnorms of keys by head" in said
    assert "    1    1.00    1.00    1.00    5.00\n" in said
    picture = (tmp_path / "p.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 30_000


def test_what_cannot_be_inspected_together(
    prompt: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ones = jnp.ones((2, 2, 3, 4, 32))
    prefix, wrong = save_prefix(tmp_path / "a", cross=ones), tmp_path / "b"
    save_prefix(wrong, cross=ones[:1])
    save_prompt(tmp_path / "c", Prompt(jnp.ones((3, 128)), cross=ones), PromptMetadata())
    for arguments, message in (
        ([prompt, prefix], "Inspect them apart"),
        ([tmp_path / "c"], "has rows, cross. Expected rows alone, or keys and values alone"),
        ([wrong], "cross of shape (1, 2, 3, 4, 32); the model needs (2, 2, 3, 4, 32)"),
        ([prefix, "--init=x"], "--init is for rows"),
    ):
        code = cli.main(["inspect-prompt", *map(str, arguments), "--checkpoint=tiny"])
        assert code == 2
        assert message in capsys.readouterr().err


def test_a_shared_prompt_is_inspected_as_its_rows(prompt: Path, tmp_path: Path) -> None:
    rows, metadata = load_prompt(prompt)
    assert metadata is not None
    shared = dataclasses.replace(metadata, method="shared_prompt", visibility="prompt")
    save_prompt(tmp_path / "shared", rows, shared)
    assert not are_prefixes([tmp_path / "shared", prompt])
    one, other = inspect_prompts([prompt, tmp_path / "shared"], "tiny").prompts
    assert (one.rows, one.labels) == (other.rows, other.labels)
