"""Measures this project beside the alternatives and prints a table.

    pip install -e '.[bench]' && python benchmarks/run.py --suite=step --name=MACHINE

Every number is the median of some rounds; in a round each engine has a process of its own, one
after the other, so that what else the machine does meets all alike. Raw numbers go to
`benchmarks/results/<name>/<suite>.jsonl` as they come: after --minutes the program stops, and the
same command goes on where it was. At the end there are a table, a plot and a `.json` of machine,
versions and this command beside them.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tables
from suites import SUITES, measured, real_rows
from workload import Workload

HERE = Path(__file__).parent
SCRIPTS = {
    **{name: "ours.py" for name in ("ours", "ours-cudnn", "ours-dropout", "ours-512")},
    "peft": "peft_torch.py",
    **{"t5x": "t5x_upstream.py", "start": "start.py"},
}


def once(workload: Workload) -> dict[str, Any]:
    """One measurement, in a new process; what fails is kept, and the others go on."""
    values = dataclasses.asdict(workload)
    try:
        return _run(SCRIPTS[workload.engine], json.dumps(values), workload.devices)
    except SystemExit as error:
        print(error, file=sys.stderr, flush=True)
        last = str(error).strip().splitlines()[-1]
        return {**values, "task": workload.task, "failed": last[:500]}


def _run(script: str, argument: str, devices: int = 1) -> dict[str, Any]:
    paths = [str(HERE.parent), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    flags = os.environ.get("XLA_FLAGS", "")
    if devices > 1:
        flags += f" --xla_force_host_platform_device_count={devices}"
    done = subprocess.run(
        [sys.executable, str(HERE / script), argument],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{script} {argument} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def machine() -> dict[str, Any]:
    """What the numbers belong to."""
    names = ("jax", "jaxlib", "flax", "optax", "torch", "transformers", "peft", "t5x")
    versions = {n: _version(n) for n in names if importlib.util.find_spec(n)}
    model = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    return {
        "processor": model,
        "cores": os.cpu_count(),
        **({"accelerators": found} if (found := _gpus()) else {}),
        "python": platform.python_version(),
        "versions": versions,
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # a checkout, such as T5X's
        return "from source"


def _gpus() -> list[str]:
    """Name, memory and driver of each of NVIDIA's."""
    if not shutil.which("nvidia-smi"):
        return []
    query = "--query-gpu=name,memory.total,driver_version"
    done = subprocess.run(
        ["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True
    )
    return done.stdout.strip().splitlines()


def commit() -> str:
    """Which source was measured; "-dirty" where files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    return done.stdout.strip() or "not known"


def read(raw: Path) -> list[dict[str, Any]]:
    """The measurements that are there, but one that was being written."""
    lines = raw.read_text().splitlines() if raw.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def measure(workloads: list[Workload], raw: Path, rounds: int, seconds: float) -> int:
    """Makes what is missing of all workloads, for so long; returns how many are missing then."""
    raw.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    done = {_key(one["round"], one) for one in read(raw) if "failed" not in one}
    source = commit()
    peaks = sorted({one.dtype for one in workloads if one.engine != "peft"})
    wanted = [(number, one) for number in range(rounds) for one in (*peaks, *workloads)]
    missing = 0
    for number, workload in wanted:
        of_machine = isinstance(workload, str)
        values = {"dtype": workload} if of_machine else dataclasses.asdict(workload)
        if _key(number, values) in done:
            continue
        if time.monotonic() - began > seconds:
            missing += 1
            continue
        found = _run("matmul_peak.py", workload) if of_machine else once(workload)
        if found.get("lengths"):
            found["lengths"] = Path(found["lengths"]).name  # wherever it lay
        with raw.open("a") as file:
            file.write(json.dumps({"round": number, "commit": source, **found}) + "\n")
    return missing


def _key(number: int, values: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a measurement is of: the round, and the workload by its fields."""
    if "engine" not in values:  # of the machine
        return number, values["dtype"]
    names = [field.name for field in dataclasses.fields(Workload)]
    shown = {**values, "lengths": Path(values.get("lengths") or "").name}
    return number, *(str(shown.get(name)) for name in names)


def _command() -> str:
    """The command line, without the places of this machine."""
    shown = [a.split("=")[0] + "=..." if "/" in a else a for a in sys.argv[1:]]
    return " ".join(["python", "benchmarks/run.py", *(a for a in shown if a != "--out=...")])


def main() -> None:
    """Runs a suite."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--suite", choices=list(SUITES), default="step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--dtypes",
        default="float32,bfloat16",
        help="bfloat16 takes minutes a step on old processors",
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="no new measurement after them")
    parser.add_argument("--name", default="latest", help="of the folder in benchmarks/results")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--superglue", type=Path, help="folder of BoolQ/val.jsonl, RTE, CB")
    parser.add_argument("--vocabulary", type=Path, help="T5's sentencepiece.model")
    args = parser.parse_args()
    folder = args.out / args.name
    axis, suite = SUITES[args.suite]
    if args.suite == "superglue":
        if not (args.superglue and args.vocabulary):
            parser.error("--suite=superglue needs --superglue=DIR and --vocabulary=FILE")
        suite = real_rows(args.superglue, args.vocabulary, folder / "lengths")
    raw = folder / f"{args.suite}.jsonl"
    workloads = measured(suite, args.dtypes.split(","))
    if missing := measure(workloads, raw, args.rounds, 60.0 * args.minutes):
        print(f"{missing} measurements are missing: the same command goes on")
        return
    measurements = read(raw)
    commits = sorted({one.get("commit", "not recorded") for one in measurements})
    described = {**machine(), "commit": ", ".join(commits)}
    content = {"command": _command(), "machine": described, **tables.summarise(measurements)}
    raw.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    text = tables.describe(content)
    raw.with_suffix(".md").write_text(text)
    if axis and content["results"]:
        tables.draw(content["results"], axis, raw.with_suffix(".png"))
    print(text + str(raw.with_suffix(".md")))
    if content["failed"]:
        raise SystemExit("some measurements failed: the same command tries them again")


if __name__ == "__main__":
    main()
