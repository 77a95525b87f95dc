"""`t5x convert`: converts a backbone from Hugging Face's format to T5X's, and back."""

from __future__ import annotations

import argparse
import re

from prompt_tuning.commands.command import Command
from prompt_tuning.config import ConfigError

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def _add_flags(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--input",
        required=True,
        metavar="PATH",
        help="a Hugging Face T5 (a folder, or hf://organisation/name[@revision]), which becomes a "
        "T5X checkpoint; or a T5X checkpoint, which becomes a Hugging Face folder",
    )
    command.add_argument("--output", required=True, metavar="PATH", help="must not exist yet")
    command.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="of the written weights (each keeps its own)",
    )
    command.add_argument(
        "--step",
        type=int,
        help="the step that is written (0 for a Hugging Face folder, which has none; the "
        "LM-adapted T5 1.1 are at step 1100000)",
    )
    command.add_argument(
        "--max_shard_size", default="5GB", metavar="SIZE", help="of a safetensors file (5GB)"
    )


def _convert(args: argparse.Namespace, rest: list[str]) -> int:
    from prompt_tuning.checkpoints.conversion import convert

    if args.step is not None and not 0 <= args.step < 2**31:  # T5X stores it in 32 bits
        raise ConfigError(f"--step must be between 0 and {2**31 - 1}, found {args.step}.")
    limit = _parse_size(args.max_shard_size)
    print(convert(args.input, args.output, dtype=args.dtype, step=args.step, max_file_bytes=limit))
    return 0


def _parse_size(text: str) -> int:
    match = re.fullmatch(r"([1-9]\d*)(KB|MB|GB)", text)
    if match is None:
        raise ConfigError(f"--max_shard_size must be like 5GB or 500MB, found {text!r}.")
    return int(match.group(1)) * _UNITS[match.group(2)]


COMMANDS = {
    "convert": Command(
        "make a T5X checkpoint of a Hugging Face T5, or the other way round", _add_flags, _convert
    )
}
