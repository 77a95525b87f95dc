"""`t5x convert | convert-prompt | inspect-prompt`: commands on saved backbones and prompts."""

from __future__ import annotations

import argparse
import functools
import json
import re
from pathlib import Path

from prompt_tuning.commands.command import Command
from prompt_tuning.config import ConfigError
from prompt_tuning.runtime.replace_folder import replace_text, writing

_FORMS = ("ours", "peft", "npy", "t5x")
_INPUT = "a prompt in any form: a folder of ours or PEFT's, a .npy, a T5X checkpoint with it inside"

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def _add_convert_flags(command: argparse.ArgumentParser) -> None:
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


def _add_convert_prompt_flags(command: argparse.ArgumentParser) -> None:
    command.add_argument("--input", required=True, metavar="PATH", help=_INPUT)
    command.add_argument("--output", required=True, metavar="PATH", help="must not exist yet")
    command.add_argument("--format", required=True, choices=_FORMS, help="what to write")
    command.add_argument(
        "--checkpoint",
        default="",
        metavar="PATH",
        help="the backbone, T5X's, Hugging Face's or tiny: the prompt is checked against it, and "
        "--format=t5x writes a copy of T5X's with the prompt",
    )
    command.add_argument(
        "--dead_half",
        action="store_true",
        help="with --format=peft: write 2 P rows, as PEFT does, of which it uses the first P",
    )
    command.add_argument(
        "--task",
        type=int,
        metavar="N",
        help="of an adapter of PEFT's MULTITASK_PROMPT_TUNING: which of its tasks, from 0",
    )


def _convert_prompt(args: argparse.Namespace, rest: list[str]) -> int:
    from prompt_tuning.prompts.convert import convert_prompt

    lines = convert_prompt(
        args.input,
        args.output,
        args.format,
        checkpoint=args.checkpoint,
        dead_half=args.dead_half,
        task=args.task,
    )
    print("\n".join(lines))
    return 0


def _add_inspect_flags(command: argparse.ArgumentParser) -> None:
    command.add_argument("paths", nargs="+", metavar="PATH", help=_INPUT)
    command.add_argument(
        "--checkpoint",
        required=True,
        metavar="PATH",
        help="the backbone; its embedding table is read",
    )
    command.add_argument(
        "--vocabulary",
        default="",
        metavar="SPEC",
        help="as VOCABULARY; without it pieces are shown as numbers, except those of tiny",
    )
    command.add_argument(
        "--label_words", default="", metavar="A,B", help="words to look for (each prompt's labels)"
    )
    command.add_argument(
        "--init", default="", metavar="PATH", help="the initial prompt of these prompts, if saved"
    )
    command.add_argument(
        "--neighbours", type=int, default=5, metavar="K", help="pieces to show for each row (5)"
    )
    command.add_argument("--plot", default="", metavar="FILE.png", help="also draw it")
    command.add_argument("--json", default="", metavar="FILE", help="also write it as JSON")


def _inspect(args: argparse.Namespace, rest: list[str]) -> int:
    from prompt_tuning.prompts import inspection, picture, prefix_inspection

    plot = local_file(args.plot, "--plot") if args.plot else None
    if plot:
        picture.check_suffix(plot)
    values = local_file(args.json, "--json") if args.json else None
    if prefix_inspection.are_prefixes(args.paths):
        for flag in ("vocabulary", "label_words", "init"):
            if getattr(args, flag):
                raise ConfigError(f"--{flag} is for rows, and {args.paths[0]} is keys and values.")
        prefixes = prefix_inspection.inspect_prefixes(args.paths, args.checkpoint)
        described, report = prefix_inspection.describe(prefixes), prefixes.to_json()
        draw = functools.partial(picture.draw_prefixes, prefixes)
    else:
        rows = inspection.inspect_prompts(
            args.paths,
            args.checkpoint,
            vocabulary=args.vocabulary,
            label_words=[word.strip() for word in args.label_words.split(",") if word.strip()],
            init=args.init,
            neighbours=args.neighbours,
        )
        described, report = inspection.describe(rows), rows.to_json()
        draw = functools.partial(picture.draw, rows)
    print(described)
    if values:
        text = json.dumps(report, indent=1, ensure_ascii=False)
        with writing(f"--json={values}"):
            replace_text(values, text + "\n")
    if plot:
        with writing(f"--plot={plot}"):
            draw(plot)
    return 0


def local_file(path: str, flag: str) -> Path:
    """The path of a file to write; makes its folder.

    Raises:
      ConfigError: it is in a bucket, is a folder, or its folder cannot be made.
    """
    file = Path(path).expanduser()
    if "://" in path or file.is_dir():
        raise ConfigError(f"{flag} must be a local file, found {path}.")
    with writing(f"{flag}={path}"):
        file.parent.mkdir(parents=True, exist_ok=True)
    return file


COMMANDS = {
    "convert": Command(
        "make a T5X checkpoint of a Hugging Face T5, or the other way round",
        _add_convert_flags,
        _convert,
    ),
    "convert-prompt": Command(
        "write a prompt in another form: ours, PEFT's, a .npy, or inside a T5X checkpoint",
        _add_convert_prompt_flags,
        _convert_prompt,
    ),
    "inspect-prompt": Command(
        "inspect prompts: norms, nearest pieces, label words, similarity of prompts or of layers",
        _add_inspect_flags,
        _inspect,
    ),
}
