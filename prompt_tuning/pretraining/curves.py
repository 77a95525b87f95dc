"""The losses of a pre-training run, read from its records and drawn at its end by `run.py`."""

from __future__ import annotations

from pathlib import Path

from prompt_tuning.evaluation.records import METRICS, read_records
from prompt_tuning.runtime.replace_folder import replace_file

_HELD_OUT = "cross_entropy/held_out"


def held_out_points(model_dir: Path) -> list[tuple[int, float]]:
    """The step and the held-out cross entropy of every evaluation."""
    records = read_records(model_dir / METRICS)
    return [(r["step"], r["value"]) for r in records if r["name"] == _HELD_OUT]


def draw_losses(model_dir: Path) -> Path | None:
    """The path of curves.png, training and held-out cross entropy; None if there is no record."""
    records = read_records(model_dir / METRICS)
    training = [(r["step"], r["value"]) for r in records if r["name"] == "cross_entropy"]
    unseen = held_out_points(model_dir)
    if not training:
        return None

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot(*zip(*training, strict=True), color="#4063d8", label="training")
    axes.plot(*zip(*unseen, strict=True), color="#cb3c33", marker="o", ms=3, label="held out")
    axes.set(xlabel="step", ylabel="cross entropy per token (nats)")
    axes.legend()
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    path = model_dir / "curves.png"
    with replace_file(path) as new:
        figure.savefig(new, dpi=150, format="png")
    return path
