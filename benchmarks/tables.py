"""From raw measurements to a table and a plot."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

KEYS = ("size", "rows", "inputs", "targets", "prompt", "lengths", "steps", "devices", "method")
COLUMNS: dict[str, tuple[str, str, float]] = {  # heading -> key, format, divisor
    "s/step": ("seconds_per_step", ".3f", 1.0),
    "beside ours": ("beside_ours", ".2f", 1.0),
    "tokens/s": ("tokens_per_second", ".0f", 1.0),
    "dot GFLOP": ("flops_per_step", ".0f", 1e9),
    "of peak": ("share_of_peak", ".0%", 1.0),
    "GiB": ("peak_memory_bytes", ".1f", 2.0**30),
    "GiB of the device": ("device_memory_bytes", ".1f", 2.0**30),
    "compile s": ("compile_seconds", ".1f", 1.0),
    "first step s": ("first_step_after_seconds", ".1f", 1.0),
    "input ms": ("input_seconds", ".1f", 1e-3),
    "decoded tokens/s": ("decoded_per_second", ".0f", 1.0),
    "trained": ("trained_parameters", ",.0f", 1.0),
    "stored kB": ("stored_bytes", ",.0f", 1e3),
    "save ms": ("save_seconds", ".0f", 1e-3),
    "saved kB": ("save_bytes", ".0f", 1e3),
    "cold start s": ("cold_start_seconds", ".1f", 1.0),
    "warm start s": ("warm_start_seconds", ".1f", 1.0),
    "its CPU s": ("warm_start_cpu_seconds", ".1f", 1.0),
    "restore s": ("restore_seconds", ".2f", 1.0),
    "beside weights GiB": ("restore_beside_bytes", ".2f", 2.0**30),
}


def summarise(raw: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The medians over the rounds, and the peak that shares are of.

    `beside_ours` is the median of the ratios within a round, which is what pairs are good for; ours
    is the one in float32 where there are two.
    """
    of_machine = [one for one in raw if "flops_per_second" in one]
    measured = [one for one in raw if "seconds_per_step" in one or "warm_start_seconds" in one]
    peaks = {
        dtype: statistics.median(o["flops_per_second"] for o in of_machine if o["dtype"] == dtype)
        for dtype in sorted({one["dtype"] for one in of_machine})
    }
    measured = [{"method": "prompt_tuning", **one} for one in measured]  # results of before
    engine = lambda one: tuple(one.get(key) for key in ("engine", "dtype", *KEYS))  # noqa: E731
    ours = sorted((o for o in measured if o["engine"] == "ours"), key=lambda one: one["dtype"])
    same = {(one["round"], *engine(one)[2:]): one for one in ours}  # in float32 where there is one
    results = []
    for _, group in itertools.groupby(sorted(measured, key=engine), key=engine):
        rounds = list(group)
        floats = {k for k, v in rounds[0].items() if isinstance(v, float)}
        found = {**rounds[0], "rounds": len(rounds)}
        found |= {k: statistics.median(one[k] for one in rounds) for k in floats}
        ratios = [
            one["seconds_per_step"] / same[pair]["seconds_per_step"]
            for one in rounds
            if (pair := (one["round"], *engine(one)[2:])) in same
        ]
        if ratios:
            found["beside_ours"] = statistics.median(ratios)
        if "flops_per_step" in found and found["dtype"] in peaks:
            per_second = found["flops_per_step"] / found["seconds_per_step"]
            found["share_of_peak"] = per_second / peaks[found["dtype"]]
        results.append(found)
    results.sort(key=lambda one: [str(one[key]).rjust(6) for key in (*KEYS, "engine", "dtype")])
    failed = [one for one in raw if "failed" in one and engine(one) not in map(engine, measured)]
    return {"matmul_peak": peaks, "results": results, "failed": failed}


def describe(content: Mapping[str, Any]) -> str:
    """The table as Markdown, with the machine and the command above it."""
    results = content["results"]
    shown = {name: how for name, how in COLUMNS.items() if any(how[0] in one for one in results)}
    first = ["engine", "dtype", "method", "size", "rows", "inputs", "targets", "prompt", "devices"]
    head = [*first, *shown]
    lines = [head, ["---"] * len(head)]
    for one in results:
        inputs = f"{one['task']} <= {one['inputs']}" if one.get("task") else str(one["inputs"])
        named = [str(one[key]) for key in ("targets", "prompt", "devices")]
        cells = [
            one["engine"],
            one["dtype"],
            one["method"],
            one["size"],
            str(one["rows"]),
            inputs,
            *named,
        ]
        for key, form, unit in shown.values():
            cells.append(format(one[key] / unit, form) if key in one else "-")
        lines.append(cells)
    rounds = min((one["rounds"] for one in results), default=0)
    peaks = [f"{dtype} {peak / 1e9:,.0f}" for dtype, peak in content["matmul_peak"].items()]
    return "\n".join(
        [
            f"`{content['command']}`\n",
            f"{json.dumps(content['machine'])}\n",
            f"Peak of matrix products in GFLOP/s: {', '.join(peaks)}. Medians of "
            f"{rounds} rounds; first step: of a process that compiles anew, with a random backbone "
            "made in place.\n",
            *(f"| {' | '.join(cells)} |" for cells in lines),
            *(f"\n{describe_failure(one)}" for one in content.get("failed", ())),
            "",
        ]
    )


def describe_failure(one: Mapping[str, Any]) -> str:
    """Which measurement failed, and the last thing that it said."""
    named = ", ".join(f"{key} {one[key]}" for key in ("dtype", "size", "rows", "inputs", "prompt"))
    return f"{one['engine']} ({named}) failed: {one['failed']}"


def draw(results: Sequence[Mapping[str, Any]], axis: str, path: Path) -> None:
    """Seconds against what the suite varies, an engine a line."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    flops = {one["size"]: one["flops_per_step"] for one in results if "flops_per_step" in one}
    figure, axes = pyplot.subplots(figsize=(6, 4))
    key = lambda one: f"{one['engine']} {one['dtype']}"  # noqa: E731
    for label, group in itertools.groupby(sorted(results, key=key), key=key):
        points = [(one.get(axis, flops.get(one["size"])), _seconds(one)) for one in group]
        axes.plot(*zip(*sorted(points), strict=True), "o-", label=label)
    axes.set_xlabel(axis.replace("_", " "))
    axes.set_ylabel("seconds from command to first step" if axis == "weights_bytes" else "s/step")
    axes.set_ylim(bottom=0.0)
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")


def _seconds(one: Mapping[str, Any]) -> float:
    return one.get("seconds_per_step", one.get("warm_start_seconds", 0.0))
