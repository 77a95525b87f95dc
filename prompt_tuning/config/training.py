"""The settings of the prompt, the optimiser and training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from prompt_tuning.config.setting import check, setting, settings

PromptInit = Literal["auto", "random_uniform", "sampled_vocab", "class_labels", "text", "file"]
_STEPS = 2**30  # steps are counted in 32 bits


@settings
class PromptConfig:
    """The prompt: a file of inits/ sets PROMPT_INIT and what belongs to it (paper 3.2)."""

    length: int = setting("PROMPT_LENGTH", "rows; 0 is the model as it is", default=100, at_least=0)
    # "auto": class labels if the task has them, else sampled vocabulary.
    init: PromptInit = setting(
        "PROMPT_INIT",
        "'auto', 'random_uniform', 'sampled_vocab', 'class_labels', 'text' or 'file'",
        default="auto",
    )
    class_labels: tuple[str, ...] = setting(
        "CLASS_LABELS", "words that begin the prompt; empty: the task's label words", default=()
    )
    text: str = setting("PROMPT_TEXT", "a text that begins the prompt", default="")
    file: str = setting(
        "PROMPT_FILE",
        "a prompt in any form (docs/prompts.md): begins it (train), or is it (eval, infer)",
        default="",
    )
    scale: float = setting(
        "PROMPT_SCALE", "random_uniform draws from [-PROMPT_SCALE, PROMPT_SCALE]", default=0.5
    )
    population: int = setting(
        "PROMPT_POPULATION",
        "sampled_vocab draws from this many most common pieces",
        default=5000,
        at_least=1,
    )
    method: str = setting(
        "PROMPT_METHOD",
        "how the prompt is parametrised and learned; a file of methods/ sets it",
        default="prompt_tuning",
    )
    settings: Mapping[str, Any] = setting(
        "PROMPT_SETTINGS",
        "the method's own settings, e.g. {'name': 1}; those left out have its defaults",
        default={},
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "settings", _store_settings(self.settings))
        check(
            self.init != "file" or bool(self.file),
            "PROMPT_INIT = 'file' needs PROMPT_FILE. Set it to a prompt folder or a .npy file.",
        )
        check(
            self.init != "text" or bool(self.text),
            "PROMPT_INIT = 'text' needs PROMPT_TEXT. Set it.",
        )
        # If a file or a text is set, the prompt begins as it.
        begins = [name for name in ("file", "text") if getattr(self, name)]
        check(
            len(begins) < 2,
            f"PROMPT_FILE ({self.file!r}) and PROMPT_TEXT ({self.text!r}) are both set: a prompt "
            "begins as one of them. Set the other to ''.",
        )
        if self.init == "auto" and begins:
            object.__setattr__(self, "init", begins[0])
        for name in begins:
            macro = f"PROMPT_{name.upper()}"
            check(
                self.init == name,
                f"{macro} is set ({getattr(self, name)!r}), but PROMPT_INIT is {self.init!r}, "
                f"which does not read it. Set PROMPT_INIT = '{name}' or {macro} = ''.",
            )


def _store_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with sorted names and lists as tuples, so that equal settings look equal.

    Raises:
      ConfigError: a name is not a string, or a value cannot be stored as JSON and read back.
    """

    def store(name: Any, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return tuple(store(name, item) for item in value)
        plain = value is None or type(value) in (bool, int, float, str)
        check(
            plain and (type(value) is not float or math.isfinite(value)),
            f"PROMPT_SETTINGS = {dict(values)}: {name!r} is {value!r}. Expected an integer, a "
            "finite number, a string, True, False, None, or a list of these.",
        )
        return value

    names = [name for name in values if not isinstance(name, str)]
    check(not names, f"PROMPT_SETTINGS = {dict(values)}: {names} are not strings. Quote the names.")
    return {name: store(name, values[name]) for name in sorted(values)}


@settings
class OptimizerConfig:
    """The optimiser: the update rule of the trainable part; the defaults are the paper's (3)."""

    name: Literal["adafactor", "adamw"] = setting(
        "OPTIMIZER", "'adafactor' or 'adamw'", default="adafactor"
    )
    learning_rate: float = setting(
        "LEARNING_RATE", "constant after the warm-up", default=0.3, above=0
    )
    warmup_steps: int = setting(
        "WARMUP_STEPS",
        "linear from 0; with 'rsqrt' the rate is constant up to this absolute step",
        default=0,
        at_least=0,
        below=_STEPS,
    )
    schedule: Literal["constant", "rsqrt"] = setting(
        "LEARNING_RATE_SCHEDULE",
        "or 'rsqrt', T5's: divided by sqrt(max(step, WARMUP_STEPS))",
        default="constant",
    )
    decay_rate: float = setting(
        "DECAY_RATE", "Adafactor: exponent of the second moment's decay", default=0.8, above=0
    )
    clipping_threshold: float = setting(
        "CLIPPING_THRESHOLD",
        "Adafactor: largest RMS of an update, before the learning rate",
        default=1.0,
        above=0,
    )
    weight_decay: float = setting(
        "WEIGHT_DECAY", "Adafactor: not multiplied by the learning rate", default=1e-5, at_least=0
    )
    multiply_by_parameter_scale: bool = setting(
        "MULTIPLY_BY_PARAMETER_SCALE",
        "Adafactor: the rate is relative to each matrix's RMS",
        default=False,
    )
    start_step: int | None = setting(
        "OPTIMIZER_START_STEP",
        "the step Adafactor starts at; None: the backbone's, as T5X does",
        default=None,
        at_least=0,
        below=_STEPS,
    )

    def __post_init__(self) -> None:
        check(
            self.schedule == "constant" or self.warmup_steps >= 1,
            f"WARMUP_STEPS = {self.warmup_steps}: LEARNING_RATE_SCHEDULE = 'rsqrt' divides by it. "
            "Expected at least 1.",
        )


@settings
class TrainConfig:
    """Training: how long, on which loss, and what is trainable."""

    train_steps: int | None = setting(
        "TRAIN_STEPS",
        "last step, counted as T5X does: with the backbone's own steps",
        default=None,
        at_least=1,
        below=_STEPS,
    )
    train_steps_relative: int | None = setting(
        "TRAIN_STEPS_RELATIVE",
        "steps of this run; set this one or TRAIN_STEPS",
        default=None,
        at_least=1,
        below=_STEPS,
    )
    trainable: Literal["prompt", "model"] = setting(
        "TRAINABLE",
        "'prompt', or 'model' for the baseline that trains every weight",
        default="prompt",
    )
    z_loss: float = setting(
        "Z_LOSS", "weight of log(Z)^2 in the loss", default=1e-4, at_least=0, below=1e30
    )
    label_smoothing: float = setting(
        "LABEL_SMOOTHING",
        "share of a target's probability that is spread over the vocabulary",
        default=0.0,
        at_least=0,
        below=1,
    )
    prompt_average: float = setting(
        "PROMPT_AVERAGE",
        "decay of a moving average of the prompt, which is evaluated and saved; 0: none",
        default=0.0,
        at_least=0,
        below=1,
    )
    input_noise: float = setting(
        "INPUT_NOISE",
        "in training, on the embedded input, in units of the embeddings' RMS; 0: none",
        default=0.0,
        at_least=0,
        below=1e30,
    )
    input_noise_weight: float = setting(
        "INPUT_NOISE_WEIGHT",
        "weight in the loss of KL(p without noise || p with INPUT_NOISE)",
        default=1.0,
        above=0,
        below=1e30,
    )
    random_seed: int = setting(
        "RANDOM_SEED",
        "of the order of the rows, the prompt's first value, dropout and INPUT_NOISE",
        default=0,
        at_least=0,
        below=2**32,
    )
    checkpoint_period: int | None = setting(
        "CHECKPOINT_PERIOD",
        "steps between saved run states; None: at every evaluation",
        default=None,
        at_least=1,
        below=_STEPS,
    )
    keep_checkpoints: int | None = setting(
        "KEEP_CHECKPOINTS",
        "checkpoints that a pre-training run keeps; None: all",
        default=2,
        at_least=1,
        below=_STEPS,
    )
    restore_optimizer: bool = setting(
        "RESTORE_OPTIMIZER",
        "pre-training: go on with the Adafactor moments of the checkpoint",
        default=False,
    )
    length_groups: int = setting(
        "LENGTH_GROUPS",
        "parts, by length, that a batch is cut into if that saves padding; 1: never",
        default=8,
        at_least=1,
        below=_STEPS,
    )
    microbatches: int = setting(
        "MICROBATCHES",
        "parts that it is cut into in any case: less memory, the same gradient",
        default=1,
        at_least=1,
        below=_STEPS,
    )

    def __post_init__(self) -> None:
        check(
            self.train_steps is None or self.train_steps_relative is None,
            f"TRAIN_STEPS ({self.train_steps}) and TRAIN_STEPS_RELATIVE "
            f"({self.train_steps_relative}) are both set. Set one: TRAIN_STEPS counts the "
            "backbone's own steps, TRAIN_STEPS_RELATIVE only this run's.",
        )
