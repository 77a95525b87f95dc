"""What a run under upstream T5X reads: checkpoint, task, batches, first prompt, number of steps.

`gin/t5x/*.gin` binds these beside `plugin.py`; `engine.py` calls them before it starts T5X, so that
a mistake is one message. Nothing here imports T5X.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import seqio
import tensorflow as tf
from etils import epath
from jaxtyping import Array, Float, PRNGKeyArray

from prompt_tuning.batches import batching
from prompt_tuning.checkpoints import huggingface, load
from prompt_tuning.checkpoints import t5x as t5x_checkpoint
from prompt_tuning.checkpoints.t5x_prompt import PROMPT, is_prompt_leaf
from prompt_tuning.config import (
    ConfigError,
    DataConfig,
    EvalRun,
    Experiment,
    InferRun,
    ModelConfig,
    PromptConfig,
)
from prompt_tuning.methods.method import Frozen, Params
from prompt_tuning.methods.table import find_method, make_settings
from prompt_tuning.model import t5
from prompt_tuning.model.prompt import Prompt
from prompt_tuning.prompts.embedding import read_identity
from prompt_tuning.prompts.prompt_file import PromptMetadata, check_prompt, load_prompt
from prompt_tuning.session import checks, session, setup
from prompt_tuning.tasks import registry, task_rows
from prompt_tuning.tasks.file_tasks import register_files
from prompt_tuning.vocabularies.vocabulary import load_vocabulary

Run = Experiment | EvalRun | InferRun
T = TypeVar("T")
Fold = Callable[..., Float[Array, "P D"]]  # (a method's parameters, key or None) -> rows
EMBEDDING = "token_embedder/embedding"


def absolute_path(path: str) -> str:
    """The path as Orbax and T5X need it; an address such as gs://bucket/... is absolute already."""
    return path if "://" in path else os.path.abspath(os.path.expanduser(path))


def first_given(value: T | None, otherwise: T) -> T:
    """`value`, or `otherwise` if it is None: gin has no expression for that."""
    return otherwise if value is None else value


def register_task(data: DataConfig) -> str:
    """The name of the task or mixture, once it is registered with the run's vocabulary.

    Raises:
      ConfigError: there is no such task, or several are named.
    """
    # T5X's --tfds_data_dir has been handed to seqio before any gin file is read.
    directory = data.tfds_data_dir or getattr(seqio.utils, "_TFDS_DATA_DIR_OVERRIDE", None)
    registry.register(data.vocabulary, tfds_data_dir=directory)
    register_files(data)
    if data.mixture_or_task_module:
        registry.import_task_module(data.mixture_or_task_module)
    return registry.resolve(_only(data.mixture_or_task_name, "MIXTURE_OR_TASK_NAME")).name


def _only(names: str | tuple[str, ...], macro: str) -> str:
    """The name, if it is a single one: T5X evaluates one task with one prompt."""
    if isinstance(names, tuple) and len(names) != 1:
        raise ConfigError(
            f"{macro} = {names!r}: upstream T5X takes one. Name one, or use --engine=embedded."
        )
    return names if isinstance(names, str) else names[0]


def find_checkpoint(run: Run) -> str:
    """The absolute path of the run's checkpoint, if its parameters are exactly the model's.

    T5X itself gives missing parameters random values and drops unknown ones, without a message.

    Raises:
      ConfigError: a parameter is missing, unknown, or of another shape.
    """
    spec = run.initial_checkpoint_path if isinstance(run, Experiment) else run.checkpoint_path
    if not spec:
        raise ConfigError("CHECKPOINT_PATH is not set: give the path of a T5X checkpoint.")
    path = absolute_path(load.find_path(spec))
    if huggingface.is_huggingface(path):
        raise ConfigError(
            f"upstream T5X reads T5X checkpoints, and {spec} is a Hugging Face folder. Convert "
            f"it: t5x convert --input={spec} --output=checkpoint_{load.read_step(spec)}"
        )
    stored = t5x_checkpoint.read_shapes(path)
    stored = {name: shape for name, shape in stored.items() if not is_prompt_leaf(name)}
    needed = {name: shape.shape for name, shape in t5.param_shapes(run.model).items()}
    wrong = [
        f"  {name}: {stored.get(name, 'missing')} there, {needed.get(name, 'unknown')} in the model"
        for name in sorted(stored.keys() | needed.keys())
        if stored.get(name) != needed.get(name)
    ]
    if wrong:
        raise ConfigError(
            f"the checkpoint {path} does not fit the model, which differs in {len(wrong)} "
            "parameters:\n" + "\n".join(wrong[:5]) + "\nDo the model's sizes (the gin file in "
            "models/) belong to this checkpoint?"
        )
    return path


def start_step(experiment: Experiment) -> int:
    """The backbone's own step, where T5X and the optimiser begin to count."""
    return t5x_checkpoint.read_step(find_checkpoint(experiment))


def last_step(experiment: Experiment) -> int:
    """The absolute step at which the run ends, however often it is resumed on the way.

    (T5X's own `relative_steps` counts from where it resumed.)
    """
    return checks.last_step(experiment.train, start_step(experiment))


def training_batches(
    config: Any, shard: int, num_shards: int, converter: Any, *, experiment: Experiment
) -> tf.data.Dataset:
    """T5X's `get_dataset_fn`: the embedded engine's batches, from the step that T5X resumes at.

    So both engines train on the same rows in the same order, and a killed run resumes at its row,
    which T5X's own pipeline does not. `config` is T5X's DatasetConfig; rows are
    padded to its lengths, since T5X compiles one shape.

    Raises:
      ConfigError: the data is missing, or the settings ask for another order or form.
    """
    del converter  # seqio's, which makes the same four features
    if not config.shuffle or config.pack or config.use_cached:
        raise ConfigError(
            "training rows are shuffled by RANDOM_SEED and step, not packed, and tokenised here; "
            f"found shuffle = {config.shuffle}, pack = {config.pack}, use_cached = "
            f"{config.use_cached}. T5X's own pipeline is `train.get_dataset_fn = "
            "@utils.get_dataset`."
        )
    lengths = config.task_feature_lengths
    vocabulary = load_vocabulary(experiment.data.vocabulary)
    rows, rates = task_rows.load_training_rows(
        config.mixture_or_task_name, config.split, lengths, vocabulary=vocabulary
    )
    first = last_saved_step(experiment) - start_step(experiment)
    size = config.batch_size // num_shards
    mine = slice(shard * size, (shard + 1) * size)

    def batches() -> Iterator[dict[str, np.ndarray]]:
        for step in itertools.count(first):
            batch = batching.train_batch(
                rows,
                rates,
                seed=experiment.train.random_seed,
                step=step,
                batch_size=config.batch_size,
                lengths=lengths,
            )
            padded = {name: _widen(values, widths[name]) for name, values in batch.items()}
            yield {name: values[mine].astype(np.int32) for name, values in padded.items()}

    widths = {
        name: lengths["inputs" if name.startswith("encoder") else "targets"]
        for name in batching.Batch.__annotations__
    }
    signature = {name: tf.TensorSpec((size, width), tf.int32) for name, width in widths.items()}
    dataset = tf.data.Dataset.from_generator(batches, output_signature=signature)
    return dataset.prefetch(tf.data.AUTOTUNE)


def _widen(values: Any, width: int) -> np.ndarray:
    return np.pad(values, ((0, 0), (0, width - values.shape[1])))


def last_saved_step(experiment: Experiment) -> int:
    """The step that T5X resumes from: of the newest checkpoint in MODEL_DIR, or the backbone's."""
    names = [path.name for path in epath.Path(absolute_path(experiment.model_dir)).glob("*")]
    saved = [re.fullmatch(r"checkpoint_(\d+)", name) for name in names]
    return max((int(m.group(1)) for m in saved if m), default=start_step(experiment))


class StartingPrompt(NamedTuple):
    """What T5X's network begins with: the parameters of a method, and how they become rows."""

    params: Mapping[str, Float[np.ndarray, "..."]]  # by the method's own names
    length: int  # P
    fold: Fold
    init: str = ""  # how they begin


class _NoBackbone(Mapping[str, Array]):
    """In place of the backbone's parameters: T5X's network cannot hand them to a method."""

    def __init__(self, method: str) -> None:
        self._method = method

    def __getitem__(self, name: str) -> Array:
        raise ConfigError(
            f"PROMPT_METHOD = {self._method!r}: its fold reads the backbone, which upstream T5X "
            "cannot do. Expected a method that folds its own parameters to rows. Use "
            "--engine=embedded."
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self[""])

    def __len__(self) -> int:
        return len(self[""])


def make_fold(config: PromptConfig, model: ModelConfig) -> Fold:
    """The function that makes the rows, float32[P, D], of a method's parameters.

    It raises ConfigError if the method reads the backbone, or its prompt is more than rows.
    """
    method = find_method(config.method)
    settings = make_settings(method, config.method, config.settings)
    frozen = Frozen(model, _NoBackbone(config.method))

    def fold(params: Params, key: PRNGKeyArray | None = None) -> Float[Array, "P D"]:
        prompt = method.fold(settings, params, frozen, key)
        others = [name for name in Prompt._fields[1:] if getattr(prompt, name) is not None]
        if others:
            raise ConfigError(
                f"PROMPT_METHOD = {config.method!r}: its prompt has {', '.join(others)}. Expected "
                "rows alone, for upstream T5X. Use --engine=embedded."
            )
        return prompt.rows

    return fold


def starting_prompt(run: Run) -> StartingPrompt:
    """The first parameters of a training run, or the rows of PROMPT_FILE, with their fold.

    Evaluation without a PROMPT_FILE takes the checkpoint's own prompt: zeros of its shape are
    returned, which the checkpoint replaces. A checkpoint without one is a model without a prompt.

    Raises:
      ConfigError: the prompt cannot be made, does not fit the model, or is not rows alone.
    """
    if isinstance(run, Experiment):
        return _first_prompt(run)
    if run.prompt_file:
        rows = _read_prompt(run, _only(run.prompt_file, "PROMPT_FILE"))
    else:
        shapes = t5x_checkpoint.read_shapes(find_checkpoint(run))
        leaves = sorted(name for name in shapes if is_prompt_leaf(name))
        if leaves and PROMPT not in shapes:
            raise ConfigError(
                f"CHECKPOINT_PATH = {run.checkpoint_path!r} holds the parameters of a prompt "
                f"method ({', '.join(leaves[:3])}, ...), not a prompt. Set PROMPT_FILE to the "
                "folder that its run wrote (prompts/step_...)."
            )
        rows = np.zeros(shapes.get(PROMPT, (0, run.model.embed_dim)), np.float32)
    return StartingPrompt({"prompt": rows}, len(rows), make_fold(PromptConfig(), run.model))


def _first_prompt(experiment: Experiment) -> StartingPrompt:
    config, model = experiment.prompt, experiment.model
    if find_method(config.method).members:
        raise ConfigError(
            f"PROMPT_METHOD = {config.method!r}: it learns a prompt for each task, and a batch of "
            "upstream T5X does not say of which task a row is. Use --engine=embedded."
        )
    checkpoint = find_checkpoint(experiment)
    register_task(experiment.data)
    embedding = t5x_checkpoint.read_param(checkpoint, EMBEDDING)
    params: Any = {**t5.param_shapes(model), EMBEDDING: jnp.asarray(embedding, model.dtype)}
    identity = read_identity(checkpoint) if config.init == "file" else ""
    spec = experiment.data.vocabulary
    first, init = setup.first_params(
        experiment,
        session.Backbone(params, t5x_checkpoint.read_step(checkpoint), identity),
        setup.Data((), (), (), load_vocabulary(spec), setup.vocabulary_identity(spec)),
    )
    fold = make_fold(PromptConfig() if experiment.train.trainable == "model" else config, model)
    length = jax.eval_shape(fold, first).shape[0]
    return StartingPrompt(first, length, fold, init)


def _read_prompt(run: EvalRun | InferRun, file: str) -> Float[np.ndarray, "P D"]:
    prompt, metadata = load_prompt(file)
    known = metadata or PromptMetadata()
    check_prompt(
        prompt,
        metadata,
        shape=(None, run.model.embed_dim),
        backbone=read_identity(find_checkpoint(run)) if known.backbone else "",
        vocabulary=setup.vocabulary_identity(run.data.vocabulary),
        where=file,
    )
    return np.asarray(prompt.rows)


def make_evaluator(
    run: EvalRun, evaluator: Callable[..., seqio.Evaluator] = seqio.Evaluator
) -> Callable[..., seqio.Evaluator]:
    """T5X's `inference_evaluator_cls`: its files and records have the step of PROMPT_FILE.

    T5X hands over the step of its state, which is the backbone's, so the files of a second prompt
    would replace those of the first.
    """
    if not run.prompt_file:
        return evaluator
    _, metadata = load_prompt(_only(run.prompt_file, "PROMPT_FILE"))
    step = metadata.step if metadata else 0  # as in the embedded engine

    def make(**settings: Any) -> seqio.Evaluator:
        made = evaluator(**settings)
        evaluate = made.evaluate
        made.evaluate = lambda **functions: evaluate(**{**functions, "step": step})
        return made

    return make


def choose_new(run: EvalRun | InferRun) -> tuple[tuple[str, None], ...]:
    """T5X's `assignment_map` for evaluation: what does not come from the checkpoint.

    It is empty where the checkpoint brings its own prompt: T5X refuses patterns without a match.
    """
    return ((f".*/{PROMPT}", None),) if run.prompt_file else ()


def describe_prompt(
    experiment: Experiment, *, backbone: str, init: str, step: int
) -> PromptMetadata:
    """The metadata of a prompt of this run, without scores: those are in T5X's own files."""
    register_task(experiment.data)
    return setup.describe_prompt(
        experiment,
        backbone=backbone,
        vocabulary=setup.vocabulary_identity(experiment.data.vocabulary),
        init=init,
        step=step,
    )
