"""Loads rows and vocabulary, and initialises the prompt, after `session.py` has opened the devices.

Reading rows imports TensorFlow.
"""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

import prompt_tuning
from prompt_tuning.batches import batching
from prompt_tuning.config import (
    ConfigError,
    DataConfig,
    EvalConfig,
    Experiment,
    ModelConfig,
    config_hash,
)
from prompt_tuning.methods import inits
from prompt_tuning.methods.method import Method, Start
from prompt_tuning.methods.method import first_params as make_first_params
from prompt_tuning.methods.table import find_method, make_settings
from prompt_tuning.model import sharding
from prompt_tuning.model.prompt import POSITIONS, Prompt, no_prompt, other_fields
from prompt_tuning.prompts import prompt_file
from prompt_tuning.session import checks
from prompt_tuning.session.session import Backbone
from prompt_tuning.tasks import file_examples, registry, task_rows
from prompt_tuning.tasks.eval_task import EvalTask, make_eval_tasks
from prompt_tuning.vocabularies.vocabulary import Vocabulary, load_vocabulary


@dataclasses.dataclass(frozen=True)
class Data:
    """The rows of a run: training rows with mixing rates, and evaluation tasks."""

    train: tuple[batching.Rows, ...]
    rates: tuple[float, ...]
    eval_tasks: tuple[EvalTask, ...]
    vocabulary: Vocabulary
    vocabulary_identity: str
    files_identity: str = ""  # fingerprint of the user's own files, if the rows are from there


def fingerprint(data: Data) -> str:
    """The SHA-256 of all rows; every process of a run must have the same."""
    digest = hashlib.sha256(repr(data.rates).encode())
    for rows in (*data.train, *(task.rows for task in data.eval_tasks)):
        for row in (*rows.inputs, *rows.targets):
            digest.update(np.int64(len(row)).tobytes() + np.asarray(row, np.int32).tobytes())
    return digest.hexdigest()


def load_data(
    config: DataConfig,
    evaluation: EvalConfig,
    model: ModelConfig,
    *,
    class_labels: tuple[str, ...] = (),
    train: bool = True,
) -> Data:
    """The tokenised rows of the tasks of MIXTURE_OR_TASK_NAME, in memory.

    Raises:
      ConfigError: a task, its data or its vocabulary is missing or does not fit.
    """
    vocabulary = load_vocabulary(config.vocabulary)
    checks.check_vocabulary_size(vocabulary.vocab_size, config.vocabulary, model)
    if train and len(config.names) != 1:
        raise ConfigError(
            f"MIXTURE_OR_TASK_NAME = {config.names}: a run trains on one task or mixture. Register "
            "a seqio mixture of them to train on all."
        )
    loaded = task_rows.load_eval_rows(
        config, class_labels=class_labels, limit=evaluation.num_examples
    )
    rows, rates = [], []
    if train:
        rows, rates = task_rows.load_training_rows(
            config.names[0],
            config.train_split,
            config.task_feature_lengths,
            vocabulary=vocabulary,
            truncate=config.truncate,
        )
    return Data(
        train=tuple(rows),
        rates=tuple(rates),
        eval_tasks=make_eval_tasks(loaded, evaluation),
        vocabulary=vocabulary,
        vocabulary_identity=vocabulary.sha256,
        files_identity=file_examples.files_identity(config.files),
    )


def find_members(experiment: Experiment) -> tuple[str, ...]:
    """The tasks that have a member of the prompt each, sorted; () for a prompt without members.

    It registers the tasks, and reads no rows.

    Raises:
      ConfigError: a task that is scored has no member, because it is not trained.
    """
    config, method = experiment.data, find_method(experiment.prompt.method)
    if not method.members or len(config.names) != 1:
        return ()
    task_rows.register_tasks(config)
    (name,), split = config.names, config.train_split
    members = tuple(sorted(task for task, _ in task_rows.training_tasks(name, split)))
    scored = task_rows.scored_tasks(config)
    others = [task for task in scored if registry.trained_task(task) not in members]
    if others:
        raise ConfigError(
            f"MIXTURE_OR_TASK_NAME = {name!r}: PROMPT_METHOD = {experiment.prompt.method!r} learns "
            f"a prompt for each task that is trained ({', '.join(members)}), and none for "
            f"{', '.join(others)}. Expected such tasks alone. Give each a rate above 0 and rows "
            f"in the split {split!r}, or leave it out of the mixture."
        )
    return members


def vocabulary_identity(spec: str) -> str:
    """The fingerprint of a vocabulary, which is saved with a prompt."""
    return load_vocabulary(spec).sha256


def first_params(
    experiment: Experiment, backbone: Backbone, data: Data
) -> tuple[dict[str, np.ndarray], str]:
    """The prompt method's parameters before the first step, and how they begin, also printed."""
    config, model = experiment.prompt, experiment.model
    if experiment.train.trainable == "model":
        return no_first_params(model)
    method = find_method(config.method)
    settings = make_settings(method, config.method, config.settings)
    key = first_prompt_key(experiment.train.random_seed)
    labels = registry.label_words(experiment.data.names[0])
    drawn: list[str] = []  # how; a method may begin without such rows
    file = None
    if config.init == "file":
        file = _load_first_prompt(experiment, method, backbone, data)
        drawn.append(f"from the file {config.file}")

    def draw_rows(number: int) -> Any:
        if file is not None:
            loaded = np.asarray(file.rows)
            if len(loaded) != number:
                raise ConfigError(
                    f"PROMPT_FILE = {config.file!r}: it has {len(loaded)} rows. Expected {number} "
                    f"for PROMPT_METHOD = {config.method!r}. Choose another PROMPT_INIT."
                )
            return loaded[:number]
        rows, description = inits.init_prompt(
            dataclasses.replace(config, length=number),
            key,
            jnp.asarray(_fetch(backbone.params["token_embedder/embedding"]), jnp.float32),
            encode=data.vocabulary.encode,
            task_labels=labels,
        )
        drawn.append(description)
        return rows

    start = Start(
        key=jax.random.fold_in(key, 1),
        model=model,
        length=config.length,
        draw_rows=draw_rows,
        init=config.init,
        tasks=tuple(sorted(rows.task for rows in data.train)),
        backbone=backbone.params,
        file=file if file is not None and other_fields(file) else None,
    )
    params = make_first_params(config.method, method, settings, start)
    init = "; ".join(dict.fromkeys(drawn)) or "first values of the method's own"
    if config.method != "prompt_tuning":
        sizes = sum(v.size for leaf, v in params.items() if leaf not in method.fixed)
        init += f"; {config.method}, {sizes:,} trained parameters"
    shape = (
        f"{config.length} x {model.embed_dim}"
        if method.fields == ("rows",)
        else f"{config.length} positions ({', '.join(method.fields)})"
    )
    if method.members:
        shape = f"{shape} for each of {', '.join(start.tasks)}"
    print(f"prompt: {shape}, {init}", flush=True)
    return {name: np.asarray(value) for name, value in params.items()}, init


def no_first_params(model: ModelConfig) -> tuple[dict[str, np.ndarray], str]:
    """The parameters of no prompt, and how they begin, of a run that trains the model itself."""
    return {"prompt": np.asarray(no_prompt(model).rows)}, "no prompt: the model itself is tuned"


def _load_first_prompt(
    experiment: Experiment, method: Method, backbone: Backbone, data: Data
) -> Prompt:
    """The prompt of PROMPT_FILE: rows, or keys and values for a method that has some."""
    config, model = experiment.prompt, experiment.model
    if method.visibility == "prompt":  # whose rows may begin as those of any prompt
        stored = prompt_file.read_prompt(config.file)
        prompt, metadata = stored.prompt, stored.metadata
    else:
        prompt, metadata = prompt_file.load_prompt(config.file)
    # A method with members may begin with rows for a part of its prompt.
    any_length = method.members or other_fields(prompt)
    prompt_file.check_prompt(
        prompt,
        metadata,
        shape=(None if any_length else config.length, model.embed_dim),
        model=None if "rows" in method.fields or method.visibility == "prompt" else model,
        backbone=backbone.identity,
        vocabulary=data.vocabulary_identity,
        where=config.file,
    )
    for field in other_fields(prompt):
        if (length := getattr(prompt, field).shape[POSITIONS[field]]) != config.length:
            raise ConfigError(
                f"PROMPT_FILE = {config.file!r}: its {field} has {length} positions. Set "
                f"PROMPT_LENGTH = {length}, or give another prompt."
            )
    return prompt


def _fetch(array: Array) -> np.ndarray:
    """The whole array on this host; a collective if there are several processes."""
    if not array.is_fully_addressable:
        mesh = array.sharding.mesh  # type: ignore[attr-defined]
        array = jax.jit(lambda x: x, out_shardings=sharding.replicated(mesh))(array)
    return np.asarray(array)


def describe_prompt(
    experiment: Experiment,
    *,
    backbone: str,
    vocabulary: str,
    init: str,
    step: int,
    task: str | None = None,
) -> prompt_file.PromptMetadata:
    """The metadata of a prompt of this run, or of its member for `task`, without its score.

    The tasks must be registered.
    """
    name, config = task or experiment.data.names[0], experiment.prompt
    method = find_method(config.method)
    settings = make_settings(method, config.method, config.settings)
    return prompt_file.PromptMetadata(
        task=name,
        label_words=registry.label_words(name, otherwise=config.class_labels),
        method=config.method,
        settings=dataclasses.asdict(settings),
        visibility=method.visibility,
        backbone=backbone,
        vocabulary=vocabulary,
        init=init,
        step=step,
        config_hash=config_hash(experiment),
        prompt_tuning_version=prompt_tuning.__version__,
    )


def first_prompt_key(random_seed: int) -> PRNGKeyArray:
    """The key of the first prompt, different from every step's; the same in both engines."""
    return jax.random.fold_in(jax.random.key(random_seed), 2**31 - 1)
