"""Where the time of a step goes: XLA's operations on one core, beside that core's matmul peak.

    python benchmarks/profile_step.py --size=small --dtype=float32 --name=MACHINE

One thread on one core, so that every operation has it alone and its time is its own; a step on all
cores overlaps some of them. Writes a table and the raw numbers to `benchmarks/results/<name>/`.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CORE = min(os.sched_getaffinity(0))
os.environ["NPROC"] = "1"  # XLA's threads
os.sched_setaffinity(0, {CORE})

import hlo_text  # noqa: E402
import jax  # noqa: E402
import matmul_peak  # noqa: E402
import ours  # noqa: E402
import run  # noqa: E402
from jax.profiler import ProfileData  # noqa: E402
from workload import Workload  # noqa: E402

STEPS = 3
OPERATION = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = ", re.MULTILINE)
HEADS, WEIGHTS, LOGITS = "heads' products and softmax", "products with weights", "logits"


class Parts:
    """The operations of a compiled program, by name."""

    def __init__(self, text: str, vocabulary: int) -> None:
        self._vocabulary = vocabulary
        self._lines: dict[str, str] = {}
        self._bodies: dict[str, str] = {}
        for block in re.findall(r"^(?:ENTRY )?%.*?^}", text, re.MULTILINE | re.DOTALL):
            head, *lines = block.splitlines()
            name = head.removeprefix("ENTRY ").split(" ", 1)[0].lstrip("%")
            self._bodies[name] = "\n".join(lines)
            for line in lines:
                if match := OPERATION.match(line):
                    self._lines[match.group(1)] = line

    def __contains__(self, name: str) -> bool:
        return name in self._lines

    def body(self, name: str) -> str:
        """What an operation computes: the lines of its fusion, or its own and its operands'."""
        line = self._lines[name]
        if called := re.search(r"calls=%([\w.\-]+)", line):
            return self._bodies[called.group(1)]
        operands = re.findall(r"%([\w.\-]+)", line.split(" = ", 1)[1].split("metadata")[0])
        return "\n".join([*(self._lines[o] for o in operands if o in self._lines), line])

    def flops(self, name: str) -> int:
        """Of its matrix products."""
        return hlo_text.dot_flops(self.body(name))

    def kind(self, name: str) -> str:
        """What it is for, told by its products and their shapes."""
        found = list(hlo_text.instructions(self.body(name)))
        dots = [one for one in found if one.operation == "dot"]
        if any("batch_dims" in one.attributes for one in dots):
            return HEADS
        if dots:
            shapes = [one.shape for one in found]
            return LOGITS if any(self._vocabulary in shape for shape in shapes) else WEIGHTS
        operations = {one.operation for one in found} - {"parameter", "bitcast", "constant"}
        moves = {"copy", "transpose", "concatenate", "slice", "broadcast", "reshape"}
        return "copies and transposes" if operations <= moves else "elementwise and sums"


def profile(workload: Workload) -> dict[str, Any]:
    """Seconds and FLOPs of a step, by what its operations are for."""
    prepared = ours.prepare(workload)
    batch = ours.place(ours.batches(workload, 1), prepared)[0]
    state, frozen = prepared.state, prepared.frozen
    compiled = prepared.programs.whole.lower(state, frozen, batch).compile()
    parts = Parts(compiled.as_text(), prepared.model.config.num_embeddings)
    seconds: dict[str, float] = collections.defaultdict(float)
    calls: dict[str, int] = collections.defaultdict(int)
    walls, peaks = [], []
    state, _ = jax.block_until_ready(compiled(state, frozen, batch))
    for _ in range(STEPS):
        # In turn: a core's clock changes within seconds.
        peaks.append(matmul_peak.peak(workload.dtype, (2048,), 4))
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                begin = time.perf_counter()
                state, _ = jax.block_until_ready(compiled(state, frozen, batch))
                walls.append(time.perf_counter() - begin)
            (trace,) = Path(folder).rglob("*.xplane.pb")
            for plane in ProfileData.from_file(str(trace)).planes:
                for event in (event for line in plane.lines for event in line.events):
                    if event.name in parts:
                        seconds[event.name] += event.duration_ns / 1e9 / STEPS
                        calls[event.name] += 1
    reached = statistics.median(peaks)
    return {
        "workload": dataclasses.asdict(workload),
        "seconds_per_step": sum(walls) / STEPS,
        "matmul_peak": reached,
        "kinds": summarise(parts, seconds, calls, reached),
    }


def summarise(
    parts: Parts, seconds: Mapping[str, float], calls: Mapping[str, int], peak: float
) -> list[dict[str, Any]]:
    """Every kind of operation with its calls, seconds and FLOPs a step, the longest first."""
    found: dict[str, dict[str, Any]] = {}
    for name, taken in seconds.items():
        empty = {"kind": parts.kind(name), "calls": 0.0, "seconds": 0.0, "flops": 0.0}
        one = found.setdefault(empty["kind"], empty)
        one["calls"] += calls[name] / STEPS
        one["seconds"] += taken
        one["flops"] += parts.flops(name) * calls[name] / STEPS
    for one in found.values():
        one["share_of_peak"] = one["flops"] / one["seconds"] / peak
    return sorted(found.values(), key=lambda one: -one["seconds"])


def describe(found: Mapping[str, Any]) -> str:
    """The table as Markdown."""
    lines = [
        "| operations | calls | ms | share of the step | GFLOP | of the core's peak |",
        "|---|---|---|---|---|---|",
    ]
    wall = found["seconds_per_step"]
    for one in found["kinds"]:
        products = one["flops"] > 0
        lines.append(
            f"| {one['kind']} | {one['calls']:.0f} | {1e3 * one['seconds']:.0f} "
            f"| {one['seconds'] / wall:.0%} | {one['flops'] / 1e9 if products else 0:.1f} "
            f"| {format(one['share_of_peak'], '.0%') if products else '-'} |"
        )
    counted = sum(one["seconds"] for one in found["kinds"])
    between = wall - counted
    lines.append(f"| between operations | | {1e3 * between:.0f} | {between / wall:.0%} | | |")
    whole = sum(one["flops"] for one in found["kinds"])
    lines.append(
        f"| the step | | {1e3 * wall:.0f} | 100% | {whole / 1e9:.1f} "
        f"| {whole / wall / found['matmul_peak']:.0%} |"
    )
    return "\n".join(lines)


def main() -> None:
    """Profiles a step."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", default="small")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--inputs", type=int, default=128)
    parser.add_argument("--targets", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=100)
    parser.add_argument("--name", default="latest", help="of the folder in benchmarks/results")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = vars(parser.parse_args())
    folder = args.pop("out") / args.pop("name")
    command = " ".join(["python", "benchmarks/profile_step.py", *sys.argv[1:]])
    machine = {**run.machine(), "commit": run.commit()}
    found = {"command": command, "machine": machine, **profile(Workload("ours", **args))}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"profile_{args['size']}_{args['dtype']}.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    text = "\n".join(
        [
            f"`{command}`\n",
            f"{json.dumps(found['machine'])}\n",
            f"One core, whose products reach {found['matmul_peak'] / 1e9:.0f} GFLOP/s.\n",
            describe(found),
            "",
        ]
    )
    path.with_suffix(".md").write_text(text)
    print(text + str(path.with_suffix(".md")))


if __name__ == "__main__":
    main()
