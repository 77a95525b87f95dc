"""The predictor: one frozen backbone, several prompts; each text is answered with its own prompt.

`infer.py` and Python programs call it. Prompts of different lengths share a batch
(`mixed_batch.py`), and the output of a row does not depend on the other rows.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from prompt_tuning.checkpoints import identity
from prompt_tuning.checkpoints.load import read_backbone
from prompt_tuning.config import BEAM, ConfigError, Decoding, ModelConfig, Truncate
from prompt_tuning.decoding import decode
from prompt_tuning.methods.method import Frozen
from prompt_tuning.model import sharding, t5
from prompt_tuning.model.device import choose_device
from prompt_tuning.model.prompt import Prompt, no_prompt, read_memory, stack_prompts
from prompt_tuning.prompts import prompt_file
from prompt_tuning.prompts.rows import widen_no_rows
from prompt_tuning.serving import mixed_batch
from prompt_tuning.vocabularies.coverage import CURE, describe_lost
from prompt_tuning.vocabularies.truncate import encode_input
from prompt_tuning.vocabularies.vocabulary import Vocabulary, load_vocabulary

PromptNames = str | None | Sequence[str | None]  # a name for all rows, or a name for each


class Generated(NamedTuple):
    """An output and its score: log p, divided by T5X's length penalty in beam search."""

    text: str
    score: float


@dataclasses.dataclass(frozen=True, eq=False)
class Predictor:
    """Answers texts with one backbone and any of its prompts, by name; None is no prompt.

    Its only state is compiled functions, so several threads can share a predictor. If the backbone
    is sharded on a ('data', 'model') mesh, the rows of a batch are sharded over 'data'.
    """

    config: ModelConfig
    backbone: t5.Params
    vocabulary: Vocabulary
    prompts: Mapping[str, Prompt | Float[Array | np.ndarray, "P D"]]
    _: dataclasses.KW_ONLY
    max_input_length: int = 512  # tokens, with end-of-sequence and without the prompt
    max_target_length: int = 32
    batch_size: int = 32
    truncate: Truncate = "end"  # what a longer input loses; 'longest_field' of `pt.read_inputs`
    sentinel_targets: bool = False  # SENTINEL_TARGETS: outputs begin with T5's first sentinel
    members: Prompt = dataclasses.field(init=False, repr=False)  # all prompts, and an empty one
    model: t5.T5 = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Checks that backbone, vocabulary and prompts fit each other.

        Raises:
          ConfigError: a prompt has another width than the model, the vocabulary has more ids than
            the model has embeddings, or a limit is below 1.
        """
        if self.vocabulary.vocab_size > self.config.num_embeddings:
            raise ConfigError(
                f"the vocabulary has {self.vocabulary.vocab_size} ids, the model only "
                f"{self.config.num_embeddings} embeddings (NUM_EMBEDDINGS). Give the model's "
                "vocabulary."
            )
        for name in ("max_input_length", "max_target_length", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, found {getattr(self, name)}.")
        devices = self.backbone["token_embedder/embedding"].devices()
        model = t5.T5(self.config, choose_device(self.config, devices))
        object.__setattr__(self, "model", model)
        prompts = []
        for name, prompt in self.prompts.items():
            if not isinstance(prompt, Prompt):
                prompt = Prompt(jnp.asarray(prompt))
            if prompt.rows.ndim != 2:
                shape = tuple(prompt.rows.shape)
                raise ConfigError(f"the prompt {name} has shape {shape}; expected (P, D).")
            shape = (None, self.config.embed_dim)
            prompt_file.check_prompt(prompt, None, shape=shape, model=self.config, where=name)
            if prompt.memory is not None:
                prompt = jax.jit(read_memory, static_argnums=0)(model, dict(self.backbone), prompt)
            prompts.append(widen_no_rows(prompt, self.config.embed_dim))
        members = stack_prompts([*prompts, no_prompt(self.config)])
        object.__setattr__(self, "members", jax.device_put(members, self._sharding()))

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: str,
        config: ModelConfig,
        vocabulary: str,
        prompts: Mapping[str, str | os.PathLike[str]],
        *,
        num_model_partitions: int = 1,
        **settings: Any,
    ) -> Predictor:
        """A predictor over a backbone and prompt folders or .npy files, by name.

        The backbone is a T5X checkpoint, a Hugging Face folder, an hf:// address, or "tiny".
        `settings` are `max_input_length`, `max_target_length`, `batch_size`, `truncate` and
        `sentinel_targets`.

        Raises:
          ConfigError: something cannot be read, or a prompt was made for another model.
        """
        loaded_vocabulary = load_vocabulary(vocabulary)
        for path in prompts.values():
            prompt_file.check_stored_prompt(path, config)
        mesh = sharding.make_mesh(num_model_partitions)
        choose_device(config, mesh.devices.flat, partitions=num_model_partitions)
        backbone, _ = read_backbone(checkpoint, config, mesh=mesh)
        fingerprint = identity.backbone_identity(backbone)
        frozen = Frozen(config, backbone)
        identities = {"backbone": fingerprint, "vocabulary": loaded_vocabulary.sha256}
        named = {
            name: prompt_file.load_fitting_prompt(
                path, (None, config.embed_dim), frozen=frozen, **identities
            )[0]
            for name, path in prompts.items()
        }
        return cls(config, backbone, loaded_vocabulary, named, **settings)

    def generate(
        self,
        texts: Sequence[str],
        prompts: PromptNames,
        *,
        num_decodes: int = 1,
        decoding: Decoding = BEAM,
    ) -> list[str]:
        """The output for every text with its prompt; more than one decode is beam search.

        With `Decoding(method="sample", ...)` it is the most probable of `num_decodes` samples.
        Warns if texts are longer than `max_input_length` and were cut, or have characters that the
        vocabulary does not know.

        Raises:
          ConfigError: a prompt is not loaded, or the number of prompts is not that of the texts.
        """
        rows = self._tokenize(texts)
        outputs = self.generate_rows(rows, prompts, num_decodes=num_decodes, decoding=decoding)
        return [best.text for best in outputs]

    def generate_all(
        self,
        texts: Sequence[str],
        prompts: PromptNames,
        *,
        num_decodes: int = 1,
        decoding: Decoding = BEAM,
    ) -> list[list[Generated]]:
        """All beams or samples of every text, the best first, with their scores; as `generate`."""
        rows = self._tokenize(texts)
        return self.generate_all_rows(rows, prompts, num_decodes=num_decodes, decoding=decoding)

    def rank(self, texts: Sequence[str], labels: Sequence[str], prompts: PromptNames) -> list[str]:
        """The most probable of `labels` for every text; `score` gives the numbers."""
        best = self.score_rows(self._tokenize(texts), labels, prompts).argmax(axis=1)
        return [labels[int(label)] for label in best]

    def score(
        self, texts: Sequence[str], labels: Sequence[str], prompts: PromptNames
    ) -> Float[np.ndarray, "B C"]:
        """Log p(label | text, prompt), end-of-sequence included, of every label for every text.

        Warns and raises as `generate` does.
        """
        return self.score_rows(self._tokenize(texts), labels, prompts)

    def label_lengths(self, labels: Sequence[str]) -> Int[np.ndarray, "C"]:
        """The number of tokens of every label, end-of-sequence included: the divisor of a mean."""
        return (self._label_tokens(labels) > 0).sum(axis=1)

    def tokenize(self, texts: Sequence[str]) -> tuple[list[list[int]], list[int]]:
        """The ids of every text with end-of-sequence, and the numbers of the texts that were cut.

        A truncated text also ends in end-of-sequence, as with seqio's append_eos_after_trim.
        """
        if isinstance(texts, str):
            raise ConfigError("expected a list of texts, found a single text. Write [text].")
        length = self.max_input_length
        ids = [encode_input(self.vocabulary, text, length, self.truncate) for text in texts]
        full = [row for row, tokens in enumerate(ids) if len(tokens) == length]
        return ids, [row for row in full if len(self.vocabulary.encode(texts[row])) >= length]

    def generate_rows(
        self, rows: Sequence[Sequence[int]], prompts: PromptNames, **how: Any
    ) -> list[Generated]:
        """`generate` for rows of ids, with scores; `how` is as in `generate_all_rows`."""
        return [best for best, *_ in self.generate_all_rows(rows, prompts, **how)]

    def generate_all_rows(
        self,
        rows: Sequence[Sequence[int]],
        prompts: PromptNames,
        *,
        num_decodes: int = 1,
        decoding: Decoding = BEAM,
        first_row: int = 0,
    ) -> list[list[Generated]]:
        """`generate_all` for rows of ids; nothing is cut or added.

        The samples of a row depend on its number, counted from `first_row`, not on other rows.
        """
        results: dict[int, list[Generated]] = {}
        search = decode.Search(self.max_target_length, num_decodes, decoding)

        def generate(places: list[int], batch: mixed_batch.MixedBatch) -> Any:
            padded = places + places[-1:] * (len(batch.which) - len(places))
            numbers = jax.device_put(
                np.asarray(padded, np.int32) + first_row, self._sharding("data")
            )
            return mixed_batch.generate(
                self.backbone, self.members, batch, numbers, model=self.model, search=search
            )

        for places, outputs in _dispatch_ahead(generate, self._batches(rows, prompts)):
            for place, ids, scores in zip(places, *jax.device_get(outputs), strict=False):
                pairs = zip(ids.tolist(), scores.tolist(), strict=True)
                results[place] = [Generated(self._decode(i), s) for i, s in pairs][::-1]
        return [results[place] for place in range(len(rows))]

    def score_rows(
        self, rows: Sequence[Sequence[int]], labels: Sequence[str], prompts: PromptNames
    ) -> Float[np.ndarray, "B C"]:
        """`score` for rows of ids."""
        targets = self._label_tokens(labels)
        results = np.zeros((len(rows), len(labels)), np.float32)

        def score(places: list[int], batch: mixed_batch.MixedBatch) -> Any:
            return mixed_batch.score(self.backbone, self.members, batch, targets, model=self.model)

        for places, scores in _dispatch_ahead(score, self._batches(rows, prompts)):
            results[places] = jax.device_get(scores)[: len(places)]
        return results

    def _tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        rows, cut = self.tokenize(texts)
        if cut:
            shown = ", ".join(map(str, cut[:5])) + (", ..." if len(cut) > 5 else "")
            warnings.warn(
                f"{len(cut)} of {len(rows)} texts are longer than max_input_length = "
                f"{self.max_input_length} tokens and were cut: numbers {shown}.",
                stacklevel=3,  # the program that called generate, rank or score
            )
        if lost := describe_lost(texts, rows, self.vocabulary):
            warnings.warn(
                f"texts: {lost}. The model reads an unknown piece there. {CURE}", stacklevel=3
            )
        return rows

    def _label_tokens(self, labels: Sequence[str]) -> Int[np.ndarray, "C L"]:
        if isinstance(labels, str) or not labels:
            raise ConfigError(f"expected a list of labels to rank, found {labels!r}.")
        first = [self._sentinel] if self.sentinel_targets else []
        eos = self.vocabulary.eos_id
        ids = [[*first, *self.vocabulary.encode(label), eos] for label in labels]
        tokens = np.zeros((len(ids), max(map(len, ids))), np.int32)
        for row, label in zip(tokens, ids, strict=True):
            row[: len(label)] = label
        return tokens

    @property
    def _sentinel(self) -> int:
        return self.vocabulary.vocab_size - 1

    def _decode(self, ids: list[int]) -> str:
        has_sentinel = self.sentinel_targets and ids[:1] == [self._sentinel]
        return self.vocabulary.decode(ids[1:] if has_sentinel else ids)

    def _batches(
        self, rows: Sequence[Sequence[int]], prompts: PromptNames
    ) -> Iterator[tuple[list[int], mixed_batch.MixedBatch]]:
        names = [prompts] * len(rows) if prompts is None or isinstance(prompts, str) else prompts
        if len(names) != len(rows):
            raise ConfigError(
                f"there are {len(rows)} texts and {len(names)} prompts. Give a prompt for each "
                "text, or one prompt for all."
            )
        mesh = _mesh(self.backbone)
        batches = mixed_batch.mixed_batches(
            rows,
            [self._index(name) for name in names],
            np.asarray(self.members.lengths)[:, 0].tolist(),
            batch_size=self.batch_size,
            multiple=mesh.shape.get("data", 1) if mesh else 1,
        )
        for places, batch in batches:
            yield places, jax.device_put(batch, self._sharding("data"))

    def _index(self, name: str | None) -> int:
        """The index of a prompt among the members; None is the last, the empty prompt."""
        if name is None:
            return len(self.prompts)
        if name not in self.prompts:
            near = difflib.get_close_matches(name, self.prompts, n=3)
            hint = f" Did you mean {' or '.join(near)}?" if near else ""
            raise ConfigError(
                f"no prompt is named {name!r}.{hint} Loaded: {', '.join(self.prompts) or 'none'}; "
                "None is the model without a prompt."
            )
        return list(self.prompts).index(name)

    def _sharding(self, *axes: str) -> NamedSharding | None:
        mesh = _mesh(self.backbone)
        if mesh is None:
            return None
        return NamedSharding(mesh, PartitionSpec(*(axis for axis in axes if axis in mesh.shape)))


def _dispatch_ahead(
    compute: Callable[[list[int], mixed_batch.MixedBatch], Any],
    batches: Iterable[tuple[list[int], mixed_batch.MixedBatch]],
) -> Iterator[tuple[list[int], Any]]:
    """The result of each batch, on the device, yielded after the next batch was dispatched.

    So the device computes a batch while the host reads the result of the one before.
    """
    dispatched = ((places, compute(places, batch)) for places, batch in batches)
    pairs = itertools.pairwise(itertools.chain(dispatched, [([], None)]))
    return (result for result, _ in pairs)


def _mesh(backbone: t5.Params) -> Mesh | None:
    """The mesh of the backbone's sharding; None if it is on a single device."""
    placed = backbone["token_embedder/embedding"].sharding
    if isinstance(placed, NamedSharding) and isinstance(placed.mesh, Mesh):
        return placed.mesh
    return None
