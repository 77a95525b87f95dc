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
from prompt_tuning.model.prompt import Prompt, other_fields
from prompt_tuning.prompts.convert import convert_prompt
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
        ({"peft_type": "CARTRIDGE"}, "'CARTRIDGE'"),
        ({"peft_type": "PREFIX_TUNING"}, r"\(6, 8\).*'num_layers': None"),
        (
            {"peft_type": "MULTITASK_PROMPT_TUNING", "num_transformer_submodules": 2},
            "num_transformer_submodules = 1, found 2",
        ),
        ({"peft_type": "MULTITASK_PROMPT_TUNING"}, "'prefix_task_cols'"),
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


def test_the_rows_of_p_tuning(folder: Path, tmp_path: Path) -> None:
    change(folder, peft_type="P_TUNING", encoder_reparameterization_type="MLP")
    np.testing.assert_array_equal(read_prompt(folder).prompt.rows, PROMPT)
    convert_prompt(folder, tmp_path / "ours", "ours")
    metadata = read_prompt(tmp_path / "ours").metadata
    assert metadata is not None
    assert metadata.method == "p_tuning"


def write_prefix(folder: Path, layers: int) -> np.ndarray:
    """An adapter of two heads and four positions, and its array as PEFT takes it apart."""
    array = np.random.default_rng(1).normal(size=(4, 2 * layers * 6)).astype(np.float32)
    safetensors.numpy.save_file({"prompt_embeddings": array}, folder / WEIGHTS)
    sizes = {"num_virtual_tokens": 4, "num_layers": layers, "num_attention_heads": 2}
    change(folder, peft_type="PREFIX_TUNING", token_dim=6, **sizes)
    slots = array.reshape(4, 2 * layers, 2, 3)
    return np.concatenate([slots, slots], axis=1).transpose(1, 0, 2, 3)


@pytest.mark.parametrize("layers", [1, 3, 4])
def test_a_prefix_is_the_decoders_with_one_for_each_layer(
    folder: Path, tmp_path: Path, layers: int
) -> None:
    """PEFT gives each layer the next four slots, the last two of which it empties."""
    slots = write_prefix(folder, layers)
    prompt = read_prompt(folder).prompt
    expected = [slots[4 * layer : 4 * layer + 2] for layer in range(layers)]
    np.testing.assert_array_equal(prompt.decoder, expected)
    assert other_fields(prompt) == ["decoder"]
    assert not prompt.rows.size
    lines = convert_prompt(folder, tmp_path / "ours", "ours")
    assert ("layers l and l + 2 have the same" in lines[-1]) == (layers == 4)
    convert_prompt(tmp_path / "ours", tmp_path / "again", "peft")
    again = read_prompt(tmp_path / "again")
    np.testing.assert_array_equal(again.prompt.decoder, expected)
    assert again.metadata is not None
    assert again.metadata.method == "prefix_tuning"
    if layers % 2:  # all slots are used
        assert (tmp_path / "again" / WEIGHTS).read_bytes()[-layers * 192 :] == (
            folder / WEIGHTS
        ).read_bytes()[-layers * 192 :]


def test_a_prefix_that_peft_cannot_have(tmp_path: Path) -> None:
    prefix = np.random.default_rng(0).normal(size=(4, 2, 5, 2, 3)).astype(np.float32)
    rows = np.zeros((0, 6), np.float32)
    for name, fields, message in (
        ("layers", {"decoder": prefix}, "decoder layer 0 than in layer 2"),
        ("encoder", {"encoder": prefix}, "the prompt has encoder"),
        ("both", {"decoder": prefix, "cross": prefix}, "the prompt has decoder, cross"),
    ):
        save_prompt(tmp_path / name, Prompt(rows, **fields), PromptMetadata())
        with pytest.raises(ConfigError, match=message):
            convert_prompt(tmp_path / name, tmp_path / "peft", "peft")
        assert not (tmp_path / "peft").exists()
        with pytest.raises(ConfigError, match="Expected rows alone"):
            convert_prompt(tmp_path / name, tmp_path / "x.npy", "npy")


def write_tasks(folder: Path, tasks: int) -> list[np.ndarray]:
    """An adapter of several tasks, and the rows of each."""
    rng = np.random.default_rng(2)
    cols, rows = rng.normal(size=(tasks, 6, 2)), rng.normal(size=(tasks, 2, 8))
    tensors = {"prompt_embeddings": PROMPT, "prefix_task_cols": cols, "prefix_task_rows": rows}
    tensors = {name: np.asarray(value, np.float32) for name, value in tensors.items()}
    safetensors.numpy.save_file(tensors, folder / WEIGHTS)
    change(folder, peft_type="MULTITASK_PROMPT_TUNING", num_transformer_submodules=1)
    return [PROMPT * (a @ b) for a, b in zip(cols, rows, strict=True)]


def test_each_task_of_an_adapter_is_a_prompt(folder: Path, tmp_path: Path) -> None:
    for number, rows in enumerate(write_tasks(folder, 3)):
        convert_prompt(folder, tmp_path / f"{number}", "ours", task=number)
        stored = read_prompt(tmp_path / f"{number}").prompt.rows
        np.testing.assert_allclose(stored, rows, rtol=1e-5, atol=1e-6)
    for task in (None, 3, -1):
        with pytest.raises(ConfigError, match=r"3 tasks.*from 0 to 2.*--task=0"):
            read_prompt(folder, task)
    (rows,) = write_tasks(folder, 1)
    np.testing.assert_allclose(read_prompt(folder).prompt.rows, rows, rtol=1e-5, atol=1e-6)
    write_peft(folder, as_prompt(PROMPT))
    with pytest.raises(ConfigError, match="--task=0"):
        read_prompt(folder, 0)


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
