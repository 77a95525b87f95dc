"""The settings of a whole run: an Experiment, an EvalRun, an InferRun.

`gin_reader.py` fills these from T5X's macros; `api.py` and the tests build them directly. Nothing
in the classes of settings imports JAX, TensorFlow or gin, so every other module may import them.
"""

from __future__ import annotations

from typing import Literal

from prompt_tuning.config.data import CorpusConfig, DataConfig, FileTask
from prompt_tuning.config.evaluation import Decoding, EvalConfig
from prompt_tuning.config.model import ModelConfig
from prompt_tuning.config.setting import (
    Leaf,
    check,
    nested_classes,
    own_settings,
    setting,
    settings,
)
from prompt_tuning.config.training import OptimizerConfig, PromptConfig, TrainConfig

EvalPairs = Literal["all", "own"]
SCRATCH = "scratch"  # as a checkpoint: none, the same as None
TINY = "tiny"  # as a checkpoint, a vocabulary or a model: the one that ships with the package


@settings
class ModelRun:
    """What every run has: a model, rows, the way they are scored, and devices."""

    model: ModelConfig
    data: DataConfig
    eval: EvalConfig = EvalConfig()
    num_model_partitions: int = setting(
        "NUM_MODEL_PARTITIONS",
        "devices that share one copy of the model; the others split the batch",
        default=1,
        at_least=1,
    )
    verify_checkpoint: bool = setting(
        "VERIFY_CHECKPOINT",
        "hold the T5's files against their manifest first (`t5x verify --write`)",
        default=False,
    )


@settings
class Experiment(ModelRun):
    """The run: where it begins and where it writes; `training.loop.train` takes it."""

    model_dir: str = setting("MODEL_DIR", "where the run writes, e.g. 'runs/boolq'")
    initial_checkpoint_path: str | None = setting(  # None: random weights
        "INITIAL_CHECKPOINT_PATH", "the T5: T5X's, Hugging Face's (docs/checkpoints.md), or 'tiny'"
    )
    corpus: CorpusConfig = CorpusConfig()
    prompt: PromptConfig = PromptConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()

    @property
    def from_scratch(self) -> bool:
        """Whether the weights are random at first; only a pre-training run's are."""
        return self.initial_checkpoint_path in (None, SCRATCH)

    @property
    def checkpoint(self) -> str:
        """The checkpoint that the run begins with, or "scratch"."""
        return self.initial_checkpoint_path or SCRATCH

    def __post_init__(self) -> None:
        check(
            not (self.corpus.pack and self.model.attention == "cudnn"),
            "PACK = True puts several examples in a row, and ATTENTION = 'cudnn' takes rows of one "
            "each: set PACK = False or ATTENTION = 'xla'.",
        )
        check(
            self.prompt.length >= 1 or self.train.trainable == "model",
            "PROMPT_LENGTH is 0 and only the prompt is trainable: there is nothing to train. Set "
            "PROMPT_LENGTH to at least 1.",
        )
        lengths, pretrains = self.data.task_feature_lengths, self.corpus.objective != "task"
        check(
            not self.train.prompt_average or self.train.trainable == "prompt",
            f"PROMPT_AVERAGE = {self.train.prompt_average}: it averages a prompt's parameters, and "
            "TRAINABLE = 'model' trains none. Set PROMPT_AVERAGE = 0.",
        )
        check(
            not (self.train.input_noise and pretrains),
            f"INPUT_NOISE = {self.train.input_noise}: it is for the rows of a task, and "
            f"OBJECTIVE = {self.corpus.objective!r} trains on a corpus. Set INPUT_NOISE = 0.",
        )
        check(
            "targets" in lengths or pretrains,
            "TASK_FEATURE_LENGTHS must be {'inputs': T, 'targets': L} with T, L >= 1, found "
            f"{dict(lengths)}.",
        )
        check(
            pretrains or not self.from_scratch,
            f"INITIAL_CHECKPOINT_PATH is {self.initial_checkpoint_path!r}, that is, random weights:"
            " these are for OBJECTIVE = 'span_corruption' or 'prefix_lm' (runs/pretrain.gin). Name "
            "a checkpoint.",
        )


@settings
class EvalRun(ModelRun):
    """`t5x eval` and `t5x submit-superglue`: one scoring of a model, with a prompt or without one.

    The field names are T5X's macros.
    """

    checkpoint_path: str = setting(
        "CHECKPOINT_PATH",
        "the model to score, e.g. 'gs://.../checkpoint_1100000'",
        fallback="INITIAL_CHECKPOINT_PATH",
    )
    eval_output_dir: str = setting(
        "EVAL_OUTPUT_DIR", "where `t5x eval` writes, e.g. 'runs/boolq_eval'"
    )
    prompt_file: str | tuple[str, ...] = setting("PROMPT_FILE", default="")
    pairs: EvalPairs = setting(
        "EVAL_PAIRS",
        "every prompt on every task, or 'own': each on what it was tuned for",
        default="all",
    )
    # The answers to rank, if the task names none.
    class_labels: tuple[str, ...] = setting("CLASS_LABELS", default=())

    @property
    def checkpoint(self) -> str:
        """The checkpoint of the model."""
        return self.checkpoint_path


@settings
class InferRun(ModelRun):
    """`t5x infer`: one round of answers to the rows of a task or of a file.

    If the rows are those of a file, `data.mixture_or_task_name` is ().
    """

    checkpoint_path: str = setting("CHECKPOINT_PATH", fallback="INITIAL_CHECKPOINT_PATH")
    infer_output_dir: str = setting(
        "INFER_OUTPUT_DIR", "where `t5x infer` writes; not needed with --output"
    )
    prompt_file: str = setting("PROMPT_FILE", default="")
    class_labels: tuple[str, ...] = setting("CLASS_LABELS", default=())
    return_all_decodes: bool = setting(
        "RETURN_ALL_DECODES",
        "`t5x infer`: all beams or samples of a row, the best first",
        default=False,
    )

    def __post_init__(self) -> None:
        check(
            not (self.return_all_decodes and self.eval.method == "rank"),
            "RETURN_ALL_DECODES asks for everything that is generated, and EVAL_METHOD = 'rank' "
            "generates nothing. Set EVAL_METHOD = 'generate' or 'both'.",
        )

    @property
    def checkpoint(self) -> str:
        """The checkpoint of the model."""
        return self.checkpoint_path


# The order in which settings are written; a run has some of these parts.
PARTS = (
    ModelConfig,
    DataConfig,
    FileTask,
    CorpusConfig,
    PromptConfig,
    OptimizerConfig,
    TrainConfig,
    EvalConfig,
    Decoding,
)
RUNS = (Experiment, EvalRun, InferRun)


def run_settings(run: type) -> tuple[Leaf, ...]:
    """Every setting of a kind of run: its own, then those of its parts."""
    parts = set(_reach(run))
    return tuple(leaf for cls in (run, *PARTS) if cls in parts for leaf in own_settings(cls))


def _reach(cls: type) -> list[type]:
    return [cls, *(part for inner in nested_classes(cls).values() for part in _reach(inner))]


def macros() -> dict[str, Leaf]:
    """Every macro of the embedded engine, with the first of its fields, which has the help."""
    stated: dict[str, Leaf] = {}
    for cls in (Experiment, *PARTS, EvalRun, InferRun):
        for leaf in own_settings(cls):
            stated.setdefault(leaf.macro.name, leaf)
    return stated
