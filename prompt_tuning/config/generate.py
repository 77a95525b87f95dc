"""`python -m prompt_tuning.config.generate`: what is written of the settings, from their fields.

In a checkout it writes gin/defaults.gin, gin/runs/bindings.gin and docs/settings.md.
"""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterator
from pathlib import Path

from prompt_tuning.config.gin_files import describe
from prompt_tuning.config.runs import PARTS, RUNS, Experiment, macros
from prompt_tuning.config.setting import Leaf, own_settings

_COMMAND = "python -m prompt_tuning.config.generate"
_DEFAULTS = f"""\
# Every macro of the embedded engine: its default, and what it is.
# Written by `{_COMMAND}` from prompt_tuning/config/.
#
# Nothing that is set here overrides anything. A macro that is set anywhere but not named here (and
# not used by another value) is an error: it is misspelt. Names are T5X's if T5X has one.
"""
_BINDINGS = f"""\
# Binds every field of prompt_tuning/config/ to one macro, for the embedded engine. The files of
# runs/ include it; upstream T5X binds the same macros in t5x/. `config.gin` of a run is the list of
# these macros with their values.
# Written by `{_COMMAND}`.
"""
_PAGE = f"""\
# Settings

Every setting is a macro: `--gin.NAME=VALUE` on the command line, or `NAME = VALUE` in a gin file.
Later files and flags win; `t5x show-config` prints every value and where it was set. In Python they
are fields of the dataclasses in `prompt_tuning.config`.

<!-- Written by `{_COMMAND}`. -->
"""


def write_files(root: Path) -> dict[Path, str]:
    """The files that are made from the settings, with their contents, below a checkout."""
    return {
        root / "gin" / "defaults.gin": write_defaults(),
        root / "gin" / "runs" / "bindings.gin": write_bindings(),
        root / "docs" / "settings.md": write_page(),
    }


def write_defaults() -> str:
    """gin/defaults.gin: every macro with its default, and what it is."""
    text = _DEFAULTS
    for cls, leaves in _sections():
        lines = (f"{leaf.macro.name} = {_default(leaf)}  # {leaf.macro.help}\n" for leaf in leaves)
        text += "\n" + _heading(cls) + "".join(lines)
    return text


def write_bindings() -> str:
    """gin/runs/bindings.gin: every field with its macro."""
    text = _BINDINGS
    for cls in (Experiment, *PARTS, *(run for run in RUNS if run is not Experiment)):
        lines = (f"{cls.__name__}.{leaf.name} = %{leaf.macro.name}\n" for leaf in own_settings(cls))
        text += "\n" + "".join(lines)
    return text


def write_page() -> str:
    """docs/settings.md: a table of the settings of every class."""
    text = _PAGE
    for cls, leaves in _sections():
        text += f"\n## {_title(cls)}\n\n| setting | field | value | default | what it is |\n"
        text += "|---|---|---|---|---|\n"
        for leaf in leaves:
            limits = leaf.macro.describe_limits()
            value = describe(leaf.type) + (f", {limits}" if limits else "")
            field = f"{cls.__name__}.{leaf.name}"
            cells = (f"`{leaf.macro.name}`", f"`{field}`", value, _shown(leaf), leaf.macro.help)
            text += f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n"
    return text


def _sections() -> Iterator[tuple[type, list[Leaf]]]:
    """The macros, each once, under the class that states them."""
    stated = list(macros().values())
    for cls in dict.fromkeys(leaf.owner for leaf in stated):
        yield cls, [leaf for leaf in stated if leaf.owner is cls]


def _title(cls: type) -> str:
    return (cls.__doc__ or "").splitlines()[0]


def _heading(cls: type) -> str:
    return textwrap.fill(_title(cls), 98, initial_indent="# ", subsequent_indent="# ") + "\n"


def _default(leaf: Leaf) -> str:
    """The default as a gin literal."""
    if leaf.default is dataclasses.MISSING:
        return f"%{leaf.macro.fallback or 'gin.REQUIRED'}"
    return repr(leaf.default)


def _shown(leaf: Leaf) -> str:
    if leaf.default is not dataclasses.MISSING:
        return f"`{leaf.default!r}`"
    return f"`{leaf.macro.fallback}`" if leaf.macro.fallback else "required"


def main() -> None:
    """Writes the files of the checkout that this module is in."""
    for file, text in write_files(Path(__file__).parents[2]).items():
        file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
