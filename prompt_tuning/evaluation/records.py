"""The records of a run or an evaluation: metrics.jsonl, rows, TensorBoard events.

They are plain files. A resumed run drops the records after the step of its restored state and
appends to the rest. A damaged line is dropped.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import types
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prompt_tuning.runtime.replace_folder import replace_text, write_with_retries

if TYPE_CHECKING:
    from tensorboardX import SummaryWriter

METRICS = "metrics.jsonl"
EVALUATIONS = "inference_eval"
NOTHING: Mapping[str, Any] = types.MappingProxyType({})
_METRIC = {"step": int, "name": str, "value": int | float, "task": str}  # in metrics.jsonl
_STEP = {"step": int}  # in the other files that are appended to


class RunLog:
    """The records of one folder, and the same numbers as TensorBoard events.

    Every record is in its file when the call that writes it returns.
    """

    def __init__(self, model_dir: Path, *, step: int, evaluation_due: bool = False) -> None:
        """Opens the logs and drops records beyond `step`, the step of the restored state.

        A run that was killed between an evaluation and its saved state repeats the evaluation. If
        `evaluation_due`, the evaluation of `step` itself is repeated. Unreadable lines are dropped.
        """
        self.model_dir = model_dir
        self._step = step
        self._writers: dict[str, SummaryWriter] = {}
        for path in _record_files(model_dir):
            cut_back(path, step, step - 1 if evaluation_due else step)

    def training(
        self,
        step: int,
        values: Mapping[str, float],
        *,
        task: str,
        timing: Mapping[str, float] = NOTHING,
    ) -> None:
        """Writes the training metrics up to `step`, one line for each value.

        `timing` goes to TensorBoard alone: metrics.jsonl is the same if a run is repeated.
        """
        self._write({"step": step, "task": task, "split": "train"}, values)
        self._draw("train", step, {**values, **{f"timing/{n}": v for n, v in timing.items()}})

    def scores(
        self, step: int, values: Mapping[str, float], *, task: str, split: str, prompt: str = ""
    ) -> None:
        """Writes scores, named `<metric>/<method>`, one line for each.

        `prompt` is empty for the run's own prompt. Otherwise it is "majority", "none" or, in
        `t5x eval`, a file. The split of a slice (`validation[:100]`) is recorded without the slice.
        """
        head: dict[str, Any] = {"step": step, "task": task, "split": re.split(r"\W", split)[0]}
        self._write(head, values, {"prompt": prompt} if prompt else {})
        if not prompt:
            drawn = {f"eval/{name}": value for name, value in values.items()}
            self._draw(f"{EVALUATIONS}/{task}", step, drawn)

    def _write(
        self,
        head: Mapping[str, Any],
        values: Mapping[str, float],
        tail: Mapping[str, Any] = NOTHING,
    ) -> None:
        lines = [{**head, "name": n, "value": float(v), **tail} for n, v in values.items()]
        self._append(METRICS, "".join(json.dumps(line) + "\n" for line in lines))

    def _append(self, name: str, text: str) -> None:
        path = self.model_dir / name
        write_with_retries(lambda: append_text(path, text), path)

    def _draw(self, folder: str, step: int, values: Mapping[str, float]) -> None:
        from tensorboardX import SummaryWriter  # slow: it imports PyTorch if that is installed

        if folder not in self._writers:
            self._writers[folder] = SummaryWriter(
                str(self.model_dir / folder), purge_step=self._step + 1
            )
        for name, value in values.items():
            self._writers[folder].add_scalar(name, float(value), step)
        self._writers[folder].flush()

    def predictions(
        self, step: int, task: str, metrics: Mapping[str, float], rows: Iterable[Mapping[str, Any]]
    ) -> None:
        """Writes the two files of a T5X evaluation: metrics, and every row with its output."""
        name = f"{EVALUATIONS}/{task}-metrics.jsonl"
        self._append(name, json.dumps({"step": step, **metrics}) + "\n")
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path, text = self.model_dir / EVALUATIONS / f"{task}-{step:06d}.jsonl", "".join(lines)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_with_retries(lambda: replace_text(path, text), path)

    def analysis(self, step: int, task: str, counts: Mapping[str, Any]) -> None:
        """Writes the error analysis: confusions, illegal outputs, agreement."""
        line = json.dumps({"step": step, **counts}, ensure_ascii=False)
        self._append(f"{EVALUATIONS}/{task}-analysis.jsonl", line + "\n")

    def read_predictions(self, step: int, task: str) -> list[dict[str, Any]]:
        """The rows that `predictions` wrote; [] if the file was removed."""
        return read_records(self.model_dir / EVALUATIONS / f"{task}-{step:06d}.jsonl")

    def close(self) -> None:
        """Flushes and closes the event files."""
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()


def append_text(path: Path, text: str) -> None:
    """Appends lines to a file; if that fails, the file is truncated to its old size."""
    path.parent.mkdir(exist_ok=True)
    size = path.stat().st_size if path.exists() else 0
    try:
        with path.open("a", encoding="utf-8", newline="") as file:
            file.write(text)
    except OSError:
        with contextlib.suppress(OSError):
            os.truncate(path, size)
        raise


def _record_files(folder: Path) -> list[Path]:
    """The files that are appended to at each evaluation."""
    evaluations = sorted((folder / EVALUATIONS).glob("*.jsonl"))
    files = (folder / METRICS, *evaluations)
    return [path for path in files if _is_appended(path) and path.exists()]


def _is_appended(path: Path) -> bool:
    return path.name == METRICS or path.stem.endswith(("-metrics", "-analysis"))


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a file of JSON lines; damaged lines are skipped."""
    return [record for _, record in _parse_lines(path)]


def read_points(model_dir: Path, name: str) -> list[tuple[int, float]]:
    """The step and the value of every record of this name."""
    records = read_records(model_dir / METRICS)
    return [(r["step"], r["value"]) for r in records if r["name"] == name]


def _parse_lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Each valid line and its record."""
    if not path.exists():
        return []
    text = path.read_bytes().decode("utf-8", errors="replace")
    needed = _METRIC if path.name == METRICS else _STEP if _is_appended(path) else {}
    lines = []
    for line in text.split("\n"):  # not `splitlines`: a row's text may hold other line ends
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and all(
            isinstance(record.get(name), kind) for name, kind in needed.items()
        ):
            lines.append((line, record))
    return lines


def cut_back(path: Path, step: int, scored: int) -> None:
    """Drops the records after `step`, and damaged lines, from a file of records.

    Scores of the run's own prompt are dropped after `scored`: those in metrics.jsonl, and all
    records of the other files.
    """

    def is_current(record: Mapping[str, Any]) -> bool:
        of_prompt = path.name != METRICS or (is_score(record) and "prompt" not in record)
        return record["step"] <= (scored if of_prompt else step)

    text = "".join(line + "\n" for line, record in _parse_lines(path) if is_current(record))
    if path.read_bytes() != text.encode():
        replace_text(path, text)


def is_score(record: Mapping[str, Any]) -> bool:
    """Whether a record is a score (`accuracy/rank`), not a training metric (`loss`)."""
    return "/" in record["name"]
