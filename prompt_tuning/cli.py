"""The command line: `t5x train | eval | infer | show-config | list-tasks | prepare-superglue`.

Flags and macros are T5X's. Every command reads its settings through `gin_config.py` and makes one
call into the room that does the work. What is heavy is imported inside the commands, so that
`--help` and mistakes in the settings answer at once.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
import tempfile
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from prompt_tuning.config import ConfigError, EvalRun, Experiment, InferRun

if TYPE_CHECKING:
    from prompt_tuning import gin_config

COMMANDS = {
    "train": "tune a prompt (or, with runs/model_tune.gin, the whole model)",
    "eval": "score a model on a task, with a prompt or without one",
    "infer": "answer the rows of a task or of a file",
    "show-config": "print every setting with its value, and where it was set",
    "list-tasks": "print the tasks and mixtures that come with the project",
    "prepare-superglue": "make a TFDS directory of SuperGLUE's official JSONL files",
}
RUNS = {"train": Experiment, "eval": EvalRun, "infer": InferRun}
EXAMPLES = """\
examples:
  t5x train --gin_file=demo.gin
  t5x train --gin_file=models/t5_1_1_base.gin --gin_file=prompts/class_labels.gin \\
      --gin_file=superglue/boolq.gin --gin_file=runs/prompt_tune.gin \\
      --gin.MODEL_DIR="'runs/boolq'" --gin.INITIAL_CHECKPOINT_PATH="'gs://.../checkpoint_1100000'"

gin files are found relative to the working directory, then in --gin_search_paths, then among those
of the project. Later files and flags win; every override is named.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; its exit code is 2 for a mistake of the user's, 130 after Ctrl-C."""
    program = os.path.basename(sys.argv[0]).removesuffix(".py")
    program = program if program in ("t5x", "prompt-tuning") else "t5x"
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = arguments[0] if arguments and arguments[0] in COMMANDS else ""
    try:
        code = _run(program, arguments)
        sys.stdout.flush()
        return code
    except ConfigError as error:
        print(f"{program} {command}".strip() + f": error: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:  # a run that diverged says what to do
        print(f"{program} {command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{program} {command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `t5x show-config ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run(program: str, arguments: list[str]) -> int:
    parser = _make_parser(program)
    if not arguments:
        parser.print_help()
        return 2
    if not arguments[0].startswith("-") and arguments[0] not in COMMANDS:
        raise ConfigError(
            f"unknown command {arguments[0]}.{_suggest(arguments[0], COMMANDS)} "
            f"The commands: {', '.join(COMMANDS)}."
        )
    args, rest = parser.parse_known_args([_rewrite(argument) for argument in arguments])
    if rest and getattr(args, "engine", "embedded") == "embedded":
        raise ConfigError(_describe_unknown(rest[0], args.flags))
    return args.run(args, rest)


# Flags ------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Raises where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def _make_parser(program: str) -> argparse.ArgumentParser:
    layout: dict[str, Any] = {
        "allow_abbrev": False,
        "formatter_class": argparse.RawDescriptionHelpFormatter,
    }
    parser = _Parser(
        prog=program, description="Prompt tuning for a frozen T5.", epilog=EXAMPLES, **layout
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    functions = {
        "train": _train,
        "eval": _eval,
        "infer": _infer,
        "show-config": _show_config,
        "list-tasks": _list_tasks,
        "prepare-superglue": _prepare_superglue,
    }
    for name, what in COMMANDS.items():
        command = commands.add_parser(name, help=what, description=f"{what}.", **layout)
        if name in RUNS or name == "show-config":
            _add_gin_flags(command)
        if name in RUNS:
            _add_run_flags(command)
        if name == "infer":
            command.add_argument("--input", metavar="FILE|-", help=_INPUT)
            command.add_argument("--output", metavar="FILE|-", help=_OUTPUT)
        if name == "show-config":
            command.add_argument(
                "--run_mode", choices=list(RUNS), default="train", help="whose settings (train)"
            )
        if name == "prepare-superglue":
            command.add_argument("--jsonl_dir", required=True, help="folder of the JSONL files")
            command.add_argument("--tfds_data_dir", required=True, help="folder to write")
        flags = [flag for action in command._actions for flag in action.option_strings]
        command.set_defaults(run=functions[name], mode=name, flags=flags)
    return parser


_INPUT = "rows to answer, a text or a JSON object a line, instead of a task; - is standard input"
_OUTPUT = "where the answers go, a JSON object a line, instead of INFER_OUTPUT_DIR; - is the screen"


def _add_gin_flags(command: argparse.ArgumentParser) -> None:
    command.add_argument("--gin_file", action="append", default=[], help="may be given repeatedly")
    command.add_argument(
        "--gin_bindings",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="sets a macro after all files; --gin.NAME=VALUE is the same. Strings need quotes of "
        "their own: --gin.MODEL_DIR=\"'runs/boolq'\"",
    )
    command.add_argument(
        "--gin_search_paths", default="", metavar="A,B", help="more folders to find gin files in"
    )
    command.add_argument("--tfds_data_dir", help="where TFDS keeps its data (TFDS_DATA_DIR)")


def _add_run_flags(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--dry_run", action="store_true", help="print the settings and stop, as show-config does"
    )
    command.add_argument(
        "--engine",
        choices=["embedded", "t5x"],
        default="embedded",
        help="what runs it: the project's own runtime, or upstream T5X (docs/t5x.md); T5X is "
        "handed every flag that is not listed here (embedded)",
    )


def _rewrite(argument: str) -> str:
    """`--gin.NAME=VALUE` as T5X's users write it, in the form that argparse takes."""
    if not argument.startswith("--gin."):
        return argument
    if "=" not in argument:
        name = argument.removeprefix("--gin.")
        raise ConfigError(f"--gin.{name} has no value: write --gin.{name}=VALUE, without a space.")
    return argument.replace("--gin.", "--gin_bindings=", 1)


def _describe_unknown(argument: str, flags: Sequence[str]) -> str:
    name = argument.split("=")[0]
    if not name.startswith("-"):
        return f"unexpected argument {argument}. gin files are given as --gin_file={argument}."
    if name.lstrip("-").isupper():
        return f"unknown flag {name}. A macro is set with --gin.{name.lstrip('-')}=VALUE."
    known = [flag for flag in flags if flag.startswith("--")]
    return f"unknown flag {name}.{_suggest(name, known)} The flags: {', '.join(known)}."


def _suggest(name: str, known: Sequence[str] | dict[str, str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {near[0]}?" if near else ""


# Commands ---------------------------------------------------------------------------------------


def _load(args: argparse.Namespace, mode: str) -> gin_config.Loaded:
    """The settings of a run; names every override on standard error."""
    from prompt_tuning import gin_config

    if not args.gin_file:
        raise ConfigError(
            "no --gin_file is given, so there is nothing to run. Try --gin_file=demo.gin, or see "
            "--help."
        )
    bindings = list(args.gin_bindings)
    if args.tfds_data_dir is not None:
        bindings.append(f"TFDS_DATA_DIR = {args.tfds_data_dir!r}")
    fallbacks: dict[str, Any] = {}
    if getattr(args, "input", None):
        fallbacks["MIXTURE_OR_TASK_NAME"] = ()
    if getattr(args, "output", None):
        fallbacks["INFER_OUTPUT_DIR"] = ""
    engine: Any = getattr(args, "engine", "embedded")
    loaded = gin_config.load(
        args.gin_file,
        [text for text in bindings if engine == "embedded" or gin_config.is_ours(text)],
        [path for path in args.gin_search_paths.split(",") if path],
        run=RUNS[mode],
        engine=engine,
        fallbacks=fallbacks,
    )
    for override in loaded.overrides:
        print(override, file=sys.stderr)
    return loaded


def _start(args: argparse.Namespace, rest: list[str]) -> tuple[gin_config.Loaded, str] | None:
    """The settings and their text, or nothing where all is done: a dry run, or T5X's."""
    from prompt_tuning import gin_config

    loaded = _load(args, args.mode)
    if args.dry_run:
        print(gin_config.to_gin(loaded.run, loaded.provenance), end="")
        return None
    if args.engine == "t5x":
        from prompt_tuning import t5x_engine

        theirs = [text for text in args.gin_bindings if not gin_config.is_ours(text)]
        t5x_engine.run(args.mode, loaded, [*(f"--gin.{text}" for text in theirs), *rest])
        return None
    if args.mode != "infer" or not args.input:  # the rows of a task; answering needs none
        _import_tensorflow()
    return loaded, gin_config.to_gin(loaded.run)


def _import_tensorflow() -> None:
    """Imports TensorFlow without the lines that it writes before it reads its log level."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    noise = re.compile(rb"I\d{4} |WARNING: All log messages before absl::InitializeLog")
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as log:
        os.dup2(log.fileno(), 2)
        try:
            import tensorflow  # noqa: F401
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)
            log.seek(0)
            os.write(2, b"".join(line for line in log if not noise.match(line)))


def _train(args: argparse.Namespace, rest: list[str]) -> int:
    if (started := _start(args, rest)) is not None:
        from prompt_tuning.training import loop

        loaded, text = started
        loop.train(loaded.run, config_text=text)
    return 0


def _eval(args: argparse.Namespace, rest: list[str]) -> int:
    if (started := _start(args, rest)) is not None:
        from prompt_tuning.training import matrix

        loaded, text = started
        matrix.run_eval(loaded.run, config_text=text)
    return 0


def _infer(args: argparse.Namespace, rest: list[str]) -> int:
    if (started := _start(args, rest)) is not None:
        from prompt_tuning.serving import infer

        loaded, text = started
        infer.run_infer(loaded.run, input=args.input, output=args.output, config_text=text)
    return 0


def _show_config(args: argparse.Namespace, rest: list[str]) -> int:
    from prompt_tuning import gin_config

    loaded = _load(args, args.run_mode)
    print(gin_config.to_gin(loaded.run, loaded.provenance), end="")
    return 0


def _list_tasks(args: argparse.Namespace, rest: list[str]) -> int:
    _import_tensorflow()
    from prompt_tuning.data import tasks

    tasks.register()
    print("\n".join(tasks.task_names()))
    return 0


def _prepare_superglue(args: argparse.Namespace, rest: list[str]) -> int:
    _import_tensorflow()
    from prompt_tuning.data import prepare

    prepare.prepare_superglue(args.jsonl_dir, args.tfds_data_dir)
    return 0


if __name__ == "__main__":
    sys.exit(main())
