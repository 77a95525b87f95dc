"""Folders that version 1 wrote: a MODEL_DIR goes on, a prompt loads."""

import tarfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning import cli, load_prompt
from prompt_tuning.checkpoints import run_state
from prompt_tuning.config import gin_reader
from prompt_tuning.training import optim, step

FOLDERS = Path(__file__).parent / "fixtures" / "version_1.tar.gz"


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    with tarfile.open(FOLDERS) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def test_a_prompt_folder_loads(folders: Path):
    prompt, metadata = load_prompt(folders / "model_dir" / "prompts" / "step_006020")
    assert prompt.shape == (4, 128)
    assert metadata is not None
    assert (metadata.task, metadata.step) == ("tiny_mood", 6020)


def test_a_state_is_restored(folders: Path):
    """In the structure of today's training state, to the bits of the prompt saved beside it."""
    model_dir = folders / "model_dir"
    run = gin_reader.load([str(model_dir / "config.gin")]).run
    optimizer = optim.make_optimizer(run.optimizer, optim.PROMPT_RULES)
    prompt, _ = load_prompt(model_dir / "prompts" / "step_006020")
    like = step.init_state({"prompt": jnp.zeros(prompt.shape)}, optimizer, 0)
    with run_state.RunStateStore(model_dir / "checkpoints", read_only=True) as store:
        state, _ = store.restore(like)
    assert int(state.step) == 6020
    np.testing.assert_array_equal(state.trainable["prompt"], prompt)
    assert any(np.asarray(leaf).any() for leaf in jax.tree.leaves(state.opt_state))


@pytest.mark.slow
def test_a_model_dir_goes_on(folders: Path):
    model_dir = folders / "model_dir"
    code = cli.main(
        [
            "train",
            f"--gin_file={model_dir / 'config.gin'}",
            f"--gin.MODEL_DIR='{model_dir}'",
            "--gin.TRAIN_STEPS_RELATIVE=30",
        ]
    )
    assert code == 0
    assert run_state.saved_steps(model_dir / "checkpoints") == [6020, 6030]
    # Ten steps of version 1 from the same state; processors round differently.
    expected, _ = load_prompt(folders / "next_prompt")
    found, _ = load_prompt(model_dir / "prompts" / "step_006030")
    before, _ = load_prompt(model_dir / "prompts" / "step_006020")
    assert np.abs(found - expected).max() < 1e-2 * np.abs(expected - before).max()
