"""What gin files set: where a file is, what is wrong with it, which setting wins, what fits.

`config/gin_reader.py` reads the settings and makes the experiment of them. No gin here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import re
import tokenize
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from prompt_tuning.config import ConfigError

DEFAULTS = "defaults.gin"
COMMAND_LINE = "the command line"


class Place(NamedTuple):
    """Where a value was set."""

    source: str  # the file as it was named, or the command line
    line: int | None = None

    def __str__(self) -> str:
        return self.source if self.line is None else f"{self.source}:{self.line}"


DEFAULT = Place("the default")


@dataclasses.dataclass(frozen=True)
class Setting:
    """`key = value`, as gin read it: a macro (`BATCH_SIZE`) or a field (`ModelConfig.dtype`)."""

    key: str
    value: Any
    place: Place


@dataclasses.dataclass(frozen=True)
class Override:
    """A setting that a later file or flag replaced."""

    old: Setting
    new: Setting

    def __str__(self) -> str:
        old, new = self.old, self.new
        name = "" if old.key == new.key else f"{new.key} = "
        return (
            f"{old.key} = {old.value!r} ({old.place}) is overridden by "
            f"{name}{new.value!r} ({new.place})"
        )


# Files ------------------------------------------------------------------------------------------


def gin_folder(package: Path = Path(__file__).parents[1]) -> Path:
    """The project's gin files: inside the package in a wheel, beside it in a checkout.

    Raises:
      ConfigError: they are in neither place.
    """
    for folder in (package / "gin", package.parent / "gin"):
        if (folder / DEFAULTS).is_file():
            return folder
    raise ConfigError(
        f"the project's gin files are neither in {package / 'gin'} nor in "
        f"{package.parent / 'gin'}: the installation is incomplete. Install the package again."
    )


def find_file(name: str, search_paths: Sequence[str] = ()) -> Path:
    """The gin file of that name: from the working directory, the search paths, or the project.

    Raises:
      ConfigError: there is none; the message names the places and the nearest files.
    """
    if not name.strip():
        raise ConfigError("--gin_file is empty: give the path of a gin file, such as demo.gin.")
    path = Path(name).expanduser()
    shipped = gin_folder()
    folders = [Path(), *(Path(folder).expanduser() for folder in search_paths), shipped]
    if path.is_absolute():
        folders = [path.parent]
    for folder in folders:
        if (folder / path).is_file():
            return folder / path
    # The working directory may be a home directory: only the named folder is looked at there.
    files = {str(file.relative_to(shipped)) for file in shipped.rglob("*.gin")}
    for folder in folders:
        files |= {str(path.parent / file.name) for file in (folder / path).parent.glob("*.gin")}
    same_name = sorted(file for file in files if Path(file).name == path.name)
    near = same_name or difflib.get_close_matches(name, sorted(files), n=2, cutoff=0.75)
    places = ", ".join(str(folder.resolve()) for folder in folders)
    hint = f" Did you mean {' or '.join(near)}?" if near else " Check its name."
    raise ConfigError(f"gin file {name} not found. Searched in {places}.{hint}")


# Mistakes in a file ----------------------------------------------------------------------------


@contextlib.contextmanager
def readable_errors(text: str, place: Place) -> Iterator[None]:
    """Turns what gin's parser raises into a sentence with the place and the line."""
    try:
        yield
    except (RecursionError, MemoryError) as error:
        raise ConfigError(
            f"{place}: cannot read `{text[:80]}...`: it is nested too deep. Expected NAME = VALUE."
        ) from error
    except (SyntaxError, tokenize.TokenError, ValueError) as error:
        if isinstance(error, SyntaxError):
            message, line = str(error.msg), error.lineno
        elif isinstance(error, tokenize.TokenError):
            message, (line, _) = error.args
        else:  # gin names the place itself, in its last line
            message, line = str(error), None
            match = re.search(r"line (\d+)", message)
            line = int(match.group(1)) if match else None
        lines = text.splitlines()
        line = min(line, len(lines)) if line else None
        if line and place.source != COMMAND_LINE:
            place = Place(place.source, line)
        shown = lines[line - 1].strip() if line else text.strip()
        shown = shown if len(shown) <= 200 else f"{shown[:200]}..."
        raise ConfigError(f"{place}: cannot read `{shown}`: {_explain(message)}") from error


def _explain(message: str) -> str:
    unknown = re.search(r"No configurable matching reference '(.*?)'", message)
    if unknown:
        return (
            f"nothing is registered as {unknown.group(1)}. The embedded engine takes plain values "
            "(a string, a number, a list); T5X's own objects need --engine=t5x."
        )
    token = re.search(r"Failed to parse token '(.*)'", message)
    if token and token.group(1).capitalize() in ("True", "False", "None"):
        return f"write {token.group(1).capitalize()}."
    if token or "Unable to parse value" in message:
        return (
            "the value is not a Python literal. A string needs quotes, on the command line inside "
            "those of the shell: --gin.MODEL_DIR=\"'runs/boolq'\"."
        )
    problem = (message.strip() or "malformed").splitlines()[0].rstrip(".")
    return f"{problem}. Expected NAME = VALUE, include 'FILE' or a comment."


# Which setting wins -----------------------------------------------------------------------------


def find_latest(settings: Iterable[Setting]) -> tuple[dict[str, Setting], list[Override]]:
    """The last setting of every key, in the order in which they were set, and the overrides.

    Two rules concern several macros: of TRAIN_STEPS and TRAIN_STEPS_RELATIVE the later one wins,
    and if PROMPT_FILE or PROMPT_TEXT is set, PROMPT_INIT = 'auto' becomes 'file' or 'text'.
    """
    latest: dict[str, Setting] = {}
    overrides = []
    for setting in settings:
        old = latest.pop(setting.key, None)
        latest[setting.key] = setting
        if old is None or old.place == DEFAULT or repr(old.value) == "%gin.REQUIRED":
            continue
        if repr(old.value) != repr(setting.value):  # as written: 1, 1.0 and True are different
            overrides.append(Override(old, setting))
    overrides += _choose_steps(latest)
    _choose_init(latest)
    return latest, overrides


def _choose_steps(latest: dict[str, Setting]) -> list[Override]:
    earlier, later = (
        s for s in latest.values() if s.key in ("TRAIN_STEPS", "TRAIN_STEPS_RELATIVE")
    )
    if earlier.value is None or later.value is None or earlier.place.source == later.place.source:
        return []  # both in the same place: TrainConfig refuses it
    latest[earlier.key] = dataclasses.replace(earlier, value=None, place=later.place)
    return [Override(earlier, later)]


def _choose_init(latest: dict[str, Setting]) -> None:
    for macro, init in (("PROMPT_TEXT", "text"), ("PROMPT_FILE", "file")):
        if latest["PROMPT_INIT"].value == "auto" and latest[macro].value:
            latest["PROMPT_INIT"] = Setting("PROMPT_INIT", init, latest[macro].place)


def suggest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """The question whether the nearest known name was meant, empty where none is near.

    >>> suggest("LEARNIG_RATE", ["LEARNING_RATE", "BATCH_SIZE"])
    ' Did you mean LEARNING_RATE?'
    """
    spelt = {other.lower(): other for other in known}
    near = difflib.get_close_matches(name.lower(), spelt, n=1, cutoff=cutoff)
    return f" Did you mean {spelt[near[0]]}?" if near else ""


# Whether a value fits ---------------------------------------------------------------------------


def convert(value: Any, hint: Any) -> Any:
    """The value in its field's own form: lists are tuples, and 1 is a fine learning rate."""
    if type(value) is list:
        return tuple(value)
    options = typing.get_args(hint) or (hint,)
    if type(value) is int and float in options and int not in options:
        return float(value)
    return value


def fits(value: Any, hint: Any) -> bool:
    """Whether a field of that type takes the value; every item counts, and a bool is no number.

    (beartype would look at one item of a long list, drawn at random.)

    >>> fits(3, int), fits("3", int), fits(True, int), fits(None, int | None)
    (True, False, False, True)
    >>> fits(("a", "b"), tuple[str, ...]), fits(("a", 1), tuple[str, ...])
    (True, False)
    """
    if hint is Any:
        return True
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, option) for option in options)
    if origin is Literal:
        return type(value) is str and value in options
    if origin is tuple:
        return isinstance(value, tuple) and all(fits(item, options[0]) for item in value)
    if origin is Mapping:
        return isinstance(value, Mapping) and all(
            fits(name, options[0]) and fits(item, options[1]) for name, item in value.items()
        )
    return type(value) is hint


def describe(hint: Any) -> str:
    """A type in words.

    >>> describe(int | None)
    'an integer or None'
    """
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(option) for option in options)
    if origin is Literal:
        return f"one of {', '.join(map(repr, options))}"
    if origin is tuple:
        return "a list of strings"
    if origin is Mapping and options[1] is str:
        return "a dict from labels to words"
    if origin is Mapping and options[1] is Any:
        return "a dict from names to values"
    words = {
        int: "an integer",
        float: "a number",
        str: "a string",
        bool: "True or False",
        type(None): "None",
    }
    return words.get(hint, "a dict from strings to integers")
