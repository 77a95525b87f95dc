"""The type of a command of `t5x`; the other modules of this folder define the commands."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class Command:
    """One command: its line in `--help`, its flags, and its function.

    `run` takes the parsed flags and the unknown ones, which are passed to T5X if --engine=t5x, and
    returns the exit code.
    """

    help: str
    add_flags: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace, list[str]], int]
