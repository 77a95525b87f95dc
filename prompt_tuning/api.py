"""The commands as Python functions, without gin: `train`, `evaluate`, `fit_to_devices`, ...

    import prompt_tuning as pt
    from prompt_tuning.config import DataConfig, Experiment, PromptConfig, TrainConfig

    result = pt.train(
        Experiment(
            model_dir="runs/mood",
            initial_checkpoint_path="tiny",
            model=pt.model_config("tiny"),
            data=DataConfig(
                mixture_or_task_name="tiny_mood",
                task_feature_lengths={"inputs": 64, "targets": 8},
                vocabulary="tiny",
            ),
            prompt=PromptConfig(length=20),
            train=TrainConfig(train_steps_relative=600),
        )
    )
    prompt, metadata = pt.load_prompt(result.model_dir / "prompts/best")

Heavy modules are imported when a function is called.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from jaxtyping import Float

from prompt_tuning.config import TINY, ConfigError, EvalRun, Experiment, FileTask, ModelConfig

if TYPE_CHECKING:
    import numpy as np

    from prompt_tuning.evaluation.matrix import Matrix
    from prompt_tuning.model.prompt import Prompt
    from prompt_tuning.prompts.prompt_file import PromptMetadata
    from prompt_tuning.training.run import TrainResult


def model_config(name: str) -> ModelConfig:
    """The sizes of a published model, such as "base" (T5 1.1), "t5_1_0_base" or "mt5_small".

    "tiny" is the backbone that is bundled with the package. A name with a slash is a checkpoint,
    whose sizes are read: "gs://.../checkpoint_1100000", "hf://google/flan-t5-small", "./folder".

    Raises:
      ConfigError: there is no model of that name, or the checkpoint cannot be read.

    >>> model_config("xl").embed_dim
    2048
    """
    from prompt_tuning.checkpoints import load
    from prompt_tuning.config import gin_reader
    from prompt_tuning.world import assets

    if "/" in name:
        return load.read_model(name)
    return assets.TINY_CONFIG if name == TINY else gin_reader.read_model(name)


def train(
    experiment: Experiment, *, after_evaluation: Callable[[], object] | None = None
) -> TrainResult:
    """The result of an experiment, run as by `t5x train`; see `training.loop.train`.

    `after_evaluation` is called after each evaluation, for instance to draw the curves so far.

    Raises:
      ConfigError: something does not fit, or the system refuses it (a full disk, no memory).
      Stopped: a KeyboardInterrupt, once the state is saved; the same call goes on from there.
    """
    with _as_command("train"):  # also for the imports, some of which import TensorFlow
        from prompt_tuning.config import gin_reader
        from prompt_tuning.pretraining.run import find_objective
        from prompt_tuning.training import loop

        return loop.train(
            experiment,
            objective=find_objective(experiment),
            config_text=gin_reader.to_gin(experiment),
            after_evaluation=after_evaluation,
        )


def evaluate(run: EvalRun) -> Matrix:
    """The scores of prompts on tasks, as by `t5x eval`; see `evaluation.matrix.run_eval`."""
    with _as_command("eval"):
        from prompt_tuning.config import gin_reader
        from prompt_tuning.evaluation import matrix

        return matrix.run_eval(run, config_text=gin_reader.to_gin(run))


def fit_to_devices(experiment: Experiment) -> Experiment:
    """The experiment with DTYPE, MICROBATCHES and a length of inputs that fit this machine.

    Compiles its largest step; prints what fits, and the time of the run if the device is known.

    Raises:
      ConfigError: nothing fits: the backbone is too large for these devices.
    """
    with _as_command("plan"):
        from prompt_tuning.planning import fit

        fitting, description = fit.fit_to_devices(experiment)
        print(description, flush=True)
        return fitting


@contextlib.contextmanager
def _as_command(name: str) -> Iterator[None]:
    """A block that runs as a command does: quiet imports, signals, and refusals in one message."""
    from prompt_tuning.runtime import crash, signals, startup
    from prompt_tuning.tasks.tensorflow_import import import_tensorflow

    startup.prepare()
    with signals.handled(name, may_exit=False):
        try:
            import_tensorflow()
            yield
        except Exception as error:
            refusal = crash.describe_refusal(error, continues=name == "train")
            if refusal is None or isinstance(error, ConfigError):
                raise
            raise ConfigError(refusal) from error


def read_inputs(path: str, files: FileTask) -> list[str]:
    """The texts of a file's rows, in order, as training on `files` and `t5x infer` make them.

    They know where their fields are, for a predictor with `truncate="longest_field"`.

    Raises:
      ConfigError: the file is malformed, or a row lacks a field that INPUT_TEMPLATE names.
    """
    from prompt_tuning.tasks import file_examples, file_reader

    source = file_reader.read_source(path, file_examples.field_names(files), files)
    return [*file_examples.fill_inputs(file_examples.rows_to_answer(source, files), files)]


def load_prompt(
    path: str | os.PathLike[str],
) -> tuple[Float[np.ndarray, "P D"] | Prompt, PromptMetadata | None]:
    """The rows of a prompt, float32[P, D], and its metadata; None if it has none.

    A prompt of keys, values or memory is returned as a `Prompt`.

    `path` is a prompt folder, a .npy file, or any other form that docs/prompts.md names.

    Raises:
      ConfigError: there is no prompt, or it is damaged.
    """
    import numpy as np

    from prompt_tuning.prompts import prompt_file
    from prompt_tuning.prompts.rows import other_fields

    prompt, metadata = prompt_file.load_prompt(path)
    return (prompt if other_fields(prompt) else np.asarray(prompt.rows)), metadata
