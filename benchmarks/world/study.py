"""Zero-shot, prompts and model tuning on SuperGLUE in miniature, before and after LM adaptation.

For the backbones of README.md, in the folder in which its commands were run:
  python benchmarks/world/study.py --sizes 200k 1m --out study.jsonl
A line of `--out` is a run; one that is there is not run again, so a study can be stopped at will.
`--report` prints the table of what is there, means of the seeds with 95 % intervals, and draws it;
`--curves` draws the held-out losses of the backbones' own training.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np

STAGES = {"span corruption": "{size}", "LM-adapted": "{size}_lm"}
METHODS = {
    "prompt tuning": ("runs/prompt_tune.gin",),
    "shared prompt": ("runs/prompt_tune.gin", "methods/shared_prompt.gin"),
    "model tuning": ("runs/model_tune.gin",),
}
T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}


def checkpoint(runs: Path, size: str, stage: str) -> Path:
    """The newest checkpoint of a backbone."""
    folder = runs / STAGES[stage].format(size=size)
    found = [p for p in folder.glob("checkpoint_*") if p.is_dir()]
    if not found:
        raise SystemExit(f"there is no checkpoint in {folder}: see benchmarks/world/README.md")
    return max(found, key=lambda path: int(path.name.split("_")[1]))


def run(args: argparse.Namespace, key: dict) -> list[dict]:
    """The records of one run: its best and last score, and that of the model before it."""
    from prompt_tuning.config import gin_reader
    from prompt_tuning.evaluation.records import read_records
    from prompt_tuning.training import loop
    from prompt_tuning.training.tasks import Tasks

    folder = Path(tempfile.mkdtemp(prefix="world-study-"))
    tunes_model = key["method"] == "model tuning"
    steps = args.model_steps if tunes_model else args.steps
    bindings = {
        "MODEL_DIR": str(folder / "run"),
        "INITIAL_CHECKPOINT_PATH": str(checkpoint(args.runs, key["size"], key["stage"])),
        "VOCABULARY": str(args.world / "pieces.model"),
        "TFDS_DATA_DIR": str(args.world / "tfds"),
        "TASK_FEATURE_LENGTHS": {"inputs": 80, "targets": 8},
        "TRAIN_STEPS_RELATIVE": steps,
        "EVAL_PERIOD": max(1, steps // 2),
        "EVAL_METHOD": "rank",
        "BATCH_SIZE": 32,
        "PROMPT_LENGTH": 0 if tunes_model else 20,
        "DROPOUT_RATE": 0.0,
        "WARMUP_STEPS": 0,
        "LEARNING_RATE": args.model_rate if tunes_model else args.rate,
        "RANDOM_SEED": key["seed"],
    }
    files = [f"world_{key['size']}.gin", f"superglue/{key['task']}.gin"]
    loaded = gin_reader.load(
        [*files, *METHODS[key["method"]]],
        [f"{k} = {v!r}" for k, v in bindings.items()],
        [str(Path(__file__).parent)],
    )
    began = time.monotonic()
    loop.train(loaded.run, Tasks)
    seconds = time.monotonic() - began
    records = [
        r for r in read_records(folder / "run" / "metrics.jsonl") if r["name"] == "accuracy/rank"
    ]
    own = [r["value"] for r in records if "prompt" not in r]
    (before,) = (r["value"] for r in records if r.get("prompt") == "none")
    shutil.rmtree(folder)
    common = {**key, "steps": steps, "seconds": round(seconds, 1)}
    return [
        {**common, "best": max(own), "last": own[-1]},
        {**common, "method": "zero-shot", "best": before, "last": before, "steps": 0},
    ]


def study(args: argparse.Namespace) -> None:
    """Every run that is not in the file yet."""
    names = ("size", "stage", "task", "method", "seed")
    for values in itertools.product(
        args.sizes, args.stages, args.tasks, args.methods, range(args.seeds)
    ):
        key = dict(zip(names, values, strict=True))
        if any(all(r[k] == v for k, v in key.items()) for r in read(args.out)):
            continue
        print(key, flush=True)
        records = run(args, key)
        with args.out.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)


def read(path: Path) -> list[dict]:
    """The records of the file, each once."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    unique = {}
    for record in map(json.loads, lines):
        names = ("size", "stage", "task", "method", "seed")
        unique[tuple(record[name] for name in names)] = record
    return list(unique.values())


def interval(values: list[float]) -> str:
    """Mean and half of the 95 % interval (Student's t) of the seeds."""
    if len(values) < 2 or len(values) not in T_95:
        return f"{np.mean(values):.1f}"
    half = T_95[len(values)] * np.std(values, ddof=1) / np.sqrt(len(values))
    return f"{np.mean(values):.1f} ± {half:.1f}"


def report_table(args: argparse.Namespace) -> None:
    """Prints the table and draws `<out>.png`."""
    groups: dict[tuple, list[float]] = {}
    for r in read(args.out):
        groups.setdefault((r["size"], r["stage"], r["task"], r["method"]), []).append(r["last"])
    tasks = sorted({key[2] for key in groups})
    print("| size | stage | method | seeds | " + " | ".join(tasks) + " |")
    print("|---" * (4 + len(tasks)) + "|")
    rows = dict.fromkeys((key[0], key[1], key[3]) for key in groups)
    for size, stage, method in rows:
        cells = [groups.get((size, stage, task, method), []) for task in tasks]
        counts = "/".join(str(len(values)) for values in cells)
        shown = [interval(values) if values else "not run" for values in cells]
        print(f"| {size} | {stage} | {method} | {counts} | " + " | ".join(shown) + " |")
    draw(args.out.with_suffix(".png"), groups, tasks)


def draw(path: Path, groups: dict[tuple, list[float]], tasks: list[str]) -> None:
    """A panel a task: accuracy of each run, by method and stage."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(tasks), 4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(tasks), squeeze=False, sharey=True)[0]
    columns = list(dict.fromkeys((key[0], key[3]) for key in groups))
    for axes, task in zip(panels, tasks, strict=True):
        for shift, (stage, colour) in zip(
            (-0.12, 0.12), zip(STAGES, ("#cb3c33", "#4063d8"), strict=True), strict=True
        ):
            for x, (size, method) in enumerate(columns):
                values = groups.get((size, stage, task, method), [])
                axes.plot([x + shift] * len(values), values, "o", ms=4, alpha=0.7, color=colour)
        axes.set(title=task)
        axes.set_xticks(range(len(columns)), [f"{m}\n{s}" for s, m in columns], fontsize=7)
        axes.grid(alpha=0.3, axis="y")
    panels[0].set_ylabel("accuracy (%); red: before LM adaptation")
    figure.savefig(path, dpi=130)
    print(path)


def draw_curves(args: argparse.Namespace) -> None:
    """Draws the held-out cross entropy of every backbone, a panel a stage, beside `--out`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from prompt_tuning.evaluation.records import read_points

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(STAGES))
    for axes, (stage, folder) in zip(panels, STAGES.items(), strict=True):
        for size in args.sizes:
            points = read_points(args.runs / folder.format(size=size), "cross_entropy/held_out")
            axes.plot(*zip(*points, strict=True), "o-", ms=3, label=size)
        axes.set(title=stage, xlabel="step", ylabel="held-out cross entropy (nats a token)")
        axes.set_yscale("log")
        axes.grid(alpha=0.3, which="both")
        axes.legend()
    path = args.out.with_name("curves.png")
    figure.savefig(path, dpi=110)
    print(path)


def main() -> None:
    """Runs what is missing, or reports what is there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--world", type=Path, default=Path("world"))
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--out", type=Path, default=Path("study.jsonl"))
    parser.add_argument("--sizes", nargs="+", default=["200k", "1m", "3m", "10m"])
    parser.add_argument("--tasks", nargs="+", default=["copa", "wic", "cb"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=STAGES)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=300, help="of a prompt")
    parser.add_argument("--model_steps", type=int, default=200, help="of model tuning")
    parser.add_argument("--rate", type=float, default=0.1, help="learning rate of a prompt")
    parser.add_argument("--model_rate", type=float, default=0.01, help="of model tuning")
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--curves", action="store_true")
    args = parser.parse_args()
    actions = {args.report: report_table, args.curves: draw_curves}
    actions.get(True, study)(args)


if __name__ == "__main__":
    main()
