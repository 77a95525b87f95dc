"""Pictures: curves of a run, scores of prompts by tasks, and confusion matrices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from prompt_tuning.evaluation.analysis import ILLEGAL, Analysis
from prompt_tuning.evaluation.records import METRICS, is_score, read_points, read_records
from prompt_tuning.runtime.replace_folder import replace_file

if TYPE_CHECKING:
    from prompt_tuning.evaluation.results import Matrix

BLUE = "#4063d8"
BASELINES = {"majority": ("--", "majority class"), "none": (":", "no prompt")}  # lines of curves


def draw_curves(model_dir: Path) -> Path | None:
    """The path of curves.png, loss and validation metrics over steps; None if there is no record.

    Baselines are dashed lines.
    """
    loss = read_points(model_dir, "loss")
    scores: dict[str, list[tuple[int, float]]] = {}
    baselines: dict[str, dict[str, float]] = {}
    for r in filter(is_score, read_records(model_dir / METRICS)):
        name = f"{r['task']} {r['name']}"
        if "prompt" in r:
            baselines.setdefault(name, {})[r["prompt"]] = r["value"]
        else:
            scores.setdefault(name, []).append((r["step"], r["value"]))
    if not loss and not scores:
        return None
    figure, (left, right) = _figure(2, 5.5, 4)
    if loss:
        left.plot(*zip(*loss, strict=True), color=BLUE)
    left.set(title="training", xlabel="step", ylabel="loss per target token")
    draw_scores(right, scores, baselines)
    return _save_curves(figure, model_dir)


def draw_scores(
    axes: Any,
    scores: Mapping[str, Sequence[tuple[int, float]]],
    baselines: Mapping[str, Mapping[str, float]],
) -> None:
    """Draws each score over steps in its own colour; its baselines have the same colour."""
    for number, (name, points) in enumerate(sorted(scores.items())):
        axes.plot(*zip(*points, strict=True), marker="o", color=f"C{number}", label=name)
        for base, value in baselines.get(name, {}).items():
            axes.axhline(value, ls=BASELINES[base][0], lw=1, color=f"C{number}")
    for base, (style, label) in BASELINES.items():  # for the legend, in grey
        if any(base in values for values in baselines.values()):
            axes.plot([], [], ls=style, lw=1, color="grey", label=label)
    axes.set(title="validation", xlabel="step", ylabel="per cent")
    if scores:
        axes.legend(fontsize="small")


def draw_losses(
    model_dir: Path, training: Sequence[tuple[int, float]], held_out: Sequence[tuple[int, float]]
) -> Path | None:
    """The path of curves.png, cross entropy in training and held out; None without a record."""
    if not training:
        return None
    figure, (axes,) = _figure(1, 6, 4)
    axes.plot(*zip(*training, strict=True), color=BLUE, label="training")
    axes.plot(*zip(*held_out, strict=True), color="#cb3c33", marker="o", ms=3, label="held out")
    axes.set(xlabel="step", ylabel="cross entropy per token (nats)")
    axes.legend()
    return _save_curves(figure, model_dir)


def _save_curves(figure: Any, model_dir: Path) -> Path:
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return _save(figure, model_dir / "curves.png")


def draw_matrix(matrix: Matrix, folder: Path) -> Path | None:
    """`matrix.png`: the mean of each task's metrics for each prompt; None for a single number."""
    tasks = matrix.tasks
    panels = {method: matrix.means(method) for method in matrix.methods}
    panels = {method: means for method, means in panels.items() if any(means.values())}
    rows = max((len(means) for means in panels.values()), default=0)
    if rows * len(tasks) < 2:
        return None
    width, height = 2.2 + 0.9 * len(tasks) + 1.8, 1.2 + 0.45 * rows
    figure, axes = _figure(len(panels), max(width, 4.0), max(height, 2.4))
    for panel, (method, means) in zip(axes, panels.items(), strict=True):
        values = np.array([[row.get(task, np.nan) for task in tasks] for row in means.values()])
        _heat(panel, values, [f"{v:.1f}" if np.isfinite(v) else "" for v in values.flat])
        _label(panel, tasks, [_tail(name) for name in means])
        panel.set_title(f"{matrix.score_name}, {method}", fontsize="medium")
    return _save(figure, folder / "matrix.png")


def draw_confusion(analysis: Analysis, name: str, folder: Path) -> Path | None:
    """`<name>-confusion.png`: the confusion matrices; None if the task has no classes."""
    if not analysis.confusion:
        return None
    size = len(analysis.words)
    width, height = 2.4 + 0.9 * size, 1.8 + 0.6 * size
    figure, axes = _figure(len(analysis.confusion), max(width, 4.0), max(height, 2.4))
    for panel, (method, counts) in zip(axes, analysis.confusion.items(), strict=True):
        matrix = np.array(counts)
        shares = 100.0 * matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
        _heat(panel, shares, [str(n) if n else "" for n in matrix.flat])
        _label(panel, [*analysis.words, ILLEGAL], list(analysis.words))
        panel.set(xlabel="answer", ylabel="target")
        panel.set_title(f"{name}, {method}", fontsize="medium")
    return _save(figure, folder / f"{name}-confusion.png")


def _figure(panels: int, width: float, height: float) -> tuple[Any, list[Any]]:
    """A figure of panels side by side, each of this width in inches, and their axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * panels, height), layout="constrained")
    return figure, list(figure.subplots(1, panels, squeeze=False)[0])


def _save(figure: Any, path: Path) -> Path:
    with replace_file(path) as new:
        figure.savefig(new, dpi=150, format="png")
    return path


def _heat(panel: Any, values: np.ndarray, texts: list[str]) -> None:
    """Draws per cent from white to blue, with a text in each cell."""
    panel.imshow(values, cmap="Blues", vmin=0.0, vmax=100.0, aspect="auto")
    columns = values.shape[1]
    for place, text in enumerate(texts):
        row, column = divmod(place, columns)
        dark = np.nan_to_num(values[row, column]) > 60.0
        panel.text(column, row, text, ha="center", va="center", color="w" if dark else "k")


def _label(panel: Any, columns: list[str], rows: list[str]) -> None:
    panel.set_xticks(range(len(columns)), columns, rotation=20, ha="right", fontsize="small")
    panel.set_yticks(range(len(rows)), rows, fontsize="small")
    panel.spines[:].set_visible(False)
    panel.tick_params(length=0)


def _tail(name: str, longest: int = 32) -> str:
    """The end of a path, which tells prompts apart better than its beginning."""
    return name if len(name) <= longest else "..." + name[3 - longest :]
