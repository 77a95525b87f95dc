"""A prompt in a T5X checkpoint is found wherever a T5X program puts it."""

import json
from pathlib import Path

import numpy as np
import pytest
from tiny_models import CONFIG as MODEL
from tiny_models import random_params

from prompt_tuning.checkpoints import load
from prompt_tuning.checkpoints.conversion import convert
from prompt_tuning.checkpoints.identity import backbone_identity
from prompt_tuning.checkpoints.t5x import write_t5x
from prompt_tuning.checkpoints.t5x_prompt import PROMPT
from prompt_tuning.config import ConfigError
from prompt_tuning.prompts.embedding import read_identity
from prompt_tuning.prompts.prompt_file import load_prompt, read_prompt

ROWS = np.random.default_rng(0).standard_normal((5, 32)).astype(np.float32)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("t5x") / "checkpoint_7"
    write_t5x(path, {**random_params(), PROMPT: ROWS}, 7)
    return path


def test_the_prompt_of_a_checkpoint(checkpoint: Path) -> None:
    prompt, metadata = load_prompt(checkpoint)
    np.testing.assert_array_equal(prompt.rows, ROWS)
    assert metadata is not None
    assert metadata.step == 7
    np.testing.assert_array_equal(load_prompt(checkpoint / "checkpoint")[0].rows, ROWS)


def test_the_folder_of_its_array(checkpoint: Path) -> None:
    stored = read_prompt(checkpoint / "target.encoder.prompt.prompt.prompt")
    np.testing.assert_array_equal(stored.prompt.rows, ROWS)
    assert stored.form == "zarr"


def test_the_originals_numpy_files(tmp_path: Path) -> None:
    folder = tmp_path / "numpy_checkpoints" / "checkpoint_1130000"
    folder.mkdir(parents=True)
    with (folder / "encoder.prompt.prompt.prompt").open("wb") as file:
        np.save(file, ROWS)
    for path in (folder, folder / "encoder.prompt.prompt.prompt"):
        np.testing.assert_array_equal(load_prompt(path)[0].rows, ROWS)
    with pytest.raises(ConfigError, match=r"1 prompts.*prompt\.prompt\.prompt"):
        load_prompt(tmp_path)
    with (folder / "encoder.other.prompt").open("wb") as file:
        np.save(file, ROWS)
    with pytest.raises(ConfigError, match="2 prompts"):
        load_prompt(folder)


def test_no_prompt_or_one_of_another_kind(tmp_path: Path) -> None:
    write_t5x(tmp_path / "model", random_params(), 0)
    with pytest.raises(ConfigError, match="encoder/prompt/prompt/prompt"):
        load_prompt(tmp_path / "model")
    write_t5x(tmp_path / "several", {"encoder/prompt/prompt/shared_prompt": ROWS}, 0)
    with pytest.raises(ConfigError, match="encoder/prompt/prompt/shared_pro"):
        load_prompt(tmp_path / "several")


def test_a_damaged_array(checkpoint: Path, tmp_path: Path) -> None:
    write_t5x(tmp_path / "c", {PROMPT: ROWS}, 0)
    array = tmp_path / "c" / "target.encoder.prompt.prompt.prompt"
    chunk = (array / "0.0").read_bytes()
    (array / "0.0").write_bytes(chunk[:20])
    for path in (tmp_path / "c", array):
        with pytest.raises(ConfigError):
            load_prompt(path)
    (array / "0.0").write_bytes(chunk)
    values = json.loads((array / ".zarray").read_text())
    (array / ".zarray").write_text(json.dumps({**values, "shape": [5_000_000, 3_200_000]}))
    with pytest.raises(ConfigError, match="matrix"):
        load_prompt(array)
    (array / ".zarray").write_text("{")
    with pytest.raises(ConfigError):
        load_prompt(array)


def test_the_identity_of_the_model_around_it(checkpoint: Path) -> None:
    assert read_identity(checkpoint) == backbone_identity(random_params())


def test_the_model_around_it_loads_and_says_so(checkpoint: Path) -> None:
    params, step = load.read_backbone(checkpoint, MODEL)
    assert step == 7
    assert params.keys() == random_params().keys()
    said = load.describe_unused_prompt(checkpoint, [])
    assert str(checkpoint) in said
    assert f"--gin.PROMPT_FILE=\"'{checkpoint}'\"" in said
    assert load.describe_unused_prompt(checkpoint, [checkpoint.parent / "other"]) == said
    for named in (checkpoint, f"{checkpoint}/", checkpoint / "target.encoder.prompt.prompt.prompt"):
        assert not load.describe_unused_prompt(checkpoint, [named])
    assert not load.describe_unused_prompt("tiny", [])


def test_no_other_parameter_is_let_through(tmp_path: Path) -> None:
    write_t5x(tmp_path / "c", {**random_params(), f"{PROMPT}_2": ROWS}, 0)
    with pytest.raises(ConfigError, match=r"encoder/.*prompt_2"):
        load.read_backbone(tmp_path / "c", MODEL)


def test_a_conversion_says_that_the_prompt_stays(checkpoint: Path, tmp_path: Path) -> None:
    done = convert(str(checkpoint), str(tmp_path / "hf"))
    assert f"t5x convert-prompt --input={checkpoint}" in str(done)
    found, _ = load.read_backbone(tmp_path / "hf", MODEL)
    assert backbone_identity(found) == read_identity(checkpoint)
