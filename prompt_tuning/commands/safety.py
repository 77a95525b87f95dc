"""`t5x verify`: whether files are what was written."""

from __future__ import annotations

import argparse

from prompt_tuning.commands.command import Command
from prompt_tuning.config import ConfigError


def _add_flags(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "path", metavar="PATH", help="a MODEL_DIR, a prompt, a checkpoint, or any folder or file"
    )
    command.add_argument(
        "--write", action="store_true", help="record the checksums of what is there in a manifest"
    )


def _verify(args: argparse.Namespace, rest: list[str]) -> int:
    from prompt_tuning.commands.verify import verify

    good, bad = verify(args.path, write=args.write)
    for line in good:
        print(line)
    if bad:
        listed = "\n".join(bad)
        raise ConfigError(f"{len(bad)} of {len(good) + len(bad)} checks failed.\n{listed}")
    return 0


COMMANDS = {
    "verify": Command(
        "check prompts, run states and checkpoints against their checksums", _add_flags, _verify
    ),
}
