"""Whatever form a prompt has, training, scoring, answering and rows that name it take it."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_models import as_prompt

from prompt_tuning import Predictor, cli, load_prompt, model_config
from prompt_tuning.checkpoints.t5x import write_t5x
from prompt_tuning.config import ConfigError
from prompt_tuning.model import t5
from prompt_tuning.prompts.convert import convert_prompt
from prompt_tuning.prompts.prompt_file import PromptMetadata, check_prompt, save_prompt
from prompt_tuning.world.assets import TINY_CONFIG

ROWS = 20 * np.random.default_rng(0).standard_normal((5, 128)).astype(np.float32)
TASK = ["--gin_file=demo.gin", "--gin.TASK_FEATURE_LENGTHS={'inputs': 32, 'targets': 4}"]


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """One prompt in every form that there is."""
    folder = tmp_path_factory.mktemp("forms")
    ours = folder / "ours"
    save_prompt(
        ours, as_prompt(ROWS), PromptMetadata(task="tiny_mood", label_words=("glad", "sad"))
    )
    convert_prompt(ours, folder / "p.npy", "npy")
    convert_prompt(ours, folder / "numpy_checkpoints" / "encoder.prompt.prompt.prompt", "npy")
    convert_prompt(ours, folder / "peft", "peft", dead_half=True)
    convert_prompt(ours, folder / "checkpoint_9", "t5x", checkpoint="tiny")
    names = ["ours", "p.npy", "numpy_checkpoints", "numpy_checkpoints/encoder.prompt.prompt.prompt"]
    names += ["peft", "checkpoint_9", "checkpoint_9/target.encoder.prompt.prompt.prompt"]
    return [str(folder / name) for name in names]


def test_rows_and_the_flag_name_any_form(forms: list[str], tmp_path: Path) -> None:
    rows, answers = tmp_path / "rows.jsonl", tmp_path / "answers.jsonl"
    text = "lovely soup. we loved the soup."
    rows.write_text("".join(json.dumps({"inputs": text, "prompt": f}) + "\n" for f in forms[1:]))
    with rows.open("a") as file:
        file.write(json.dumps({"inputs": text}) + "\n")
    arguments = ["infer", *TASK, "--gin_file=runs/infer.gin", f"--gin.PROMPT_FILE='{forms[0]}'"]
    arguments += ["--gin.EVAL_METHOD='generate'"]  # a bare array knows no label words
    assert cli.main([*arguments, f"--input={rows}", f"--output={answers}"]) == 0
    answered = [json.loads(line) for line in answers.read_text().splitlines()]
    assert len(answered) == len(forms)
    assert len({(answer["prediction"], answer["score"]) for answer in answered}) == 1


def test_evaluation_takes_any_form(forms: list[str], tmp_path: Path) -> None:
    forms = [forms[1], forms[4], forms[5]]  # numpy's, PEFT's, T5X's
    arguments = [
        "eval",
        *TASK,
        "--gin_file=runs/eval.gin",
        f"--gin.EVAL_OUTPUT_DIR='{tmp_path / 'scores'}'",
        f"--gin.PROMPT_FILE={forms!r}",
        "--gin.EVAL_METHOD='rank'",
        "--gin.EVALUATOR_NUM_EXAMPLES=16",
        "--gin.EVAL_BASELINES=False",
    ]
    assert cli.main(arguments) == 0
    lines = (tmp_path / "scores" / "metrics.jsonl").read_text().splitlines()
    scores = {line["prompt"]: line["value"] for line in map(json.loads, lines)}
    assert set(scores) == set(forms)
    assert len(set(scores.values())) == 1


def test_training_goes_on_from_the_prompt_of_a_checkpoint(forms: list[str], tmp_path: Path) -> None:
    arguments = [
        *("train", *TASK, "--gin_file=inits/from_file.gin", "--gin.PROMPT_LENGTH=5"),
        f"--gin.PROMPT_FILE='{forms[5]}'",
        f"--gin.MODEL_DIR='{tmp_path / 'run'}'",
        *("--gin.TRAIN_STEPS_RELATIVE=1", "--gin.EVAL_METHOD='rank'"),
        *("--gin.EVALUATOR_NUM_EXAMPLES=8", "--gin.EVAL_BASELINES=False"),
    ]
    assert cli.main(arguments) == 0
    prompt = load_prompt(tmp_path / "run" / "prompts" / "best")[0]
    assert 0 < np.abs(prompt - ROWS).max() < 1  # one step away


def test_the_predictor_takes_any_form(forms: list[str]) -> None:
    tiny = model_config("tiny")
    predictor = Predictor.from_checkpoint(
        "tiny", tiny, "tiny", dict(zip("abcdefg", forms, strict=True))
    )
    said = predictor.score(["lovely soup."] * 7, ["glad", "sad"], list("abcdefg"))
    assert len({row.tobytes() for row in said}) == 1


def test_a_prompt_of_the_release(tmp_path: Path) -> None:
    """The three that exist are float32[100, 768], for T5 1.1 base: other sizes refuse them."""
    np.save(tmp_path / "sst2.npy", np.full((100, 768), 40, np.float32))
    rows, metadata = load_prompt(tmp_path / "sst2.npy")
    prompt = as_prompt(rows)
    check_prompt(
        as_prompt(prompt), metadata, shape=(100, model_config("base").embed_dim), where="sst2.npy"
    )
    for size in ("small", "large", "tiny"):
        width = model_config(size).embed_dim
        message = rf"\(100, 768\).*\(100, {width}\)"
        with pytest.raises(ConfigError, match=message):
            check_prompt(prompt, metadata, shape=(100, width), where="sst2.npy")


def test_a_prompt_of_the_release_is_refused_by_the_tiny_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "sst2.npy", np.full((100, 768), 40, np.float32))
    (tmp_path / "rows").write_text("a\n")
    arguments = [*TASK, f"--gin.PROMPT_FILE='{tmp_path / 'sst2.npy'}'"]
    places = [f"--input={tmp_path / 'rows'}", f"--output={tmp_path / 'answers'}"]
    assert cli.main(["infer", "--gin_file=runs/infer.gin", *arguments, *places]) == 2
    assert "(any, 128)" in capsys.readouterr().err


@pytest.mark.slow  # a second run; the one above trains on from another form
def test_training_goes_on_from_a_prompt_of_the_release(tmp_path: Path) -> None:
    """On a model as wide as T5 1.1 base, and small otherwise."""
    small = {"num_encoder_layers": 1, "num_decoder_layers": 1, "num_heads": 1, "mlp_dim": 8}
    config = dataclasses.replace(TINY_CONFIG, embed_dim=768, **small)
    write_t5x(tmp_path / "checkpoint_0", t5.init_params(config, jax.random.key(0)), 0)
    rows = 40 * np.random.default_rng(0).standard_normal((100, 768)).astype(np.float32)
    np.save(tmp_path / "sst2.npy", rows)
    sizes = {**small, "embed_dim": 768}
    arguments = [
        *("train", *TASK, "--gin_file=inits/from_file.gin", "--gin.PROMPT_LENGTH=100"),
        *(f"--gin.{name.upper()}={value}" for name, value in sizes.items()),
        f"--gin.INITIAL_CHECKPOINT_PATH='{tmp_path / 'checkpoint_0'}'",
        f"--gin.PROMPT_FILE='{tmp_path / 'sst2.npy'}'",
        f"--gin.MODEL_DIR='{tmp_path / 'run'}'",
        *("--gin.TRAIN_STEPS_RELATIVE=1", "--gin.BATCH_SIZE=8", "--gin.EVAL_METHOD='rank'"),
        *("--gin.EVALUATOR_NUM_EXAMPLES=8", "--gin.EVAL_BASELINES=False"),
    ]
    assert cli.main(arguments) == 0
    prompt, metadata = load_prompt(tmp_path / "run" / "prompts" / "best")
    assert metadata is not None
    assert metadata.step == 1
    assert 0 < np.abs(prompt - rows).max() < 1 + 40 * 1e-3
