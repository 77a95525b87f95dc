"""Measures this project beside the alternatives and prints a table.

    pip install -e '.[bench]' && python benchmarks/run.py

Every number is the median of some rounds; in a round each engine has a process of its own, one
after the other, so that what else the machine does meets all alike. Raw numbers go to
`benchmarks/results/<name>.json`, with machine, versions and this command; plots beside them.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from workload import Workload

HERE = Path(__file__).parent
SCRIPTS = {"ours": "ours.py", "ours-512": "ours.py", "peft": "peft_torch.py"}


def suite(name: str) -> list[Workload]:
    """The workloads of a suite, without their engines."""
    base = Workload(engine="")
    if name == "smoke":
        return [dataclasses.replace(base, inputs=32, prompt=10, rows=4, steps=1)]
    by = dataclasses.replace
    rows = [base, by(base, spread=True, rows=32, inputs=512, steps=4)]
    rows += [by(base, inputs=n) for n in (32, 64, 256, 512)]
    rows += [by(base, prompt=n) for n in (1, 20, 150)]
    rows += [by(base, rows=n) for n in (1, 32)]
    rows += [by(base, size=size, steps=3) for size in ("base", "large")]
    return rows


def engines(workload: Workload) -> list[Workload]:
    """Every engine that is installed, in the dtypes that it is run in."""
    found = [dataclasses.replace(workload, engine="ours")]
    if workload.spread:
        found.append(dataclasses.replace(workload, engine="ours-512"))
    if importlib.util.find_spec("peft"):
        dtypes = ("float32", "bfloat16")
        found += [dataclasses.replace(workload, engine="peft", dtype=d) for d in dtypes]
    return found


def once(workload: Workload) -> dict[str, Any]:
    """One measurement, in a new process."""
    return _run(SCRIPTS[workload.engine], json.dumps(dataclasses.asdict(workload)))


def _run(script: str, argument: str) -> dict[str, Any]:
    paths = os.pathsep.join([str(HERE.parent), str(HERE)])
    done = subprocess.run(
        [sys.executable, str(HERE / script), argument],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{script} {argument} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def machine() -> dict[str, Any]:
    """What the numbers belong to."""
    names = ("jax", "jaxlib", "flax", "optax", "torch", "transformers", "peft")
    versions = {n: importlib.metadata.version(n) for n in names if importlib.util.find_spec(n)}
    model = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    return {"processor": model, "cores": os.cpu_count(), "python": platform.python_version()} | {
        "versions": versions
    }


def summarise(rounds: list[dict[str, Any]], peak: float) -> dict[str, Any]:
    """The medians of one workload's rounds."""
    numbers = {
        key: statistics.median(one[key] for one in rounds)
        for key, value in rounds[0].items()
        if isinstance(value, float)
    }
    summary = {**rounds[0], **numbers, "rounds": len(rounds)}
    if "flops_per_step" in summary:
        rate = summary["flops_per_step"] / summary["seconds_per_step"]
        summary["share_of_peak"] = rate / peak
    return summary


def table(results: list[dict[str, Any]]) -> str:
    """The summaries as text."""
    head = ("engine", "size", "dtype", "rows", "inputs", "prompt", "s/step", "tok/s", "peak", "GiB")
    lines = [head]
    for r in results:
        share = f"{r['share_of_peak']:.0%}" if "share_of_peak" in r else "-"
        inputs = f"<={r['inputs']}" if r["spread"] else str(r["inputs"])
        lines.append(
            (
                *(r["engine"], r["size"], r["dtype"], str(r["rows"]), inputs, str(r["prompt"])),
                f"{r['seconds_per_step']:.3f}",
                f"{r['tokens_per_second']:.0f}",
                share,
                f"{r['peak_memory_bytes'] / 2**30:.1f}",
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) for line in lines
    )


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Seconds a step against the length of the inputs, an engine a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    plain = [
        r
        for r in results
        if not r["spread"] and (r["size"], r["rows"], r["prompt"]) == ("small", 8, 100)
    ]
    plain.sort(key=lambda r: (r["engine"], r["dtype"], r["inputs"]))
    for key, group in itertools.groupby(plain, key=lambda r: f"{r['engine']} {r['dtype']}"):
        points = list(group)
        axes.plot(
            [r["inputs"] for r in points], [r["seconds_per_step"] for r in points], "o-", label=key
        )
    axes.set_xlabel("input tokens a row")
    axes.set_ylabel("seconds a step")
    if plain:
        axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")


def main() -> None:
    """Runs a suite."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--suite", choices=["full", "smoke"], default="full")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--name", default="latest", help="of the files in benchmarks/results")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    args = parser.parse_args()
    peak = _run("matmul_peak.py", "float32")["flops_per_second"]
    results, raw = [], []
    for workload in suite(args.suite):
        variants = engines(workload)
        rounds = [[once(variant) for variant in variants] for _ in range(args.rounds)]
        raw += [one for found in rounds for one in found]
        results += [summarise(list(of_one), peak) for of_one in zip(*rounds, strict=True)]
    args.out.mkdir(parents=True, exist_ok=True)
    content = {
        "command": " ".join(["python", "benchmarks/run.py", *sys.argv[1:]]),
        "machine": machine(),
        "matmul_peak_float32": peak,
        "results": results,
        "raw": raw,
    }
    path = args.out / f"{args.name}.json"
    path.write_text(json.dumps(content, indent=1) + "\n")
    draw(results, path.with_suffix(".png"))
    print(json.dumps(content["machine"]))
    print(f"matrix products, float32: {peak / 1e9:.0f} GFLOP/s")
    print(table(results))
    print(path)


if __name__ == "__main__":
    main()
