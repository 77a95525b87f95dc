"""What a run needs before its first step: backbone, rows, the first prompt, the number of steps.

`loop.py` and `matrix.py` call these; each stops with one message where something does not fit.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, PRNGKeyArray

from prompt_tuning.checkpoint import identity, prompt_file
from prompt_tuning.checkpoint import t5x as t5x_checkpoint
from prompt_tuning.config import TINY, ConfigError, Experiment, TrainConfig
from prompt_tuning.data import features, tasks
from prompt_tuning.data import vocabulary as vocabularies
from prompt_tuning.model import prompt as prompts
from prompt_tuning.model import t5
from prompt_tuning.training import sharding
from prompt_tuning.training.evaluate import EvalTask, make_eval_task
from prompt_tuning.world import assets


@dataclasses.dataclass(frozen=True)
class Backbone:
    """The T5 of a checkpoint, on the devices."""

    params: dict[str, Array]
    step: int
    identity: str


@dataclasses.dataclass(frozen=True)
class Data:
    """The rows of a run: what is trained on, with mixing rates, and what is evaluated."""

    train: tuple[features.Rows, ...]
    rates: tuple[float, ...]
    eval_tasks: tuple[EvalTask, ...]
    vocabulary: Any  # seqio's, of the inputs
    vocabulary_sha256: str


def make_dir(path: Path, macro: str) -> None:
    """Makes a folder that is named by a macro, or says why it cannot be made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{macro} {path} cannot be made or is not a folder ({error.strerror}): choose another."
        ) from error


def checkpoint_path(spec: str) -> str:
    """Where a checkpoint lies; "tiny" is the bundled backbone."""
    return assets.tiny_checkpoint() if spec == TINY else spec


def load_backbone(experiment: Experiment, mesh: Mesh) -> Backbone:
    """Restores the whole T5, straight to its dtype and its place on the mesh, or stops.

    Weights that are to be trained are float32; frozen ones have the dtype of the model.
    """
    shapes = t5.param_shapes(experiment.model)
    params, step = t5x_checkpoint.read_t5x(
        checkpoint_path(experiment.initial_checkpoint_path),
        shapes,
        dtype="float32" if experiment.train.trainable == "model" else experiment.model.dtype,
        shardings=sharding.param_shardings(shapes, mesh),
    )
    return Backbone(params, step, identity.backbone_identity(params))


def load_data(experiment: Experiment, *, train: bool = True) -> Data:
    """Tokenised rows of every task asked for, held in memory as arrays.

    Raises:
      ConfigError: a task, its data or its vocabulary is missing or does not fit.
    """
    config, lengths = experiment.data, experiment.data.task_feature_lengths
    tasks.register(config.vocabulary, tfds_data_dir=config.tfds_data_dir)
    if config.mixture_or_task_module:
        tasks.import_task_module(config.mixture_or_task_module)
    vocabulary = vocabularies.load_vocabulary(config.vocabulary)
    if vocabulary.vocab_size > experiment.model.num_embeddings:
        raise ConfigError(
            f"the vocabulary {config.vocabulary} has {vocabulary.vocab_size} ids, the model only "
            f"{experiment.model.num_embeddings} embeddings (NUM_EMBEDDINGS): they do not belong "
            "together."
        )
    if train and len(config.names) != 1:
        raise ConfigError(
            f"a run trains on one task or mixture; MIXTURE_OR_TASK_NAME names {config.names}. "
            "Register a seqio mixture of them to train on all."
        )
    rows, rates = [], []
    if train:
        rows, rates = features.load_training_rows(
            config.names[0], config.train_split, lengths, vocabulary=vocabulary
        )
    eval_tasks = []
    for name in dict.fromkeys(t for n in config.names for t, _ in tasks.component_tasks(n)):
        words = tasks.label_words(name) or experiment.prompt.class_labels
        scored = features.load_rows(
            name,
            config.eval_split,
            lengths,
            vocabulary=vocabulary,
            limit=experiment.eval.num_examples,
        )
        eval_tasks.append(make_eval_task(tasks.resolve(name), scored, words))
    sha256 = vocabularies.vocabulary_sha256(config.vocabulary)
    return Data(tuple(rows), tuple(rates), tuple(eval_tasks), vocabulary, sha256)


def describe_rows(rows: features.Rows) -> str:
    """One line on a split: rows, lengths, how much is cut off, and the commonest targets."""
    count = len(rows.inputs)
    longest = max(map(len, rows.inputs), default=0)
    mean = float(np.mean([len(x) for x in rows.inputs])) if count else 0.0
    texts = collections.Counter(_target_text(example) for example in rows.examples)
    common = ", ".join(f"{text!r} {n / count:.0%}" for text, n in texts.most_common(4))
    return (
        f"{rows.task}: {count} rows, inputs {mean:.0f} tokens on average, {longest} at most; "
        f"truncated: inputs {rows.truncated_inputs / max(count, 1):.1%}, "
        f"targets {rows.truncated_targets / max(count, 1):.1%}; targets: {common}"
    )


def _target_text(example: Mapping[str, Any]) -> str:
    text = example.get("targets_pretokenized", b"")
    return text.decode("utf-8", errors="replace") if isinstance(text, bytes) else str(text)


def first_prompt(
    experiment: Experiment, backbone: Backbone, data: Data
) -> tuple[Float[np.ndarray, "P D"], str]:
    """The prompt before the first step, and a sentence on where it comes from."""
    config, width = experiment.prompt, experiment.model.embed_dim
    if experiment.train.trainable == "model":
        return np.zeros((0, width), np.float32), "no prompt: the model itself is tuned"
    if config.init == "file":
        prompt, metadata = prompt_file.load_prompt(config.file)
        prompt_file.check_prompt(
            prompt,
            metadata,
            shape=(config.length, width),
            backbone=backbone.identity,
            vocabulary=data.vocabulary_sha256,
            where=config.file,
        )
        return np.asarray(prompt, np.float32), f"from the file {config.file}"
    key = first_prompt_key(experiment.train.random_seed)
    labels = data.eval_tasks[0].label_words if len(data.eval_tasks) == 1 else ()
    return prompts.init_prompt(
        config,
        key,
        jnp.asarray(jax.device_get(backbone.params["token_embedder/embedding"]), jnp.float32),
        encode=data.vocabulary.encode,
        task_labels=labels,
    )


def first_prompt_key(random_seed: int) -> PRNGKeyArray:
    """The key of the first prompt, apart from every step's: the same one in both engines."""
    return jax.random.fold_in(jax.random.key(random_seed), 2**31 - 1)


def last_step(train: TrainConfig, start: int) -> int:
    """The absolute step at which a run that starts at `start` ends.

    Raises:
      ConfigError: neither or both counts are given, or the end is not after the start.
    """
    if (train.train_steps is None) == (train.train_steps_relative is None):
        raise ConfigError(
            "give either TRAIN_STEPS (absolute: counts the checkpoint's own steps, as in T5X) or "
            f"TRAIN_STEPS_RELATIVE (this run's steps); found TRAIN_STEPS = {train.train_steps}, "
            f"TRAIN_STEPS_RELATIVE = {train.train_steps_relative}."
        )
    if train.train_steps_relative is not None:
        return start + train.train_steps_relative
    assert train.train_steps is not None
    if train.train_steps <= start:
        raise ConfigError(
            f"TRAIN_STEPS = {train.train_steps} is absolute and the checkpoint is already at step "
            f"{start}: nothing would be trained. Set TRAIN_STEPS to more than {start}, or "
            f"TRAIN_STEPS_RELATIVE = {train.train_steps} to train {train.train_steps} steps."
        )
    return train.train_steps


def train_targets(rows: features.Rows, task: EvalTask) -> Sequence[Any]:
    """The training targets as the metrics see them, for the majority class."""
    return [
        task.task.postprocess_fn(_target_text(e), example=e, is_target=True) for e in rows.examples
    ]
