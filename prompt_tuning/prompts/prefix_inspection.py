"""Inspection of prefixes: norms of keys and values by layer and head, and how alike layers are.

Keys and values have no nearest pieces: each head of each layer has a space of its own. Rows, those
of a shared prompt too, are for `inspection.py`. `t5x inspect-prompt` calls both.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from prompt_tuning.checkpoints.load import read_model
from prompt_tuning.config import ConfigError, to_dict
from prompt_tuning.model.prompt import PREFIXES, Prompt, other_fields
from prompt_tuning.prompts.inspection import unit
from prompt_tuning.prompts.prompt_file import PromptMetadata, check_prompt, read_prompt

KINDS = ("keys", "values")


@dataclasses.dataclass(frozen=True)
class Place:
    """The prefix of one place: the encoder, the decoder, or cross-attention."""

    name: str
    shape: tuple[int, ...]
    norms: Float[np.ndarray, "2 N H"]  # of keys and values; the mean over positions
    similarity: Float[np.ndarray, "2 N N"]  # cosine of the whole keys, or values, of two layers

    def to_json(self) -> dict[str, Any]:
        """The same as plain values."""
        values = {
            kind: {"norms": norms.tolist(), "similarity": similarity.tolist()}
            for kind, norms, similarity in zip(KINDS, self.norms, self.similarity, strict=True)
        }
        return {"shape": list(self.shape), **values}


@dataclasses.dataclass(frozen=True)
class InspectedPrefix:
    """One prompt: the places where it has a prefix, and its metadata."""

    name: str
    metadata: PromptMetadata
    places: tuple[Place, ...]


@dataclasses.dataclass(frozen=True)
class PrefixInspection:
    """Several prompts of keys and values."""

    checkpoint: str
    prompts: tuple[InspectedPrefix, ...]

    def to_json(self) -> dict[str, Any]:
        """The same as plain values."""
        prompts = [
            {
                "name": prompt.name,
                "metadata": to_dict(prompt.metadata),
                **{place.name: place.to_json() for place in prompt.places},
            }
            for prompt in self.prompts
        ]
        return {"checkpoint": self.checkpoint, "prompts": prompts}


def are_prefixes(paths: Sequence[str | os.PathLike[str]]) -> bool:
    """Whether the prompts are keys and values; False if they are rows.

    Raises:
      ConfigError: some are and others are not, one has rows as well, or one cannot be read.
    """
    fields = {}
    for path in paths:
        prompt = read_prompt(path).prompt
        rows = ["rows"] if prompt.rows.shape[0] else []
        fields[os.fspath(path)] = [*rows, *other_fields(prompt)]
    kinds = {set(names) <= set(PREFIXES): path for path, names in fields.items()}
    unknown = [path for path, names in fields.items() if len(names) > 1 and "rows" in names]
    unknown += [path for path, names in fields.items() if "memory" in names]
    if unknown:
        raise ConfigError(
            f"the prompt {unknown[0]} has {', '.join(fields[unknown[0]])}. Expected rows alone, or "
            "keys and values alone."
        )
    if len(kinds) > 1:
        raise ConfigError(
            f"{kinds[True]} is a prompt of keys and values, and {kinds[False]} of rows: they "
            "cannot be compared. Inspect them apart."
        )
    return True in kinds


def inspect_prefixes(paths: Sequence[str | os.PathLike[str]], checkpoint: str) -> PrefixInspection:
    """The norms and similarities of prompts of keys and values, which must fit the checkpoint.

    Raises:
      ConfigError: something cannot be read, or a prompt does not fit the checkpoint.
    """
    model, prompts = read_model(checkpoint), []
    for path in paths:
        stored = read_prompt(path)
        shape = None, model.embed_dim
        check_prompt(stored.prompt, stored.metadata, shape=shape, model=model, where=path)
        metadata = stored.metadata or PromptMetadata(method=stored.method)
        prompts.append(InspectedPrefix(str(path), metadata, tuple(_places(stored.prompt))))
    return PrefixInspection(checkpoint, tuple(prompts))


def _places(prompt: Prompt) -> Iterator[Place]:
    for name in PREFIXES:
        if getattr(prompt, name) is None:
            continue
        prefix = np.asarray(getattr(prompt, name))
        norms = np.linalg.norm(prefix, axis=-1).mean(axis=2)
        wholes = [unit(prefix[:, kind].reshape(len(prefix), -1)) for kind in range(2)]
        similarity = np.stack([whole @ whole.T for whole in wholes])
        yield Place(name, prefix.shape, np.swapaxes(norms, 0, 1), similarity)


def describe(inspection: PrefixInspection) -> str:
    """The text that `t5x inspect-prompt` prints; `to_json` has the same for programs."""
    return "\n\n".join("\n".join(_prompt_lines(prompt)) for prompt in inspection.prompts)


def _prompt_lines(prompt: InspectedPrefix) -> Iterator[str]:
    metadata = prompt.metadata
    facts = [metadata.method, metadata.task, f"step {metadata.step}" if metadata.step else ""]
    if metadata.score is not None:
        facts.append(f"{metadata.score_name} {metadata.score:.1f}")
    yield f"{prompt.name}: {', '.join(fact for fact in facts if fact)}"
    for place in prompt.places:
        yield f"{place.name} float32{list(place.shape)}"
        for kind, norms, similarity in zip(KINDS, place.norms, place.similarity, strict=True):
            yield f"norms of {kind} by head, mean over positions"
            yield from _table(norms, "7.2f")
            yield f"cosine of the {kind} of two layers"
            yield from _table(similarity, "7.3f")


def _table(matrix: Float[np.ndarray, "N C"], form: str) -> Iterator[str]:
    """A line for each layer, below the numbers of the columns."""
    yield "layer " + " ".join(f"{column:>7}" for column in range(matrix.shape[1]))
    for layer, values in enumerate(matrix):
        yield f"{layer:>5} " + " ".join(format(value, form) for value in values)
