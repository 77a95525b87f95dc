"""`t5x list-tasks | prepare-superglue | train-vocabulary`: tasks, their data, and vocabularies."""

from __future__ import annotations

import argparse

from prompt_tuning.commands.command import Command
from prompt_tuning.tasks.tensorflow_import import import_tensorflow


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


def _add_vocabulary_flags(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--input",
        required=True,
        action="append",
        help="text files, or a pattern; may be given repeatedly",
    )
    command.add_argument("--output", required=True, help="the model to write, e.g. en.model")
    command.add_argument("--size", type=int, required=True, help="pieces, without the sentinels")
    command.add_argument(
        "--model_type", choices=["unigram", "bpe"], default="unigram", help="(unigram, as T5's)"
    )
    command.add_argument("--field", default="text", help="the field of JSON lines (text)")


def _train_vocabulary(args: argparse.Namespace, rest: list[str]) -> int:
    import_tensorflow()
    from prompt_tuning.config import CorpusConfig
    from prompt_tuning.pretraining import documents, train_vocabulary

    corpus = CorpusConfig(files=tuple(args.input), field=args.field, documents="line")
    texts = documents.read_texts(corpus.files, corpus, macro="--input")
    path = train_vocabulary.write_vocabulary(
        texts, args.output, args.size, model_type=args.model_type
    )
    sentinels = train_vocabulary.EXTRA_IDS
    ids = args.size + sentinels
    print(
        f"{path}: {args.size} pieces. With the {sentinels} sentinels a model needs "
        f"NUM_EMBEDDINGS = {ids} or more: --gin.VOCABULARY=\"'{path}'\""
    )
    return 0


COMMANDS = {
    "train-vocabulary": Command(
        "train a SentencePiece vocabulary on text files", _add_vocabulary_flags, _train_vocabulary
    ),
    "list-tasks": Command(
        "print the tasks and mixtures that come with the project", _add_no_flags, _list_tasks
    ),
    "prepare-superglue": Command(
        "make a TFDS directory of SuperGLUE's official JSONL files",
        _add_prepare_flags,
        _prepare_superglue,
    ),
}
