"""`t5x train | eval | infer | show-config`: the commands whose settings come from gin files."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from prompt_tuning.commands.command import Command
from prompt_tuning.config import ConfigError, EvalRun, Experiment, InferRun
from prompt_tuning.tasks.tensorflow_import import import_tensorflow

if TYPE_CHECKING:
    from prompt_tuning.config import gin_reader

RUNS = {"train": Experiment, "eval": EvalRun, "infer": InferRun}
_INPUT = (
    "rows to answer, instead of a task: those of a file that TRAIN_FILE could name, which "
    "INPUT_TEMPLATE fills in, or a text or a JSON object a line; - is standard input"
)
_OUTPUT = "file of the answers, JSON lines, instead of INFER_OUTPUT_DIR; - is standard output"


def add_gin_flags(command: argparse.ArgumentParser) -> None:
    """The flags of every command whose settings come from gin files."""
    command.add_argument("--gin_file", action="append", default=[], help="may be given repeatedly")
    command.add_argument(
        "--gin_bindings",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="sets a macro after all files; --gin.NAME=VALUE is the same. Strings need a second "
        "pair of quotes: --gin.MODEL_DIR=\"'runs/boolq'\"",
    )
    command.add_argument(
        "--gin_search_paths", default="", metavar="A,B", help="more folders to find gin files in"
    )
    command.add_argument("--tfds_data_dir", help="folder of TFDS's data (TFDS_DATA_DIR)")


def _add_run_flags(command: argparse.ArgumentParser) -> None:
    add_gin_flags(command)
    command.add_argument(
        "--dry_run",
        action="store_true",
        help="only print the settings, as show-config does, and for train mesh, memory and batch",
    )
    _add_process_flags(command)
    command.add_argument(
        "--compilation_cache",
        metavar="DIR|off",
        help="folder of compiled programs (a folder in the user's cache)",
    )
    command.add_argument(
        "--engine",
        choices=["embedded", "t5x"],
        default="embedded",
        help="the project's own runtime, or upstream T5X (docs/t5x.md), which also gets every flag "
        "that is not listed here (embedded)",
    )


def _add_train_flags(command: argparse.ArgumentParser) -> None:
    _add_run_flags(command)
    command.add_argument(
        "--debug-nans",
        "--debug_nans",
        action="store_true",
        help="stop at the first NaN and name the line of the model that made it; slower",
    )


def _add_process_flags(command: argparse.ArgumentParser) -> None:
    """T5X's flags for several processes; Slurm and TPU pods need none."""
    command.add_argument(
        "--multiprocess_gpu",
        action="store_true",
        help="this is one of several processes, of any kind of device (docs/scale.md)",
    )
    command.add_argument("--coordinator_address", metavar="HOST:PORT", help="of process 0")
    command.add_argument("--process_count", type=int, help="the number of processes")
    command.add_argument("--process_index", type=int, help="the number of this process, from 0")


def _join_processes(args: argparse.Namespace) -> None:
    """Joins the other processes of the run, if there are any; starts a guard first.

    Raises:
      SystemExit: this process was the guard, and its child has ended.
    """
    from prompt_tuning.runtime import guard, processes

    flags = processes.Flags(*(getattr(args, name) for name in processes.Flags._fields))
    flags.check()
    if not processes.is_wanted(flags):
        return
    if args.mode == "infer":  # several independent processes may be started with srun
        if flags.multiprocess_gpu:
            raise ConfigError(
                "--multiprocess_gpu: `t5x infer` runs in one process. Give each process a part of "
                "the rows."
            )
        return
    if not guard.is_child():
        raise SystemExit(guard.run_guarded(f"t5x {args.mode}", args.argv))
    guard.die_with_parent()
    processes.join(flags)


def _process_arguments(args: argparse.Namespace) -> list[str]:
    """The flags of several processes, in the form of T5X's own command line."""
    names = ("coordinator_address", "process_count", "process_index")
    flags = [f"--{name}={getattr(args, name)}" for name in names if getattr(args, name) is not None]
    return ["--multiprocess_gpu", *flags] if args.multiprocess_gpu else flags


def _add_infer_flags(command: argparse.ArgumentParser) -> None:
    _add_run_flags(command)
    command.add_argument("--input", metavar="FILE|-", help=_INPUT)
    command.add_argument("--output", metavar="FILE|-", help=_OUTPUT)


def _add_show_config_flags(command: argparse.ArgumentParser) -> None:
    add_gin_flags(command)
    command.add_argument(
        "--run_mode", choices=list(RUNS), default="train", help="whose settings (train)"
    )


def load(
    args: argparse.Namespace, mode: str, fallbacks: Mapping[str, Any] | None = None
) -> gin_reader.Loaded:
    """The settings of a run; names every override on standard error."""
    from prompt_tuning.config import gin_reader

    if not args.gin_file:
        raise ConfigError("no --gin_file is given. Try --gin_file=demo.gin, or see --help.")
    bindings = list(args.gin_bindings)
    if args.tfds_data_dir is not None:
        bindings.append(f"TFDS_DATA_DIR = {args.tfds_data_dir!r}")
    values = dict(fallbacks or {})
    if getattr(args, "input", None):
        values["MIXTURE_OR_TASK_NAME"] = ()
    if getattr(args, "output", None):
        values["INFER_OUTPUT_DIR"] = ""
    engine: Any = getattr(args, "engine", "embedded")
    loaded = gin_reader.load(
        args.gin_file,
        [text for text in bindings if engine == "embedded" or gin_reader.is_ours(text)],
        [path for path in args.gin_search_paths.split(",") if path],
        run=RUNS[mode],
        engine=engine,
        fallbacks=values,
    )
    if loaded.open_sizes:
        from prompt_tuning.session.session import resolve_sizes

        loaded = resolve_sizes(loaded)
    for override in loaded.overrides:
        print(override, file=sys.stderr)
    return loaded


def _start(args: argparse.Namespace, rest: list[str]) -> tuple[gin_reader.Loaded, str] | None:
    """The settings and their text; None if a dry run or upstream T5X has done the work."""
    from prompt_tuning.config import gin_reader

    loaded = load(args, args.mode)
    if args.dry_run:
        if args.mode == "train" and args.engine == "embedded":
            _join_processes(args)  # to print the devices of all processes
        print(gin_reader.to_gin(loaded.run, loaded.provenance), end="")
        if args.mode == "train":
            _print_devices(loaded.run)
        return None
    if args.engine == "t5x":
        from prompt_tuning.upstream import engine

        bindings = [text for text in args.gin_bindings if not gin_reader.is_ours(text)]
        flags = [*(f"--gin.{text}" for text in bindings), *_process_arguments(args), *rest]
        engine.run(args.mode, loaded, flags)
        return None
    from prompt_tuning.runtime import startup

    startup.prepare()
    _join_processes(args)
    startup.enable_cache(args.compilation_cache)
    return loaded, gin_reader.to_gin(loaded.run)


def _print_devices(experiment: Experiment) -> None:
    """Prints mesh, memory and batch as comments, so that the output is a gin file."""
    from prompt_tuning.planning.devices import describe_devices

    print("\n" + "".join(f"# {line}\n" for line in describe_devices(experiment).splitlines()))


def train(args: argparse.Namespace, rest: list[str]) -> int:
    """`t5x train`: tunes a prompt or a model, or pre-trains a model."""
    if (started := _start(args, rest)) is not None:
        loaded, text = started
        from prompt_tuning.session.session import open_session

        with open_session(loaded.run) as session:  # reads the backbone in the background
            import_tensorflow()
            from prompt_tuning.pretraining.run import find_objective
            from prompt_tuning.training import loop

            loop.train(
                loaded.run,
                objective=find_objective(loaded.run),
                session=session,
                config_text=text,
                debug_nans=args.debug_nans,
            )
    return 0


def evaluate(args: argparse.Namespace, rest: list[str]) -> int:
    """`t5x eval`: scores prompts on tasks."""
    if (started := _start(args, rest)) is not None:
        loaded, text = started
        from prompt_tuning.session.session import open_session

        with open_session(loaded.run) as session:
            import_tensorflow()
            from prompt_tuning.evaluation import matrix

            matrix.run_eval(loaded.run, session=session, config_text=text)
    return 0


def _infer(args: argparse.Namespace, rest: list[str]) -> int:
    if (started := _start(args, rest)) is not None:
        if not args.input:  # the rows of a task; a file needs no TensorFlow
            import_tensorflow()
        from prompt_tuning.serving import infer

        loaded, text = started
        infer.run_infer(loaded.run, input=args.input, output=args.output, config_text=text)
    return 0


def _show_config(args: argparse.Namespace, rest: list[str]) -> int:
    from prompt_tuning.config import gin_reader

    loaded = load(args, args.run_mode)
    print(gin_reader.to_gin(loaded.run, loaded.provenance), end="")
    return 0


COMMANDS = {
    "train": Command(
        "tune a prompt (or, with runs/model_tune.gin, the whole model; or pre-train one)",
        _add_train_flags,
        train,
    ),
    "eval": Command(
        "score a model on a task, with a prompt or without one", _add_run_flags, evaluate
    ),
    "infer": Command("answer the rows of a task or of a file", _add_infer_flags, _infer),
    "show-config": Command(
        "print every setting, its value and the file that set it",
        _add_show_config_flags,
        _show_config,
    ),
}
