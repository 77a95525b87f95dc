"""Kills training runs with `kill -9`, starts them again, and compares their ends bit for bit.

    python tests/kill_runs.py --kills=100 --jobs=2

Runs of 60 steps with dropout 0.1, on a mixture in length groups, on four forced CPU devices, are
killed two to four times: at start-up, inside a save, inside an evaluation, and anywhere. What an
uninterrupted run leaves (prompts, state, records, predictions) has to be there to the last bit.
Prints where the kills hit, and at the end `N kills, D differences`; the exit code is 1 if anything
differs.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
START = 9  # the backbone's step
STEPS = 60
EVAL_PERIOD = 6
DEVICES = "--xla_force_host_platform_device_count=4"
CACHE = "compiled"  # in the folder of the work
KILLS_PER_RUN = 4
MOMENTS = ("start-up", "save", "evaluation", "anywhere")


def make_work(folder: Path, **changes: object) -> None:
    """A backbone and the settings of a run that saves every third step."""
    from tiny_models import CONFIG, random_params

    from prompt_tuning.checkpoints.t5x import write_t5x
    from prompt_tuning.config import to_dict

    write_t5x(folder / f"checkpoint_{START}", random_params(), START)
    macros = {
        **{name.upper(): value for name, value in to_dict(CONFIG).items()},
        "DROPOUT_RATE": 0.1,
        "VOCABULARY": "bytes",
        "MIXTURE_OR_TASK_NAME": "all_as",
        "MIXTURE_OR_TASK_MODULE": "user_tasks",
        "TASK_FEATURE_LENGTHS": {"inputs": 96, "targets": 5},
        "BATCH_SIZE": 8,
        "LENGTH_GROUPS": 2,
        "MICROBATCHES": 2,  # always in two groups: fewer programs to compile
        "NUM_MODEL_PARTITIONS": 2,
        "PROMPT_LENGTH": 4,
        "EVAL_PERIOD": EVAL_PERIOD,
        "CHECKPOINT_PERIOD": 3,
        "TRAIN_STEPS_RELATIVE": STEPS,
        "INITIAL_CHECKPOINT_PATH": f"checkpoint_{START}",
        **changes,
    }
    text = "".join(f"{name} = {value!r}\n" for name, value in macros.items())
    (folder / "small.gin").write_text(text)


def start(work: Path, model_dir: str, *flags: str) -> subprocess.Popen[str]:
    """The training command, under way."""
    files = ["--gin_file=runs/prompt_tune.gin", "--gin_file=small.gin"]
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "prompt_tuning.cli", "train"),
            *(*files, f"--gin.MODEL_DIR={model_dir!r}", f"--compilation_cache={CACHE}", *flags),
        ],
        cwd=work,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)]),
            "XLA_FLAGS": DEVICES,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(work: Path, model_dir: str, *flags: str) -> str:
    """Runs the command to its end and returns what it said."""
    process = start(work, model_dir, *flags)
    said, _ = process.communicate(timeout=900)
    if process.returncode != 0:
        raise SystemExit(f"{model_dir}: exit code {process.returncode}\n{said}")
    return said


def describe_end(folder: Path) -> dict[str, object]:
    """All that a run leaves, by name, but times, curves and the name of its folder."""
    patterns = ("prompts/*/*", "metrics.jsonl", "inference_eval/*.jsonl")
    files = sorted(p for pattern in patterns for p in folder.glob(pattern))
    end: dict[str, object] = {str(p.relative_to(folder)): p.read_bytes() for p in files}
    state = json.loads((folder / "checkpoints" / str(START + STEPS) / "meta/metadata").read_text())
    return {**end, "arrays": state["arrays"], "standing": state["meta"]["standing"]}


def saved_steps(folder: Path) -> list[int]:
    """The steps of the states that are complete."""
    return sorted(int(p.name) for p in (folder / "checkpoints").glob("*") if p.name.isdigit())


def is_saving(folder: Path) -> bool:
    """Whether a state or a prompt is half written."""
    half = folder.glob("checkpoints/*.orbax-checkpoint-tmp*"), folder.glob("prompts/.*.tmp")
    return any(True for found in half for _ in found)


def last_record(folder: Path) -> int:
    """The step of the last line of metrics.jsonl."""
    try:
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        return int(json.loads(lines[-1])["step"])
    except (OSError, IndexError, ValueError):
        return -1


def wait(process: subprocess.Popen[str], moment: Callable[[], bool], draw: random.Random) -> None:
    """Returns a random while after `moment` has come, or when the process has ended."""
    while process.poll() is None and not moment():
        time.sleep(0.002)
    time.sleep(draw.choice((0.0, draw.uniform(0, 0.02), draw.uniform(0, 0.3))))


def kill_once(work: Path, name: str, draw: random.Random, seconds: tuple[float, float]) -> str:
    """Starts the command and kills it; says where it was, or "finished" if it was too late."""
    folder, (starting, whole) = work / name, seconds
    aim = draw.choice(MOMENTS)
    before = last_record(folder)
    process = start(work, name)
    if aim == "start-up":
        time.sleep(draw.uniform(0.0, starting))
    elif aim == "anywhere":
        time.sleep(draw.uniform(0.0, whole))
    else:
        skipped = draw.randrange(6)  # not always the first one after a start
        for _ in range(skipped):
            wait(process, lambda: is_saving(folder), random.Random(0))
        evaluates = lambda: (last_record(folder) - START) % EVAL_PERIOD == 0  # noqa: E731
        wait(
            process,
            lambda: (
                is_saving(folder) if aim == "save" else last_record(folder) > before and evaluates()
            ),
            draw,
        )
    process.kill()
    process.communicate()
    if process.returncode == 0:
        return "finished"
    if is_saving(folder):
        return "inside a save"
    if last_record(folder) > max(saved_steps(folder), default=0):
        return "inside an evaluation"
    return "at start-up" if aim == "start-up" else "between"


def one_run(
    work: Path, number: int, seed: int, straight: dict[str, object], seconds: tuple[float, float]
) -> tuple[list[str], list[str]]:
    """Where a run was killed, and the names of what differs in the end."""
    draw = random.Random(f"{seed} {number}")
    name = f"run_{number}"
    places = [kill_once(work, name, draw, seconds) for _ in range(draw.randint(2, KILLS_PER_RUN))]
    finish(work, name)
    end = describe_end(work / name)
    names = sorted(straight.keys() | end.keys())
    return places, [n for n in names if straight.get(n) != end.get(n)]


def runs(
    work: Path, kills: int, jobs: int, seed: int
) -> Iterator[tuple[int, list[str], list[str]]]:
    """The results of runs until there were `kills` kills."""
    finish(work, "straight")  # fills the cache of compiled programs
    began = time.monotonic()
    finish(work, "again")
    whole = time.monotonic() - began
    straight = describe_end(work / "straight")
    assert describe_end(work / "again") == straight, "two uninterrupted runs differ"
    done, number, seconds = 0, 0, (0.7 * whole, whole)
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        while done < kills:
            numbers = range(number, number := number + jobs)
            tasks = [pool.submit(one_run, work, n, seed, straight, seconds) for n in numbers]
            for n, task in zip(numbers, tasks, strict=True):
                places, differing = task.result()
                done += sum(place != "finished" for place in places)
                yield n, places, differing


def main() -> int:
    """Prints a line for each run and the counts of all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--jobs", type=int, default=2, help="runs at once")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    counts: collections.Counter[str] = collections.Counter()
    differing_runs, total = 0, 0
    with tempfile.TemporaryDirectory(prefix="kill-runs-") as folder:
        work = Path(folder)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(work / "cache")
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        make_work(work)
        for number, places, differing in runs(work, args.kills, args.jobs, args.seed):
            counts.update(places)
            total += 1
            differing_runs += bool(differing)
            said = f"DIFFERS in {', '.join(differing)}" if differing else "same bits"
            print(f"run {number}: killed {', '.join(places)}: {said}", flush=True)
    late = counts.pop("finished", 0)
    where = ", ".join(f"{place} {count}" for place, count in sorted(counts.items()))
    print(f"{total} runs; killed {where}; {late} more came after the end of a run")
    print(f"{counts.total()} kills, {differing_runs} differences")
    return 1 if differing_runs else 0


if __name__ == "__main__":
    sys.path[:0] = [str(HERE), str(HERE.parent)]
    sys.exit(main())
