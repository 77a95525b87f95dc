"""`t5x submit-superglue`: writes and checks the files for SuperGLUE's test server."""

from __future__ import annotations

import argparse

from prompt_tuning.commands import runs
from prompt_tuning.commands.command import Command
from prompt_tuning.config import ConfigError
from prompt_tuning.tasks.tensorflow_import import import_tensorflow


def _add_flags(command: argparse.ArgumentParser) -> None:
    runs.add_gin_flags(command)
    command.add_argument("--submission_dir", help="folder to write")
    command.add_argument("--zip", action="store_true", help="also write submission.zip there")
    command.add_argument("--check", metavar="FOLDER|ZIP", help="check a submission and stop")
    command.add_argument(
        "--jsonl_dir", default="", help="for --check: the release, in folders or archives"
    )


def _submit(args: argparse.Namespace, rest: list[str]) -> int:
    from prompt_tuning.evaluation import submission_format

    if args.check:
        print("\n".join(submission_format.check(args.check, args.jsonl_dir)))
        return 0
    if not args.submission_dir:
        raise ConfigError("no folder is given. Give --submission_dir=FOLDER or --check=FOLDER|ZIP.")
    from prompt_tuning.runtime import processes, startup

    processes.check_alone("a submission")
    startup.prepare()
    startup.enable_cache(None)
    fallbacks = {"MIXTURE_OR_TASK_NAME": (), "EVAL_OUTPUT_DIR": args.submission_dir}
    loaded = runs.load(args, "eval", fallbacks)
    import_tensorflow()
    from prompt_tuning.evaluation import submit

    submit.run_submit(loaded.run, args.submission_dir, make_zip=args.zip)
    return 0


COMMANDS = {
    "submit-superglue": Command(
        "answer SuperGLUE's test sets in the format of its server, or check such files",
        _add_flags,
        _submit,
    )
}
