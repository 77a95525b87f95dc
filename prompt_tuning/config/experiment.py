"""What an experiment is: frozen, typed dataclasses, usable from Python with no gin at all.

`gin_reader.py` fills these from T5X's macros; `api.py` and the tests build them directly. Nothing
here imports JAX, TensorFlow or gin, so every other module may import it.

A wrong type is an error when the object is made (beartype), an impossible value an error in
`__post_init__`; both say which field, what was found, and what is possible.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from prompt_tuning.config.parts import BEAM as BEAM
from prompt_tuning.config.parts import DEFAULT_OPTIMIZER, NO_CORPUS, NO_FILES
from prompt_tuning.config.parts import ConfigError as ConfigError
from prompt_tuning.config.parts import CorpusConfig as CorpusConfig
from prompt_tuning.config.parts import Decoding as Decoding
from prompt_tuning.config.parts import FileTask as FileTask
from prompt_tuning.config.parts import OptimizerConfig as OptimizerConfig
from prompt_tuning.config.parts import check as _check
from prompt_tuning.config.parts import store_settings as _store_settings
from prompt_tuning.config.parts import typed as _typed

PromptInit = Literal["auto", "random_uniform", "sampled_vocab", "class_labels", "text", "file"]
Activation = Literal["gelu", "relu", "silu", "linear"]
EvalMethod = Literal["generate", "rank", "both"]
RankScore = Literal["sum", "mean"]
Attending = Literal["xla", "cudnn"]
EvalPairs = Literal["all", "own"]
OFFICIAL_VOCABULARY = "gs://t5-data/vocabs/cc_all.32000.100extra/sentencepiece.model"
FROM_CHECKPOINT = "from_checkpoint"  # as a size of the model: the checkpoint's
SCRATCH = "scratch"  # as a checkpoint: none, the same as None
TINY = "tiny"  # as a checkpoint, a vocabulary or a model: the one that ships with the package

ConfigT = TypeVar("ConfigT")


@_typed
@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and family of a T5; the field names are T5X's, the defaults T5 1.1's."""

    num_encoder_layers: int
    num_decoder_layers: int
    num_heads: int
    head_dim: int
    embed_dim: int
    mlp_dim: int
    num_embeddings: int
    mlp_activations: tuple[Activation, ...] = ("gelu", "linear")  # T5 1.0: ("relu",)
    logits_via_embedding: bool = False  # T5 1.0: True, the embedding table is the output's as well
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    dropout_rate: float = 0.1
    dtype: Literal["float32", "bfloat16"] = "float32"
    attention: Attending = "xla"  # the encoder's: XLA's programs, or cuDNN's on NVIDIA's GPUs

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if type(value) is int:
                _check(value >= 1, f"ModelConfig.{name} must be at least 1, found {value}.")
        _check(
            len(self.mlp_activations) >= 1,
            "MLP_ACTIVATIONS is empty: ('gelu', 'linear') is T5 1.1's, ('relu',) T5 1.0's.",
        )
        _check(
            0.0 <= self.dropout_rate < 1.0,
            f"DROPOUT_RATE must lie in [0, 1), found {self.dropout_rate}.",
        )
        fits = self.dtype == "bfloat16" and self.head_dim <= 128 and self.head_dim % 8 == 0
        _check(
            self.attention == "xla" or fits,
            f"ATTENTION = 'cudnn' takes heads of at most 128, a multiple of 8, in bfloat16; found "
            f"HEAD_DIM = {self.head_dim} and DTYPE = '{self.dtype}'. Set DTYPE = 'bfloat16', or "
            "ATTENTION = 'xla'.",
        )


@_typed
@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptConfig:
    """The prompt, `float[length, embed_dim]`, and how its first value is chosen (paper 3.2)."""

    length: int = 100
    init: PromptInit = "auto"  # class labels where the task has them, else sampled vocabulary
    class_labels: tuple[str, ...] = ()
    text: str = ""
    file: str = ""  # a prompt folder or a .npy
    scale: float = 0.5  # random_uniform draws from [-scale, scale]
    population: int = 5000  # sampled_vocab draws from this many most common pieces
    method: str = "prompt_tuning"  # how the prompt is parametrised and learned: a name in methods/
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # the method's own

    def __post_init__(self) -> None:
        object.__setattr__(self, "settings", _store_settings("PROMPT_SETTINGS", self.settings))
        _check(self.length >= 0, f"PROMPT_LENGTH must be at least 0, found {self.length}.")
        _check(self.population >= 1, f"PROMPT_POPULATION must be >= 1, found {self.population}.")
        _check(
            self.init != "file" or bool(self.file),
            "the prompt is to come from a file, but PROMPT_FILE is empty: set it to a prompt "
            "folder or a .npy.",
        )
        _check(
            self.init != "text" or bool(self.text),
            "the prompt is to come from a text, but PROMPT_TEXT is empty: set it.",
        )
        # A file or a text that is given says how the prompt begins.
        given = [name for name in ("file", "text") if getattr(self, name)]
        _check(
            len(given) < 2,
            f"PROMPT_FILE ({self.file!r}) and PROMPT_TEXT ({self.text!r}) are both set: a prompt "
            "begins as one of them. Set the other to ''.",
        )
        if self.init == "auto" and given:
            object.__setattr__(self, "init", given[0])
        for name in given:
            macro = f"PROMPT_{name.upper()}"
            _check(
                self.init == name,
                f"{macro} is set ({getattr(self, name)!r}), but PROMPT_INIT is {self.init!r}, "
                f"which does not read it. Set PROMPT_INIT = '{name}' or {macro} = ''.",
            )


@_typed
@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which rows, and how they become numbers."""

    # One task or mixture to train on; evaluation takes a tuple of several as well.
    mixture_or_task_name: str | tuple[str, ...]
    mixture_or_task_module: str | None = None
    task_feature_lengths: Mapping[str, int]  # {"inputs": T, "targets": L}
    vocabulary: str = OFFICIAL_VOCABULARY
    batch_size: int = 32
    tfds_data_dir: str | None = None
    sentinel_targets: bool = False  # targets begin with T5's first sentinel
    train_split: str = "train"
    eval_split: str = "validation"
    files: FileTask = NO_FILES  # a task of the user's own files, where there is one

    def __post_init__(self) -> None:
        _check(
            not self.files.given or bool(self.files.name) or len(self.names) <= 1,
            f"MIXTURE_OR_TASK_NAME names {self.names}: say in TASK_NAME which of them is the task "
            "of TRAIN_FILE and EVAL_FILE.",
        )
        _check(self.batch_size >= 1, f"BATCH_SIZE must be at least 1, found {self.batch_size}.")
        lengths = self.task_feature_lengths
        possible = set(lengths) in ({"inputs", "targets"}, {"inputs"})  # targets: see Experiment
        _check(
            possible and all(n >= 1 for n in lengths.values()),
            "TASK_FEATURE_LENGTHS must be {'inputs': T, 'targets': L} with T, L >= 1, found "
            f"{dict(lengths)}.",
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Every task or mixture asked for."""
        name = self.mixture_or_task_name
        return (name,) if isinstance(name, str) else name

    @property
    def file_task_name(self) -> str:
        """What the task of the user's own files is called; "" where there is none."""
        if not self.files.given:
            return ""
        return self.files.name or next(iter(self.names), "custom")


@_typed
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, on which loss, and what is trainable."""

    train_steps: int | None = None  # absolute, as in T5X: counts the backbone's own steps
    train_steps_relative: int | None = None  # counts this run's steps
    trainable: Literal["prompt", "model"] = "prompt"
    z_loss: float = 1e-4
    label_smoothing: float = 0.0
    random_seed: int = 0
    checkpoint_period: int | None = None  # None: at every evaluation
    keep_checkpoints: int | None = 2  # of a pre-training run; None: all
    restore_optimizer: bool = False  # go on with the checkpoint's Adafactor moments
    length_groups: int = 8  # parts, by length, that a batch is cut into where that saves padding
    microbatches: int = 1  # parts that it is cut into in any case: less memory, same gradient

    def __post_init__(self) -> None:
        for name in (
            "train_steps",
            "train_steps_relative",
            "checkpoint_period",
            "keep_checkpoints",
            "length_groups",
            "microbatches",
        ):
            value = getattr(self, name)
            _check(value is None or value >= 1, f"{name.upper()} must be >= 1, found {value}.")
            _check(
                value is None or value < 2**30,  # steps are counted in 32 bits
                f"{name.upper()} must be less than 2**30, found {value}.",
            )
        _check(
            self.train_steps is None or self.train_steps_relative is None,
            f"TRAIN_STEPS ({self.train_steps}) and TRAIN_STEPS_RELATIVE "
            f"({self.train_steps_relative}) are both set. Set one: TRAIN_STEPS counts the "
            "backbone's own steps, TRAIN_STEPS_RELATIVE only this run's.",
        )
        _check(0 <= self.z_loss < 1e30, f"Z_LOSS must lie in [0, 1e30), found {self.z_loss}.")
        _check(
            0 <= self.label_smoothing < 1,
            f"LABEL_SMOOTHING must lie in [0, 1), found {self.label_smoothing}.",
        )
        _check(
            0 <= self.random_seed < 2**32,
            f"RANDOM_SEED must lie in [0, 2**32), found {self.random_seed}.",
        )


@_typed
@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """When and how the tasks are scored."""

    period: int = 1000
    method: EvalMethod = "generate"
    rank_score: RankScore = "sum"  # of log p over a word's tokens, or its mean
    early_stopping_evals: int | None = None  # stop after so many evaluations without a new best
    num_decodes: int = 1  # beams or samples, of which the best is the answer; a beam of 1 is greedy
    decoding: Decoding = BEAM
    batch_size: int | None = None  # None: the training batch size
    num_examples: int | None = None  # None: the whole split
    baselines: bool = True  # also score the majority class and the model without a prompt
    bootstrap: int = 1000  # resamples behind a metric's 95 % interval; 0: no intervals

    def __post_init__(self) -> None:
        for name in ("period", "early_stopping_evals", "num_decodes", "batch_size", "num_examples"):
            value = getattr(self, name)
            _check(value is None or value >= 1, f"EvalConfig.{name} must be >= 1, found {value}.")
        _check(self.bootstrap >= 0, f"EVAL_BOOTSTRAP must be 0 or more, found {self.bootstrap}.")


@_typed
@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """One run, whole: `training.loop.train` takes this and nothing else."""

    model_dir: str
    initial_checkpoint_path: str | None  # T5X's, Hugging Face's, hf://..., "tiny"; None: scratch
    model: ModelConfig
    data: DataConfig
    corpus: CorpusConfig = NO_CORPUS
    prompt: PromptConfig = PromptConfig()
    optimizer: OptimizerConfig = DEFAULT_OPTIMIZER
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    num_model_partitions: int = 1
    verify_checkpoint: bool = False  # hold the backbone's files against their manifest first

    @property
    def from_scratch(self) -> bool:
        """Whether the weights are random at first; only a pre-training run's are."""
        return self.initial_checkpoint_path in (None, SCRATCH)

    @property
    def checkpoint(self) -> str:
        """The checkpoint that the run begins with, where there is one."""
        return self.initial_checkpoint_path or SCRATCH

    @property
    def experiment(self) -> Experiment:
        """Itself, as `EvalRun` and `InferRun` have one."""
        return self

    def __post_init__(self) -> None:
        _check_partitions(self.num_model_partitions)
        _check(
            not (self.corpus.pack and self.model.attention == "cudnn"),
            "PACK = True puts several examples in a row, and ATTENTION = 'cudnn' takes rows of one "
            "each: set PACK = False or ATTENTION = 'xla'.",
        )
        _check(
            self.prompt.length >= 1 or self.train.trainable == "model",
            "PROMPT_LENGTH is 0 and only the prompt is trainable: there is nothing to train. Set "
            "PROMPT_LENGTH to at least 1.",
        )
        lengths, pretrains = self.data.task_feature_lengths, self.corpus.objective != "task"
        _check(
            "targets" in lengths or pretrains,
            "TASK_FEATURE_LENGTHS must be {'inputs': T, 'targets': L} with T, L >= 1, found "
            f"{dict(lengths)}.",
        )
        _check(
            pretrains or not self.from_scratch,
            f"INITIAL_CHECKPOINT_PATH is {self.initial_checkpoint_path!r}, that is, random weights:"
            " these are for OBJECTIVE = 'span_corruption' or 'prefix_lm' (runs/pretrain.gin). Name "
            "a checkpoint.",
        )


@_typed
@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalRun:
    """One scoring of a model, with a prompt or without one; the field names are T5X's macros."""

    checkpoint_path: str  # a T5X checkpoint, a Hugging Face folder, hf://..., or "tiny"
    eval_output_dir: str
    prompt_file: str | tuple[str, ...] = ""  # paths (docs/prompts.md); empty: the model as it is
    pairs: EvalPairs = "all"  # "own": a prompt is scored on the tasks it was tuned for
    class_labels: tuple[str, ...] = ()  # the answers to rank, where the task names none
    model: ModelConfig
    data: DataConfig
    eval: EvalConfig = EvalConfig()
    num_model_partitions: int = 1
    verify_checkpoint: bool = False

    def __post_init__(self) -> None:
        _check_partitions(self.num_model_partitions)

    @property
    def experiment(self) -> Experiment:
        """The same settings, for what reads a backbone and rows of an experiment."""
        return _as_experiment(self, self.eval_output_dir)


@_typed
@dataclasses.dataclass(frozen=True, kw_only=True)
class InferRun:
    """One round of answers to the rows of a task or of a file."""

    checkpoint_path: str
    infer_output_dir: str  # "" where the answers go to a file of their own
    prompt_file: str = ""
    class_labels: tuple[str, ...] = ()
    model: ModelConfig
    data: DataConfig  # its `mixture_or_task_name` is () where the rows come from a file
    return_all_decodes: bool = False  # all beams or samples of a row, the best first
    eval: EvalConfig = EvalConfig()
    num_model_partitions: int = 1
    verify_checkpoint: bool = False

    def __post_init__(self) -> None:
        _check_partitions(self.num_model_partitions)
        _check(
            not (self.return_all_decodes and self.eval.method == "rank"),
            "RETURN_ALL_DECODES asks for everything that is generated, and EVAL_METHOD = 'rank' "
            "generates nothing. Set EVAL_METHOD = 'generate' or 'both'.",
        )

    @property
    def experiment(self) -> Experiment:
        """The same settings, for what reads a backbone and rows of an experiment."""
        return _as_experiment(self, self.infer_output_dir)


def _check_partitions(number: int) -> None:
    _check(number >= 1, f"NUM_MODEL_PARTITIONS must be at least 1, found {number}.")


def _as_experiment(run: EvalRun | InferRun, directory: str) -> Experiment:
    return Experiment(
        model_dir=directory,
        initial_checkpoint_path=run.checkpoint_path,
        model=run.model,
        data=run.data,
        prompt=PromptConfig(class_labels=run.class_labels),
        eval=run.eval,
        num_model_partitions=run.num_model_partitions,
        verify_checkpoint=run.verify_checkpoint,
    )


def to_dict(config: Any) -> dict[str, Any]:
    """The dataclass as plain JSON values: what is stored, hashed and compared."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if isinstance(value, Mapping):
            return {k: plain(v) for k, v in value.items()}
        if isinstance(value, (tuple, list)):
            return [plain(v) for v in value]
        return str(value) if isinstance(value, Path) else value

    return plain(config)


# Where a run's files lie and on what devices it ran: not what the experiment is.
_PLACES = frozenset(
    {
        "model_dir",
        "initial_checkpoint_path",
        "num_model_partitions",
        "verify_checkpoint",
        "data.vocabulary",
        "data.tfds_data_dir",
        "data.files.train_file",
        "data.files.eval_file",
        "prompt.file",
    }
)


def config_hash(experiment: Experiment) -> str:
    """The SHA-256, in hexadecimal, of all settings but the places of files and devices.

    (Backbone and vocabulary have hashes of their own, of their contents.)
    """
    settings = {k: v for k, v in flatten(to_dict(experiment)).items() if k not in _PLACES}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with dotted names.

    >>> flatten({"train": {"z_loss": 0.1}, "model_dir": "runs"})
    {'train.z_loss': 0.1, 'model_dir': 'runs'}
    """
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        nested = isinstance(value, Mapping)
        flat |= flatten(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return flat


def from_dict(cls: type[ConfigT], values: Mapping[str, Any]) -> ConfigT:
    """The inverse of `to_dict`.

    Raises:
      ConfigError: a field is unknown or missing.
    """
    import typing

    hints = typing.get_type_hints(cls)
    known = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - known)
    _check(not unknown, f"{cls.__name__} has no field {unknown}; it has {sorted(known)}.")

    def typed(name: str, value: Any) -> Any:
        hint = hints[name]
        return from_dict(hint, value) if dataclasses.is_dataclass(hint) else value  # type: ignore[arg-type]

    return cls(**{name: typed(name, value) for name, value in values.items()})
