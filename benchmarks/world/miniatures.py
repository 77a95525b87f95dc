"""Miniatures of SuperGLUE's tasks over new scenes of `language.py`, in the official JSONL shapes.

Every row can be answered by whoever has read it and knows the language, classes are balanced, and
where the answer is to be inferred the words of a row say nothing about it: the wrong statements are
made of the words of the right ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import language

from prompt_tuning.world.generator import Draw

Row = dict[str, Any]


def boolq(draw: Draw, number: int) -> Row:
    """Is it so? A wrong question takes the colour or the place of somebody else in the passage."""
    scene, label = language.draw_scene(draw), number % 2 == 0
    one, other = draw.two(range(len(scene.names)))
    told = one if label else other
    name = scene.names[one]
    question = draw.one(
        (
            f"does {name} have a {scene.colours[told]} {scene.things[one]}",
            f"is {name} at the {scene.places[told]}",
            f"does {name} have the {scene.things[told]}",
        )
    )
    return {"question": question, "passage": scene.text(draw), "label": label}


def cb(draw: Draw, number: int) -> Row:
    """Three reports of three degrees of certainty; the hypothesis is one of what they report."""
    kinds = tuple(language.REPORTS)
    scene, label = language.draw_scene(draw), kinds[number % 3]
    facts = [f"{n} has a {t}" for n, t in zip(scene.names, scene.things, strict=True)]
    speakers = [n for n in draw.shuffled(language.NAMES) if n not in scene.names]
    reports, asked = [], ""
    for kind, fact, speaker in zip(draw.shuffled(kinds), facts, speakers, strict=False):
        verb = draw.one(language.REPORTS[kind])
        reports.append(f"{speaker} {verb}{'' if verb.endswith('whether') else ' that'} {fact}")
        asked = fact if kind == label else asked
    premise = language.sentences(draw.shuffled(reports))
    return {"premise": premise, "hypothesis": asked, "label": label}


def copa(draw: Draw, number: int) -> Row:
    """Which is the cause, which the effect? The other choice belongs to another event."""
    one, other = draw.two(language.RULES)
    name, question = draw.one(language.NAMES), draw.one(("cause", "effect"))
    given, wanted = (1, 0) if question == "cause" else (0, 1)
    choices = [f"{name} {one[wanted]}.", f"{name} {other[wanted]}."]
    label = number % 2
    first, second = choices if label == 0 else reversed(choices)
    premise = f"{name} {one[given]}."
    return {
        "premise": premise,
        "choice1": first,
        "choice2": second,
        "question": question,
        "label": label,
    }


def multirc(draw: Draw, number: int) -> Row:
    """Who has what, who is where: of several answers none, one or more are right."""
    scene = language.draw_scene(draw)
    parts = [f"{n} is at the {p}" for n, p in zip(scene.names, scene.places, strict=True)]
    owners = [draw.one(scene.names[:2]) for _ in scene.things]  # so that half are right
    parts += [f"{owner} has a {thing}" for owner, thing in zip(owners, scene.things, strict=True)]
    questions = []
    for place in range(2):
        name = scene.names[place]
        questions.append(
            {
                "idx": 2 * number + place,
                "question": f"what does {name} have?",
                "answers": [
                    {
                        "text": f"a {thing}",
                        "idx": 6 * number + 3 * place + i,
                        "label": int(o == name),
                    }
                    for i, (thing, o) in enumerate(zip(scene.things, owners, strict=True))
                ],
            }
        )
    return {
        "version": 1.1,
        "passage": {"text": language.sentences(draw.shuffled(parts)), "questions": questions},
    }


def record(draw: Draw, number: int) -> Row:
    """A statement with a name left out, which is to be found in the passage."""
    scene = language.draw_scene(draw)
    text = scene.text(draw)
    which = draw.below(len(scene.names))
    name, thing, place = scene.names[which], scene.things[which], scene.places[which]
    query = draw.one((f"@placeholder has the {thing}.", f"the one at the {place} is @placeholder."))
    entities = [_find(text, person) for person in scene.names]
    start, end = entities[which]
    return {
        "source": "world",
        "passage": {
            "text": text,
            "entities": [{"start": s, "end": e} for s, e in sorted(entities)],
        },
        "qas": [
            {
                "idx": number,
                "query": query,
                "answers": [{"start": start, "end": end, "text": name}],
            }
        ],
    }


def _find(text: str, name: str) -> tuple[int, int]:
    """Where a name stands first, as ReCoRD counts: the last character belongs to it."""
    start = f" {text}".index(f" {name} ")
    return start, start + len(name) - 1


def rte(draw: Draw, number: int) -> Row:
    """Does it follow? In two steps, over comparisons or over what lies in what."""
    entails = number % 2 == 0
    if draw.below(2):
        a, b, c = draw.shuffled(language.NAMES)[:3]
        more = draw.one(language.QUALITIES)
        told = [f"{a} is {more} than {b}", f"{b} is {more} than {c}"]
        one, other = (a, c) if entails else (c, a)
        asked = f"{one} is {more} than {other}."
    else:
        words = (language.THINGS, language.BOXES, language.ROOMS)
        things, boxes, rooms = (draw.shuffled(w)[:2] for w in words)
        told = [f"the {t} is in the {x}" for t, x in zip(things, boxes, strict=True)]
        told += [f"the {x} is in the {r}" for x, r in zip(boxes, rooms, strict=True)]
        asked = f"the {things[0]} is in the {rooms[0 if entails else 1]}."
    label = "entailment" if entails else "not_entailment"
    premise = language.sentences(draw.shuffled(told))
    return {"premise": premise, "hypothesis": asked, "label": label}


def wic(draw: Draw, number: int) -> Row:
    """Has the word the same sense in both sentences?"""
    same, word = number % 2 == 0, draw.one(tuple(language.SENSES))
    senses = draw.shuffled(language.SENSES[word])
    said = draw.two(senses[0]) if same else (draw.one(senses[0]), draw.one(senses[1]))
    first, second = (
        f"{name} says that {text}"
        for name, text in zip(draw.two(language.NAMES), said, strict=True)
    )
    row: Row = {"word": word, "sentence1": f"{first}.", "sentence2": f"{second}.", "label": same}
    for place, sentence in ((1, first), (2, second)):
        start = f" {sentence} ".index(f" {word} ")
        row |= {f"start{place}": start, f"end{place}": start + len(word)}
    return row | {"version": 1.1}


def wsc(draw: Draw, number: int) -> Row:
    """Whom does the pronoun stand for? The reason says it, not the order of the names."""
    label = number % 2 == 0
    doer, other = language.pair_of_people(draw)
    deed, reason, about = draw.one(language.DEEDS)
    she = language.pronoun(doer)
    right, wrong = (doer, other) if about == "doer" else (other, doer)
    name = right if label else wrong
    target = {
        "span1_text": name,
        "span1_index": 0 if name == doer else 2,
        "span2_text": she,
        "span2_index": 4,
    }
    text = f"{doer} {deed} {other} because {she} {reason}."
    return {"text": text, "target": target, "label": label}


# By the folders of the official release.
TASKS: Mapping[str, Callable[[Draw, int], Row]] = MappingProxyType(
    {
        "BoolQ": boolq,
        "CB": cb,
        "COPA": copa,
        "MultiRC": multirc,
        "ReCoRD": record,
        "RTE": rte,
        "WiC": wic,
        "WSC": wsc,
    }
)
