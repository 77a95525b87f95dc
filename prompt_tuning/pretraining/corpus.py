"""The corpus of a run: its documents as tokens beside the run, and the examples made of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from prompt_tuning.config import ConfigError, Experiment
from prompt_tuning.pretraining import documents, examples, token_store
from prompt_tuning.session import setup
from prompt_tuning.vocabularies.vocabulary import load_vocabulary

FOLDER = "corpus"  # in MODEL_DIR


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The examples of a run, and what tells one corpus from another."""

    name: str
    train: examples.Examples
    held_out: examples.Examples
    identity: str
    described: str


def load_corpus(experiment: Experiment, model_dir: Path) -> Corpus:
    """The documents, tokenised, as endless training examples and as held-out ones.

    The tokens lie in MODEL_DIR, and are taken from there where the corpus has not changed since.

    Raises:
      ConfigError: the corpus is not there, or vocabulary, lengths and model do not fit.
    """
    config = experiment.data
    vocabulary = load_vocabulary(config.vocabulary)
    setup.check_vocabulary_size(vocabulary, config.vocabulary, experiment.model)
    lengths = dict(config.task_feature_lengths)
    shape = examples.make_shape(experiment.corpus, lengths, vocabulary.vocab_size)
    store = _load_tokens(experiment, model_dir / FOLDER, vocabulary.vocab_size)
    train, held_out = store.train, store.held_out
    described = (
        f"{train.name}: {len(train)} documents, {len(train.tokens)} tokens; held out: "
        f"{len(held_out)} documents, {len(held_out.tokens)} tokens; inputs {shape.inputs}, targets "
        f"{shape.targets}"
    )
    seed = experiment.train.random_seed
    return Corpus(
        train.name,
        examples.Examples(train, shape, seed),
        examples.Examples(held_out, shape, 0),  # the same whatever the seed of the run
        store.identity,
        described,
    )


def _load_tokens(experiment: Experiment, folder: Path, vocab_size: int) -> token_store.Store:
    """The tokens in `folder`, where they are of this corpus as it is now; else they are made."""
    config = experiment.data
    name, made_of = documents.describe(experiment.corpus, config)
    if made_of is not None:
        made_of = {**made_of, "vocabulary": setup.vocabulary_identity(config.vocabulary)}
        if (found := _find_tokens(folder, name, made_of)) is not None:
            return found
    found = documents.read_documents(experiment.corpus, config)
    token_store.write(folder, _show_progress(found), vocab_size=vocab_size, made_of=made_of)
    return token_store.Store(folder, name)


def _find_tokens(folder: Path, name: str, made_of: Mapping[str, Any]) -> token_store.Store | None:
    if not folder.exists():
        return None
    try:
        store = token_store.Store(folder, name)
    except ConfigError as error:
        print(f"the corpus is tokenised again: {error}", flush=True)
        return None
    return store if store.made_of == made_of else None


def _show_progress(
    found: Iterator[tuple[bool, Sequence[int]]],
) -> Iterator[tuple[bool, Sequence[int]]]:
    return iter(tqdm(found, desc="tokenising", unit=" documents", delay=5, mininterval=5))
