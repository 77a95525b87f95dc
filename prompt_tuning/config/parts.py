"""Parts of a configuration that are read where no experiment is: a task of files, a corpus.

`config.py` makes experiments of them, and hands on the names that others use. Plain Python.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from beartype import BeartypeConf, beartype

# An int is accepted where a float is asked for (PEP 484's numeric tower).
_checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
_T = TypeVar("_T")

LabelWords = tuple[str, ...] | Mapping[str | int | bool, str]
Objective = Literal["task", "span_corruption", "prefix_lm"]


def typed(cls: type[_T]) -> type[_T]:
    """A dataclass whose types are checked when it is made; lists are tuples, nothing else is bent.

    Gin hands over what stands in its file, and `['gelu', 'linear']` may stand there.
    """
    checked = _checked(cls)
    make = checked.__init__

    @functools.wraps(make)
    def init(self: Any, **values: Any) -> None:
        make(self, **{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})

    checked.__init__ = init
    return checked


class ConfigError(ValueError):
    """A mistake in what the user asked for: the command line prints it and exits with 2."""


def check(ok: bool, message: str) -> None:
    """Raises a ConfigError with the message if something is not as it should be."""
    if not ok:
        raise ConfigError(message)


def store_settings(macro: str, settings: Mapping[str, Any]) -> dict[str, Any]:
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
            f"{macro} = {dict(settings)}: {name!r} is {value!r}. Expected an integer, a finite "
            "number, a string, True, False, None, or a list of these.",
        )
        return value

    names = [name for name in settings if not isinstance(name, str)]
    check(not names, f"{macro} = {dict(settings)}: {names} are not strings. Put names in quotes.")
    return {name: store(name, settings[name]) for name in sorted(settings)}


@typed
@dataclasses.dataclass(frozen=True, kw_only=True)
class FileTask:
    """A task of the user's own: rows of CSV, TSV or JSON lines, as text. Empty: there is none.

    `label_words` maps what the target field holds to the words that the model answers with, or
    lists the words in the order of integer labels; empty, the target field is the answer itself.
    """

    name: str = ""  # "": as MIXTURE_OR_TASK_NAME
    train_file: str = ""
    eval_file: str = ""  # "": `eval_share` of the training file
    eval_share: float = 0.1  # held out: the same rows every time, and no text on both sides
    input_template: str = "{text}"  # {field} stands for what a row holds there, {{ for a brace
    target_field: str = "label"
    label_words: LabelWords = ()
    delimiter: str = ""  # "": a tab in .tsv files, else a comma
    quote_char: str = '"'  # "": quotes are characters like any other

    def __post_init__(self) -> None:
        check(
            0.0 < self.eval_share < 1.0,
            f"EVAL_SHARE must lie between 0 and 1, found {self.eval_share}.",
        )
        check(bool(self.target_field), "TARGET_FIELD is empty: name the column of the answers.")
        for macro, mark in (("DELIMITER", self.delimiter), ("QUOTE_CHAR", self.quote_char)):
            check(
                len(mark) <= 1 and mark not in ("\n", "\r"),
                f"{macro} must be one character or '', found {mark!r}.",
            )
        if isinstance(self.label_words, Mapping):
            # As text, so that they can be stored as JSON: `1` and `'1'` are one label.
            words = {label_key(value): word for value, word in self.label_words.items()}
            check(
                len(words) == len(self.label_words),
                f"LABEL_WORDS names a label twice: {dict(self.label_words)}.",
            )
            object.__setattr__(self, "label_words", words)
        words = self.words
        check(
            len(words) != 1 and all(words),
            f"LABEL_WORDS must name at least two words, none of them empty, found {words}.",
        )
        check(
            isinstance(self.label_words, Mapping) or len(words) == len(self.label_words),
            f"LABEL_WORDS names a word twice: {self.label_words}.",
        )

    @property
    def given(self) -> bool:
        """Whether there is such a task at all."""
        return bool(self.train_file or self.eval_file)

    @property
    def words(self) -> tuple[str, ...]:
        """The words the model answers with, in the order of the classes, each once."""
        words = self.label_words
        return tuple(dict.fromkeys(words.values() if isinstance(words, Mapping) else words))


def label_key(value: Any) -> str:
    """A label as text, however it is written: JSON's true and 1.0 are CSV's `true` and `1`.

    >>> label_key(True), label_key(1.0), label_key(2), label_key(" good ")
    ('true', '1', '2', 'good')
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()


NO_FILES = FileTask()


@typed
@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoding:
    """How answers are generated, but for their number; the names are those of T5X's functions."""

    # A beam of one is greedy; "transformers_beam" searches by the rules of Hugging Face's library.
    method: Literal["beam", "transformers_beam", "sample"] = "beam"
    alpha: float = 0.6  # beams: exponent of the length penalty
    temperature: float = 1.0  # sample: logits are divided by it; 0 takes the most probable token
    topk: int = 0  # sample: only from so many most probable tokens; 0: from all
    topp: float = 0.0  # sample: only from the most probable tokens with this share; 0: from all
    rescale_log_probs: bool = False  # sample: scores of what is drawn from, not of the model
    seed: int = 0  # sample: with it and its number, a row always draws the same

    def __post_init__(self) -> None:
        check(self.alpha >= 0, f"ALPHA must be >= 0, found {self.alpha}.")
        check(self.temperature >= 0, f"TEMPERATURE must be >= 0, found {self.temperature}.")
        check(self.topk >= 0, f"TOPK must be >= 0, found {self.topk}.")
        check(0.0 <= self.topp <= 1.0, f"TOPP must lie in [0, 1], found {self.topp}.")
        check(0 <= self.seed < 2**32, f"DECODE_SEED must lie in [0, 2**32), found {self.seed}.")
        check(
            not (self.topk and self.topp),
            f"TOPK ({self.topk}) and TOPP ({self.topp}) are both set: give at most one, as in T5X.",
        )
        of_samples = ("temperature", "topk", "topp", "rescale_log_probs", "seed")
        for name in ("alpha",) if self.method == "sample" else of_samples:
            value, default = getattr(self, name), type(self).__dataclass_fields__[name].default
            macro = "DECODE_SEED" if name == "seed" else name.upper()
            other = "beam" if self.method == "sample" else "sample"
            check(
                value == default,
                f"{macro} is set ({value}), but DECODING is {self.method!r}, which does not read "
                f"it. Set DECODING = {other!r}, or leave it out.",
            )


BEAM = Decoding()


@typed
@dataclasses.dataclass(frozen=True, kw_only=True)
class CorpusConfig:
    """What a pre-training run reads, and what it hides of it; "task" is a run on a task's rows."""

    objective: Objective = "task"
    files: str | tuple[str, ...] = ()  # text files, or patterns of them
    eval_files: str | tuple[str, ...] = ()  # (): some documents of `files` are held out
    tfds: str = ""  # a TFDS data set, "c4/en:3.1.0"
    field: str = "text"  # of TFDS rows and JSON lines
    documents: Literal["paragraph", "line", "file"] = "paragraph"  # what a document is in a file
    noise_density: float = 0.15  # T5's
    mean_noise_span_length: float = 3.0  # T5's
    merge_documents: bool = True  # one text of all, so that nothing is padded
    pack: bool = False  # several examples a row

    def __post_init__(self) -> None:
        check(
            0.0 < self.noise_density < 1.0,
            f"NOISE_DENSITY must lie in (0, 1), found {self.noise_density}.",
        )
        check(
            self.mean_noise_span_length >= 1.0,
            f"MEAN_NOISE_SPAN_LENGTH must be >= 1, found {self.mean_noise_span_length}.",
        )
        check(
            not (self.files and self.tfds),
            f"TEXT_FILES ({self.files!r}) and TFDS_CORPUS ({self.tfds!r}) are both set: a run reads"
            " one corpus. Empty the other.",
        )


NO_CORPUS = CorpusConfig()


@typed
@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """The update rule of the trainable part; defaults are the paper's (facts: Lester et al., 3)."""

    name: Literal["adafactor", "adamw"] = "adafactor"
    learning_rate: float = 0.3
    warmup_steps: int = 0
    schedule: Literal["constant", "rsqrt"] = "constant"  # rsqrt is T5's
    decay_rate: float = 0.8  # Adafactor's second-moment exponent
    clipping_threshold: float = 1.0  # Adafactor's RMS clip of the update
    weight_decay: float = 1e-5
    multiply_by_parameter_scale: bool = False  # Adafactor: rate relative to each matrix's RMS
    start_step: int | None = None  # None: the backbone's step, as T5X does

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            finite = not isinstance(value, float) or math.isfinite(value)
            check(finite, f"OptimizerConfig.{name} must be a finite number, found {value}.")
        check(
            self.learning_rate > 0, f"LEARNING_RATE must be positive, found {self.learning_rate}."
        )
        least = 1 if self.schedule == "rsqrt" else 0
        check(
            least <= self.warmup_steps < 2**30,  # steps are counted in 32 bits
            f"WARMUP_STEPS must lie in [{least}, 2**30), found {self.warmup_steps}.",
        )
        check(self.weight_decay >= 0, f"WEIGHT_DECAY must be >= 0, found {self.weight_decay}.")
        for name in ("decay_rate", "clipping_threshold"):
            value = getattr(self, name)
            check(value > 0, f"{name.upper()} must be positive, found {value}.")
        check(
            self.start_step is None or 0 <= self.start_step < 2**30,
            f"OPTIMIZER_START_STEP must lie in [0, 2**30), found {self.start_step}.",
        )


DEFAULT_OPTIMIZER = OptimizerConfig()
