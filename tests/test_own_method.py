"""docs/your_own_method.md, block by block."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from prompt_tuning import Predictor, cli, model_config
from prompt_tuning.config import ConfigError
from prompt_tuning.methods.table import find_method

DOC = (Path(__file__).resolve().parents[1] / "docs" / "your_own_method.md").read_text()
METHOD, TRIAL = re.findall(r"```python\n(.*?)```", DOC, flags=re.DOTALL)
COMMANDS = [
    shlex.split(line)
    for block in re.findall(r"```bash\n(.*?)```", DOC, flags=re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "my_module.py").write_text(METHOD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    sys.modules.pop("my_module", None)


def test_the_method_is_about_as_short_as_the_page_promises():
    code = [line for line in METHOD.splitlines() if line.strip()]
    assert len(code) <= 35


def test_the_method_by_itself(folder):
    exec(compile(TRIAL, "docs/your_own_method.md", "exec"), {})


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[-1])
def test_the_commands_are_read(folder, command, capsys):
    """Every setting is known, those of the method too; behind `slow`, they train."""
    assert cli.main(["show-config", *command[2:]]) == 0
    assert "my_module.METHOD" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[-1])
def test_the_commands_train(folder, command):
    train_briefly(command)
    (adapter,) = (folder / "short" / "prompts").glob("*4/adapter_model.safetensors")
    assert adapter.stat().st_size > 0


def train_briefly(command):
    """A few steps of what the page runs to its end."""
    program, *arguments = command
    assert program == "t5x"
    less = ["TRAIN_STEPS_RELATIVE=4", "EVAL_PERIOD=4", "EVALUATOR_NUM_EXAMPLES=8"]
    less += ["EVAL_BASELINES=False", "MODEL_DIR='short'"]
    assert cli.main([*arguments, *(f"--gin.{setting}" for setting in less)]) == 0


@pytest.mark.slow
def test_the_prompt_is_used_without_the_module(folder):
    """By `t5x eval` and `t5x infer`, with the settings of the run, and by the Predictor."""
    train_briefly(COMMANDS[1])
    (folder / "my_module.py").unlink()
    sys.modules.pop("my_module")
    with pytest.raises(ConfigError):
        find_method("my_module.METHOD")
    settings = ["--gin_file=short/config.gin", "--gin.PROMPT_FILE='short/prompts/best'"]
    output = "--gin.EVAL_OUTPUT_DIR='scores'"
    assert cli.main(["eval", *settings, "--gin_file=runs/eval.gin", output]) == 0
    (run, rows) = (
        next((folder / name / "inference_eval").glob("tiny_mood-[0-9]*.jsonl")).read_text()
        for name in ("short", "scores")
    )
    assert rows == run

    texts = [json.loads(line)["input"]["inputs_pretokenized"] for line in rows.splitlines()]
    (folder / "texts.txt").write_text("\n".join(texts))
    files = ["--input=texts.txt", "--output=answers.jsonl"]
    assert cli.main(["infer", *settings, "--gin_file=runs/infer.gin", *files]) == 0
    answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    prompts = {"own": folder / "short" / "prompts" / "best"}
    lengths = {"max_input_length": 64, "max_target_length": 8}
    config = model_config("tiny")
    predictor = Predictor.from_checkpoint("tiny", config, "tiny", prompts, **lengths)
    assert [answer["prediction"] for answer in answers] == predictor.generate(texts, "own")


def test_a_misspelt_setting_is_refused(folder):
    arguments = [*COMMANDS[0][1:], "--gin.PROMPT_SETTINGS={'nois': 0.1}"]
    assert cli.main(arguments) == 2
    assert not (folder / "runs").exists()
