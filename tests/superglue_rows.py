"""A few rows in SuperGLUE's official JSONL form, so that the data tests need no download."""

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


def labelled(folder: str) -> list[dict]:
    rows = zip(ROWS[folder], LABELS[folder], strict=True)
    return [{**row, "label": label} for row, label in rows]


def write_jsonl(directory: Path) -> Path:
    """Train and validation of all three tasks, and a test split without labels for CB."""
    for folder in ROWS:
        write_rows(directory / folder / "train.jsonl", labelled(folder))
        write_rows(directory / folder / "val.jsonl", labelled(folder)[:2])
    write_rows(directory / "CB" / "test.jsonl", ROWS["CB"][:3])
    return directory


def write_rows(path: Path, rows: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
