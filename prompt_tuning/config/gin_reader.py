"""gin files and flags -> the dataclasses of `config`, every value with the place it came from.

The only module that imports gin. gin parses the files and evaluates macros and references. What gin
accepts without a word is an error or a line of output here: a misspelt macro, a wrong type, an
override. `commands/` comes before it, `session/` after it.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import io
import re
import types
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
from prompt_tuning.config.runs import PARTS, RUNS, macros, run_settings
from prompt_tuning.config.setting import Leaf, nested_classes, own_settings

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

    kind: type[RunT]  # Experiment, EvalRun or InferRun
    fields: Mapping[str, Any]  # the value of every field, by a name such as "ModelConfig.num_heads"
    macros: Mapping[str, Any]  # every macro's value, if it has one
    provenance: Mapping[str, Place]  # the place that set each macro
    overrides: tuple[Override, ...]

    @property
    def open_sizes(self) -> tuple[str, ...]:
        """The fields of ModelConfig whose values are still to be read from the checkpoint."""
        return tuple(
            key.removeprefix("ModelConfig.")
            for key, value in self.fields.items()
            if key.startswith("ModelConfig.") and value == FROM_CHECKPOINT
        )

    def fill_sizes(self, sizes: Mapping[str, Any]) -> Loaded[RunT]:
        """The settings with these values of fields of ModelConfig."""
        filled = {f"ModelConfig.{name}": value for name, value in sizes.items()}
        return dataclasses.replace(self, fields={**self.fields, **filled})

    @functools.cached_property
    def run(self) -> RunT:
        """The run, once its sizes are known (`session.session.resolve_sizes`).

        Raises:
          ConfigError: two settings do not fit each other, or there is no such method.
        """
        assert not self.open_sizes, f"sizes that are not read yet: {self.open_sizes}"
        values: dict[type, dict[str, Any]] = {}
        for leaf in run_settings(self.kind):
            values.setdefault(leaf.owner, {})[leaf.name] = self.fields[_key(leaf)]
        try:
            run = _construct(self.kind, values)
            if self.kind is config.Experiment:
                _check_method(run.prompt)
        except ConfigError as error:
            raise ConfigError(f"{error}{self._name_places(str(error))}") from error
        return run

    def _name_places(self, message: str) -> str:
        """Where the macros were set that a message of the dataclasses names."""
        names = dict.fromkeys(re.findall(r"\b[A-Z][A-Z0-9_]+\b", message))
        places = {name: self.provenance.get(name, DEFAULT) for name in names}
        places = [f"{name}: {place}" for name, place in places.items() if place != DEFAULT]
        return f" ({'; '.join(places)})" if places else ""


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
    defaults = _defaults()
    settings = [
        *(Setting(key, value, DEFAULT) for key, value in {**defaults, **fallbacks}.items()),
        *(setting for name in gin_files for setting in reader.read_file(name)),
        *(setting for text in bindings for setting in reader.read_binding(text)),
    ]
    latest, overrides = find_latest(settings)
    _check_names(latest, set(defaults), engine)
    if any(_key(leaf) not in latest for leaf in run_settings(run)):
        raise ConfigError(
            "the gin files do not say what kind of run this is: add a file of runs/, such as "
            f"--gin_file=runs/prompt_tune.gin (or `include '{BINDINGS}'` in your own file)."
        )
    macro_values, fields = _evaluate(latest)
    loaded = Loaded(
        kind=run,
        fields=_check_values(run, fields, latest),
        macros={name: value for name, value in macro_values.items() if value is not gin.REQUIRED},
        provenance={name: latest[name].place for name in macro_values},
        overrides=tuple(overrides),
    )
    if not loaded.open_sizes:
        _ = loaded.run  # so that a mistake is an error here
    return loaded


def to_gin(
    run: config.Experiment | config.EvalRun | config.InferRun,
    provenance: Mapping[str, Place] = NOWHERE,
) -> str:
    """A gin file of every macro with its value: `load` makes the same run of it.

    With `provenance` each line says in a comment where its value was set.
    """
    lines = ["# Every macro of this run. Use it with --gin_file; later files and flags win."]
    lines += [f"include './{BINDINGS}'", ""]  # the dot: see gin/t5x/bindings.gin
    parts = {type(part): part for part in _find_parts(run)}
    last: type = type(run)
    for leaf in run_settings(type(run)):
        if leaf.owner is not last:
            last = leaf.owner
            lines.append("")
        macro = leaf.macro.name
        comment = f"  # {provenance[macro]}" if macro in provenance else ""
        value = getattr(parts[leaf.owner], leaf.name)
        literal = repr(dict(value) if isinstance(value, Mapping) else value)
        lines.append(f"{macro} = {literal}{comment}")
    return "\n".join(lines) + "\n"


def _find_parts(owner: Any) -> Iterator[Any]:
    """A dataclass and the dataclasses in it; no class occurs twice."""
    yield owner
    for field in nested_classes(type(owner)):
        yield from _find_parts(getattr(owner, field))


def _key(leaf: Leaf) -> str:
    """The name that a field has in a gin file, "ModelConfig.num_heads"."""
    return f"{leaf.owner.__name__}.{leaf.name}"


@functools.cache
def field_macros() -> Mapping[str, str]:
    """`{"ModelConfig.num_heads": "NUM_HEADS", ...}`, as gin/runs/bindings.gin binds them."""
    return {_key(leaf): leaf.macro.name for run in RUNS for leaf in run_settings(run)}


@functools.cache
def _defaults() -> dict[str, Any]:
    """The value of every macro that nothing sets, as gin/defaults.gin states them for T5X."""
    return {name: _default(leaf) for name, leaf in macros().items()}


def _default(leaf: Leaf) -> Any:
    if leaf.default is not dataclasses.MISSING:
        return leaf.default
    return gin_parsing.parse_value(f"%{leaf.macro.fallback or 'gin.REQUIRED'}")


def is_ours(binding: str) -> bool:
    """Whether `NAME = VALUE` sets a macro or a field of ours; the rest is meant for T5X."""
    key = binding.split("=")[0].strip()
    return "." not in key or key in field_macros()


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
            text = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or f"it is not UTF-8: {error.reason}"  # type: ignore[union-attr]
            raise ConfigError(
                f"cannot read gin file {path} ({reason}). Give a text file of lines NAME = VALUE."
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


def read_model(name: str) -> config.ModelConfig:
    """The sizes that a file of gin/models/ sets; "base" is T5 1.1's.

    Raises:
      ConfigError: there is no model of that name.
    """
    files = {path.stem: path for path in (gin_folder() / "models").glob("*t5_*.gin")}
    file = files.get(name) or files.get(f"t5_1_1_{name}")
    if file is None:
        raise ConfigError(
            f"no model is called {name!r}.{suggest(name, files)} Expected one of "
            f"{', '.join(sorted(files))}. For other sizes make a prompt_tuning.config.ModelConfig."
        )
    values = {setting.key: setting.value for setting in _Reader(()).read_file(str(file))}
    sizes = [leaf for leaf in own_settings(config.ModelConfig) if leaf.macro.name in values]
    return config.ModelConfig(**{leaf.name: values[leaf.macro.name] for leaf in sizes})


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
    classes = {cls.__name__: cls for cls in (*RUNS, *PARTS)}
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
def _register_configurables() -> None:
    for cls in (*RUNS, *PARTS):
        gin.register(cls, module="prompt_tuning.config")


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
        for cls in (*RUNS, *PARTS):
            for name, value in gin.get_bindings(f"prompt_tuning.config.{cls.__name__}").items():
                fields[f"{cls.__name__}.{name}"] = value
        return macros, fields
    except RecursionError as error:
        raise ConfigError("macros refer to each other in a circle.") from error
    finally:
        gin.clear_config()


def _check_values(
    run: type[RunT], fields: Mapping[str, Any], latest: Mapping[str, Setting]
) -> dict[str, Any]:
    """The values of a run's fields, once every value is there and of its type.

    Raises:
      ConfigError: with every value that is not, and where it was set.
    """
    values: dict[str, Any] = {}
    open_macros, wrong = [], []
    for leaf in run_settings(run):
        key = _key(leaf)
        macro = next(_find_macros(latest[key].value), key)
        value = values[key] = convert(fields[key], leaf.type)
        may_be_read = leaf.owner is config.ModelConfig and value == FROM_CHECKPOINT
        if value is gin.REQUIRED:
            open_macros.append(macro)
        elif not may_be_read and not fits(value, leaf.type):
            wrong.append(
                f"{latest[macro].place}: {macro} must be {describe(leaf.type)}, found {value!r}."
            )
    steps = {values.get(f"TrainConfig.{name}") for name in ("train_steps", "train_steps_relative")}
    if run is config.Experiment and steps == {None}:
        open_macros.append("TRAIN_STEPS_RELATIVE")
    if open_macros:
        wrong.append(_list_open(open_macros))
    if wrong:
        raise ConfigError("\n".join(wrong))
    return values


def _construct(cls: type, values: Mapping[type, Mapping[str, Any]]) -> Any:
    nested = {name: _construct(inner, values) for name, inner in nested_classes(cls).items()}
    return cls(**values[cls], **nested)


def _check_method(prompt: config.PromptConfig) -> None:
    """Raises ConfigError unless there is such a method, with such settings."""
    if prompt.method != config.PromptConfig().method or prompt.settings:
        from prompt_tuning.methods.table import find_method, make_settings

        make_settings(find_method(prompt.method), prompt.method, prompt.settings)


def _list_open(names: Sequence[str]) -> str:
    what = "macro has" if len(names) == 1 else "macros have"
    lines = [f"{len(names)} {what} no value. Set each with --gin.NAME=VALUE or in a gin file:"]
    known = macros()
    comments = {name: known[name].macro.help if name in known else "required" for name in names}
    for comment in dict.fromkeys(comments.values()):
        alike = ", ".join(name for name in names if comments[name] == comment)
        lines.append(f"  {alike}: {comment}")
    return "\n".join(lines)
