"""Every form to every other: the same bits, the metadata that finds a place, the rest named."""

import dataclasses
import json
import typing
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from tiny_models import CONFIG, as_prompt, random_params

from prompt_tuning import cli
from prompt_tuning.checkpoints.identity import backbone_identity
from prompt_tuning.checkpoints.t5x import read_param, read_shapes, read_step, read_t5x, write_t5x
from prompt_tuning.checkpoints.t5x_prompt import PROMPT
from prompt_tuning.commands import conversions as commands
from prompt_tuning.config import ConfigError
from prompt_tuning.model import t5
from prompt_tuning.prompts.convert import Output, convert_prompt
from prompt_tuning.prompts.prompt_file import PromptMetadata, read_prompt, save_prompt

FORMS = typing.get_args(Output)
METADATA = PromptMetadata(
    task="super_glue_boolq_v102",
    label_words=("True", "Falsch: né"),
    vocabulary="cd" * 32,
    init="class labels",
    step=1_130_000,
    score=82.5,
    score_name="accuracy/generate",
    config_hash="ef" * 32,
    prompt_tuning_version="1.0",
)
ROWS = np.random.default_rng(0).standard_normal((5, CONFIG.embed_dim)).astype(np.float32)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("convert") / "checkpoint_9"
    write_t5x(path, random_params(), 9)
    return str(path)


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    save_prompt(tmp_path / "ours", as_prompt(ROWS), METADATA, base_model="google/t5-base-lm-adapt")
    return tmp_path / "ours"


def test_the_command_knows_every_form() -> None:
    assert FORMS == commands._FORMS


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("back", FORMS)
def test_there_and_back_to_the_same_bits(
    ours: Path, tmp_path: Path, backbone: str, form: Output, back: Output
) -> None:
    convert_prompt(ours, tmp_path / "there", form, checkpoint=backbone)
    convert_prompt(tmp_path / "there", tmp_path / "back", back, checkpoint=backbone)
    stored = read_prompt(tmp_path / "back")
    assert stored.prompt.rows.tobytes() == ROWS.tobytes()
    assert stored.form == back
    known = dataclasses.replace(METADATA, backbone=backbone_identity(random_params()))
    if {form, back} <= {"ours", "peft"}:
        assert stored.metadata == known
        assert stored.base_model == "google/t5-base-lm-adapt"
    elif form == "t5x" and back != "npy":
        assert stored.metadata is not None
        assert stored.metadata.step == 1_130_000


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    rows=arrays(
        np.float32,
        (2, 3),
        elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
    )
)
def test_no_value_is_touched(tmp_path_factory: pytest.TempPathFactory, rows: np.ndarray) -> None:
    """Minus zero, the smallest and the largest numbers too."""
    folder = tmp_path_factory.mktemp("values")
    np.save(folder / "0.npy", rows)
    for number, form in enumerate(("ours", "peft", "npy")):
        source = folder / ("0.npy" if number == 0 else str(number))
        convert_prompt(source, folder / str(number + 1), form)
    assert np.load(folder / "3").tobytes() == rows.tobytes()
    assert np.load(folder / "3").dtype == np.float32


def test_what_is_lost_is_said(ours: Path, tmp_path: Path, backbone: str) -> None:
    said = convert_prompt(ours, tmp_path / "a.npy", "npy")[-1]
    assert said.startswith("lost, since a numpy file has no place for it: task, label_words, ")
    assert said.endswith("prompt_tuning_version, base_model_name_or_path")
    assert len(convert_prompt(ours, tmp_path / "peft", "peft")) == 1
    said = convert_prompt(ours, tmp_path / "t5x", "t5x", checkpoint=backbone)
    assert said[1] == "step of the checkpoint: 1130000; optimizer state: left out"
    assert "step" not in said[2].split(": ")[1].split(", ")
    np.save(tmp_path / "double.npy", ROWS.astype(np.float64))
    assert convert_prompt(tmp_path / "double.npy", tmp_path / "b.npy", "npy")[1:] == [
        "rounded: float64 to float32"
    ]


def test_pefts_dead_half(ours: Path, tmp_path: Path) -> None:
    convert_prompt(ours, tmp_path / "peft", "peft", dead_half=True)
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (config["num_virtual_tokens"], config["num_transformer_submodules"]) == (5, 2)
    stored = safetensors.numpy.load_file(tmp_path / "peft" / "adapter_model.safetensors")
    np.testing.assert_array_equal(stored["prompt_embeddings"], np.concatenate([ROWS, ROWS]))
    said = convert_prompt(tmp_path / "peft", tmp_path / "again", "ours")
    assert said[1] == "left out: the last 5 rows, which PEFT never uses"
    assert read_prompt(tmp_path / "again").metadata == METADATA
    with pytest.raises(ConfigError, match=r"--dead_half.*--format=peft"):
        convert_prompt(ours, tmp_path / "x", "npy", dead_half=True)


def test_the_copy_of_the_backbone_is_exact(tmp_path: Path, backbone: str) -> None:
    """In the dtype of every parameter; a prompt that was there makes room."""
    shapes = t5.param_shapes(CONFIG)
    params, _ = read_t5x(backbone, shapes)
    mixed = {
        name: np.asarray(array, "bfloat16" if "mlp" in name else np.float32)
        for name, array in params.items()
    }
    write_t5x(tmp_path / "mixed", mixed, 9, dtype=None)
    np.save(tmp_path / "p.npy", ROWS)
    convert_prompt(tmp_path / "p.npy", tmp_path / "one", "t5x", checkpoint=str(tmp_path / "mixed"))
    convert_prompt(tmp_path / "p.npy", tmp_path / "two", "t5x", checkpoint=str(tmp_path / "one"))
    assert set(read_shapes(tmp_path / "two")) == {*mixed, PROMPT}
    assert read_step(tmp_path / "two") == 9
    for name, array in mixed.items():
        copied = read_param(tmp_path / "two", name)
        assert copied.dtype == array.dtype
        assert copied.tobytes() == array.tobytes()
    np.testing.assert_array_equal(read_param(tmp_path / "two", PROMPT), ROWS)


def test_the_checkpoint_around_a_prompt_gives_its_identity(tmp_path: Path, backbone: str) -> None:
    np.save(tmp_path / "p.npy", ROWS)
    convert_prompt(tmp_path / "p.npy", tmp_path / "t5x", "t5x", checkpoint=backbone)
    convert_prompt(tmp_path / "t5x", tmp_path / "ours", "ours")
    stored = read_prompt(tmp_path / "ours").metadata
    assert stored == PromptMetadata(backbone=backbone_identity(random_params()), step=9)


def test_pefts_initialisation_is_kept(tmp_path: Path, ours: Path) -> None:
    convert_prompt(ours, tmp_path / "peft", "peft")
    weights = {"prompt_embeddings": ROWS}
    safetensors.numpy.save_file(weights, tmp_path / "peft" / "adapter_model.safetensors")
    file = tmp_path / "peft" / "adapter_config.json"
    config = json.loads(file.read_text())
    config |= {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "is it so?"}
    file.write_text(json.dumps(config))
    convert_prompt(tmp_path / "peft", tmp_path / "back", "ours")
    init = "the pieces of 'is it so?', in PEFT"
    assert read_prompt(tmp_path / "back").metadata == PromptMetadata(init=init)


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    code = cli.main(["convert-prompt", *map(str, arguments)])
    error = capsys.readouterr().err
    assert (code, error.count("\n")) == (2, 1)
    return error


def test_mistakes(
    ours: Path, tmp_path: Path, backbone: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = f"--input={ours}", f"--output={tmp_path / 'new'}"
    assert "exists already" in refusal(capsys, source, f"--output={ours}", "--format=peft")
    assert "give the backbone with --checkpoint" in refusal(capsys, source, target, "--format=t5x")
    assert "invalid choice: 'pickle'" in refusal(capsys, source, target, "--format=pickle")
    assert "must be a local folder" in refusal(
        capsys, source, "--output=gs://bucket/p", "--format=npy"
    )
    (tmp_path / "file").write_text("")
    for form in ("npy", "ours", "peft"):
        under = f"--output={tmp_path / 'file' / 'new'}"
        assert "cannot be written" in refusal(capsys, source, under, f"--format={form}")
    np.save(tmp_path / "wide.npy", np.ones((100, 768), np.float32))
    wide = refusal(
        capsys, f"--input={tmp_path / 'wide.npy'}", target, "--format=ours", "--checkpoint=tiny"
    )
    assert "has shape (100, 768); the model needs (any, 128)" in wide
    assert not (tmp_path / "new").exists()
    convert_prompt(ours, tmp_path / "known", "ours", checkpoint=backbone)
    write_t5x(tmp_path / "other", random_params(seed=3), 0)
    other = f"--checkpoint={tmp_path / 'other'}"
    said = refusal(capsys, f"--input={tmp_path / 'known'}", target, "--format=t5x", other)
    assert "another backbone" in said


def test_the_command(ours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [f"--input={ours}", f"--output={tmp_path / 'p.npy'}", "--format=npy"]
    assert cli.main(["convert-prompt", *arguments]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].endswith(": a prompt folder, float32[5, 32]")
    assert said[1] == f"{tmp_path / 'p.npy'}: a numpy file, the same values"
    np.testing.assert_array_equal(np.load(tmp_path / "p.npy"), ROWS)
