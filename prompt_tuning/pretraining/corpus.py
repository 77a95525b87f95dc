"""The corpus of a run: its documents as tokens in MODEL_DIR, and the examples made from them.

`documents.py` reads the documents, `token_store.py` stores their tokens, `examples.py` makes the
examples. `run.py` trains on them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from prompt_tuning.config import ConfigError, Experiment
from prompt_tuning.pretraining import documents, examples, token_store
from prompt_tuning.session import checks, setup
from prompt_tuning.vocabularies.vocabulary import load_vocabulary

FOLDER = "corpus"  # in MODEL_DIR


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The training and held-out examples of a run, and the corpus's fingerprint."""

    name: str
    train: examples.Examples
    held_out: examples.Examples
    identity: str
    description: str


def load_corpus(experiment: Experiment, model_dir: Path) -> Corpus:
    """The training examples, an endless sequence, and the held-out examples of the corpus.

    The tokens are stored in MODEL_DIR, and reused if the corpus has not changed.

    Raises:
      ConfigError: the corpus is missing, or vocabulary, lengths and model do not fit each other.
    """
    config = experiment.data
    vocabulary = load_vocabulary(config.vocabulary)
    checks.check_vocabulary_size(vocabulary.vocab_size, config.vocabulary, experiment.model)
    lengths = dict(config.task_feature_lengths)
    shape = examples.make_shape(experiment.corpus, lengths, vocabulary.vocab_size)
    store = _load_tokens(experiment, model_dir / FOLDER, vocabulary.vocab_size)
    train, held_out = store.train, store.held_out
    unknown = np.mean(held_out.tokens == vocabulary.unk_id)
    description = (
        f"{train.name}: {len(train)} documents, {len(train.tokens)} tokens; held out: "
        f"{len(held_out)} documents, {len(held_out.tokens)} tokens; inputs {shape.inputs}, targets "
        f"{shape.targets}"
    ) + (f"; unknown to VOCABULARY: {unknown:.1%} of the held-out tokens" if unknown else "")
    seed = experiment.train.random_seed
    return Corpus(
        train.name,
        examples.Examples(train, shape, seed),
        examples.Examples(held_out, shape, 0),  # the same for every seed of the run
        store.identity,
        description,
    )


def _load_tokens(experiment: Experiment, folder: Path, vocab_size: int) -> token_store.TokenStore:
    """The tokens in `folder`; writes them if there are none, or if the corpus has changed."""
    config = experiment.data
    name, made_of = documents.describe(experiment.corpus, config)
    if made_of is not None:
        made_of = {**made_of, "vocabulary": setup.vocabulary_identity(config.vocabulary)}
        if (store := _find_tokens(folder, name, made_of)) is not None:
            return store
    tokens = documents.read_documents(experiment.corpus, config)
    token_store.write(folder, _show_progress(tokens), vocab_size=vocab_size, made_of=made_of)
    return token_store.TokenStore(folder, name)


def _find_tokens(
    folder: Path, name: str, made_of: Mapping[str, Any]
) -> token_store.TokenStore | None:
    if not folder.exists():
        return None
    try:
        store = token_store.TokenStore(folder, name)
    except ConfigError as error:
        print(f"the corpus is tokenised again: {error}", flush=True)
        return None
    return store if store.made_of == made_of else None


def _show_progress(
    tokens: Iterator[tuple[bool, Sequence[int]]],
) -> Iterator[tuple[bool, Sequence[int]]]:
    return iter(tqdm(tokens, desc="tokenising", unit=" documents", delay=5, mininterval=5))
