"""One measurement of a start: `t5x train` from the command to its first step, and what is in it.

The backbone is a random one in T5X's format, made once; programs are compiled by the first command
and found compiled by the second. Baselines are off: they are evaluations before the first step.
"""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from workload import Workload, main

from prompt_tuning.api import model_config

SECONDS = 900.0  # a start that takes longer has failed


def run(workload: Workload) -> dict[str, Any]:
    """The seconds of a cold and of a warm start, and of restoring the backbone alone."""
    places = Path(tempfile.gettempdir()) / "prompt_tuning_benchmark"
    checkpoint = places / workload.size / "checkpoint_1100000"
    if not checkpoint.exists():
        _call([sys.executable, __file__, "make", workload.size, str(checkpoint)])
    restored = json.loads(
        _call([sys.executable, __file__, "restore", workload.size, str(checkpoint)])
    )
    with tempfile.TemporaryDirectory(dir=places) as folder:
        rows = Path(folder) / "rows.jsonl"
        words = " ".join(["word"] * (workload.inputs // 2))
        row = '{"text": "%s %d", "label": "%s"}\n'  # no two alike: a tenth of the texts is held out
        rows.write_text("".join(row % (words, n, ("no", "yes")[n % 2]) for n in range(2000)))
        cold, warm = (first_step(workload, checkpoint, Path(folder), n) for n in range(2))
    return {
        **dataclasses.asdict(workload),
        **restored,
        "cold_start_seconds": cold["wall"],
        "warm_start_seconds": warm["wall"],
        "warm_start_cpu_seconds": warm["cpu"],
        "peak_memory_bytes": warm["peak"],
    }


def first_step(workload: Workload, checkpoint: Path, folder: Path, number: int) -> dict[str, float]:
    """Seconds from the command to the record of its first step."""
    model_dir = folder / f"run_{number}"
    settings = {
        "MODEL_DIR": str(model_dir),
        "INITIAL_CHECKPOINT_PATH": str(checkpoint),
        "VOCABULARY": "tiny",
        "TRAIN_FILE": str(folder / "rows.jsonl"),
        "MIXTURE_OR_TASK_NAME": "benchmark_rows",
        "CLASS_LABELS": ("yes", "no"),
        "TASK_FEATURE_LENGTHS": {"inputs": workload.inputs, "targets": workload.targets},
        "BATCH_SIZE": workload.rows,
        "PROMPT_LENGTH": workload.prompt,
        "EVAL_BASELINES": False,
        "EVALUATOR_NUM_EXAMPLES": 8,
        "EVAL_PERIOD": 1,
        "TRAIN_STEPS_RELATIVE": 1,
    }
    command = [
        *(sys.executable, "-m", "prompt_tuning.cli", "train"),
        f"--gin_file=models/t5_1_1_{workload.size}.gin",
        "--gin_file=runs/prompt_tune.gin",
        *(f"--gin.{name}={value!r}" for name, value in settings.items()),
        f"--compilation_cache={folder / 'cache'}",
    ]
    with (folder / f"log_{number}").open("w") as log:
        begin = time.perf_counter()
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            while not _has_records(model_dir / "metrics.jsonl"):
                if process.poll() is not None or time.perf_counter() - begin > SECONDS:
                    raise SystemExit(f"no first step:\n{Path(log.name).read_text()[-2000:]}")
                time.sleep(0.01)
            wall = time.perf_counter() - begin
            cpu = _cpu_seconds(process.pid)
        finally:
            if process.returncode is None and number:
                os.kill(process.pid, signal.SIGTERM)  # a cold one goes on: evaluation compiles too
        _, _, used = os.wait4(process.pid, 0)
    return {"wall": wall, "cpu": cpu, "peak": used.ru_maxrss * 1024.0}


def _has_records(path: Path) -> bool:
    return path.exists() and "train" in path.read_text()


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _call(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return done.stdout.splitlines()[-1] if done.stdout else ""


def make(size: str, path: str) -> None:
    """Writes a random backbone."""
    import jax

    from prompt_tuning.checkpoints.t5x import write_t5x
    from prompt_tuning.model import t5

    config = model_config(size)  # type: ignore[arg-type]
    write_t5x(path, jax.jit(lambda key: t5.init_params(config, key))(jax.random.key(0)), 1_100_000)


def restore(size: str, path: str) -> None:
    """Reads it, and prints how long that took and what memory it needed beside the weights."""
    import jax

    from prompt_tuning.checkpoints.t5x import read_t5x
    from prompt_tuning.model import t5

    shapes = t5.param_shapes(model_config(size))  # type: ignore[arg-type]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
    begin = time.perf_counter()
    params, _ = read_t5x(path, shapes)
    jax.block_until_ready(params)
    taken = time.perf_counter() - begin
    weights = sum(value.nbytes for value in params.values())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0 - before
    found = {"restore_seconds": taken, "restore_beside_bytes": peak - weights}
    print(json.dumps({**found, "weights_bytes": float(weights)}))


if __name__ == "__main__":
    if sys.argv[1] in ("make", "restore"):
        {"make": make, "restore": restore}[sys.argv[1]](*sys.argv[2:])
    else:
        main(run)
