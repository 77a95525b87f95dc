"""`t5x verify`: damage of any kind is found and named, exit code 2; what is whole passes."""

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import as_prompt, random_params

from prompt_tuning import cli
from prompt_tuning.checkpoints import manifest
from prompt_tuning.checkpoints.run_state import RunStateStore
from prompt_tuning.checkpoints.t5x import read_t5x, write_t5x
from prompt_tuning.config import ConfigError
from prompt_tuning.prompts.prompt_file import PromptMetadata, save_prompt


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A MODEL_DIR with two states and two prompts, and a checkpoint without checksums."""
    folder = tmp_path_factory.mktemp("verify")
    with RunStateStore(folder / "run" / "checkpoints") as store:
        for step in (3, 6):
            state = {"prompt": jnp.full((4, 8), step, jnp.float32), "step": jnp.int32(step)}
            store.save(step, state, {"standing": {"best_step": 3}})
    for name in ("best", "step_000006"):
        save_prompt(
            folder / "run/prompts" / name, as_prompt(np.ones((4, 8), np.float32)), PromptMetadata()
        )
    write_t5x(folder / "checkpoint_9", random_params(), 9)
    return folder


@pytest.fixture
def folder(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "copy"))


def verify(capsys, *arguments) -> tuple[int, str, str]:
    code = cli.main(["verify", *map(str, arguments)])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return code, captured.out, captured.err


def flip(file: Path, place: float = 0.5) -> None:
    data = bytearray(file.read_bytes())
    data[int(place * (len(data) - 1))] ^= 1
    file.write_bytes(data)


def test_a_model_dir_that_is_whole(folder, capsys):
    before = sorted(folder.rglob("*"))
    code, out, _ = verify(capsys, folder / "run")
    assert code == 0
    assert out.count("2 arrays, all with the SHA-256") == 2
    assert out.count("float32[4, 8], with the SHA-256") == 2
    assert sorted(folder.rglob("*")) == before
    for part in ("run/checkpoints", "run/checkpoints/3", "run/prompts/best"):
        assert verify(capsys, folder / part)[0] == 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_damage_in_a_model_dir_is_named_and_the_rest_is_checked(folder, capsys):
    arrays = [p for p in (folder / "run/checkpoints/3/state").rglob("d/*") if p.is_file()]
    for file in arrays:
        data = file.read_bytes()
        file.write_bytes(data[: len(data) // 2])
    flip(folder / "run/prompts/best/adapter_model.safetensors", 1.0)
    code, out, err = verify(capsys, folder / "run")
    assert code == 2
    assert "2 of 4 checks failed" in err
    assert "checkpoints/3 is damaged" in err
    assert "prompts/best" in err
    assert "checkpoints/6: 2 arrays" in out


def test_a_foreign_checkpoint_is_read_through_and_held_against_its_manifest(folder, capsys):
    place = folder / "checkpoint_9"
    kernel = "encoder/layers_0/attention/query/kernel"
    code, out, _ = verify(capsys, place)
    assert code == 0
    assert "--write" in out
    assert verify(capsys, place, "--write")[0] == 0
    assert "checkpoint" in json.loads((place / manifest.NAME).read_text())["files"]
    code, out, _ = verify(capsys, place)
    assert code == 0
    assert "SHA-256" in out

    write_t5x(folder / "other", {**random_params(), kernel: jnp.ones((32, 32))}, 9)
    name = f"target.{kernel.replace('/', '.')}"
    shutil.copytree(folder / "other" / name, place / name, dirs_exist_ok=True)
    code, _, err = verify(capsys, place)  # it is a perfect array, but another one
    assert code == 2
    assert f"{name}/0.0 has" in err


def test_a_truncated_and_a_missing_array_are_found_without_a_manifest(folder, capsys):
    place = folder / "checkpoint_9"
    chunk = place / "target.decoder.logits_dense.kernel" / "0.0"
    whole = chunk.read_bytes()
    for length in (0, 9, len(whole) // 2, len(whole) - 9, len(whole) - 1):
        chunk.write_bytes(whole[:length])
        code, _, err = verify(capsys, place)
        assert code == 2
        assert "decoder/logits_dense/kernel" in err
    for length in (0, 9, len(whole) // 2):  # without all numbers it is not loaded either
        chunk.write_bytes(whole[:length])
        with pytest.raises(ConfigError, match="decoder/logits_dense/kernel"):
            read_t5x(place, random_params())
    chunk.write_bytes(whole)
    flip(chunk)  # gzip has a checksum
    assert verify(capsys, place)[0] == 2
    chunk.unlink()
    assert verify(capsys, place)[0] == 2


def test_any_folder_with_a_manifest(tmp_path, capsys):
    data = tmp_path / "data"
    (data / "deep").mkdir(parents=True)
    (data / "a.txt").write_text("one")
    (data / "deep" / "b.txt").write_text("two")
    code, _, err = verify(capsys, data)
    assert code == 2
    assert "there is no manifest" in err
    assert verify(capsys, data, "--write")[0] == 0
    assert verify(capsys, data)[0] == 0
    (data / "a.txt").write_text("One")
    (data / "deep" / "b.txt").unlink()
    (data / "c.txt").write_text("new")
    code, _, err = verify(capsys, data)
    assert code == 2
    for said in (
        "a.txt has other contents",
        "deep/b.txt is missing",
        "c.txt is not in",
    ):
        assert said in err
    (data / "a.txt").write_text("longer")
    assert "has 6 bytes, and had 3" in verify(capsys, data)[2]
    assert verify(capsys, data / "a.txt", "--write")[0] == 2


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"files": 3}', "{" * 9999])
def test_a_manifest_that_is_none(tmp_path, capsys, text):
    (tmp_path / manifest.NAME).write_text(text)
    code, _, err = verify(capsys, tmp_path)
    assert code == 2
    assert "damaged" in err


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_flipped_bit_in_any_file_of_a_state_changes_nothing_or_is_found(made, tmp_path):
    """The arrays' digests and the digest of the JSON values are all that a state needs."""
    source, copy = made / "run" / "checkpoints" / "6", tmp_path / "checkpoints"
    abstract = {"prompt": jnp.zeros((4, 8)), "step": jnp.int32(0)}
    outcomes = []
    for file in sorted(p.relative_to(source) for p in source.rglob("*") if p.is_file()):
        for place in (0.1, 0.5, 0.9):
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(source, copy / "6")
            flip(copy / "6" / file, place)
            with RunStateStore(copy) as store:
                try:
                    state, meta = store.restore(abstract)
                except ConfigError:
                    outcomes.append("damaged")
                else:
                    assert (np.asarray(state["prompt"]) == 6).all()
                    assert (int(state["step"]), meta) == (6, {"standing": {"best_step": 3}})
                    outcomes.append("unharmed")
    assert set(outcomes) == {"damaged", "unharmed"}


@pytest.mark.parametrize("path", ["nowhere", "gs://bucket/x"])
def test_places_that_cannot_be_checked(tmp_path, capsys, path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert verify(capsys, path)[0] == 2
