"""The command line: runs a command, and turns its errors into one message and an exit code.

Flags and macros are T5X's. The commands are defined in `commands/`. Each imports heavy modules only
when it runs, so that `--help` and errors in the settings are shown at once.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from prompt_tuning.runtime import signals

PROGRAMS = ("t5x", "prompt-tuning")
if __name__ == "__main__" or os.path.basename(sys.argv[0]) in PROGRAMS:
    signals.exit_at_once()  # while the imports below take their time

from prompt_tuning.commands import conversions, data, plan, runs, submit, verify  # noqa: E402
from prompt_tuning.config import ConfigError  # noqa: E402
from prompt_tuning.config.gin_files import suggest  # noqa: E402
from prompt_tuning.runtime import guard  # noqa: E402

COMMANDS = {
    **runs.COMMANDS,
    **plan.COMMANDS,
    **conversions.COMMANDS,
    **data.COMMANDS,
    **verify.COMMANDS,
    **submit.COMMANDS,
}
EXAMPLES = """\
examples:
  t5x train --gin_file=demo.gin
  t5x train --gin_file=models/t5_1_1_base.gin --gin_file=inits/class_labels.gin \\
      --gin_file=superglue/boolq.gin --gin_file=runs/prompt_tune.gin \\
      --gin.MODEL_DIR="'runs/boolq'" --gin.INITIAL_CHECKPOINT_PATH="'gs://.../checkpoint_1100000'"

gin files are looked up in the working directory, then in --gin_search_paths, then in the project.
Later files and flags override earlier ones; every override is printed.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code of one command, which it runs.

    2: an error of the user or a damaged file; 1: a diverged run, or a defect of the project; 130
    and 143: stopped by Ctrl-C or SIGTERM.
    """
    program = os.path.basename(sys.argv[0]).removesuffix(".py")
    program = program if program in PROGRAMS else "t5x"
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = arguments[0] if arguments and arguments[0] in COMMANDS else ""
    name = f"{program} {command}".strip()
    with signals.handled(name):
        try:
            args, rest = _parse(program, arguments)
            code = args.run(args, rest)
            sys.stdout.flush()
            return code
        except BrokenPipeError:  # `t5x show-config ... | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except (KeyboardInterrupt, Exception) as error:
            if guard.is_child():
                guard.exit_if_lost(name, error)
            code, message = _explain(error, command)
            print(f"{name}: {message}", file=sys.stderr, flush=True)
            if argv is None:  # after a failed save, threads of Orbax would wait for minutes
                with contextlib.suppress(OSError, ValueError):
                    sys.stdout.flush()
                os._exit(code)
            return code


def _explain(error: BaseException, command: str) -> tuple[int, str]:
    """The exit code and the message of a command that failed."""
    if isinstance(error, ConfigError):
        return 2, f"error: {error}"
    if isinstance(error, signals.Stopped):
        return error.exit_code, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    if isinstance(error, FloatingPointError):  # a diverged run; its message is complete
        return 1, str(error)
    from prompt_tuning.runtime import crash

    if (message := crash.describe_refusal(error, continues=command == "train")) is not None:
        return 2, f"error: {message}"
    return 1, crash.describe(error)


def _parse(program: str, arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The command with its flags, and the flags that are upstream T5X's."""
    parser = _make_parser(program)
    if not arguments:
        return argparse.Namespace(run=lambda *_: parser.print_help() or 2), []
    if not arguments[0].startswith("-") and arguments[0] not in COMMANDS:
        raise ConfigError(
            f"unknown command {arguments[0]}.{suggest(arguments[0], COMMANDS)} "
            f"The commands: {', '.join(COMMANDS)}."
        )
    args, rest = parser.parse_known_args([_rewrite(argument) for argument in arguments])
    args.argv = arguments
    if rest and getattr(args, "engine", "embedded") == "embedded":
        raise ConfigError(_describe_unknown(rest[0], args.flags))
    return args, rest


# Flags ------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Raises ConfigError instead of printing the usage and exiting."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}. See {self.prog} --help.")


def _make_parser(program: str) -> argparse.ArgumentParser:
    layout: dict[str, Any] = {
        "allow_abbrev": False,
        "formatter_class": argparse.RawDescriptionHelpFormatter,
    }
    parser = _Parser(
        prog=program, description="Prompt tuning for a frozen T5.", epilog=EXAMPLES, **layout
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        flags = commands.add_parser(
            name, help=command.help, description=f"{command.help}.", **layout
        )
        command.add_flags(flags)
        names = [flag for action in flags._actions for flag in action.option_strings]
        flags.set_defaults(run=command.run, mode=name, flags=names)
    return parser


def _rewrite(argument: str) -> str:
    """The argument, with T5X's `--gin.NAME=VALUE` in a form that argparse accepts."""
    if not argument.startswith("--gin."):
        return argument
    if "=" not in argument:
        name = argument.removeprefix("--gin.")
        raise ConfigError(f"--gin.{name} has no value. Write --gin.{name}=VALUE, without a space.")
    return argument.replace("--gin.", "--gin_bindings=", 1)


def _describe_unknown(argument: str, flags: Sequence[str]) -> str:
    name = argument.split("=")[0]
    if not name.startswith("-"):
        return f"unexpected argument {argument}. gin files are given as --gin_file={argument}."
    if name.lstrip("-").isupper():
        return f"unknown flag {name}. A macro is set with --gin.{name.lstrip('-')}=VALUE."
    known = [flag for flag in flags if flag.startswith("--")]
    return f"unknown flag {name}.{suggest(name, known)} The flags: {', '.join(known)}."


if __name__ == "__main__":
    sys.exit(main())
