"""Pictures of prompts: norms of their rows, nearest pieces, similarity; or those of prefixes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from prompt_tuning.config import ConfigError
from prompt_tuning.prompts.inspection import Inspected, Inspection, Neighbour, unit
from prompt_tuning.prompts.prefix_inspection import KINDS, PrefixInspection

MAX_ROWS = 50  # more would be too small to read; the text names them all
_ROW_HEIGHT, _CELL_WIDTH = 0.25, 1.15  # inches
_LABEL = "#c8500a"  # a piece of a label word
_BAR = "#4063d8"


def check_suffix(file: Path) -> None:
    """Raises ConfigError if matplotlib cannot draw files with this suffix."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    supported = FigureCanvasAgg.get_supported_filetypes()
    if file.suffix and file.suffix[1:].lower() not in supported:
        raise ConfigError(
            f"--plot={file}: expected a file name that ends in one of "
            f"{', '.join(sorted(supported))}, found {file.suffix}."
        )


def draw(inspection: Inspection, file: Path) -> None:
    """Writes a PNG, or the format of the file's suffix.

    For every prompt, from the left: the norm of each row, in front of the range of the
    vocabulary's norms; and its nearest pieces, darker where nearer, those of label words in
    orange. Last, the cosines between all rows of all prompts, with SPoT's measures beside it.
    """
    from matplotlib.figure import Figure

    names = _short_names([prompt.name for prompt in inspection.prompts])
    columns = [len(prompt.rows[0].neighbours) for prompt in inspection.prompts]
    shown = min(max(len(prompt.rows) for prompt in inspection.prompts), MAX_ROWS)
    height = max(_ROW_HEIGHT * shown + 1.6, 4.5)
    nearest = max(
        n.cosine for prompt in inspection.prompts for row in prompt.rows for n in row.neighbours
    )
    widths = [width for count in columns for width in (1.6, _CELL_WIDTH * count)]
    square = max(4.0, min(height - 1.5, 7.0))
    figure = Figure(figsize=(sum(widths) + square + 1.5, height), layout="constrained")
    axes = figure.subplots(1, len(widths) + 1, width_ratios=[*widths, square], squeeze=False)[0]
    for number, (prompt, name) in enumerate(zip(inspection.prompts, names, strict=True)):
        norms, pieces = axes[2 * number], axes[2 * number + 1]
        _draw_norms(norms, prompt, inspection)
        _draw_pieces(pieces, prompt, name, max(nearest, 0.3))
        for panel in (norms, pieces):  # rows of the same height, whatever the prompts' lengths
            panel.set_ylim(shown - 0.5, -0.5)
    _draw_similarity(axes[-1], inspection, names)
    figure.savefig(file, dpi=130)


def draw_prefixes(inspection: PrefixInspection, file: Path) -> None:
    """Writes a PNG, or the format of the file's suffix.

    For every place of every prompt, from the left: the norms of the keys by layer and head, and of
    the values on the same scale; the cosines between the layers' keys, and between their values.
    """
    from matplotlib.figure import Figure

    names = _short_names([prompt.name for prompt in inspection.prompts])
    panels = [
        (name, place)
        for name, prompt in zip(names, inspection.prompts, strict=True)
        for place in prompt.places
    ]
    figure = Figure(figsize=(17, 3.8 * len(panels)), layout="constrained")
    grid = figure.subplots(len(panels), 4, squeeze=False)
    for axes, (name, place) in zip(grid, panels, strict=True):
        scales = {"cmap": "Blues", "vmin": 0, "vmax": float(place.norms.max())}
        for column, (kind, norms) in enumerate(zip(KINDS, place.norms, strict=True)):
            image = axes[column].imshow(norms, aspect="auto", **scales)
            title = f"{name}, {place.name}: norms of {kind}"
            axes[column].set_title(title.replace("$", r"\$"), fontsize=9)
            axes[column].set(xlabel="head", ylabel="layer")
            figure.colorbar(image, ax=axes[column], shrink=0.8)
        for column, (kind, cosines) in enumerate(zip(KINDS, place.similarity, strict=True), 2):
            image = axes[column].imshow(cosines, cmap="RdBu_r", vmin=-1, vmax=1)
            axes[column].set_title(f"cosine of the layers' {kind}", fontsize=9)
            axes[column].set(xlabel="layer", ylabel="layer")
            figure.colorbar(image, ax=axes[column], shrink=0.8)
        for panel in axes:
            panel.xaxis.get_major_locator().set_params(integer=True)
            panel.yaxis.get_major_locator().set_params(integer=True)
    figure.savefig(file, dpi=130)


def _short_names(names: list[str]) -> list[str]:
    """The paths without the parts that all share, at the front and at the end.

    >>> _short_names(["runs/mood/prompts/best", "runs/topic/prompts/best"])
    ['mood', 'topic']
    """
    if len(names) < 2:
        return names
    parts = [name.strip("/").split("/") for name in names]
    for end in (0, -1):
        while len({part[end] for part in parts}) == 1 and min(map(len, parts)) > 1:
            parts = [part[:-1] if end else part[1:] for part in parts]
    return ["/".join(part) for part in parts]


def _draw_norms(axes: Any, prompt: Inspected, inspection: Inspection) -> None:
    shown = prompt.rows[:MAX_ROWS]
    spread = inspection.embedding_norms
    axes.barh(range(len(shown)), [row.norm for row in shown], color=_BAR, height=0.72)
    axes.axvspan(spread.min, spread.max, color="0.85", zorder=0, label="vocabulary")
    axes.axvline(spread.mean, color="0.45", lw=1, zorder=3)
    axes.set(xlabel="norm (grey: vocabulary)", ylabel="prompt row")
    axes.set_xlim(0, None)
    step = 1 if len(shown) <= 30 else 5
    axes.set_yticks(range(0, len(shown), step))
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_pieces(axes: Any, prompt: Inspected, name: str, top: float) -> None:
    shown = prompt.rows[:MAX_ROWS]
    cosines = np.array([[n.cosine for n in row.neighbours] for row in shown])
    axes.imshow(cosines, cmap="Blues", aspect="auto", vmin=0, vmax=top)
    labels = {piece for label in prompt.labels for piece in label.pieces}
    for place, row in enumerate(shown):
        for column, near in enumerate(row.neighbours):
            _write(axes, (column, place), near, near.cosine / top, near.piece in labels)
    rest = len(prompt.rows) - len(shown)
    more = f" ({rest} more rows not drawn)" if rest else ""
    orange = "; orange: label words" if labels else ""
    axes.set_title(f"{name}{more}\nnearest pieces and their cosines{orange}", fontsize=10)
    axes.set_xticks(range(cosines.shape[1]), [f"{i + 1}." for i in range(cosines.shape[1])])
    axes.set_yticks([])
    axes.tick_params(length=0, labelsize=8)
    axes.spines[:].set_visible(False)


def _write(
    axes: Any, place: tuple[int, int], near: Neighbour, darkness: float, is_label: bool
) -> None:
    plain = re.sub(r"\u2581?<extra_id_(\d+)>", r"<\1>", near.piece)
    plain = plain if len(plain) <= 11 else f"{plain[:10]}…"
    color = "white" if darkness > 0.6 else "black"
    box = {"boxstyle": "round,pad=0.15", "fc": _LABEL, "ec": "none"} if is_label else None
    x, y = place
    axes.text(
        x - 0.46,
        y,
        plain.replace("$", r"\$"),  # matplotlib would read mathematics
        ha="left",
        va="center",
        fontsize=8,
        color="white" if is_label else color,
        bbox=box,
        clip_on=True,
    )
    cosine = f"{near.cosine:.2f}".removeprefix("0")
    style = {"ha": "right", "va": "center", "fontsize": 6.5, "alpha": 0.75}
    axes.text(x + 0.46, y, cosine, color=color, **style)


def _draw_similarity(axes: Any, inspection: Inspection, names: list[str]) -> None:
    rows = unit(np.concatenate([prompt.array for prompt in inspection.prompts]))
    cosines = rows @ rows.T
    off = cosines[~np.eye(len(rows), dtype=bool)]
    top = max(float(np.abs(off).max(initial=0)), 0.1)
    image = axes.imshow(cosines, cmap="RdBu_r", vmin=-top, vmax=top)
    axes.set_anchor("N")
    ends = np.cumsum([len(prompt.array) for prompt in inspection.prompts])
    middles = ends - np.array([len(prompt.array) for prompt in inspection.prompts]) / 2 - 0.5
    for end in ends[:-1]:
        axes.axhline(end - 0.5, color="black", lw=1)
        axes.axvline(end - 0.5, color="black", lw=1)
    axes.set_title("cosine between rows", fontsize=10)
    axes.set_xlabel(_describe_similarity(inspection, names), fontsize=9)
    if len(names) < 2:
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.yaxis.get_major_locator().set_params(integer=True)
        axes.tick_params(labelsize=8)
    else:
        axes.set_xticks(middles, names, fontsize=8)
        axes.set_yticks(middles, names, fontsize=8, rotation=90, va="center")
        axes.tick_params(length=0)
    axes.figure.colorbar(image, ax=axes, shrink=0.7, pad=0.02).ax.tick_params(labelsize=8)


def _describe_similarity(inspection: Inspection, names: list[str]) -> str:
    if len(names) < 2:
        return f"row; mean over all pairs {inspection.pairs[0, 0]:.3f}"
    if len(names) > 4:
        return "prompts; their similarities are printed"
    return "\n".join(
        f"{first} and {second}: mean rows {inspection.pooled[i, j]:.3f}, "
        f"pairs {inspection.pairs[i, j]:.3f}"
        for i, first in enumerate(names)
        for j, second in enumerate(names)
        if i < j
    )
