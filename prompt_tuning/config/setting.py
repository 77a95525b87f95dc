"""How a setting is stated: once, on its field, with its macro, what it is, default and limits.

    @settings
    class DataConfig:
        batch_size: int = setting("BATCH_SIZE", "rows a step", default=32, at_least=1)

The gin files of defaults and bindings, `show-config` and docs/settings.md are made from these.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import typing
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

from beartype import BeartypeConf, beartype

# An int is accepted where a float is asked for (PEP 484's numeric tower).
_checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
ClassT = TypeVar("ClassT")


class ConfigError(ValueError):
    """A mistake in what the user asked for: the command line prints it and exits with 2."""

    def _render_traceback_(self) -> list[str]:
        """What IPython shows in place of a traceback."""
        return [f"error: {self}"]


def check(ok: bool, message: str) -> None:
    """Raises a ConfigError with the message if something is not as it should be."""
    if not ok:
        raise ConfigError(message)


class Macro(NamedTuple):
    """What a setting is beside its type and its default."""

    name: str
    help: str
    fallback: str = ""  # the macro whose value it has if nothing sets it
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None

    def describe_limits(self) -> str:
        """The limits in words; "" if there are none.

        >>> Macro("RANDOM_SEED", "", at_least=0, below=2**32).describe_limits()
        'at least 0 and below 2**32'
        """
        limits = zip(("at least", "above", "at most", "below"), self[3:], strict=True)
        return " and ".join(f"{word} {_write(n)}" for word, n in limits if n is not None)

    def allows(self, value: Any) -> bool:
        """Whether a value lies within the limits; what is no number does."""
        if type(value) not in (int, float):
            return True
        return (
            not _is_infinite(value)
            and (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )


def _is_infinite(value: float) -> bool:
    return isinstance(value, float) and not math.isfinite(
        value
    )  # an int may be too long for isfinite


def _write(limit: float) -> str:
    return f"2**{int(limit).bit_length() - 1}" if limit in (2**30, 2**32) else str(limit)


def setting(
    macro: str,
    help: str = "",
    *,
    default: Any = dataclasses.MISSING,
    fallback: str = "",
    **limits: float,
) -> Any:
    """A field of a class of settings. If several fields have one macro, the first has the help.

    If a field has no default, `fallback` is the macro whose value it has if nothing sets its own.
    The limits are at_least, above, at_most and below.
    """
    metadata = {"macro": Macro(macro, help, fallback, **limits)}
    if default == {}:  # each object has its own
        return dataclasses.field(default_factory=dict, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@typing.dataclass_transform(
    frozen_default=True, kw_only_default=True, field_specifiers=(setting, dataclasses.field)
)
def settings(cls: type[ClassT]) -> type[ClassT]:
    """A frozen dataclass whose types and limits are checked when it is made; lists become tuples.

    Gin hands over what is in its file, and `['gelu', 'linear']` may be there.
    """
    check_rest = cls.__dict__.get("__post_init__")

    def __post_init__(self: Any) -> None:
        for field in dataclasses.fields(self):
            _check_limits(field, getattr(self, field.name))
        if check_rest is not None:
            check_rest(self)

    cls.__post_init__ = __post_init__  # type: ignore[attr-defined]
    made = typed(dataclasses.dataclass(frozen=True, kw_only=True)(cls))
    return typing.cast("type[ClassT]", made)


def typed(cls: type[ClassT]) -> type[ClassT]:
    """A dataclass whose types are checked when it is made; lists become tuples."""
    checked = _checked(cls)
    make = checked.__init__

    @functools.wraps(make)
    def init(self: Any, **values: Any) -> None:
        make(self, **{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})

    checked.__init__ = init
    return checked


def _check_limits(field: dataclasses.Field[Any], value: Any) -> None:
    macro: Macro | None = field.metadata.get("macro")
    if macro is not None and not macro.allows(value):
        expected = "a finite number" if _is_infinite(value) else macro.describe_limits()
        about = f" ({macro.help})" if macro.help else ""
        raise ConfigError(f"{macro.name} = {value!r}: out of range. Expected {expected}{about}.")


class Leaf(NamedTuple):
    """A setting and the class it is a field of."""

    owner: type
    name: str
    type: Any
    default: Any  # dataclasses.MISSING if it has none
    macro: Macro


@functools.cache
def nested_classes(cls: type) -> Mapping[str, type]:
    """The fields of a class of settings that are classes of settings themselves."""
    hints = typing.get_type_hints(cls).items()
    return {name: h for name, h in hints if isinstance(h, type) and dataclasses.is_dataclass(h)}


@functools.cache
def own_settings(cls: type) -> tuple[Leaf, ...]:
    """The settings that are fields of a class: first those that it states, then its base's."""
    hints, stated = typing.get_type_hints(cls), inspect.get_annotations(cls)
    fields = [field for field in dataclasses.fields(cls) if "macro" in field.metadata]
    return tuple(
        Leaf(
            cls,
            field.name,
            hints[field.name],
            field.default if field.default_factory is dataclasses.MISSING else {},
            field.metadata["macro"],
        )
        for field in sorted(fields, key=lambda field: field.name not in stated)
    )
