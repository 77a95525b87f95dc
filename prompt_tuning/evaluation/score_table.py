"""Tables of scores as text in aligned columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Interval = tuple[float, float]
NO_INTERVALS: Mapping[str, Mapping[str, Interval]] = {}


def table(rows: Sequence[tuple[str, ...]]) -> str:
    """Text in aligned columns; the first row is the head.

    >>> print(table([("prompt", "accuracy"), ("none", "50.0")]))
    prompt  accuracy
    none        50.0
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def score_table(
    head: str,
    rows: Mapping[str, Mapping[str, float]],
    intervals: Mapping[str, Mapping[str, Interval]] = NO_INTERVALS,
) -> str:
    """A line for each row and a column for each metric, in per cent, with intervals where known.

    >>> scores = {"no prompt": {"accuracy/rank": 8.93}, "best": {"accuracy/rank": 75.0}}
    >>> print(score_table("cb", scores, {"best": {"accuracy/rank": (62.3, 84.46)}}))
    cb             accuracy/rank
    no prompt   8.9
    best       75.0 (62.3, 84.5)
    """
    columns = list(dict.fromkeys(name for values in rows.values() for name in values))
    cells = {
        (name, column): _cell(values.get(column), intervals.get(name, {}).get(column))
        for name, values in rows.items()
        for column in columns
    }
    # Pad the intervals, so that scores are aligned even if some rows have none.
    widths = {c: max(len(cells[name, c][1]) for name in rows) for c in columns}
    lines: list[tuple[str, ...]] = [(head, *columns)]
    for name in rows:
        parts = ((cells[name, column], widths[column]) for column in columns)
        lines.append((name, *(score + interval.ljust(width) for (score, interval), width in parts)))
    return table(lines)


def _cell(score: float | None, interval: Interval | None) -> tuple[str, str]:
    if score is None:
        return "-", ""
    return f"{score:.1f}", f" ({interval[0]:.1f}, {interval[1]:.1f})" if interval else ""
