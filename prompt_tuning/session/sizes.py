"""Sizes of the model that a gin file leaves to the checkpoint (models/from_checkpoint.gin).

The commands resolve them here after `config/` has read the settings.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from prompt_tuning.checkpoints import architecture, load
from prompt_tuning.config import ConfigError, EvalRun, Experiment, InferRun

if TYPE_CHECKING:
    from prompt_tuning.config.gin_reader import Loaded

RunT = TypeVar("RunT", Experiment, EvalRun, InferRun)


def resolve_sizes(loaded: Loaded[RunT]) -> Loaded[RunT]:
    """The settings with the checkpoint's sizes in place of "from_checkpoint".

    Raises:
      ConfigError: no checkpoint is named, it cannot be read, or a field is not a size.
    """
    if not loaded.open_sizes:
        return loaded
    for name in loaded.open_sizes:
        if name not in architecture.SIZES and name not in architecture.FORM:
            raise ConfigError(
                f"{name.upper()} = 'from_checkpoint': a checkpoint does not contain it. Give a "
                "value."
            )
    macro = "initial_checkpoint_path" if loaded.kind is Experiment else "checkpoint_path"
    spec = loaded.fields[f"{loaded.kind.__name__}.{macro}"]
    if not isinstance(spec, str):
        raise ConfigError(
            "the model's sizes are 'from_checkpoint', but no checkpoint is named. Set "
            "INITIAL_CHECKPOINT_PATH (t5x train) or CHECKPOINT_PATH."
        )
    model = load.read_model(spec)
    return loaded.fill_sizes({name: getattr(model, name) for name in loaded.open_sizes})
