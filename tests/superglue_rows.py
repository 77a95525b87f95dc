"""A few rows in SuperGLUE's official JSONL form, so that the data tests need no download.

They have what the release has: a text as AX-b's `idx`, fields that nobody reads (`version`, a
diagnostic's category), and most test files end without a line feed.
"""

import json
from pathlib import Path

ROWS = {
    "BoolQ": [
        {"question": "is tea a drink", "passage": "Tea -- Tea is a hot drink.", "idx": 0},
        {"question": "is fog solid", "passage": "Fog -- Fog is a cloud: it is wet.", "idx": 1},
        {"question": "do naïve cats fly", "passage": "Cat -- Cats  walk.\n", "idx": 2},
    ],
    "CB": [
        {"premise": "It rains. I think it will stop.", "hypothesis": "it will stop", "idx": 0},
        {"premise": "She denied that he lied.", "hypothesis": "he lied", "idx": 1},
        {"premise": "If he comes, they will sing.", "hypothesis": "they will sing", "idx": 2},
        {"premise": "I know that the shop is shut.", "hypothesis": "the shop is shut", "idx": 3},
        {"premise": "I know that the door is shut.", "hypothesis": "the door is shut", "idx": 4},
    ],
    "RTE": [
        {"premise": "Oslo is in Norway.", "hypothesis": "Norway has Oslo.", "idx": 0},
        {"premise": "Rome is old.", "hypothesis": "Rome is new.", "idx": 1},
    ],
}
LABELS = {
    "BoolQ": [True, False, False],
    "CB": ["entailment", "contradiction", "neutral", "entailment", "entailment"],
    "RTE": ["entailment", "not_entailment"],
}
# The tasks whose rows are odd, nested or a single file, labelled.
OTHERS = {
    "COPA": [
        {
            "premise": "The glass fell.",
            "choice1": "It broke.",
            "choice2": "It sang.",
            "question": "effect",
            "label": 0,
            "idx": 0,
        },
        {
            "premise": "Ann smiled.",
            "choice1": "",
            "choice2": "She won.",
            "question": "cause",
            "label": 1,
            "idx": 1,
        },
    ],
    "WiC": [
        {
            "word": "bank",
            "sentence1": "The bank of a river.",
            "sentence2": "A bank for money.",
            "start1": 4,
            "end1": 8,
            "start2": 2,
            "end2": 6,
            "label": False,
            "idx": 0,
            "version": 1.1,
        },
    ],
    "MultiRC": [
        {
            "idx": 3,
            "version": 1.1,
            "passage": {
                "text": "<b>Sent 1: </b>Eva sang.<br><b>Sent 2: </b>Zoë danced &amp; left.<br>",
                "questions": [
                    {
                        "idx": 7,
                        "question": "Who <b>sang</b>?",
                        "answers": [
                            {"text": "Eva", "idx": 20, "label": 1},
                            {"text": "", "idx": 21, "label": 0},
                        ],
                    },
                    {
                        "idx": 8,
                        "question": "Who left?",
                        "answers": [{"text": "Zoë", "idx": 22, "label": 1}],
                    },
                ],
            },
        },
    ],
    "ReCoRD": [
        {
            "source": "nowhere",
            "idx": 5,
            "passage": {
                "text": 'Bo met Łucja.\n@highlight\nBo left\n@highlight\n@highlight\nHe said "no"\n'
                "@highlight\nWhy?",
                "entities": [
                    {"start": 7, "end": 11},
                    {"start": 0, "end": 1},
                    {"start": 25, "end": 26},
                ],
            },
            "qas": [
                {
                    "query": "Then @placeholder left.",
                    "idx": 9,
                    "answers": [
                        {"start": 0, "end": 1, "text": "Bo"},
                        {"start": 7, "end": 11, "text": "Łucja"},
                    ],
                },
                {
                    "query": "@placeholder said no.",
                    "idx": 10,
                    "answers": [{"start": 25, "end": 26, "text": "Bo"}],
                },
            ],
        },
    ],
    "WSC": [
        {
            "text": "Tom thanked Bob because he had helped him.",
            "target": {
                "span1_text": "Tom",
                "span1_index": 0,
                "span2_text": "he",
                "span2_index": 4,
            },
            "label": False,
            "idx": 0,
        },
        {
            "text": "Tom thanked Bob. Of this he spoke, and Émile praised him, too. ",
            "target": {
                "span1_text": "bob",
                "span1_index": 2,
                "span2_text": "him",
                "span2_index": 10,
            },
            "label": True,
            "idx": 1,
        },
    ],
    "AX-b": [
        {
            "idx": "0",
            "label": "entailment",
            "sentence1": "It is hot.",
            "sentence2": "It is warm.",
            "lexical-semantics": "Lexical entailment",
        },
        {
            "idx": "1",
            "label": "not_entailment",
            "sentence1": "It is hot.",
            "sentence2": "It is not hot.",
            "logic": "Negation",
        },
    ],
    "AX-g": [
        {
            "premise": "The nurse met a man because she was asked.",
            "hypothesis": "The nurse was asked.",
            "label": "not_entailment",
            "idx": 0,
            "pair_id": 3,
        },
        {
            "premise": "The nurse met a man because he was asked.",
            "hypothesis": "The nurse was asked.",
            "label": "not_entailment",
            "idx": 1,
            "pair_id": 5,
        },
    ],
}


def labelled(folder: str) -> list[dict]:
    if folder in OTHERS:
        return OTHERS[folder]
    rows = zip(ROWS[folder], LABELS[folder], strict=True)
    return [{**row, "label": label} for row, label in rows]


def write_jsonl(directory: Path) -> Path:
    """Train and validation of three plain tasks, and a test split without labels for CB."""
    for folder in ROWS:
        write_rows(directory / folder / "train.jsonl", labelled(folder))
        write_rows(directory / folder / "val.jsonl", labelled(folder)[:2])
    write_rows(directory / "CB" / "test.jsonl", ROWS["CB"][:3])
    return directory


def write_all(directory: Path) -> Path:
    """Every task of the release: train and validation, and test splits of the nested ones."""
    for folder, rows in OTHERS.items():
        if folder.startswith("AX-"):
            write_rows(directory / folder / f"{folder}.jsonl", rows)
            continue
        write_rows(directory / folder / "train.jsonl", rows)
        write_rows(directory / folder / "val.jsonl", rows)
    for folder in ("MultiRC", "ReCoRD", "WSC"):
        write_rows(directory / folder / "test.jsonl", unlabelled(OTHERS[folder]))
    return write_jsonl(directory)


def unlabelled(value):
    """The rows without labels and answers, as the official test files have them."""
    if isinstance(value, list):
        return [unlabelled(item) for item in value]
    if isinstance(value, dict):
        hidden = {"label"} | ({"answers"} if "query" in value else set())
        return {key: unlabelled(item) for key, item in value.items() if key not in hidden}
    return value


def write_rows(path: Path, rows: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    last = "" if path.stem in ("test", "AX-g") else "\n"
    path.write_text("\n".join(map(json.dumps, rows)) + last)
