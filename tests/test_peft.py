"""Adapters of PEFT: prompt tuning for an encoder-decoder is read, everything else is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from tiny_models import as_prompt

from prompt_tuning import cli
from prompt_tuning.config import ConfigError
from prompt_tuning.prompts.peft import CONFIG, WEIGHTS, read_peft, write_peft
from prompt_tuning.prompts.prompt_file import PromptMetadata, read_prompt, save_prompt

PROMPT = np.random.default_rng(0).standard_normal((6, 8)).astype(np.float32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_peft(tmp_path, as_prompt(PROMPT), base_model="google/t5-base-lm-adapt")
    return tmp_path


def change(folder: Path, **values: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **values}))


def refusal(folder: Path) -> str:
    with pytest.raises(ConfigError) as error:
        read_peft(folder)
    return str(error.value)


@pytest.mark.parametrize("submodules", [1, 2])
def test_what_is_written_is_read(tmp_path: Path, submodules: int) -> None:
    write_peft(tmp_path, as_prompt(PROMPT), base_model="a/b", submodules=submodules)
    stored = read_prompt(tmp_path)
    np.testing.assert_array_equal(stored.prompt.rows, PROMPT)
    assert (stored.form, stored.base_model, stored.metadata) == ("peft", "a/b", None)
    assert stored.unused_rows == 6 * (submodules - 1)
    assert len(safetensors.numpy.load_file(tmp_path / WEIGHTS)["prompt_embeddings"]) == (
        6 * submodules
    )


def test_any_file_of_a_folder_stands_for_it(folder: Path) -> None:
    for name in (CONFIG, WEIGHTS):
        np.testing.assert_array_equal(read_prompt(folder / name).prompt.rows, PROMPT)
    save_prompt(folder / "ours", as_prompt(PROMPT), PromptMetadata(task="t"))
    assert read_prompt(folder / "ours" / WEIGHTS).metadata == PromptMetadata(task="t")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"peft_type": "LORA"}, "'PROMPT_TUNING'.*'LORA'"),
        ({"peft_type": "PREFIX_TUNING"}, "'PREFIX_TUNING'"),
        ({"peft_type": "P_TUNING"}, "'P_TUNING'"),
        ({"peft_type": None}, "None"),
        ({"task_type": "CAUSAL_LM"}, "'CAUSAL_LM'"),
        ({"num_virtual_tokens": 4}, r"\(6, 8\).*num_virtual_tokens = 4"),
        ({"num_virtual_tokens": "6"}, "'6'"),
        ({"token_dim": 16}, r"\(6, 8\).*token_dim = 16"),
    ],
)
def test_other_adapters_are_refused(folder: Path, values: dict[str, Any], message: str) -> None:
    change(folder, **values)
    with pytest.raises(ConfigError, match=message):
        read_peft(folder)


def test_missing_files(folder: Path) -> None:
    (folder / CONFIG).unlink()
    assert "has no adapter_config.json" in refusal(folder)
    write_peft(folder, as_prompt(PROMPT))
    (folder / WEIGHTS).unlink()
    assert "adapter_model.safetensors is missing. Copy the folder again." in refusal(folder)
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04N.")
    assert "which is a pickle and never loaded" in refusal(folder)


def test_a_truncated_adapter(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    for size in (0, 7, 40, len(data) - 1):
        (folder / WEIGHTS).write_bytes(data[:size])
        assert "is damaged" in refusal(folder)


def test_nan_inside(folder: Path) -> None:
    spoilt = PROMPT.copy()
    spoilt[1, 1] = np.nan
    safetensors.numpy.save_file({"prompt_embeddings": spoilt}, folder / WEIGHTS)
    assert "holds 1 values that are not finite" in refusal(folder)


def test_refused_on_the_command_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(folder, peft_type="LORA")
    (tmp_path / "rows.txt").write_text("some words\n")
    code = cli.main(
        [
            "infer",
            "--gin_file=demo.gin",
            "--gin_file=runs/infer.gin",
            f"--gin.PROMPT_FILE='{folder}'",
            f"--input={tmp_path / 'rows.txt'}",
            f"--output={tmp_path / 'answers.jsonl'}",
        ]
    )
    error = capsys.readouterr().err
    assert code == 2
    assert "another method" in error
    assert "Traceback" not in error
