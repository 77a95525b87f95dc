"""Folders that version 1 wrote: a MODEL_DIR goes on, a prompt loads."""

import tarfile
from pathlib import Path

import numpy as np
import pytest

from prompt_tuning import cli, load_prompt
from prompt_tuning.checkpoints import run_state

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
