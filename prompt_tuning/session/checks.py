"""Checks of the settings of a run against devices, checkpoint and vocabulary, before it starts.

Training, evaluation, inference and `t5x plan` call them.
"""

from __future__ import annotations

import os

import jax
from jax.sharding import Mesh

from prompt_tuning.config import (
    ConfigError,
    Experiment,
    ModelConfig,
    ModelRun,
    PromptConfig,
    TrainConfig,
)
from prompt_tuning.methods.table import find_method, make_settings, trace_method


def check_batch_size(batch_size: int, mesh: Mesh) -> None:
    """Raises ConfigError when a batch does not divide by the data axis."""
    parts = mesh.shape["data"]
    if batch_size % parts:
        raise ConfigError(
            f"BATCH_SIZE = {batch_size} does not divide by the {parts} data-parallel devices "
            f"({mesh.size} devices, NUM_MODEL_PARTITIONS = {mesh.shape['model']}): choose a "
            f"multiple of {parts}."
        )


def check_method(experiment: Experiment) -> None:
    """Checks the method of a run and its settings, before anything is read.

    Raises:
      ConfigError: there is no such method or setting, the model itself is trained, or the attention
        takes no prefix.
    """
    config = experiment.prompt
    method = find_method(config.method)
    make_settings(method, config.method, config.settings)
    if experiment.train.trainable == "model" and config.method != PromptConfig().method:
        objective = experiment.corpus.objective
        of = "TRAINABLE = 'model'" if objective == "task" else f"OBJECTIVE = {objective!r}"
        raise ConfigError(
            f"PROMPT_METHOD = {config.method!r}: it learns a prompt, and {of} trains the model "
            "itself, without one. Leave PROMPT_METHOD and PROMPT_SETTINGS out."
        )
    if experiment.model.attention == "cudnn" and "encoder" in method.fields:
        _, prompt = trace_method(config, experiment.model)
        if prompt.encoder is not None:
            raise ConfigError(
                f"PROMPT_METHOD = {config.method!r}: its prompt has keys and values for the "
                "encoder, which ATTENTION = 'cudnn' does not take. Set ATTENTION = 'xla'."
            )


def check_activations(run: ModelRun, mesh: Mesh) -> None:
    """Rejects rows whose first activations alone cannot fit the devices, before anything is read.

    It counts the inputs' embeddings and the targets' logits of one of the parts that a batch may
    be cut into. This is a lower bound: it rejects only configurations that cannot possibly fit.

    Raises:
      ConfigError: BATCH_SIZE, EVAL_BATCH_SIZE, TASK_FEATURE_LENGTHS or PROMPT_LENGTH is too large.
    """
    model, data = run.model, run.data
    inputs, parts = data.task_feature_lengths["inputs"], 1
    if isinstance(run, Experiment):
        inputs += run.prompt.length
        parts = run.train.microbatches * run.train.length_groups
    targets = data.task_feature_lengths.get("targets", 1)
    row = 4 * targets * model.num_embeddings  # logits are float32
    row += {"float32": 4, "bfloat16": 2}[model.dtype] * inputs * model.embed_dim
    rows = max(1, data.batch_size // parts)
    evaluated = run.eval.batch_size or data.batch_size
    for name, number, needed in (
        ("BATCH_SIZE", data.batch_size, rows * row),
        ("EVAL_BATCH_SIZE", evaluated, evaluated * 4 * inputs),
    ):
        check_memory(mesh, needed, f"{name} = {number}", (inputs, targets))


def check_memory(mesh: Mesh, needed: int, what: str, lengths: tuple[int, int]) -> None:
    """Raises ConfigError if `what`, for rows of these lengths, needs more bytes than there are."""
    memory, (inputs, targets) = memory_of(mesh), lengths
    if needed > memory:
        raise ConfigError(
            f"{what} with rows of {inputs} + {targets} tokens (TASK_FEATURE_LENGTHS and "
            f"PROMPT_LENGTH) needs more than {needed / 2**30:,.0f} GiB for a step, and the "
            f"{mesh.size} devices have {memory / 2**30:,.0f} GiB: lower {what.split(' ')[0]} or "
            "the lengths."
        )


def memory_of(mesh: Mesh) -> int:
    """Bytes of memory of all devices of the mesh; for CPU devices those of the machine."""
    limits = [(d.memory_stats() or {}).get("bytes_limit", 0) for d in mesh.local_devices]
    if all(limits):
        return sum(limits) * mesh.size // len(limits)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * jax.process_count()


def check_vocabulary_size(size: int, name: str, model: ModelConfig) -> None:
    """Raises ConfigError if the vocabulary has more ids than the model has embeddings."""
    if size > model.num_embeddings:
        raise ConfigError(
            f"VOCABULARY = {name!r} has {size} ids, the model only "
            f"{model.num_embeddings} embeddings (NUM_EMBEDDINGS). Give the model's vocabulary."
        )


def refuse_many_processes(experiment: Experiment) -> None:
    """Raises ConfigError for settings that need a single process."""
    if experiment.train.trainable == "model":
        raise ConfigError(
            "TRAINABLE = 'model': model tuning is not supported with several processes, because "
            "one process writes its checkpoints. Start a single process, or tune a prompt."
        )


def last_step(train: TrainConfig, start: int) -> int:
    """The absolute step at which a run that starts at `start` ends.

    Raises:
      ConfigError: neither or both counts are given, or the end is not after the start.
    """
    if (train.train_steps is None) == (train.train_steps_relative is None):
        raise ConfigError(
            f"TRAIN_STEPS = {train.train_steps}, TRAIN_STEPS_RELATIVE = "
            f"{train.train_steps_relative}: expected exactly one of them. Set TRAIN_STEPS "
            "(absolute: counts the checkpoint's own steps, as in T5X) or TRAIN_STEPS_RELATIVE "
            "(this run's steps)."
        )
    if train.train_steps_relative is not None:
        return start + train.train_steps_relative
    assert train.train_steps is not None
    if train.train_steps <= start:
        raise ConfigError(
            f"TRAIN_STEPS = {train.train_steps} is absolute and the checkpoint is already at step "
            f"{start}: there is no step to train. Set TRAIN_STEPS to more than {start}, or "
            f"TRAIN_STEPS_RELATIVE = {train.train_steps} to train {train.train_steps} steps."
        )
    return train.train_steps
