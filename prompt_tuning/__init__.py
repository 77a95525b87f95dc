"""Prompt tuning for frozen T5 models: `train`, `load_prompt`, `Predictor`, and the configuration.

Names are loaded when they are used, so that `import prompt_tuning.model` and
`import prompt_tuning.serving` stay free of TensorFlow.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prompt_tuning.api import (
        evaluate,
        fit_to_devices,
        load_prompt,
        model_config,
        read_inputs,
        train,
    )
    from prompt_tuning.serving.predictor import Predictor

__all__ = [
    "Predictor",
    "evaluate",
    "fit_to_devices",
    "load_prompt",
    "model_config",
    "read_inputs",
    "train",
]
__version__ = "1.0.0.dev0"


def __getattr__(name: str) -> Any:
    import importlib

    if name == "Predictor":
        return importlib.import_module("prompt_tuning.serving.predictor").Predictor
    if name in __all__:
        return getattr(importlib.import_module("prompt_tuning.api"), name)
    raise AttributeError(f"module 'prompt_tuning' has no attribute {name!r}")
