"""`kill -9` at any moment, and the same command again: the prompt of an uninterrupted run."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tiny_models import CONFIG, random_params

from prompt_tuning.checkpoint.prompt_file import load_prompt
from prompt_tuning.checkpoint.t5x import write_t5x
from prompt_tuning.config import to_dict

HERE = Path(__file__).parent
STEPS = 60


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a backbone and the settings of a run that saves every third step."""
    folder = tmp_path_factory.mktemp("kill")
    write_t5x(folder / "checkpoint_9", random_params(), 9)
    macros = {
        **{name.upper(): value for name, value in to_dict(CONFIG).items()},
        "DROPOUT_RATE": 0.1,
        "VOCABULARY": "bytes",
        "MIXTURE_OR_TASK_NAME": "both_as",
        "MIXTURE_OR_TASK_MODULE": "user_tasks",
        "TASK_FEATURE_LENGTHS": {"inputs": 16, "targets": 5},
        "BATCH_SIZE": 8,
        "PROMPT_LENGTH": 4,
        "EVAL_PERIOD": 6,
        "CHECKPOINT_PERIOD": 3,
        "TRAIN_STEPS_RELATIVE": STEPS,
        "INITIAL_CHECKPOINT_PATH": "checkpoint_9",
    }
    text = "".join(f"{name} = {value!r}\n" for name, value in macros.items())
    (folder / "small.gin").write_text(text)
    return folder


def start(work: Path, model_dir: str) -> subprocess.Popen:
    files = ["--gin_file=runs/prompt_tune.gin", "--gin_file=small.gin"]
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "prompt_tuning.cli", "train"),
            *files,
            f"--gin.MODEL_DIR={model_dir!r}",
        ],
        cwd=work,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)])},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(work: Path, model_dir: str) -> np.ndarray:
    process = start(work, model_dir)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    prompt, _ = load_prompt(work / model_dir / "prompts" / f"step_{9 + STEPS:06d}")
    return prompt


@pytest.fixture(scope="module")
def straight(work):
    return finish(work, "straight")


def saved_steps(folder: Path) -> list[int]:
    return [int(p.name) for p in (folder / "checkpoints").glob("*") if p.name.isdigit()]


def test_killed_behind_a_saved_state(work, straight):
    process = start(work, "killed")
    deadline = time.monotonic() + 120
    while max(saved_steps(work / "killed"), default=0) < 9 + 12:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert max(saved_steps(work / "killed")) < 9 + STEPS
    np.testing.assert_array_equal(finish(work, "killed"), straight)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(10))
def test_killed_at_random_moments(work, straight, number):
    """At start-up, within a step, a save or an evaluation; up to three times a run."""
    draw = random.Random(number)
    for _ in range(3):
        process = start(work, f"random_{number}")
        time.sleep(draw.uniform(1.0, 16.0))
        process.kill()
        process.communicate()
    np.testing.assert_array_equal(finish(work, f"random_{number}"), straight)
