"""The commands as Python functions, as a notebook calls them."""

import errno
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from IPython.core.interactiveshell import InteractiveShell
from tiny_models import CONFIG, random_params

import prompt_tuning as pt
from prompt_tuning import api
from prompt_tuning.checkpoints import t5x
from prompt_tuning.checkpoints.conversion import convert
from prompt_tuning.config import (
    ConfigError,
    DataConfig,
    EvalConfig,
    Experiment,
    PromptConfig,
    TrainConfig,
)
from prompt_tuning.evaluation.pictures import draw_curves
from prompt_tuning.runtime.signals import Stopped
from prompt_tuning.vocabularies.vocabulary import load_vocabulary


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("backbone") / "checkpoint_7")
    t5x.write_t5x(path, random_params(), 7)
    return path


@pytest.fixture(scope="module")
def experiment(checkpoint):
    def make(model_dir):
        return Experiment(
            model_dir=str(model_dir),
            initial_checkpoint_path=checkpoint,
            model=CONFIG,
            data=DataConfig(
                mixture_or_task_name="two_as",
                mixture_or_task_module="user_tasks",
                task_feature_lengths={"inputs": 16, "targets": 5},
                vocabulary="bytes",
                batch_size=8,
            ),
            prompt=PromptConfig(length=4, class_labels=("yes", "no")),
            train=TrainConfig(train_steps_relative=6),
            eval=EvalConfig(period=2, baselines=False, num_examples=16),
        )

    return make


@pytest.mark.slow  # two runs; test_safety.py and test_run_state.py have the parts
def test_an_interrupted_call_is_saved_and_the_same_call_goes_on(experiment, tmp_path):
    handler = signal.getsignal(signal.SIGINT)
    pictures = []

    def interrupt():
        pictures.append(draw_curves(tmp_path / "stopped"))
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Stopped, match="step 9 is saved"):
        pt.train(experiment(tmp_path / "stopped"), after_evaluation=interrupt)
    assert signal.getsignal(signal.SIGINT) is handler
    assert [path.exists() for path in pictures] == [True]
    stopped = pt.train(experiment(tmp_path / "stopped"))
    whole = pt.train(experiment(tmp_path / "whole"))
    np.testing.assert_array_equal(stopped.prompt, whole.prompt)


def test_what_the_system_refuses_is_the_users_to_mend():
    with pytest.raises(ConfigError, match="No space left on device"), api._as_command("train"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(KeyError), api._as_command("train"):  # a defect keeps its traceback
        raise KeyError("x")


@pytest.mark.slow
def test_tensorflow_is_quiet():
    """In a new process: importing TensorFlow, its first import, writes lines to standard error."""
    for function in ("train", "evaluate", "fit_to_devices"):
        # None has no settings: that is said once all is imported.
        text = f"import prompt_tuning as pt\ntry: pt.{function}(None)\nexcept Exception: pass"
        environment = {k: v for k, v in os.environ.items() if k != "TF_CPP_MIN_LOG_LEVEL"}
        done = subprocess.run(
            [sys.executable, "-c", text], env=environment, capture_output=True, text=True
        )
        assert (done.returncode, done.stderr) == (0, "")


def test_a_notebook_shows_one_message(capsys):
    shell = InteractiveShell()
    shell.run_cell("import prompt_tuning as pt\npt.load_prompt('nowhere')")
    said = capsys.readouterr().out
    assert said.startswith("error: ")
    assert "nowhere" in said
    assert "Traceback" not in said
    assert len(said.splitlines()) == 1


def test_the_sizes_of_a_checkpoint(checkpoint, tmp_path):
    folder = str(tmp_path / "hugging_face")
    convert(checkpoint, folder)
    for path in (checkpoint, folder):
        assert pt.model_config(path).embed_dim == CONFIG.embed_dim
    with pytest.raises(ConfigError, match="nowhere"):
        pt.model_config("./nowhere")


def test_a_vocabulary_of_hugging_face_is_downloaded_by_its_address():
    with pytest.raises(ConfigError, match="expected hf://organisation/name"):
        load_vocabulary("hf://t5-small")
