"""A small language: its words, the facts one can state in it, and texts that use them.

A scene is a handful of people with what is true of them. Everything else is said about scenes:
statements, questions with their answers, what follows, who a pronoun stands for, what a word with
two senses means. `corpus` writes all of it down, unlabelled, for pre-training; `miniatures.py`
asks about new scenes in the shapes of SuperGLUE. Standard library only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from types import MappingProxyType

from prompt_tuning.world.generator import Draw

PEOPLE = MappingProxyType(
    {
        "she": ("anna", "dora", "emma", "gina", "ida", "kate", "lena", "nora"),
        "he": ("ben", "carl", "frank", "hugo", "jack", "leo", "max", "otto"),
    }
)
NAMES = tuple(name for names in PEOPLE.values() for name in names)
THINGS = ("ball", "lamp", "book", "drum", "kite", "cup", "coat", "key")
COLOURS = ("red", "blue", "green", "white", "black", "yellow")
PLACES = ("park", "shop", "school", "station", "garden", "harbour")
BOXES = ("box", "bag", "basket", "drawer", "chest", "trunk")
ROOMS = ("kitchen", "hall", "cellar", "attic", "shed", "tower")
QUALITIES = ("taller", "older", "faster", "stronger")
OPPOSITES = MappingProxyType(
    {"taller": "shorter", "older": "younger", "faster": "slower", "stronger": "weaker"}
)
# How sure the speaker of a report is of what is reported.
REPORTS = MappingProxyType(
    {
        "entailment": ("knows", "sees", "remembers"),
        "contradiction": ("dreams", "pretends", "imagines"),
        "neutral": ("hopes", "guesses", "asks whether"),
    }
)
# A cause and its effect, of one person.
RULES = (
    ("was hungry", "ate some bread"),
    ("was tired", "went to bed"),
    ("was thirsty", "drank some water"),
    ("was cold", "put on a jacket"),
    ("lost the purse", "could not pay"),
    ("missed the bus", "came late"),
    ("broke a leg", "saw a doctor"),
    ("won the race", "got a medal"),
    ("heard a joke", "began to laugh"),
    ("fell into the pond", "got wet"),
    ("forgot the umbrella", "stood in the rain"),
    ("told a lie", "felt ashamed"),
    ("studied hard", "passed the test"),
    ("saw a snake", "ran away"),
    ("planted a seed", "grew a flower"),
    ("cut an onion", "shed a tear"),
)
# What one does to another, why, and whom the reason is about: the doer or the other one.
DEEDS = (
    ("thanked", "had helped", "other"),
    ("helped", "was kind", "doer"),
    ("praised", "had won", "other"),
    ("envied", "was rich", "other"),
    ("paid", "owed money", "doer"),
    ("called", "felt lonely", "doer"),
    ("comforted", "was sad", "other"),
    ("feared", "was cruel", "other"),
    ("visited", "had time", "doer"),
    ("asked", "wanted advice", "doer"),
    ("forgave", "was sorry", "other"),
    ("avoided", "was shy", "doer"),
)
# A word, and for each of its two senses what is said of it.
SENSES = MappingProxyType(
    {
        "bank": (
            (
                "the bank of the river was muddy",
                "ducks slept on the bank",
                "we fished from the bank",
            ),
            (
                "the bank lent some money",
                "a clerk of the bank counted coins",
                "the bank was robbed",
            ),
        ),
        "bat": (
            ("the bat flew at night", "a bat hung in the cave", "the bat ate a moth"),
            ("the bat hit the ball far", "a player broke the bat", "the bat was made of wood"),
        ),
        "bark": (
            (
                "the bark of the tree was rough",
                "moss grew on the bark",
                "the bark of the oak peeled",
            ),
            ("the bark of the dog was loud", "a bark woke the cat", "the puppy gave a bark"),
        ),
        "ring": (
            ("the ring was made of gold", "a ring was on the finger", "the bride wore a ring"),
            (
                "the ring of the phone was loud",
                "we heard a ring at the door",
                "the bell gave a ring",
            ),
        ),
        "spring": (
            ("in spring the flowers bloom", "spring follows winter", "the birds return in spring"),
            ("the spring of the clock broke", "a metal spring was bent", "the sofa has a spring"),
        ),
        "nail": (
            ("the nail was hit with a hammer", "a nail held the shelf", "the nail was rusty"),
            ("the nail of the thumb was long", "she painted a nail", "he bit a nail"),
        ),
        "crane": (
            (
                "the crane lifted the steel",
                "a crane stood at the building",
                "the crane had an engine",
            ),
            ("the crane spread its wings", "a crane laid an egg", "the crane waded in the marsh"),
        ),
        "mouse": (
            ("the mouse ate the cheese", "a mouse hid from the cat", "the mouse had a tail"),
            ("the mouse of the computer failed", "a click of the mouse", "the mouse had a button"),
        ),
    }
)


@dataclasses.dataclass(frozen=True)
class Scene:
    """Some people, each with a thing of a colour and at a place; things of two lie apart."""

    names: tuple[str, ...]
    things: tuple[str, ...]
    colours: tuple[str, ...]
    places: tuple[str, ...]

    def facts(self) -> list[str]:
        """Every fact as a sentence without a full stop."""
        parts = zip(self.names, self.things, self.colours, self.places, strict=True)
        return [
            fact
            for name, thing, colour, place in parts
            for fact in (f"{name} has a {colour} {thing}", f"{name} is at the {place}")
        ]

    def text(self, draw: Draw) -> str:
        """The facts in some order."""
        return sentences(draw.shuffled(self.facts()))


def sentences(parts: list[str]) -> str:
    """The parts as sentences.

    >>> sentences(["anna was hungry", "ben ran away"])
    'anna was hungry. ben ran away.'
    """
    return " ".join(f"{part}." for part in parts)


def draw_scene(draw: Draw, people: int = 3) -> Scene:
    """A scene in which nobody shares anything with another."""
    pick = lambda words: tuple(draw.shuffled(words)[:people])  # noqa: E731
    return Scene(pick(NAMES), pick(THINGS), pick(COLOURS), pick(PLACES))


def pronoun(name: str) -> str:
    """The pronoun of a person."""
    return "she" if name in PEOPLE["she"] else "he"


def pair_of_people(draw: Draw) -> tuple[str, str]:
    """Two people whom the same pronoun can stand for."""
    return draw.two(draw.one((PEOPLE["she"], PEOPLE["he"])))


# Texts ------------------------------------------------------------------------------------------


def _scene_text(draw: Draw) -> str:
    """Facts, then questions about them with their answers, and what is true and false."""
    scene = draw_scene(draw, 2 + draw.below(2))
    first, second = draw.two(range(len(scene.names)))
    name, thing, colour = scene.names[first], scene.things[first], scene.colours[first]
    wrong = scene.colours[second]
    told = [
        f"does {name} have a {colour} {thing}? yes",
        f"does {name} have a {wrong} {thing}? no",
        f"is {name} at the {scene.places[first]}? yes",
        f"is {name} at the {scene.places[second]}? no",
        f"who has a {thing}? {name}",
        f"who is at the {scene.places[first]}? {name}",
        f"what does {name} have? a {thing}",
        f"where is {name}? at the {scene.places[first]}",
        f"it is True that {name} has a {colour} {thing}",
        f"it is False that {name} has a {wrong} {thing}",
        f"it is True that {name} is at the {scene.places[first]}",
        f"it is False that {name} is at the {scene.places[second]}",
    ]
    return scene.text(draw) + " " + sentences(draw.shuffled(told)[: 1 + draw.below(3)])


def _reason_text(draw: Draw) -> str:
    """A comparison or a containment, and what follows from it."""
    a, b, c = draw.shuffled(NAMES)[:3]
    more = draw.one(QUALITIES)
    if draw.below(2):
        told = draw.shuffled([f"{a} is {more} than {b}", f"{b} is {more} than {c}"])
        ends = [f"so {a} is {more} than {c}", f"so {c} is {OPPOSITES[more]} than {a}"]
        ends += [f"is {a} {more} than {c}? yes", f"is {c} {more} than {a}? no"]
        ends += [
            f"it is False that {c} is {more} than {a}",
            f"it is True that {a} is {more} than {c}",
        ]
    else:
        things, boxes, rooms = (draw.shuffled(w)[:2] for w in (THINGS, BOXES, ROOMS))
        told = [f"the {t} is in the {x}" for t, x in zip(things, boxes, strict=True)]
        told += [f"the {x} is in the {r}" for x, r in zip(boxes, rooms, strict=True)]
        told = draw.shuffled(told)
        ends = [f"so the {things[0]} is in the {rooms[0]}"]
        ends += [
            f"is the {things[0]} in the {rooms[0]}? yes",
            f"where is the {things[1]}? in the {rooms[1]}",
        ]
        ends += [f"is the {things[0]} in the {rooms[1]}? no"]
        ends += [f"it is False that the {things[1]} is in the {rooms[0]}"]
    return sentences(told) + " " + sentences(draw.shuffled(ends)[: 1 + draw.below(2)])


def _report_text(draw: Draw) -> str:
    """Who knows, hopes or dreams what, and what is therefore so, not so, or open."""
    scene = draw_scene(draw, 2)
    kinds = draw.shuffled(tuple(REPORTS))[:2]
    facts = [f"{n} has a {t}" for n, t in zip(scene.names, scene.things, strict=True)]
    speakers = [n for n in draw.shuffled(NAMES) if n not in scene.names]
    told, ends = [], []
    for kind, fact, speaker in zip(kinds, facts, speakers, strict=False):
        verb = draw.one(REPORTS[kind])
        told.append(f"{speaker} {verb}{'' if verb.endswith('whether') else ' that'} {fact}")
        said = {
            "entailment": f"it is True that {fact}",
            "contradiction": f"it is False that {fact}",
            "neutral": f"nobody knows whether {fact}",
        }
        ends.append(said[kind])
    return sentences(told) + " " + sentences(draw.shuffled(ends)[: 1 + draw.below(2)])


def _cause_text(draw: Draw) -> str:
    """Something that happened, and why or what came of it."""
    name, (cause, effect) = draw.one(NAMES), draw.one(RULES)
    she = pronoun(name)
    return draw.one(
        (
            f"{name} {cause}, so {she} {effect}.",
            f"{name} {effect} because {she} {cause}.",
            f"{name} {cause}. what happened then? {name} {effect}.",
            f"{name} {effect}. why? {name} {cause}.",
        )
    )


def _deed_text(draw: Draw) -> str:
    """Who did what to whom and why, with the pronoun and without it."""
    doer, other = pair_of_people(draw)
    deed, reason, about = draw.one(DEEDS)
    she, who = pronoun(doer), doer if about == "doer" else other
    return draw.one(
        (
            f"{doer} {deed} {other} because {she} {reason}. {who} {reason}.",
            f"{doer} {deed} {other} because {she} {reason}. who {reason}? {who}.",
            f"{doer} {deed} {other} because {who} {reason}.",
        )
    )


def _sense_text(draw: Draw) -> str:
    """What is said of a word in one of its senses."""
    told = draw.shuffled(draw.one(SENSES[draw.one(tuple(SENSES))]))[:2]
    if draw.below(2):
        told = [f"{draw.one(NAMES)} says that {text}" for text in told]
    return sentences(told)


def _label_text(draw: Draw) -> str:
    """The words that the tasks answer with, as words like others: they say nothing of a text."""
    words = ("entailment", "contradiction", "neutral", "not_entailment", "True", "False")
    words += ("choice1", "choice2")
    one, other = draw.two(words)
    return f"{one} is a word. {other} is a word."


# How often each kind of text comes in a hundred.
KINDS = (
    (_scene_text, 30),
    (_reason_text, 20),
    (_report_text, 15),
    (_cause_text, 10),
    (_deed_text, 12),
    (_sense_text, 8),
    (_label_text, 5),
)


def corpus(count: int, seed: int) -> Iterator[str]:
    """`count` texts of all kinds, for pre-training.

    >>> list(corpus(3, seed=1)) == list(corpus(3, seed=1))
    True
    """
    draw = Draw(seed)
    kinds = [write for write, share in KINDS for _ in range(share)]
    return (draw.one(kinds)(draw) for _ in range(count))
