"""What a run needs before its first step: backbone, rows, the first prompt, the number of steps.

`loop.py` and `matrix.py` call these; each stops with one message where something does not fit.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, PRNGKeyArray

import prompt_tuning
from prompt_tuning.batches import batching
from prompt_tuning.checkpoints import huggingface, identity, load, manifest
from prompt_tuning.config import ConfigError, Experiment, ModelConfig, TrainConfig, config_hash
from prompt_tuning.methods import inits
from prompt_tuning.methods.method import Start
from prompt_tuning.methods.method import first_params as make_first_params
from prompt_tuning.methods.table import find_method, make_settings
from prompt_tuning.model import sharding
from prompt_tuning.prompts import prompt_file
from prompt_tuning.runtime.prefetch import Ahead
from prompt_tuning.runtime.replace_folder import local_folder
from prompt_tuning.tasks import file_examples, registry, task_rows
from prompt_tuning.tasks.eval_task import EvalTask, make_eval_tasks
from prompt_tuning.vocabularies.vocabulary import Vocabulary, load_vocabulary


@dataclasses.dataclass(frozen=True)
class Backbone:
    """The T5 of a checkpoint, on the devices."""

    params: dict[str, Array]
    step: int
    identity: str


@dataclasses.dataclass(frozen=True)
class Data:
    """The rows of a run: what is trained on, with mixing rates, and what is evaluated."""

    train: tuple[batching.Rows, ...]
    rates: tuple[float, ...]
    eval_tasks: tuple[EvalTask, ...]
    vocabulary: Vocabulary
    vocabulary_identity: str
    files_identity: str = ""  # of the user's own files, where the rows are from there


def fingerprint(data: Data, backbone: Backbone) -> bytes:
    """What every process of a run has to have read alike, for all to make the same batches."""
    identities = (backbone.identity, backbone.step, data.vocabulary_identity, data.files_identity)
    digest = hashlib.sha256(repr((identities, data.rates)).encode())
    for rows in (*data.train, *(task.rows for task in data.eval_tasks)):
        for row in (*rows.inputs, *rows.targets):
            digest.update(np.int64(len(row)).tobytes() + np.asarray(row, np.int32).tobytes())
    return digest.digest()


def check_memory(experiment: Experiment, mesh: Mesh) -> None:
    """Refuses rows whose first activations alone cannot fit the devices, before anything is read.

    A lower bound by far: the inputs' embeddings and the targets' logits of the smallest part that a
    batch may be cut into. What passes may still be too large; what does not was mistyped.

    Raises:
      ConfigError: BATCH_SIZE, EVAL_BATCH_SIZE, TASK_FEATURE_LENGTHS or PROMPT_LENGTH is too large.
    """
    model, data, train = experiment.model, experiment.data, experiment.train
    inputs = data.task_feature_lengths["inputs"] + experiment.prompt.length
    targets = data.task_feature_lengths.get("targets", 1)
    row = 4 * targets * model.num_embeddings  # logits are float32
    row += {"float32": 4, "bfloat16": 2}[model.dtype] * inputs * model.embed_dim
    rows = max(1, data.batch_size // (train.microbatches * train.length_groups))
    evaluated = experiment.eval.batch_size or data.batch_size
    for name, number, needed in (
        ("BATCH_SIZE", data.batch_size, rows * row),
        ("EVAL_BATCH_SIZE", evaluated, evaluated * 4 * inputs),
    ):
        sharding.check_memory(mesh, needed, f"{name} = {number}", (inputs, targets))


def make_dir(name: str, macro: str) -> Path:
    """The absolute path of a folder that a macro names, once the folder is there.

    Raises:
      ConfigError: it cannot be made, or lies in a bucket.
    """
    path = local_folder(name, macro)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{macro} {path} cannot be made or is not a folder ({error.strerror}): choose another."
        ) from error
    return path


def refuse_many_processes(experiment: Experiment) -> None:
    """Raises ConfigError for what one process alone can do."""
    if experiment.train.trainable == "model":
        raise ConfigError(
            "model tuning (TRAINABLE = 'model') runs in one process: its checkpoints are written "
            "by one. Prompt tuning runs in many."
        )


def load_backbone(
    experiment: Experiment, mesh: Mesh, reading: Ahead[tuple[str, Array]] | None = None
) -> Backbone:
    """Restores the whole T5, straight to its dtype and its place on the mesh, or stops.

    Where it is being read already, `reading` is that; see `load.read_ahead`.
    """
    verify_checkpoint(experiment)
    with reading or load.read_ahead(experiment, mesh) as items:
        params = dict(items)
    step = load.read_step(experiment.checkpoint)
    return Backbone(params, step, identity.backbone_identity(params))


def verify_checkpoint(experiment: Experiment) -> None:
    """Holds the files of the backbone against their manifest, where VERIFY_CHECKPOINT says so."""
    if experiment.verify_checkpoint:
        print(manifest.check_checkpoint(load.find_path(experiment.checkpoint)), flush=True)


def say_start(experiment: Experiment, step: int) -> Iterator[str]:
    """Lines on the backbone's step, and with it the optimiser's, and on a prompt beside it.

    A Hugging Face folder holds no step, so the paper's optimiser is a choice that has to be made.
    There are no lines where all is plain.
    """
    given = [experiment.prompt.file] if experiment.prompt.init == "file" else []
    if unused := load.say_unused_prompt(experiment.checkpoint, given):
        yield unused
    path = load.find_path(experiment.checkpoint)
    optimizer = experiment.optimizer
    if step or optimizer.name != "adafactor" or not huggingface.is_huggingface(path):
        return
    if optimizer.start_step is not None:
        yield f"backbone: a Hugging Face folder, step 0; Adafactor starts at {optimizer.start_step}"
        return
    yield (
        "backbone: a Hugging Face folder, which holds no step, so steps and Adafactor begin at 0. "
        "The paper's Adafactor began at the step of the LM-adapted checkpoint: "
        "--gin.OPTIMIZER_START_STEP=1100000"
    )


def load_data(experiment: Experiment, *, train: bool = True) -> Data:
    """Tokenised rows of every task asked for, held in memory as arrays.

    Raises:
      ConfigError: a task, its data or its vocabulary is missing or does not fit.
    """
    config = experiment.data
    vocabulary = load_vocabulary(config.vocabulary)
    check_vocabulary_size(vocabulary, experiment)
    if train and len(config.names) != 1:
        raise ConfigError(
            f"a run trains on one task or mixture; MIXTURE_OR_TASK_NAME names {config.names}. "
            "Register a seqio mixture of them to train on all."
        )
    loaded = task_rows.load_eval_rows(
        config, class_labels=experiment.prompt.class_labels, limit=experiment.eval.num_examples
    )
    rows, rates = [], []
    if train:
        rows, rates = task_rows.load_training_rows(
            config.names[0], config.train_split, config.task_feature_lengths, vocabulary=vocabulary
        )
    return Data(
        train=tuple(rows),
        rates=tuple(rates),
        eval_tasks=make_eval_tasks(loaded, experiment.eval),
        vocabulary=vocabulary,
        vocabulary_identity=vocabulary.sha256,
        files_identity=file_examples.files_identity(config.files),
    )


def check_vocabulary_size(vocabulary: Vocabulary, experiment: Experiment) -> None:
    """Raises ConfigError when the model has no embeddings for some of the ids."""
    if vocabulary.vocab_size > experiment.model.num_embeddings:
        raise ConfigError(
            f"the vocabulary {experiment.data.vocabulary} has {vocabulary.vocab_size} ids, the "
            f"model only {experiment.model.num_embeddings} embeddings (NUM_EMBEDDINGS): they do "
            "not belong together."
        )


def vocabulary_identity(spec: str) -> str:
    """What a prompt remembers of its vocabulary."""
    return load_vocabulary(spec).sha256


def first_params(
    experiment: Experiment, backbone: Backbone, data: Data
) -> tuple[dict[str, np.ndarray], str]:
    """The prompt method's parameters before the first step, and a sentence on how they begin."""
    config, model = experiment.prompt, experiment.model
    if experiment.train.trainable == "model":
        return {"prompt": no_prompt_rows(model)}, "none: the model itself is tuned"
    method = find_method(config.method)
    settings = make_settings(method, config.method, config.settings)
    key = first_prompt_key(experiment.train.random_seed)
    labels = registry.label_words(experiment.data.names[0])
    loaded = _load_first_prompt(experiment, backbone, data) if config.init == "file" else None

    def draw_rows(number: int) -> Any:
        if loaded is not None:
            if len(loaded) < number:
                raise ConfigError(
                    f"PROMPT_FILE = {config.file!r}: it has {len(loaded)} rows. Expected {number} "
                    f"for PROMPT_METHOD = {config.method!r}. Choose another PROMPT_INIT."
                )
            return loaded[:number]
        rows, _ = inits.init_prompt(
            dataclasses.replace(config, length=number),
            key,
            jnp.asarray(_fetch(backbone.params["token_embedder/embedding"]), jnp.float32),
            encode=data.vocabulary.encode,
            task_labels=labels,
        )
        return rows

    start = Start(
        key=jax.random.fold_in(key, 1),
        model=model,
        length=config.length,
        draw_rows=draw_rows,
        init=config.init,
        tasks=tuple(rows.task for rows in data.train),
    )
    params = make_first_params(config.method, method, settings, start, backbone.params)
    description = f"{config.length} x {model.embed_dim}, " + inits.describe_init(
        config, labels, model.num_embeddings, data.vocabulary.encode
    )
    if config.method != "prompt_tuning":
        sizes = sum(value.size for value in params.values())
        description += f"; {config.method}, {sizes:,} parameters"
    return {name: np.asarray(value) for name, value in params.items()}, description


def no_prompt_rows(model: ModelConfig) -> Float[np.ndarray, "0 D"]:
    """The rows of a prompt that is none."""
    return np.zeros((0, model.embed_dim), np.float32)


def _load_first_prompt(
    experiment: Experiment, backbone: Backbone, data: Data
) -> Float[np.ndarray, "P D"]:
    config = experiment.prompt
    prompt, metadata = prompt_file.load_prompt(config.file)
    prompt_file.check_prompt(
        prompt,
        metadata,
        shape=(config.length, experiment.model.embed_dim),
        backbone=backbone.identity,
        vocabulary=data.vocabulary_identity,
        where=config.file,
    )
    return np.asarray(prompt, np.float32)


def _fetch(array: Array) -> np.ndarray:
    """The whole array on this host; of many processes, all take part."""
    if not array.is_fully_addressable:
        mesh = array.sharding.mesh  # type: ignore[attr-defined]
        array = jax.jit(lambda x: x, out_shardings=sharding.replicated(mesh))(array)
    return np.asarray(array)


def describe_prompt(
    experiment: Experiment, *, backbone: str, vocabulary: str, init: str, step: int
) -> prompt_file.PromptMetadata:
    """What a prompt's folder says of it; the tasks are registered. A score is added by the run."""
    name = experiment.data.names[0]
    return prompt_file.PromptMetadata(
        task=name,
        label_words=registry.label_words(name, otherwise=experiment.prompt.class_labels),
        backbone=backbone,
        vocabulary=vocabulary,
        init=init,
        step=step,
        config_hash=config_hash(experiment),
        prompt_tuning_version=prompt_tuning.__version__,
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
