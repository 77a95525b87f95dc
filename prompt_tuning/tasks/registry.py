"""The seqio tasks and mixtures of the tables (`superglue.py`, `glue.py`, `qa.py`) and of the demo.

Text becomes tokens of the run's vocabulary. It is known only at run time, so importing this module
registers no task: `register` does.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib
import itertools
import os
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import seqio
import tensorflow as tf
from seqio.utils import Feature

from prompt_tuning.config import OFFICIAL_VOCABULARY, ConfigError
from prompt_tuning.tasks import answers, glue, metrics, qa, superglue
from prompt_tuning.tasks.spec import TaskSpec, to_examples
from prompt_tuning.tasks.vocabulary import seqio_vocabulary, target_vocabulary
from prompt_tuning.world import generator

Provider = seqio.Task | seqio.Mixture

# Of every table its tasks, and its mixtures as names with rates.
TABLES = tuple((table.TASKS, table.MIXTURES) for table in (superglue, glue, qa))
# The original has every task twice; its `_examples` ones show a few predictions in TensorBoard.
# Here every evaluation writes all of them, so that both names are one task.
ALIAS = "_examples"

# What `register` added, and with which settings: the only state of this module.
_added: list[Provider] = []
_settings: dict[str, str | bool | None] = {}
own_words: dict[str, tuple[str, ...]] = {}  # the label words of tasks that `file_tasks.py` adds


def register(
    vocabulary: str = OFFICIAL_VOCABULARY,
    *,
    tfds_data_dir: str | None = None,
    sentinel_targets: bool = False,
) -> None:
    """Adds all tasks and mixtures of the project to seqio's registries.

    A second call changes nothing, or, with another vocabulary or directory, replaces what the
    first one added. A name that a user's module has registered is left alone. `tfds_data_dir` holds
    for the user's own TFDS tasks as well, as T5X's flag does. With `sentinel_targets` every target
    begins with the first sentinel.
    """
    settings = {
        "vocabulary": vocabulary,
        "tfds_data_dir": tfds_data_dir,
        "sentinel_targets": sentinel_targets,
    }
    if settings == _settings and all(map(_is_registered, _added)):
        return
    loaded = seqio_vocabulary(vocabulary)  # may fail: before anything is changed
    _keep_accelerators_for_jax()
    _point_tfds_at(tfds_data_dir)
    _remove_added()
    _add_all(loaded, sentinel_targets)
    _settings.update(settings)


def ensure_registered() -> None:
    """Registers the tasks if they are not, with the vocabulary that PROMPT_TUNING_VOCABULARY names.

    For programs that only import modules, such as upstream T5X: see `register.py`. The directory
    of TFDS is theirs to set.
    """
    if not _added:
        vocabulary = os.environ.get("PROMPT_TUNING_VOCABULARY", OFFICIAL_VOCABULARY)
        _keep_accelerators_for_jax()
        _add_all(seqio_vocabulary(vocabulary))


def _registry(provider: Provider) -> Any:
    return seqio.TaskRegistry if isinstance(provider, seqio.Task) else seqio.MixtureRegistry


def _is_registered(provider: Provider) -> bool:
    registry = _registry(provider)
    return provider.name in registry.names() and registry.get(provider.name) is provider


def _keep_accelerators_for_jax() -> None:
    """TensorFlow only reads data here; left alone it would take all memory of a GPU."""
    with contextlib.suppress(RuntimeError):  # already running: too late to change
        tf.config.set_visible_devices([], "GPU")


def _point_tfds_at(directory: str | None) -> None:
    """Makes seqio read TFDS from `directory`, tasks that have been read before included."""
    directory = directory and os.path.expanduser(directory)
    seqio.set_tfds_data_dir_override(directory)
    for name in seqio.TaskRegistry.names():
        source = seqio.TaskRegistry.get(name).source
        if isinstance(source, seqio.TfdsDataSource):
            source.tfds_dataset.override_data_dir(directory)  # type: ignore[arg-type]


def _remove_added() -> None:
    for provider in _added:
        if _is_registered(provider):
            _registry(provider).remove(provider.name)
    _added.clear()


def _add_all(vocabulary: seqio.Vocabulary, sentinel_targets: bool = False) -> None:
    features = {
        # As in T5: a task may do without inputs.
        "inputs": Feature(vocabulary, add_eos=True, required=False),
        "targets": Feature(target_vocabulary(vocabulary, sentinel_targets), add_eos=True),
    }
    for name in generator.DEMO_TASKS:
        _add(_demo_task(name, features))
    for specs, mixtures in TABLES:
        for task_word, alias in itertools.product((True, False), ("", ALIAS)):
            for spec in specs.values():
                if task_word or spec.word:
                    _add(_text_task(spec, task_word, alias, features))
            for name, rates in mixtures.items():
                named = [(full_name(task, task_word) + alias, rate) for task, rate in rates]
                if all(task in seqio.TaskRegistry.names() for task, _ in named):
                    _add(seqio.Mixture(full_name(name, task_word) + alias, named))


def _add(provider: Provider) -> None:
    """Adds a task or mixture, unless its name is taken."""
    if provider.name not in task_names():
        _registry(provider).add_provider(provider.name, provider)
        _added.append(provider)


def full_name(name: str, task_word: bool) -> str:
    """T5's name of a task or mixture, or the original's name of its form without the task word.

    >>> full_name(superglue.CB.name, False)
    'taskless_super_glue_cb_v102'
    """
    return name if task_word else f"taskless_{name}"


def _text_task(
    spec: TaskSpec, task_word: bool, alias: str, features: Mapping[str, Feature]
) -> seqio.Task:
    return seqio.Task(
        full_name(spec.name, task_word) + alias,
        source=seqio.TfdsDataSource(spec.source, splits=spec.splits),
        preprocessors=[
            functools.partial(to_examples, spec=spec, task_word=task_word, with_fields=True),
            seqio.preprocessors.tokenize,
            seqio.CacheDatasetPlaceholder(),
            seqio.preprocessors.append_eos_after_trim,
        ],
        output_features=features,
        postprocess_fn=spec.postprocess,
        metric_fns=list(spec.metrics),
    )


def _demo_task(name: str, features: Mapping[str, Feature]) -> seqio.Task:
    def rows(split: str, shuffle_files: bool = False, seed: int | None = None) -> tf.data.Dataset:
        del shuffle_files, seed
        examples = generator.demo_rows(name, split)
        columns: Any = {key: [row[key] for row in examples] for key in ("inputs", "targets")}
        return tf.data.Dataset.from_tensor_slices(columns)

    return seqio.Task(
        name,
        source=seqio.FunctionDataSource(
            rows,
            splits=tuple(generator.DEMO_SPLITS),
            num_input_examples={split: n for split, (n, _) in generator.DEMO_SPLITS.items()},
        ),
        preprocessors=[
            seqio.preprocessors.tokenize,
            seqio.CacheDatasetPlaceholder(),
            seqio.preprocessors.append_eos_after_trim,
        ],
        output_features=features,
        postprocess_fn=answers.to_label(*generator.DEMO_TASKS[name].label_words),
        metric_fns=[metrics.accuracy],
    )


def task_names() -> list[str]:
    """The names of all registered tasks and mixtures, the user's own included."""
    return sorted({*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()})


def resolve(name: str) -> Provider:
    """The registered task or mixture of this name.

    Raises:
      ConfigError: there is none; the message has the nearest names.
    """
    for registry in (seqio.TaskRegistry, seqio.MixtureRegistry):
        if name in registry.names():
            return registry.get(name)
    names = [known for known in task_names() if not known.endswith(ALIAS)]
    close = difflib.get_close_matches(name, names, n=3)
    hint = f"Did you mean {' or '.join(close)}? " if close else ""
    raise ConfigError(
        f"MIXTURE_OR_TASK_NAME: there is no task or mixture {name!r}. {hint}`t5x list-tasks` "
        "prints all; a task of your own is registered by the module that MIXTURE_OR_TASK_MODULE "
        "names, or made of the file that TRAIN_FILE names."
    )


def component_tasks(name: str) -> list[tuple[str, float]]:
    """The names of a mixture's tasks with their rates, which need not add up to 1.

    A task by itself is its only component.

    Raises:
      ConfigError: the name is unknown, or the rates are no rates.
    """
    provider = resolve(name)
    if isinstance(provider, seqio.Task):
        return [(name, 1.0)]
    try:
        rates = [(task.name, float(provider.get_rate(task))) for task in provider.tasks]
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"the rates of the mixture {name} cannot be computed: {error}. Give them as numbers."
        ) from error
    if min(rate for _, rate in rates) < 0 or not sum(rate for _, rate in rates) > 0:
        values = ", ".join(f"{task}: {rate}" for task, rate in rates)
        raise ConfigError(
            f"the rates of the mixture {name} must be 0 or more, one of them more; found {values}."
        )
    return rates


# Tasks that are only scored, and the task on whose rows their prompt is trained.
_SCORED_BY = (
    (r"_wsc_(\w+)_simple_eval", r"_wsc_\1_simple_train"),
    (r"glue_mnli_(?:mis)?matched_", r"glue_mnli_"),
    (r"glue_[a-z0-9]+_from_([a-z0-9]+)_", r"glue_\1_"),
)


def trained_task(name: str) -> str:
    """The task on whose rows a prompt for this task is trained: nearly always the task itself.

    >>> trained_task("glue_mnli_matched_v002"), trained_task("super_glue_cb_v102")
    ('glue_mnli_v002', 'super_glue_cb_v102')
    """
    for pattern, other in _SCORED_BY:
        name = re.sub(pattern, other, name)
    return name


def find_spec(name: str) -> TaskSpec | None:
    """The table row of a task of the project, in either form; None of any other task."""
    key = name.removeprefix("taskless_").removesuffix(ALIAS)
    return next((specs[key] for specs, _ in TABLES if key in specs), None)


def label_words(name: str, *, otherwise: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The words a task answers with, in the order of its classes.

    () where every row has its own (ReCoRD: see `row_words`) and where any text is an answer (WSC,
    SQuAD); `otherwise` of a task that is not the project's. Of a mixture, the words of all its
    tasks, each once.
    """
    if name in generator.DEMO_TASKS:
        return generator.DEMO_TASKS[name].label_words
    if (spec := find_spec(name)) is not None:
        return spec.words or spec.labels
    if name not in seqio.MixtureRegistry.names():
        return own_words.get(name, ()) or otherwise
    components = seqio.MixtureRegistry.get(name).tasks
    words = [label_words(task.name, otherwise=otherwise) for task in components]
    return tuple(dict.fromkeys(itertools.chain.from_iterable(words)))


def row_words(name: str, example: Mapping[str, Any]) -> tuple[str, ...]:
    """The words that one example of a task may be answered with; () where any text may be.

    The task's label words, or the row's own: the entities of ReCoRD, the candidates of DPR.
    `example` is what the seqio task gives.
    """
    spec = find_spec(name)
    if spec is None or not spec.answers:
        return label_words(name)
    return tuple(dict.fromkeys(answers.texts(example[spec.answers])))


def has_row_words(name: str) -> bool:
    """Whether every row of a task has words of its own to be answered with."""
    spec = find_spec(name)
    return spec is not None and bool(spec.answers)


def import_task_module(name: str) -> None:
    """Imports the user's module, which registers their tasks; a second call does nothing.

    Modules of the working directory are found, as they are with `python -m t5x.main`.

    Raises:
      ConfigError: the module is not there, or it fails.
    """
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    try:
        with _giving_way():
            importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or name
        what = (
            "is not found in the working directory, in PYTHONPATH or among the installed packages"
            if name == missing or name.startswith(missing + ".")
            else f"imports {missing!r}, which is not installed"
        )
        raise ConfigError(f"MIXTURE_OR_TASK_MODULE: the module {name!r} {what}.") from error
    except Exception as error:  # the user's code: whatever it raises is theirs to read
        raise ConfigError(
            f"MIXTURE_OR_TASK_MODULE: importing {name!r} failed with {type(error).__name__}: "
            f"{error}{_place(error)}."
        ) from error


@contextlib.contextmanager
def _giving_way() -> Iterator[None]:
    """In here a user's module may take a name of the project's, which seqio calls a duplicate.

    `import t5` registers T5's tasks, and most modules written for T5X import some part of t5.
    """

    def add_provider(cls: Any, name: str, provider: Provider) -> None:
        for added in [p for p in _added if p.name == name and _registry(p) is cls]:
            cls.remove(name)
            _added.remove(added)
        super(cls, cls).add_provider(name, provider)

    registries: list[Any] = [seqio.TaskRegistry, seqio.MixtureRegistry]
    for registry in registries:
        registry.add_provider = classmethod(add_provider)
    try:
        yield
    finally:
        for registry in registries:
            del registry.add_provider  # the inherited one again


def _place(error: Exception) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return f" ({trace.tb_frame.f_code.co_filename}, line {trace.tb_lineno})" if trace else ""
