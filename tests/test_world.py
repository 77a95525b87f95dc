"""The world is what it says, its corpus knows nothing of the demo, and the backbone knows it."""

import dataclasses
import json
import re
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from prompt_tuning.checkpoint.t5x import read_t5x
from prompt_tuning.model import t5
from prompt_tuning.world import assets, generator, objectives, pretrain, probe

MEGABYTE = 1_000_000
LABELS = [word for task in generator.DEMO_TASKS.values() for word in task.label_words]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return list(generator.corpus(20_000))


@pytest.fixture(scope="module")
def tokenizer() -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=assets.tiny_vocabulary())


@pytest.fixture(scope="module")
def backbone() -> t5.Params:
    shapes = t5.param_shapes(assets.TINY_CONFIG)
    params, _ = read_t5x(assets.tiny_checkpoint(), shapes)
    return params


# The generator.


def test_the_same_seed_gives_the_same_reviews_and_another_seed_others():
    assert generator.reviews(50, seed=7) == generator.reviews(50, seed=7)
    assert generator.reviews(50, seed=7) != generator.reviews(50, seed=8)


def test_the_first_demo_row_is_the_one_in_the_documentation():
    """Rows must not change with Python's version: `Draw` promises that."""
    row = generator.demo_rows("tiny_mood", "train")[0]
    assert f"{row['inputs']} -> {row['targets']}" == FIRST_ROW


FIRST_ROW = (
    "loved the superb salad. loved the superb sauce. five horse, superb sauce. "
    "loved the lovely sauce. -> up"
)


def test_every_combination_of_attributes_is_equally_frequent():
    reviews = generator.reviews(800, seed=3)
    counts = Counter((r.mood, r.topic, r.narrator) for r in reviews)
    assert len(counts) == 8
    assert set(counts.values()) == {100}


def test_words_of_one_attribute_value_never_stand_in_a_review_of_the_other():
    for review in generator.reviews(2000, seed=4):
        words = set(re.findall("[a-z]+", review.text))
        other_mood = "bad" if review.mood == "good" else "good"
        other_topic = "food" if review.topic == "travel" else "travel"
        wrong = {*generator.ADJECTIVES[other_mood], *generator.VERBS[other_mood]}
        wrong |= set(generator.NOUNS[other_topic])
        assert not words & wrong, review


@pytest.mark.parametrize("task", generator.DEMO_TASKS)
@pytest.mark.parametrize("split", generator.DEMO_SPLITS)
def test_demo_splits_are_balanced_and_have_their_size(task: str, split: str):
    rows = generator.demo_rows(task, split)
    counts = Counter(row["targets"] for row in rows)
    size, _ = generator.DEMO_SPLITS[split]
    assert dict.fromkeys(generator.DEMO_TASKS[task].label_words, size // 2) == dict(counts)


def test_the_two_tasks_ask_different_things_about_the_same_inputs():
    mood = generator.demo_rows("tiny_mood", "train")
    topic = generator.demo_rows("tiny_topic", "train")
    assert [row["inputs"] for row in mood] == [row["inputs"] for row in topic]
    pairs = Counter((m["targets"], t["targets"]) for m, t in zip(mood, topic, strict=True))
    assert set(pairs.values()) == {len(mood) // 4}


# What the backbone was trained on.


@pytest.fixture(scope="module")
def corpus_reviews() -> list[generator.Review]:
    return generator.reviews(20_000, seed=generator.CORPUS_SEED)


@pytest.mark.parametrize("attribute", generator.ATTRIBUTES)
@pytest.mark.parametrize("word", LABELS)
def test_label_words_say_nothing_about_an_attribute_in_the_corpus(
    corpus_reviews: list[generator.Review], attribute: str, word: str
):
    """Reviews with the word split evenly over the attribute's values, within four standard errors.

    Reviews are counted and not words: a review repeats its words, so they are not independent.
    """
    counts = Counter()
    for review in corpus_reviews:
        counts[getattr(review, attribute)] += word in re.findall("[a-z]+", review.text)
    total = sum(counts.values())
    assert total > 2000
    for count in counts.values():
        assert abs(count / total - 0.5) < 4 * 0.5 / total**0.5


def test_no_demo_input_is_in_the_corpus_and_no_text_ends_in_a_label():
    corpus = set(generator.corpus())
    for split in generator.DEMO_SPLITS:
        for row in generator.demo_rows("tiny_mood", split):
            assert row["inputs"] not in corpus
    # A review is whole sentences: nothing answers it.
    assert all(text[-1] in ".!" for text in corpus)


def test_demo_splits_share_no_input():
    inputs = [
        {row["inputs"] for row in generator.demo_rows("tiny_mood", split)}
        for split in generator.DEMO_SPLITS
    ]
    assert not inputs[0] & inputs[1] | inputs[0] & inputs[2] | inputs[1] & inputs[2]


# The objectives.

VOCAB = 1000
ROWS = st.lists(st.integers(3, 500), min_size=2, max_size=80).map(np.array)
SEEDS = st.integers(0, 2**31)


@settings(deadline=None)
@given(st.integers(2, 200), SEEDS)
def test_noise_mask_hides_its_share_in_spans_that_alternate(length: int, seed: int):
    mask = objectives.noise_mask(length, np.random.default_rng(seed))
    assert len(mask) == length
    assert mask.sum() == min(max(round(0.15 * length), 1), length - 1)
    assert not mask[0]
    assert mask[-1]
    spans = int((mask & ~np.append(False, mask[:-1])).sum())
    assert spans == max(round(mask.sum() / 3), 1)


@settings(deadline=None)
@given(ROWS, SEEDS)
def test_span_corruption_loses_nothing_and_counts_its_sentinels_down(row: np.ndarray, seed: int):
    given_, wanted = objectives.span_corruption(row, np.random.default_rng(seed), vocab_size=VOCAB)
    assert given_[-1] == wanted[-1] == objectives.EOS_ID
    sentinels = [i for i in given_ if i > 500]
    assert sentinels == [VOCAB - 1 - k for k in range(len(sentinels))]
    assert sentinels == [i for i in wanted if i > 500]
    assert restore(given_[:-1], wanted[:-1]) == row.tolist()


def restore(given_: np.ndarray, wanted: np.ndarray) -> list[int]:
    """The row again: every sentinel of the input replaced by what follows it in the target."""
    spans: dict[int, list[int]] = {}
    for token in wanted.tolist():
        if token > 500:
            spans[token] = current = []
        else:
            current.append(token)
    return [t for token in given_.tolist() for t in (spans[token] if token > 500 else [token])]


@settings(deadline=None)
@given(ROWS, SEEDS)
def test_prefix_lm_cuts_one_stretch_in_two(row: np.ndarray, seed: int):
    given_, wanted = objectives.prefix_lm(row, np.random.default_rng(seed))
    assert given_[-1] == wanted[-1] == objectives.EOS_ID
    assert min(len(given_), len(wanted)) >= 2
    joined = ",".join(map(str, [*given_[:-1], *wanted[:-1]]))
    assert f",{joined}," in "," + ",".join(map(str, row)) + ","


def test_make_batch_shifts_targets_right_and_weighs_only_tokens():
    batch = objectives.make_batch([(np.array([5, 1]), np.array([7, 8, 1]))], (3, 4))
    assert batch["encoder_input_tokens"].tolist() == [[5, 1, 0]]
    assert batch["decoder_target_tokens"].tolist() == [[7, 8, 1, 0]]
    assert batch["decoder_input_tokens"].tolist() == [[0, 7, 8, 1]]
    assert batch["decoder_loss_weights"].tolist() == [[1, 1, 1, 0]]


# The assets.


def test_vocabulary_round_trips_the_world_without_unknown_pieces(
    texts: list[str], tokenizer: sentencepiece.SentencePieceProcessor
):
    ids = tokenizer.encode(texts)
    assert tokenizer.unk_id() not in {i for row in ids for i in row}
    assert tokenizer.decode(ids) == texts
    ascii_text = "".join(map(chr, range(33, 127)))
    assert tokenizer.decode(tokenizer.encode(ascii_text)) == ascii_text


def test_vocabulary_has_the_ids_of_t5_and_one_piece_for_every_word(
    texts: list[str], tokenizer: sentencepiece.SentencePieceProcessor
):
    assert (tokenizer.pad_id(), tokenizer.eos_id(), tokenizer.unk_id()) == (0, 1, 2)
    assert tokenizer.bos_id() == -1
    assert tokenizer.vocab_size() + assets.EXTRA_IDS == assets.TINY_CONFIG.num_embeddings
    words = {word for text in texts for word in re.findall("[a-z]+", text)}
    assert [word for word in words if len(tokenizer.encode(word)) != 1] == []


def test_vocabulary_is_what_the_script_makes(texts: list[str]):
    made = pretrain.train_vocabulary(list(generator.corpus()))
    assert made == Path(assets.tiny_vocabulary()).read_bytes()


def test_longest_review_fits_the_inputs(
    texts: list[str], tokenizer: sentencepiece.SentencePieceProcessor
):
    longest = max(len(row) for row in tokenizer.encode(texts)) + 1
    assert longest <= min(phase.lengths[0] for phase in pretrain.PHASES)


def test_assets_are_small():
    size = sum(path.stat().st_size for path in assets.FOLDER.rglob("*") if path.is_file())
    assert size <= 3 * MEGABYTE


def test_checkpoint_holds_the_tiny_model_in_bfloat16_values(backbone: t5.Params):
    assert sum(value.size for value in backbone.values()) == summary()["parameters"]
    for value in backbone.values():
        assert (value == value.astype(jnp.bfloat16).astype(value.dtype)).all()


def summary() -> dict:
    return json.loads((assets.FOLDER / "summary.json").read_text())


@pytest.mark.parametrize("attribute", ["mood", "topic"])
def test_probe_knows_the_attributes(
    backbone: t5.Params, tokenizer: sentencepiece.SentencePieceProcessor, attribute: str
):
    def tokenize(texts):
        return [np.array(ids, np.int32) for ids in tokenizer.encode(list(texts))]

    accuracy = probe.probe_accuracy(
        assets.TINY_CONFIG, backbone, tokenize, attribute=attribute, num_train=500
    )
    assert accuracy >= 0.95


def test_backbone_is_a_language_model_of_the_world(
    backbone: t5.Params, tokenizer: sentencepiece.SentencePieceProcessor
):
    phase = pretrain.make_phases(tokenizer)[-1]
    unseen = list(generator.corpus(pretrain.HELD_OUT_REVIEWS, seed=generator.HELD_OUT_SEED))
    held_out = [np.array(ids, np.int32) for ids in tokenizer.encode(unseen)]
    loss = pretrain.held_out_loss(phase, backbone, held_out)
    assert loss == pytest.approx(summary()["held_out"][phase.name], abs=0.05)
    assert loss < 0.5 * pretrain.unigram_loss(phase, held_out, held_out)


def test_one_step_of_each_phase_lowers_the_loss(backbone: t5.Params):
    """The script's own path, on fresh parameters and one repeated row."""
    rows = [np.arange(3, 40, dtype=np.int32)]
    params = t5.init_params(assets.TINY_CONFIG, jax.random.key(0))
    for phase in pretrain.PHASES:
        short = dataclasses.replace(phase, steps=10, batch_size=4, warmup=1)
        before = pretrain.held_out_loss(phase, params, rows)
        params, _ = pretrain.run_phase(short, params, rows, rows, seed=0)
        assert pretrain.held_out_loss(phase, params, rows) < before
