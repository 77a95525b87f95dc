"""`t5x convert-prompt | inspect-prompt`: what can be done with a prompt once it is learned."""

from __future__ import annotations

import argparse

from prompt_tuning.commands.command import Command

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
        help="the backbone, a T5X checkpoint or tiny: the prompt is held against it, and "
        "--format=t5x puts it into a copy",
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


COMMANDS = {
    "convert-prompt": Command(
        "write a prompt in another form: ours, PEFT's, a .npy, or inside a T5X checkpoint",
        _add_convert_flags,
        _convert,
    ),
}
