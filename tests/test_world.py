"""The world is what it says, its corpus knows nothing of the demo, and the backbone knows it."""

import json
import re
import sys
from collections import Counter
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece

from prompt_tuning.checkpoints.t5x import read_t5x
from prompt_tuning.config import CorpusConfig
from prompt_tuning.model import loss, t5
from prompt_tuning.model.prompt import no_prompt
from prompt_tuning.pretraining import examples
from prompt_tuning.world import assets, generator
from tests.tiny_models import join_documents

sys.path.append(str(Path(__file__).parents[1] / "benchmarks" / "world"))
import probe  # noqa: E402
import tiny  # noqa: E402

sys.path.pop()

pytestmark = pytest.mark.slow
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


def test_longest_review_fits_the_inputs(
    texts: list[str], tokenizer: sentencepiece.SentencePieceProcessor
):
    longest = max(len(row) for row in tokenizer.encode(texts)) + 1
    assert longest <= tiny.INPUTS


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
    """On the rest of reviews cut anywhere; half of what knowing the frequencies would cost."""
    unseen = list(generator.corpus(256, seed=generator.HELD_OUT_SEED))
    config = CorpusConfig(objective="prefix_lm", merge_documents=False)
    shape = examples.make_shape(config, {"inputs": 48, "targets": 16}, 512)
    text = join_documents("reviews", tokenizer.encode(unseen))
    (batch,) = examples.Examples(text, shape, 0).batches(0, 256, limit=256)
    arrays = {name: jnp.asarray(value) for name, value in batch.items()}
    _, sums = loss.loss_fn(
        loss.forward(t5.T5(assets.TINY_CONFIG), backbone, no_prompt(assets.TINY_CONFIG), arrays),
        arrays,
    )
    targets = batch["decoder_target_tokens"]
    counts = np.bincount(targets[targets > 1])
    shares = counts[counts > 0] / counts.sum()
    assert sums["cross_entropy"] / sums["tokens"] < -0.5 * (shares * np.log(shares)).sum()


@pytest.mark.slow  # a minute, most of it for the corpus and the probes
def test_the_script_makes_a_backbone(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    tiny.main([f"--out={tmp_path}", "--steps=2"])
    assert (tmp_path / "checkpoint_4").is_dir()
    found = json.loads((tmp_path / "summary.json").read_text())
    assert found["held_out"]["span_corruption"] < 7
    made = (tmp_path / "sentencepiece.model").read_bytes()
    assert made == Path(assets.tiny_vocabulary()).read_bytes()
