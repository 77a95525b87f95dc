"""`t5x convert-prompt | inspect-prompt`: what can be done with a prompt once it is learned."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from prompt_tuning.commands.command import Command
from prompt_tuning.config import ConfigError
from prompt_tuning.runtime.replace_folder import replace_text, writing

_FORMS = ("ours", "peft", "npy", "t5x")
_INPUT = "a prompt in any form: a folder of ours or PEFT's, a .npy, a T5X checkpoint with it inside"


def _add_convert_flags(command: argparse.ArgumentParser) -> None:
    command.add_argument("--input", required=True, metavar="PATH", help=_INPUT)
    command.add_argument("--output", required=True, metavar="PATH", help="must not exist yet")
    command.add_argument("--format", required=True, choices=_FORMS, help="what to write")
    command.add_argument(
        "--checkpoint",
        default="",
        metavar="PATH",
        help="the backbone, T5X's, Hugging Face's or tiny: the prompt is held against it, and "
        "--format=t5x puts it into a copy of T5X's",
    )
    command.add_argument(
        "--dead_half",
        action="store_true",
        help="with --format=peft: write 2 P rows, as PEFT does, which uses the first P",
    )


def _convert(args: argparse.Namespace, rest: list[str]) -> int:
    from prompt_tuning.prompts.convert import convert_prompt

    said = convert_prompt(
        args.input,
        args.output,
        args.format,
        checkpoint=args.checkpoint,
        dead_half=args.dead_half,
    )
    print("\n".join(said))
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
        help="as VOCABULARY; without it pieces are shown as numbers (but tiny knows its own)",
    )
    command.add_argument(
        "--label_words", default="", metavar="A,B", help="words to look for (each prompt's own)"
    )
    command.add_argument(
        "--init", default="", metavar="PATH", help="the prompt that these began as, if it was kept"
    )
    command.add_argument(
        "--neighbours", type=int, default=5, metavar="K", help="pieces to show a row (5)"
    )
    command.add_argument("--plot", default="", metavar="FILE.png", help="also draw it")
    command.add_argument("--json", default="", metavar="FILE", help="also write it as JSON")


def _inspect(args: argparse.Namespace, rest: list[str]) -> int:
    from prompt_tuning.prompts import inspection, picture

    plot = local_file(args.plot, "--plot") if args.plot else None
    if plot:
        picture.check_suffix(plot)
    values = local_file(args.json, "--json") if args.json else None
    found = inspection.inspect_prompts(
        args.paths,
        args.checkpoint,
        vocabulary=args.vocabulary,
        label_words=[word.strip() for word in args.label_words.split(",") if word.strip()],
        init=args.init,
        neighbours=args.neighbours,
    )
    print(inspection.describe(found))
    if values:
        text = json.dumps(found.to_json(), indent=1, ensure_ascii=False)
        with writing(f"--json={values}"):
            replace_text(values, text + "\n")
    if plot:
        with writing(f"--plot={plot}"):
            picture.draw(found, plot)
    return 0


def local_file(path: str, flag: str) -> Path:
    """A file to write, whose folder is made.

    Raises:
      ConfigError: it lies in a bucket, is a folder, or its folder cannot be made.
    """
    file = Path(path).expanduser()
    if "://" in path or file.is_dir():
        raise ConfigError(f"{flag} must be a local file, found {path}.")
    with writing(f"{flag}={path}"):
        file.parent.mkdir(parents=True, exist_ok=True)
    return file


COMMANDS = {
    "convert-prompt": Command(
        "write a prompt in another form: ours, PEFT's, a .npy, or inside a T5X checkpoint",
        _add_convert_flags,
        _convert,
    ),
    "inspect-prompt": Command(
        "what a prompt is near: norms, nearest pieces, label words, other prompts",
        _add_inspect_flags,
        _inspect,
    ),
}
