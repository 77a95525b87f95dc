"""Pictures of an evaluation: scores of prompts by tasks, and confusion matrices."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from prompt_tuning.evaluation.analysis import ILLEGAL, Analysis
from prompt_tuning.runtime.replace_folder import replace_file

if TYPE_CHECKING:
    from prompt_tuning.evaluation.results import Matrix


def draw_matrix(matrix: Matrix, folder: Path) -> Path | None:
    """`matrix.png`: the mean of each task's metrics for each prompt; None for a single number."""
    tasks = matrix.tasks
    panels = {method: matrix.means(method) for method in matrix.methods}
    panels = {method: means for method, means in panels.items() if any(means.values())}
    rows = max((len(means) for means in panels.values()), default=0)
    if rows * len(tasks) < 2:
        return None
    figure, axes = _figure(len(panels), 2.2 + 0.9 * len(tasks) + 1.8, 1.2 + 0.45 * rows)
    for panel, (method, means) in zip(axes, panels.items(), strict=True):
        values = np.array([[row.get(task, np.nan) for task in tasks] for row in means.values()])
        _heat(panel, values, [f"{v:.1f}" if np.isfinite(v) else "" for v in values.flat])
        _label(panel, tasks, [_tail(name) for name in means])
        panel.set_title(f"mean of metrics, {method}", fontsize="medium")
    path = folder / "matrix.png"
    with replace_file(path) as new:
        figure.savefig(new, dpi=150, format="png")
    return path


def draw_confusion(analysis: Analysis, name: str, folder: Path) -> Path | None:
    """`<name>-confusion.png`: the confusion matrices; None if the task has no classes."""
    if not analysis.confusion:
        return None
    size = len(analysis.words)
    figure, axes = _figure(len(analysis.confusion), 2.4 + 0.9 * size, 1.8 + 0.6 * size)
    for panel, (method, counts) in zip(axes, analysis.confusion.items(), strict=True):
        matrix = np.array(counts)
        shares = 100.0 * matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
        _heat(panel, shares, [str(n) if n else "" for n in matrix.flat])
        _label(panel, [*analysis.words, ILLEGAL], list(analysis.words))
        panel.set(xlabel="answer", ylabel="target")
        panel.set_title(f"{name}, {method}", fontsize="medium")
    path = folder / f"{name}-confusion.png"
    with replace_file(path) as new:
        figure.savefig(new, dpi=150, format="png")
    return path


def _figure(panels: int, width: float, height: float) -> tuple[Any, list[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(width, 4.0) * panels, max(height, 2.4)), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, panels, squeeze=False)[0])


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
