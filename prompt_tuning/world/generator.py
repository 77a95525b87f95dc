"""The synthetic world: short reviews that carry hidden attributes, and the demo tasks over them.

Every sentence of a review carries its hidden mood (good or bad) or its topic (food or travel), in
most both. A review has few words of its own, its cast, and repeats them: what is hidden or yet to
come is best guessed by looking it up in the rest, and a model that has learned to look things up
in its input is one that a prompt can steer. The attributes are independent of each other.

The demo tasks ask for one attribute with label words that occur all over the corpus, drawn
without regard to any attribute, and never in a demo input: a model of this world knows the words
and knows the attributes, and has never seen what connects them. That is left to the prompt.

Standard library only. `benchmarks/world/tiny.py` makes a backbone from `corpus`,
`tasks/registry.py` makes seqio tasks from `demo_rows`.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Sequence
from types import MappingProxyType
from typing import TypeVar

T = TypeVar("T")

ATTRIBUTES = MappingProxyType(
    {"mood": ("good", "bad"), "topic": ("food", "travel"), "narrator": ("i", "we")}
)
ADJECTIVES = MappingProxyType(
    {
        "good": ("lovely", "great", "superb", "charming"),
        "bad": ("horrid", "nasty", "dull", "dreadful"),
    }
)
VERBS = MappingProxyType(
    {"good": ("loved", "enjoyed", "praised"), "bad": ("hated", "regretted", "cursed")}
)
NOUNS = MappingProxyType(
    {
        "food": ("soup", "cake", "salad", "sauce", "pizza", "cook", "kitchen", "menu"),
        "travel": ("train", "hotel", "beach", "boat", "guide", "road", "harbour", "ticket"),
    }
)
OBJECTS = ("door", "wall", "sign", "lamp", "window", "bench", "clock", "gate")
COLOURS = ("red", "blue", "green", "white", "black", "yellow")
DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
NUMBERS = ("one", "two", "three", "four", "five", "six")
ANIMALS = ("cat", "dog", "bird", "horse", "goat", "duck")
NAMES = ("anna", "ben", "carl", "dora", "emma", "frank")
ANSWERS = ("yes", "no", "true", "false", "maybe", "never")
SIDES = ("left", "right")
WAYS = ("up", "down")

# Sentences of attributes, and of words that are drawn without regard to them; "they" stands for
# the narrator. Those of the second list have the label words of the demo tasks. In the corpus both
# are drawn alike: where a review without a label word had told the model that none would come, no
# prompt of 20 rows could talk it out of that for sure (accuracy 50 to 99 from one seed to another).
PLAIN_SENTENCES = (
    "{adjective} {noun}.",
    "{noun} was {adjective}.",
    "{they} {verb} the {noun}.",
    "{verb} the {adjective} {noun}.",
    "{answer}, {adjective} {noun}!",
    "{name} {verb} the {noun}.",
    "{day}: {adjective} {noun}.",
    "{number} {animal}, {adjective} {noun}.",
    "{colour} {object}, {adjective} {noun}.",
)
LABEL_SENTENCES = (
    "{way}, {adjective} {noun}.",
    "{side}, {adjective} {noun}.",
    "{way} on the {side}, {adjective}!",
    "{side}: {they} {verb} the {noun}.",
    "{way}: {they} {verb} the {noun}.",
)
SENTENCES = PLAIN_SENTENCES + LABEL_SENTENCES
OWN_SENTENCES = 4  # forms that a review repeats
LENGTHS = (4, 6)  # least and most sentences in a review


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoTask:
    """A question about one attribute, answered with words that mean nothing about it."""

    attribute: str
    label_words: tuple[str, str]  # in the order of ATTRIBUTES[attribute]


DEMO_TASKS = MappingProxyType(
    {
        "tiny_mood": DemoTask(attribute="mood", label_words=("up", "down")),
        "tiny_topic": DemoTask(attribute="topic", label_words=("left", "right")),
    }
)
# Rows and seed of each split. The corpus has a seed of its own; no demo input occurs in it.
DEMO_SPLITS = MappingProxyType({"train": (2000, 101), "validation": (256, 102), "test": (512, 103)})
CORPUS_SEED = 1
CORPUS_REVIEWS = 60_000
HELD_OUT_SEED = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Review:
    """One review and what it hides."""

    text: str
    mood: str
    topic: str
    narrator: str


class Draw:
    """Choices that stay the same on every version of Python.

    Only `random.Random.random` promises that for a seed; `choice` and `shuffle` do not.
    """

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed).random

    def below(self, n: int) -> int:
        """A number from 0 to n - 1."""
        return int(self._random() * n)

    def one(self, values: Sequence[T]) -> T:
        """One of the values."""
        return values[self.below(len(values))]

    def two(self, values: Sequence[T]) -> tuple[T, T]:
        """Two different places of `values`."""
        first = self.below(len(values))
        second = self.below(len(values) - 1)
        return values[first], values[second + (second >= first)]

    def shuffled(self, values: Sequence[T]) -> list[T]:
        """The values in another order."""
        keyed = [(self._random(), i) for i in range(len(values))]
        return [values[i] for _, i in sorted(keyed)]


def write_review(
    draw: Draw, *, mood: str, topic: str, narrator: str, sentences: Sequence[str] = SENTENCES
) -> Review:
    """A review with these attributes, made of some of these sentences."""
    least, most = LENGTHS
    count = least + draw.below(most - least + 1)
    cast = {
        "they": narrator,
        "verb": draw.one(VERBS[mood]),
        "object": draw.one(OBJECTS),
        "colour": draw.one(COLOURS),
        "day": draw.one(DAYS),
        "number": draw.one(NUMBERS),
        "animal": draw.one(ANIMALS),
        "name": draw.one(NAMES),
        "answer": draw.one(ANSWERS),
        "side": draw.one(SIDES),
        "way": draw.one(WAYS),
    }
    adjectives, nouns = draw.two(ADJECTIVES[mood]), draw.two(NOUNS[topic])
    own = [draw.one(sentences) for _ in range(OWN_SENTENCES)]
    written = [
        draw.one(own).format(noun=draw.one(nouns), adjective=draw.one(adjectives), **cast)
        for _ in range(count)
    ]
    return Review(text=" ".join(written), mood=mood, topic=topic, narrator=narrator)


def reviews(count: int, *, seed: int, sentences: Sequence[str] = SENTENCES) -> list[Review]:
    """`count` reviews, the eight combinations of attributes equally often, in random order.

    >>> reviews(8, seed=3) == reviews(8, seed=3)
    True
    """
    draw = Draw(seed)
    combinations = [
        (mood, topic, narrator)
        for mood in ATTRIBUTES["mood"]
        for topic in ATTRIBUTES["topic"]
        for narrator in ATTRIBUTES["narrator"]
    ]
    order = draw.shuffled([combinations[i % len(combinations)] for i in range(count)])
    return [
        write_review(draw, mood=mood, topic=topic, narrator=narrator, sentences=sentences)
        for mood, topic, narrator in order
    ]


def corpus(count: int = CORPUS_REVIEWS, *, seed: int = CORPUS_SEED) -> Iterator[str]:
    """The texts that the backbone is pre-trained on: reviews without any label.

    A review that is also a demo input, if chance makes one, is left out.
    """
    demo = {row["inputs"] for split in DEMO_SPLITS for row in demo_rows("tiny_mood", split)}
    return (review.text for review in reviews(count, seed=seed) if review.text not in demo)


def demo_reviews(split: str) -> list[Review]:
    """The reviews of a split of the demo tasks, free of their label words."""
    count, seed = DEMO_SPLITS[split]
    return reviews(count, seed=seed, sentences=PLAIN_SENTENCES)


def demo_rows(task: str, split: str) -> list[dict[str, str]]:
    """The rows of a demo task, `{"inputs": review, "targets": label word}`, classes balanced.

    All demo tasks have the same inputs: what differs is only the question, that is, the prompt.
    """
    return label_rows(demo_reviews(split), DEMO_TASKS[task])


def label_rows(rows: Sequence[Review], task: DemoTask) -> list[dict[str, str]]:
    """The reviews as inputs and targets of a task."""
    words = dict(zip(ATTRIBUTES[task.attribute], task.label_words, strict=True))
    return [{"inputs": row.text, "targets": words[getattr(row, task.attribute)]} for row in rows]
