"""`t5x list-tasks | prepare-superglue`: the tasks that the project provides, and their data."""

from __future__ import annotations

import argparse

from prompt_tuning.commands.command import Command, import_tensorflow


def _add_no_flags(command: argparse.ArgumentParser) -> None:
    del command


def _list_tasks(args: argparse.Namespace, rest: list[str]) -> int:
    import_tensorflow()
    from prompt_tuning.tasks import registry

    registry.register()
    print("\n".join(name for name in registry.task_names() if not name.endswith(registry.ALIAS)))
    return 0


def _add_prepare_flags(command: argparse.ArgumentParser) -> None:
    command.add_argument("--jsonl_dir", required=True, help="folder of the JSONL files")
    command.add_argument("--tfds_data_dir", required=True, help="folder to write")


def _prepare_superglue(args: argparse.Namespace, rest: list[str]) -> int:
    import_tensorflow()
    from prompt_tuning.tasks import prepare

    prepare.prepare_superglue(args.jsonl_dir, args.tfds_data_dir)
    return 0


COMMANDS = {
    "list-tasks": Command(
        "print the tasks and mixtures that come with the project", _add_no_flags, _list_tasks
    ),
    "prepare-superglue": Command(
        "make a TFDS directory of SuperGLUE's official JSONL files",
        _add_prepare_flags,
        _prepare_superglue,
    ),
}
