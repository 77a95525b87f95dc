"""`t5x make-world | train-vocabulary`: something to pre-train on, and its pieces."""

from __future__ import annotations

import argparse

from prompt_tuning.commands.command import Command, import_tensorflow


def _add_world_flags(command: argparse.ArgumentParser) -> None:
    command.add_argument("--seed", type=int, required=True, help="the same one: the same files")
    command.add_argument("--out", required=True, help="a new folder to write")
    command.add_argument("--texts", type=int, default=60_000, help="of the corpus (60000)")
    command.add_argument("--rows", type=int, default=1000, help="of each training split (1000)")


def _make_world(args: argparse.Namespace, rest: list[str]) -> int:
    from prompt_tuning.world import make

    folder = make.make_world(args.seed, args.out, texts=args.texts, train_rows=args.rows)
    print(
        f"{folder}: corpus.txt ({args.texts} texts), held_out.txt, and the miniatures in "
        f"superglue/. Next: t5x prepare-superglue --jsonl_dir={folder}/superglue "
        f"--tfds_data_dir={folder}/tfds"
    )
    return 0


def _add_vocabulary_flags(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--input", required=True, action="append", help="text files, or a pattern; repeatedly"
    )
    command.add_argument("--output", required=True, help="the model to write, e.g. en.model")
    command.add_argument("--size", type=int, required=True, help="pieces, without the sentinels")
    command.add_argument(
        "--model_type", choices=["unigram", "bpe"], default="unigram", help="(unigram, as T5's)"
    )
    command.add_argument("--field", default="text", help="of JSON lines (text)")


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
    "make-world": Command(
        "write the corpus and the SuperGLUE miniatures of a synthetic world",
        _add_world_flags,
        _make_world,
    ),
    "train-vocabulary": Command(
        "train a SentencePiece vocabulary on text files", _add_vocabulary_flags, _train_vocabulary
    ),
}
