"""T5's objectives: against T5's own examples, and by what must hold of any chunk."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prompt_tuning.pretraining import objectives
from tests.tiny_models import join_documents

VOCAB = 1000
EOS = objectives.EOS_ID
CHUNKS = st.lists(st.integers(3, 500), min_size=2, max_size=80).map(np.array)
SEEDS = st.integers(0, 2**31)


def words(seed: int, count: int = 200) -> np.ndarray:
    return np.random.Philox(key=np.array([seed, 0], np.uint64)).random_raw(count)


def restore(inputs: np.ndarray, targets: np.ndarray, first_sentinel: int) -> list[int]:
    """The chunk again: every sentinel of the input replaced by what follows it in the target."""
    lowest = first_sentinel - 100
    spans: dict[int, list[int]] = {}
    for token in targets.tolist():
        if token > lowest:
            spans[token] = current = []
        else:
            current.append(token)
    return [t for token in inputs.tolist() for t in (spans[token] if token > lowest else [token])]


# Lengths.


@pytest.mark.parametrize(
    ("inputs", "tokens", "targets"), [(512, 568, 114), (1024, 1137, 229), (256, 284, 58)]
)
def test_lengths_are_t5s(inputs: int, tokens: int, targets: int):
    """The pairs that T5's gin files and papers name."""
    assert objectives.span_lengths(inputs) == (tokens, inputs, targets)


@settings(deadline=None)
@given(st.integers(4, 3000))
def test_the_chunk_is_the_longest_that_fits(inputs: int):
    found = objectives.span_lengths(inputs)
    assert found.inputs <= inputs
    assert objectives.corrupted_lengths(found.tokens + 1).inputs > inputs


# What is hidden.


@settings(deadline=None)
@given(st.integers(2, 200), SEEDS)
def test_noise_mask_hides_its_share_in_spans_that_alternate(length: int, seed: int):
    mask = objectives.noise_mask(length, words(seed))
    assert len(mask) == length
    share = np.round(np.float32(length) * np.float32(0.15))  # in float32, as T5 counts: 190 -> 29
    assert mask.sum() == min(max(int(share), 1), length - 1)
    assert not mask[0]
    assert mask[-1]
    spans = int((mask & ~np.append(False, mask[:-1])).sum())
    assert spans == max(int(np.round(np.float32(mask.sum()) / np.float32(3))), 1)


def test_every_mask_is_equally_likely():
    """Six tokens of density a half in two spans: two ways to split each, so four masks."""
    masks = Counter(
        tuple(objectives.noise_mask(6, words(seed), density=0.5, mean_span=1.5).tolist())
        for seed in range(2000)
    )
    assert len(masks) == 4
    assert all(abs(n - 500) < 100 for n in masks.values())  # five standard deviations


@settings(deadline=None)
@given(CHUNKS, SEEDS)
def test_span_corruption_loses_nothing_and_counts_its_sentinels_down(chunk: np.ndarray, seed: int):
    pair = objectives.span_corruption(chunk, words(seed), vocab_size=VOCAB)
    assert pair.inputs[-1] == pair.targets[-1] == EOS
    sentinels = [i for i in pair.inputs if i > 500]
    assert sentinels == [VOCAB - 1 - k for k in range(len(sentinels))]
    assert sentinels == [i for i in pair.targets if i > 500]
    assert restore(pair.inputs[:-1], pair.targets[:-1], VOCAB - 1) == chunk.tolist()
    expected = objectives.corrupted_lengths(len(chunk))
    assert (len(pair.inputs), len(pair.targets)) == expected[1:]


@settings(deadline=None)
@given(CHUNKS, SEEDS, st.integers(3, 90), st.integers(2, 90))
def test_prefix_lm_loses_nothing_and_both_parts_fit(
    chunk: np.ndarray, word: int, inputs: int, targets: int
):
    chunk = chunk[: inputs - 1]  # as long as `examples` makes it
    cut = objectives.prefix_cut(len(chunk), word, inputs=inputs, targets=targets)
    pair = objectives.prefix_lm(chunk, cut)
    assert pair.inputs[-1] == pair.targets[-1] == EOS
    assert [*pair.inputs[:-1], *pair.targets[:-1]] == chunk.tolist()
    assert 2 <= len(pair.inputs) <= inputs
    assert 2 <= len(pair.targets) <= targets


# T5's own examples: 500 documents of C4, and the 240 that T5 made of them.


@pytest.fixture(scope="module")
def golden(shared_dir: Path):
    import tensorflow as tf

    def read(pattern: str) -> list[dict[str, np.ndarray]]:
        (path,) = (shared_dir / "data/corpora/c4_500_airio").glob(pattern)
        rows = []
        for record in tf.data.TFRecordDataset(str(path)).as_numpy_iterator():
            features = tf.train.Example.FromString(record).features.feature
            rows.append({k: np.array(v.int64_list.value) for k, v in features.items()})
        return rows

    return read("c4_span_corruption*"), read("c4_tokenized*")


def test_golden_examples_have_our_lengths_sentinels_and_density(golden):
    examples, documents = golden
    chunk = objectives.span_lengths(1024).tokens
    sizes = Counter((len(e["inputs"]) + 1, len(e["targets"]) + 1) for e in examples)
    (usual, count), *_ = sizes.most_common()
    assert usual == objectives.span_lengths(1024)[1:]
    assert count == 236  # the other four end a group of 128 documents
    total = 0
    for example in examples:
        restored = restore(example["inputs"], example["targets"], 32099)
        total += len(restored)
        sentinels = example["inputs"][example["inputs"] > 31999]
        hidden, spans = objectives.count_noise(len(restored))
        assert sentinels.tolist() == [32099 - k for k in range(spans)]
        assert len(restored) <= chunk
        assert len(example["targets"]) == hidden + spans
    assert total == sum(len(d["targets"]) for d in documents)


def test_we_make_t5s_examples_of_t5s_masks(golden):
    """Inputs and targets, token for token, from the chunk and the mask that T5 drew."""
    for example in golden[0]:
        inputs, targets = example["inputs"], example["targets"]
        chunk = np.array(restore(inputs, targets, 32099))
        mask = mask_of(inputs, targets)
        assert objectives.with_sentinels(chunk, mask, 32100).tolist() == inputs.tolist()
        assert objectives.with_sentinels(chunk, ~mask, 32100).tolist() == targets.tolist()
        assert not mask[0]
        assert mask[-1]


def mask_of(inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
    starts = np.flatnonzero(targets > 31999)
    spans = np.diff(np.append(starts, len(targets))) - 1
    mask, sizes = [], iter(spans)
    for token in inputs:
        mask += [True] * next(sizes) if token > 31999 else [False]
    return np.array(mask)


def test_chunks_of_a_golden_corpus_cover_it(golden):
    """Cutting the documents of a group as T5 does gives the chunks that T5 hid spans in."""
    from prompt_tuning.config import CorpusConfig
    from prompt_tuning.pretraining import examples as module

    rows, documents = golden
    config = CorpusConfig(objective="span_corruption", merge_documents=True)
    shape = module.make_shape(config, {"inputs": 1024}, 32100)
    found = []
    for group in range(0, 500, 128):
        ids = np.concatenate([d["targets"] for d in documents[group : group + 128]])
        text = join_documents("c4", [ids.tolist()])
        epoch = module.Examples(text, shape, 0).epoch(0)
        pairs = [epoch.pair(i) for i in range(len(epoch.starts))]
        found += [tuple(restore(p.inputs[:-1], p.targets[:-1], 32099)) for p in pairs]
    theirs = {tuple(restore(e["inputs"], e["targets"], 32099)) for e in rows}
    assert set(found) == theirs
