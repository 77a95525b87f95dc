"""gin files and flags -> the dataclasses of `config.py`, every value with the place it came from.

The only module that imports gin (besides the T5X plugin). gin parses the files and evaluates
macros and references; what gin lets pass in silence is an error or a line here: a misspelt macro,
a wrong type, an override. `cli.py` comes before it, `config.py` after it.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import io
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Generic, Literal, TypeVar

import gin
from gin import config as gin_parsing
from gin import config_parser

from prompt_tuning import config
from prompt_tuning.config import FROM_CHECKPOINT, ConfigError
from prompt_tuning.config.gin_files import (
    COMMAND_LINE,
    DEFAULT,
    DEFAULTS,
    Override,
    Place,
    Setting,
    convert,
    describe,
    find_file,
    find_latest,
    fits,
    gin_folder,
    readable_errors,
    suggest,
)

BINDINGS = "runs/bindings.gin"
NO_FALLBACKS: Mapping[str, Any] = types.MappingProxyType({})
NOWHERE: Mapping[str, Place] = types.MappingProxyType({})

RunT = TypeVar("RunT", config.Experiment, config.EvalRun, config.InferRun)
Engine = Literal["embedded", "t5x"]

# What T5X's users also set: the value that the embedded engine's behaviour amounts to, and why it
# has no other. Any other value is an error there; of the first two, which are about the training
# rows, it is one with T5X as well, since both engines read the same rows in the same order.
T5X_MACROS: Mapping[str, tuple[Any, str]] = {
    "USE_CACHED_TASKS": (False, "rows are tokenised when a run starts and kept in memory"),
    "SHUFFLE_TRAIN_EXAMPLES": (True, "the order of the rows follows from RANDOM_SEED and the step"),
    "USE_HARDWARE_RNG": (False, "runs are reproducible"),
    "LOSS_NORMALIZING_FACTOR": (None, "the loss is the sum over target tokens, as in the paper"),
    "EVALUATOR_USE_MEMORY_CACHE": (True, "the rows are in memory"),
    "JSON_WRITE_N_RESULTS": (None, "every scored row is written"),
    "EVAL_STEPS": (None, "it scores whole splits; EVALUATOR_NUM_EXAMPLES limits the rows"),
}
ABOUT_TRAINING_ROWS = ("USE_CACHED_TASKS", "SHUFFLE_TRAIN_EXAMPLES")


@dataclasses.dataclass(frozen=True)
class Loaded(Generic[RunT]):
    """What the files and flags amount to."""

    run: RunT  # the Experiment, or the EvalRun or InferRun that was asked for
    macros: Mapping[str, Any]  # every macro's value; those left open are not in it
    provenance: Mapping[str, Place]  # the place that set each macro
    overrides: tuple[Override, ...]

    @property
    def experiment(self) -> config.Experiment:
        """The run, or what it shares with an experiment."""
        return self.run.experiment


def load(
    gin_files: Sequence[str],
    bindings: Sequence[str] = (),
    search_paths: Sequence[str] = (),
    *,
    run: type[RunT] = config.Experiment,
    engine: Engine = "embedded",
    fallbacks: Mapping[str, Any] = NO_FALLBACKS,
) -> Loaded[RunT]:
    """The experiment that gin files and bindings (`"BATCH_SIZE=16"`) describe; later ones win.

    `fallbacks` are values for macros that nothing sets. gin's global configuration is emptied
    before and after.

    Raises:
      ConfigError: a file is missing or malformed; a macro is unknown, open, or of a wrong type.
    """
    if not hasattr(gin, "register"):
        raise ConfigError("gin-config is not installed: pip install gin-config")
    _register_configurables()
    reader = _Reader(search_paths)
    defaults = {setting.key: setting.value for setting in _read_shipped(DEFAULTS)}
    settings = [
        *(Setting(key, value, DEFAULT) for key, value in {**defaults, **fallbacks}.items()),
        *(setting for name in gin_files for setting in reader.read_file(name)),
        *(setting for text in bindings for setting in reader.read_binding(text)),
    ]
    latest, overrides = find_latest(settings)
    _check_names(latest, set(defaults), engine)
    if any(f"{cls.__name__}.{name}" not in latest for cls, name, _ in _leaf_fields(run)):
        raise ConfigError(
            "the gin files do not say what kind of run this is: add a file of runs/, such as "
            f"--gin_file=runs/prompt_tune.gin (or `include '{BINDINGS}'` in your own file)."
        )
    macros, fields = _evaluate(latest)
    if FROM_CHECKPOINT in fields.values():  # models/from_checkpoint.gin
        from prompt_tuning.checkpoints.load import fill_sizes

        name = "initial_checkpoint_path" if run is config.Experiment else "checkpoint_path"
        fields = fill_sizes(fields, fields[f"{run.__name__}.{name}"])
    return Loaded(
        run=_build(run, fields, latest),
        macros={name: value for name, value in macros.items() if value is not gin.REQUIRED},
        provenance={name: latest[name].place for name in macros},
        overrides=tuple(overrides),
    )


def to_gin(
    run: config.Experiment | config.EvalRun | config.InferRun,
    provenance: Mapping[str, Place] = NOWHERE,
) -> str:
    """A gin file of every macro with its value: `load` makes the same run of it.

    With `provenance` each line says in a comment where its value was set.
    """
    lines = ["# Every macro of this run. Use it with --gin_file; later files and flags win."]
    lines += [f"include './{BINDINGS}'", ""]  # the dot: see gin/t5x/bindings.gin
    owner, owners = run, {type(part): part for part in _parts(run)}
    for cls, name, _ in _leaf_fields(type(run)):
        if cls is not type(owner):
            owner = owners[cls]
            lines.append("")
        macro = field_macros()[f"{cls.__name__}.{name}"]
        value = getattr(owner, name)
        literal = repr(dict(value) if isinstance(value, Mapping) else value)
        comment = f"  # {provenance[macro]}" if macro in provenance else ""
        lines.append(f"{macro} = {literal}{comment}")
    return "\n".join(lines) + "\n"


def _parts(owner: Any) -> Iterator[Any]:
    """A dataclass and the dataclasses in it; no class occurs twice."""
    yield owner
    for field in _nested_classes(type(owner)):
        yield from _parts(getattr(owner, field))


@functools.cache
def field_macros() -> Mapping[str, str]:
    """`{"ModelConfig.num_heads": "NUM_HEADS", ...}`, as gin/runs/bindings.gin binds them."""
    _register_configurables()
    return {setting.key: next(_find_macros(setting.value)) for setting in _read_shipped(BINDINGS)}


def is_ours(binding: str) -> bool:
    """Whether `NAME = VALUE` sets a macro or a field of ours; the rest is meant for T5X."""
    key = binding.split("=")[0].strip()
    return "." not in key or key in field_macros()


@functools.cache
def macro_comments() -> Mapping[str, str]:
    """What each macro is: the comments of gin/defaults.gin."""
    text = (gin_folder() / DEFAULTS).read_text(encoding="utf-8")
    return dict(re.findall(r"^([A-Z0-9_]+) = .*  # (.*)$", text, flags=re.MULTILINE))


# Files ------------------------------------------------------------------------------------------


class _Reader:
    """Turns files and bindings into settings, in the order in which gin would apply them."""

    def __init__(self, search_paths: Sequence[str]):
        self.search_paths = search_paths
        self.open_files: list[Any] = []

    def read_file(self, name: str) -> Iterator[Setting]:
        path = find_file(name, self.search_paths).resolve()
        if path in self.open_files:
            chain = " -> ".join(p.name for p in [*self.open_files, path])
            raise ConfigError(f"gin files include each other in a circle: {chain}.")
        self.open_files.append(path)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            said = getattr(error, "strerror", None) or f"it is not UTF-8: {error.reason}"  # type: ignore[union-attr]
            raise ConfigError(
                f"cannot read gin file {path} ({said}). Give a text file of lines NAME = VALUE."
            ) from error
        yield from self._read_text(text, name)
        self.open_files.pop()

    def read_binding(self, text: str) -> Iterator[Setting]:
        return self._read_text(text, COMMAND_LINE)

    def _read_text(self, text: str, source: str) -> Iterator[Setting]:
        with readable_errors(text, Place(source)):
            parser = config_parser.ConfigParser(io.StringIO(text), gin_parsing.ParserDelegate())
        while True:
            with readable_errors(text, Place(source)):
                statement = parser.parse_statement()
            if statement is None:
                return
            line = statement.location.line_num
            place = Place(source, None if source == COMMAND_LINE else line)
            if isinstance(statement, config_parser.BindingStatement):
                scope = f"{statement.scope}/" if statement.scope else ""
                argument = f".{statement.arg_name}" if statement.arg_name else ""
                value = tuple(statement.value) if type(statement.value) is list else statement.value
                yield Setting(f"{scope}{statement.selector}{argument}", value, place)
            elif isinstance(statement, config_parser.IncludeStatement):
                yield from self.read_file(statement.filename)
            elif isinstance(statement, config_parser.ImportStatement):
                _import_module(statement.module, place)


def _import_module(module: str, place: Place) -> None:
    if module.startswith("__gin__"):
        raise ConfigError(
            f"{place}: dynamic registration belongs to upstream T5X. Files with it are run with "
            "`python -m t5x.main`; the files of runs/ are for this command."
        )
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"{place}: cannot import {module}: {error}") from error


def _read_shipped(name: str) -> Iterator[Setting]:
    """The settings of one of the project's own files, whatever lies in the working directory."""
    text = (gin_folder() / name).read_text(encoding="utf-8")
    return _Reader(())._read_text(text, name)


# Names ------------------------------------------------------------------------------------------


def _check_names(latest: Mapping[str, Setting], known: set[str], engine: Engine) -> None:
    """Refuses keys that nothing reads, which gin would keep in silence.

    Raises:
      ConfigError: with every such key, its place and the nearest right one.
    """
    used = {name: s for s in latest.values() for name in _find_macros(s.value)}
    problems = [
        f"{setting.place}: %{name} is not set anywhere.{suggest(name, latest)}"
        for name, setting in used.items()
        if name not in latest
    ]
    for setting in latest.values():
        if "." in setting.key:
            problems += _check_field(setting)
        elif setting.key in T5X_MACROS:
            problems += _check_t5x_macro(setting, engine)
        elif setting.key not in known and setting.key not in used:
            problems.append(
                f"{setting.place}: unknown macro {setting.key}.{suggest(setting.key, known)}"
            )
    if problems:
        problems.append(f"All macros are listed in {gin_folder() / DEFAULTS}.")
        raise ConfigError("\n".join(problems))


def _check_t5x_macro(setting: Setting, engine: Engine) -> list[str]:
    harmless, reason = T5X_MACROS[setting.key]
    if setting.value == harmless:
        return []
    if setting.key in ABOUT_TRAINING_ROWS:
        return [
            f"{setting.place}: {setting.key} = {setting.value!r}: this project has no such "
            f"setting, with either engine: {reason}. Leave it out."
        ]
    if engine == "embedded":
        return [
            f"{setting.place}: {setting.key} is T5X's; the embedded engine has no such "
            f"setting: {reason}. Leave it out, or use --engine=t5x."
        ]
    return []


def _check_field(setting: Setting) -> list[str]:
    owner, name = setting.key.rsplit(".", 1)
    classes = {cls.__name__: cls for cls in _configurables()}
    if _is_registered(owner) and owner not in classes:
        return []  # of a module that one of the files imports
    if owner not in classes:
        return [
            f"{setting.place}: {setting.key}: the embedded engine has no {owner}."
            f"{suggest(owner, classes, cutoff=0.75)} T5X's own parameters are given on the command "
            f"line, with --engine=t5x: --gin.{setting.key}=VALUE."
        ]
    names = [field.name for field in dataclasses.fields(classes[owner])]
    if name not in names:
        return [
            f"{setting.place}: {owner} has no field {name}.{suggest(name, names)} "
            f"(Its fields: {', '.join(names)})"
        ]
    return []


def _is_registered(selector: str) -> bool:
    try:
        return bool(gin.get_configurable(selector))
    except ValueError:
        return False


def _find_macros(value: Any) -> Iterator[str]:
    """The names of the macros that a value refers to."""
    if isinstance(value, gin_parsing.ConfigurableReference):
        if value.scoped_selector.endswith("/gin.macro"):
            yield value.scoped_selector.removesuffix("/gin.macro")
    elif isinstance(value, Mapping):
        yield from _find_macros(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _find_macros(item)


# Values -----------------------------------------------------------------------------------------


@functools.cache
def _configurables() -> tuple[type, ...]:
    classes = (config.Experiment, config.EvalRun, config.InferRun)
    return tuple(dict.fromkeys(owner for cls in classes for owner, _, _ in _leaf_fields(cls)))


@functools.cache
def _register_configurables() -> None:
    for cls in _configurables():
        gin.register(cls, module="prompt_tuning.config")


@functools.cache
def _leaf_fields(cls: type) -> tuple[tuple[type, str, Any], ...]:
    """(class, field name, type) of every value of a dataclass, then of the dataclasses in it."""
    nested = _nested_classes(cls)
    hints = typing.get_type_hints(cls).items()
    own = tuple((cls, name, hint) for name, hint in hints if name not in nested)
    return own + tuple(leaf for inner in nested.values() for leaf in _leaf_fields(inner))


def _nested_classes(cls: type) -> dict[str, type]:
    """The fields of a dataclass that are dataclasses themselves."""
    hints = typing.get_type_hints(cls).items()
    return {name: h for name, h in hints if isinstance(h, type) and dataclasses.is_dataclass(h)}


def _evaluate(latest: Mapping[str, Setting]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The values of the macros and of the fields, with all references followed by gin."""
    gin.clear_config()
    try:
        for setting in latest.values():
            field = "." in setting.key
            key = setting.key if field else (setting.key, "gin.macro", "value")
            with readable_errors(f"{setting.key} = {setting.value!r}", setting.place):
                gin.bind_parameter(key, setting.value)
        macros, fields = {}, {}
        for key in latest:
            if "." not in key:
                with gin.config_scope(key):
                    macros[key] = gin.get_bindings("gin.macro")["value"]
        for cls in _configurables():
            for name, value in gin.get_bindings(f"prompt_tuning.config.{cls.__name__}").items():
                fields[f"{cls.__name__}.{name}"] = value
        return macros, fields
    except RecursionError as error:
        raise ConfigError("macros refer to each other in a circle.") from error
    finally:
        gin.clear_config()


def _build(run: type[RunT], fields: Mapping[str, Any], latest: Mapping[str, Setting]) -> RunT:
    """The dataclass, once every value is there and of its type.

    Raises:
      ConfigError: with every value that is not, and where it was set.
    """
    values: dict[type, dict[str, Any]] = {}
    open_macros, wrong = [], []
    for cls, name, hint in _leaf_fields(run):
        key = f"{cls.__name__}.{name}"
        macro = next(_find_macros(latest[key].value), key)
        value = convert(fields[key], hint)
        if value is gin.REQUIRED:
            open_macros.append(macro)
        elif not fits(value, hint):
            wrong.append(
                f"{latest[macro].place}: {macro} must be {describe(hint)}, found {value!r}."
            )
        values.setdefault(cls, {})[name] = value
    steps = {fields.get(f"TrainConfig.{name}") for name in ("train_steps", "train_steps_relative")}
    if run is config.Experiment and steps == {None}:
        open_macros.append("TRAIN_STEPS_RELATIVE")
    if open_macros:
        wrong.append(_list_open(open_macros))
    if wrong:
        raise ConfigError("\n".join(wrong))
    try:
        return _construct(run, values)
    except ConfigError as error:
        raise ConfigError(f"{error}{_name_places(str(error), latest)}") from error


def _construct(cls: type, values: Mapping[type, Mapping[str, Any]]) -> Any:
    nested = {name: _construct(inner, values) for name, inner in _nested_classes(cls).items()}
    return cls(**values[cls], **nested)


def _list_open(macros: Sequence[str]) -> str:
    what = "macro has" if len(macros) == 1 else "macros have"
    lines = [f"{len(macros)} {what} no value. Set each with --gin.NAME=VALUE or in a gin file:"]
    comments = {name: macro_comments().get(name, "required") for name in macros}
    for comment in dict.fromkeys(comments.values()):
        names = ", ".join(name for name in macros if comments[name] == comment)
        lines.append(f"  {names}: {comment}")
    return "\n".join(lines)


def _name_places(message: str, latest: Mapping[str, Setting]) -> str:
    """Where the macros were set that a message of `config.py` is about, by macro or by field."""
    fields = [field_macros()[f] for f in re.findall(r"\w+\.\w+", message) if f in field_macros()]
    named = dict.fromkeys([*fields, *re.findall(r"\b[A-Z][A-Z0-9_]+\b", message)])
    places = [f"{name}: {latest[name].place}" for name in named if name in latest]
    return f" ({'; '.join(places)})" if places else ""
