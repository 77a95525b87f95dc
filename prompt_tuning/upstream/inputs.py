"""What a run under upstream T5X reads: checkpoint, task, batches, first prompt, number of steps.

`gin/t5x/*.gin` binds these beside `plugin.py`; `engine.py` calls them before it starts T5X, so that
a mistake is one message. Nothing here imports T5X.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
import seqio
import tensorflow as tf
from etils import epath
from jaxtyping import Float

from prompt_tuning.batches import batching
from prompt_tuning.checkpoints import huggingface, load
from prompt_tuning.checkpoints import t5x as t5x_checkpoint
from prompt_tuning.checkpoints.t5x_prompt import PROMPT, read_identity
from prompt_tuning.config import ConfigError, DataConfig, EvalRun, Experiment, InferRun
from prompt_tuning.methods import inits
from prompt_tuning.model import t5
from prompt_tuning.prompts.prompt_file import PromptMetadata, check_prompt, load_prompt
from prompt_tuning.session import session, setup
from prompt_tuning.tasks import registry, task_rows
from prompt_tuning.tasks.file_tasks import register_files
from prompt_tuning.vocabularies.vocabulary import load_vocabulary

Run = Experiment | EvalRun | InferRun
T = TypeVar("T")


def absolute_path(path: str) -> str:
    """The path as Orbax and T5X need it; an address such as gs://bucket/... is absolute already."""
    return path if "://" in path else os.path.abspath(os.path.expanduser(path))


def first_given(value: T | None, otherwise: T) -> T:
    """`value`, or `otherwise` where it is None: gin cannot say that of two macros."""
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
    """The one name: the embedded engine scores several tasks and prompts in one go."""
    if isinstance(names, tuple) and len(names) != 1:
        raise ConfigError(
            f"{macro} = {names!r}: upstream T5X takes one. Name one, or use --engine=embedded."
        )
    return names if isinstance(names, str) else names[0]


def find_checkpoint(run: Run) -> str:
    """The absolute path of the run's checkpoint, once its tree is known to be the model's.

    T5X would give a random value to a parameter that is missing, and drop one that it does not
    know, both in silence.

    Raises:
      ConfigError: a parameter is missing, unknown, or of another shape.
    """
    given = run.initial_checkpoint_path if isinstance(run, Experiment) else run.checkpoint_path
    if not given:
        raise ConfigError("CHECKPOINT_PATH is not set: give the path of a T5X checkpoint.")
    path = absolute_path(load.find_path(given))
    if huggingface.is_huggingface(path):
        raise ConfigError(
            f"upstream T5X reads T5X checkpoints, and {given} is a Hugging Face folder. Convert "
            f"it: t5x convert --input={given} --output=checkpoint_{load.read_step(given)}"
        )
    found: dict[str, Any] = dict(t5x_checkpoint.read_shapes(path))
    found.pop(PROMPT, None)
    needed = {name: shape.shape for name, shape in t5.param_shapes(run.model).items()}
    wrong = [
        f"  {name}: {found.get(name, 'missing')} there, {needed.get(name, 'unknown')} in the model"
        for name in sorted(found.keys() | needed.keys())
        if found.get(name) != needed.get(name)
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
    return session.last_step(experiment.train, start_step(experiment))


def training_batches(
    config: Any, shard: int, num_shards: int, converter: Any, *, experiment: Experiment
) -> tf.data.Dataset:
    """T5X's `get_dataset_fn`: the embedded engine's batches, from the step that T5X resumes at.

    Both engines so train on the same rows in the same order, and a run that was killed goes on
    where it was, which T5X's own pipeline does not. `config` is T5X's DatasetConfig; rows are
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
    """The step that T5X goes on from: of the newest checkpoint in MODEL_DIR, or the backbone's."""
    names = [path.name for path in epath.Path(absolute_path(experiment.model_dir)).glob("*")]
    found = [re.fullmatch(r"checkpoint_(\d+)", name) for name in names]
    return max((int(m.group(1)) for m in found if m), default=start_step(experiment))


def starting_prompt(run: Run) -> Float[np.ndarray, "P D"]:
    """The prompt that T5X starts with: the first one of a training run, or the one of PROMPT_FILE.

    Evaluation without a PROMPT_FILE takes the checkpoint's own prompt: zeros of its shape are
    returned, which the checkpoint replaces. A checkpoint without one is a model without a prompt.

    Raises:
      ConfigError: the prompt cannot be made, or does not fit the model.
    """
    if isinstance(run, Experiment):
        return _first_prompt(run)
    if run.prompt_file:
        return _read_prompt(run, _only(run.prompt_file, "PROMPT_FILE"), None)
    shapes = t5x_checkpoint.read_shapes(find_checkpoint(run))
    return np.zeros(shapes.get(PROMPT, (0, run.model.embed_dim)), np.float32)


def _first_prompt(experiment: Experiment) -> Float[np.ndarray, "P D"]:
    config, model = experiment.prompt, experiment.model
    if experiment.train.trainable == "model":
        return np.zeros((0, model.embed_dim), np.float32)
    if config.init == "file":
        return _read_prompt(experiment, config.file, config.length)
    embedding = t5x_checkpoint.read_param(find_checkpoint(experiment), "token_embedder/embedding")
    prompt, said = inits.init_prompt(
        config,
        setup.first_prompt_key(experiment.train.random_seed),
        jnp.asarray(embedding, model.dtype).astype(np.float32),  # as the embedded engine has it
        encode=load_vocabulary(experiment.data.vocabulary).encode,
        task_labels=registry.label_words(register_task(experiment.data)),
    )
    print(f"prompt: {prompt.shape[0]} x {prompt.shape[1]}, {said}", flush=True)
    return prompt


def _read_prompt(run: Run, file: str, length: int | None) -> Float[np.ndarray, "P D"]:
    prompt, metadata = load_prompt(file)
    known = metadata or PromptMetadata()
    check_prompt(
        prompt,
        metadata,
        shape=(length, run.model.embed_dim),
        backbone=read_identity(find_checkpoint(run)) if known.backbone else "",
        vocabulary=setup.vocabulary_identity(run.data.vocabulary),
        where=file,
    )
    return prompt


def choose_new(run: EvalRun | InferRun) -> tuple[tuple[str, None], ...]:
    """T5X's `assignment_map` for evaluation: what does not come from the checkpoint.

    It is empty where the checkpoint brings its own prompt: T5X refuses patterns without a match.
    """
    return ((f".*/{PROMPT}", None),) if run.prompt_file else ()


def describe_prompt(experiment: Experiment, *, backbone: str, step: int) -> PromptMetadata:
    """What a prompt folder says of a prompt of this run; T5X's scores stay in T5X's files."""
    name = register_task(experiment.data)
    init = inits.describe_init(
        experiment.prompt,
        registry.label_words(name),
        experiment.model.num_embeddings,
        load_vocabulary(experiment.data.vocabulary).encode,
    )
    return setup.describe_prompt(
        experiment,
        backbone=backbone,
        vocabulary=setup.vocabulary_identity(experiment.data.vocabulary),
        init=init,
        step=step,
    )
