"""Makes the corpus and the miniatures of SuperGLUE of a synthetic world, from a seed to files.

    python benchmarks/world/make.py --seed=0 --out=world

A folder holds `corpus.txt` and `held_out.txt`, a text a line, and `superglue/<Task>/*.jsonl`, which
`t5x prepare-superglue` takes as it takes the official release. No row stands in two splits; the
test splits have no labels, as the official ones.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import language
import miniatures

from prompt_tuning.config import ConfigError
from prompt_tuning.runtime.replace_folder import local_folder, replace_folder, writing
from prompt_tuning.world.generator import Draw

TEXTS = 60_000  # of the corpus
HELD_OUT = 500
ROWS = {"train": 1000, "val": 200, "test": 200}
_ATTEMPTS = 200  # for each row, before the world is too small for so many


def make_world(seed: int, out: str, *, texts: int = TEXTS, train_rows: int = ROWS["train"]) -> Path:
    """Writes the world of a seed to a new folder and returns its path.

    The same seed gives the same files on every machine.

    Raises:
      ConfigError: the folder is there and not empty, or so many different rows do not exist.
    """
    folder = local_folder(out, "--out")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"--out: {folder} is there and not empty: choose a new folder.")
    if seed < 0 or texts < 1 or train_rows < 1:
        raise ConfigError(
            f"--seed must be 0 or more, --texts and --rows 1 or more; found {seed}, {texts} and "
            f"{train_rows}."
        )
    with writing(f"--out {folder}"), replace_folder(folder) as new:
        _write_lines(new / "corpus.txt", language.corpus(texts, 4 * seed))
        _write_lines(new / "held_out.txt", language.corpus(HELD_OUT, 4 * seed + 1))
        sizes = {**ROWS, "train": train_rows}
        for number, task in enumerate(miniatures.TASKS):
            for split, rows in make_rows(task, 4 * (100 * seed + number) + 2, sizes).items():
                (new / "superglue" / task).mkdir(parents=True, exist_ok=True)
                lines = (json.dumps(row) for row in rows)
                _write_lines(new / "superglue" / task / f"{split}.jsonl", lines)
        about = {"seed": seed, "texts": texts, "held_out": HELD_OUT, "rows": sizes}
        (new / "world.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    return folder


def make_rows(task: str, seed: int, sizes: dict[str, int]) -> dict[str, list[dict[str, Any]]]:
    """Different rows of a task for every split, numbered in each.

    Raises:
      ConfigError: so many do not exist.
    """
    draw, seen = Draw(seed), set()
    splits: dict[str, list[dict[str, Any]]] = {}
    for split, size in sizes.items():
        rows = splits[split] = []
        for number in range(size):
            for _ in range(_ATTEMPTS):
                row = miniatures.TASKS[task](draw, number)
                if (key := _content(row)) not in seen:
                    break
            else:
                raise ConfigError(
                    f"--rows: there are no {sum(sizes.values())} different rows of {task}, about "
                    f"{len(seen)} at most. Ask for fewer."
                )
            seen.add(key)
            rows.append({**(_unlabelled(row) if split == "test" else row), "idx": number})
    return splits


def _content(row: dict[str, Any]) -> str:
    """What makes rows the same to a reader."""
    plain = {key: value for key, value in row.items() if key not in ("label", "passage", "qas")}
    passage = row.get("passage")
    plain["passage"] = passage["text"] if isinstance(passage, dict) else passage
    return json.dumps(plain, sort_keys=True)


def _unlabelled(row: dict[str, Any]) -> dict[str, Any]:
    """The row as the official test files have it."""
    row = copy.deepcopy({key: value for key, value in row.items() if key != "label"})
    for query in row.get("qas", ()):
        del query["answers"]
    passage = row.get("passage")
    for question in passage.get("questions", ()) if isinstance(passage, dict) else ():
        for answer in question["answers"]:
            del answer["label"]
    return row


def _write_lines(path: Path, lines: Any) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(f"{line}\n" for line in lines)


def main() -> None:
    """Makes the world that the flags describe."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, required=True, help="the same one: the same files")
    parser.add_argument("--out", required=True, help="a new folder to write")
    parser.add_argument("--texts", type=int, default=TEXTS, help=f"of the corpus ({TEXTS})")
    parser.add_argument("--rows", type=int, default=ROWS["train"], help="of each training split")
    args = parser.parse_args()
    try:
        folder = make_world(args.seed, args.out, texts=args.texts, train_rows=args.rows)
    except ConfigError as error:
        parser.error(str(error))
    print(
        f"{folder}: corpus.txt ({args.texts} texts), held_out.txt, and the miniatures in "
        f"superglue/. Next: t5x prepare-superglue --jsonl_dir={folder}/superglue "
        f"--tfds_data_dir={folder}/tfds"
    )


if __name__ == "__main__":
    main()
