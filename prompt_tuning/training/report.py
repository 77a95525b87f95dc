"""What a run leaves to read and look at: metrics.jsonl, TensorBoard, a progress bar, curves.

`loop.py` says what happened; this file decides where it is written.
"""

from __future__ import annotations

import json
import re
import sys
import time
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tqdm import tqdm

from prompt_tuning.checkpoints import retry
from prompt_tuning.runtime import records
from prompt_tuning.runtime.replace_folder import replace_file, replace_text

if TYPE_CHECKING:
    from tensorboardX import SummaryWriter

ItemT = TypeVar("ItemT")
METRICS = "metrics.jsonl"
EVALUATIONS = "inference_eval"
BASELINES = {"majority": ("--", "majority class"), "none": (":", "no prompt")}  # lines of curves
NOTHING: Mapping[str, Any] = types.MappingProxyType({})


class RunLog:
    """The records of one MODEL_DIR, and the same numbers as TensorBoard events."""

    def __init__(
        self, model_dir: Path, *, step: int, evaluation_due: bool = False, saved: str | None = None
    ) -> None:
        """Opens the logs, dropping records beyond `step`, the last one of which all is saved.

        A run killed between an evaluation and its saved state repeats that evaluation; what it had
        written of it would otherwise stand there twice. With `evaluation_due` that of `step` itself
        will be repeated. `saved` is what `pack` gave for the state: files that differ are made anew
        from it, and a line says so.
        """
        self.model_dir = model_dir
        self._step = step
        self._waits = False  # until `replace`
        self._writers: dict[str, SummaryWriter] = {}
        for said in records.restore(model_dir, records.unpack(saved), step) if saved else ():
            print(said, flush=True)
        scored = step - 1 if evaluation_due else step
        self._texts: dict[str, list[str]] = {}  # all that was written, by the name of the file
        for path in _record_files(model_dir):
            text = rewind(path, step, scored)
            self._texts[path.relative_to(model_dir).as_posix()] = [text]

    @classmethod
    def of_evaluation(cls, folder: Path) -> RunLog:
        """A log whose records are written by `replace`, all at once, when there are all of them."""
        log = cls.__new__(cls)
        log.model_dir, log._step, log._writers, log._texts, log._waits = folder, -1, {}, {}, True
        return log

    def replace(self) -> None:
        """Writes the records in the place of those of an evaluation before."""
        for path in _record_files(self.model_dir):
            self._texts.setdefault(path.relative_to(self.model_dir).as_posix(), [])
        for name, texts in self._texts.items():
            (self.model_dir / name).parent.mkdir(parents=True, exist_ok=True)
            replace_text(self.model_dir / name, "".join(texts))

    def pack(self, due: int | None = None) -> str:
        """All that was written so far, to be kept in the run's state.

        `due` is a step whose evaluation was broken off; what was written of that is left out.
        """
        texts = {name: "".join(parts) for name, parts in self._texts.items()}
        if due is not None:
            texts = {name: keep_lines(name, text, due, due - 1) for name, text in texts.items()}
        return records.pack(texts)

    def training(
        self,
        step: int,
        values: Mapping[str, float],
        *,
        task: str,
        timing: Mapping[str, float] = NOTHING,
    ) -> None:
        """Writes what was measured while training up to `step`, one line for each value.

        `timing` is for TensorBoard alone: records are what a run that is repeated repeats.
        """
        self._write({"step": step, "task": task, "split": "train"}, values)
        self._draw("train", step, {**values, **{f"timing/{n}": v for n, v in timing.items()}})

    def scores(
        self, step: int, values: Mapping[str, float], *, task: str, split: str, prompt: str = ""
    ) -> None:
        """Writes scores, named `<metric>/<method>`, one line for each.

        `prompt` names what was scored instead of the run's own prompt: "majority", "none", or in
        `t5x eval` a file. A slice of a split (`validation[:100]`) counts as the split.
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
        written = self._texts.setdefault(name, [])
        if not self._waits:
            retry.retried(lambda: _append_text(path, written, text), path)
        written.append(text)

    def _draw(self, folder: str, step: int, values: Mapping[str, float]) -> None:
        from tensorboardX import SummaryWriter  # which imports PyTorch, where that is installed

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
        """Writes T5X's two files of an evaluation: its metrics, and every row with its output."""
        name = f"{EVALUATIONS}/{task}-metrics.jsonl"
        self._append(name, json.dumps({"step": step, **metrics}) + "\n")
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path, text = self.model_dir / EVALUATIONS / f"{task}-{step:06d}.jsonl", "".join(lines)
        path.parent.mkdir(parents=True, exist_ok=True)
        retry.retried(lambda: replace_text(path, text), path)

    def analysis(self, step: int, task: str, counts: Mapping[str, Any]) -> None:
        """Writes what stands behind the scores: confusions, illegal outputs, agreement."""
        line = json.dumps({"step": step, **counts}, ensure_ascii=False)
        self._append(f"{EVALUATIONS}/{task}-analysis.jsonl", line + "\n")

    def read_predictions(self, step: int, task: str) -> list[dict[str, Any]]:
        """The rows that `predictions` wrote; none where they are gone."""
        return read_records(self.model_dir / EVALUATIONS / f"{task}-{step:06d}.jsonl")

    def close(self) -> None:
        """Flushes and closes the event files."""
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()


def _append_text(path: Path, written: Sequence[str], text: str) -> None:
    """Adds to a file of records; one that is not as long as what was written is written anew.

    So it is where an attempt has failed half-way, or the file system is another one by now.
    """
    path.parent.mkdir(exist_ok=True)
    size = sum(len(one.encode()) for one in written)
    if (path.stat().st_size if path.exists() else 0) == size:
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
    else:
        replace_text(path, "".join([*written, text]))


def _record_files(model_dir: Path) -> list[Path]:
    """The files that grow line by line."""
    found = (model_dir / EVALUATIONS).glob("*.jsonl")
    grow = [path for path in found if path.stem.endswith(("-metrics", "-analysis"))]
    return [path for path in (model_dir / METRICS, *sorted(grow)) if path.exists()]


def read_records(path: Path) -> list[dict[str, Any]]:
    """The JSON lines of a file; one that a kill or a bad disk has damaged is left out."""
    return [record for _, record in _parse_lines(path.name, _read(path))]


def _read(path: Path) -> str:
    return path.read_bytes().decode("utf-8", errors="replace") if path.exists() else ""


def _parse_lines(name: str, text: str) -> list[tuple[str, dict[str, Any]]]:
    """Each line that holds a record, and the record."""
    found = []
    wanted = {"step", "name", "value", "task"} if name == METRICS else {"step"}
    for line in text.split("\n"):  # not `splitlines`: a row's text may hold other line ends
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and wanted <= record.keys() and type(record["step"]) is int:
            found.append((line, record))
    return found


def keep_lines(name: str, text: str, step: int, scored: int) -> str:
    """The lines of a file of records without those of later steps.

    Scores of the run's own prompt, which are all that the files of evaluations hold, are dropped
    from behind `scored`.
    """

    def kept(record: Mapping[str, Any]) -> bool:
        own = name != METRICS or ("/" in str(record["name"]) and "prompt" not in record)
        return record["step"] <= (scored if own else step)

    return "".join(line + "\n" for line, record in _parse_lines(name, text) if kept(record))


def rewind(path: Path, step: int, scored: int) -> str:
    """`keep_lines` of a file, atomically; returns what is left."""
    text = keep_lines(path.name, found := _read(path), step, scored)
    if found != text:
        replace_text(path, text)
    return text


class Progress:
    """A bar on a terminal; plain lines, at most one in five seconds, where output is piped."""

    def __init__(self, *, start: int, total: int, rows_per_step: int) -> None:
        self._rows_per_step = rows_per_step
        self._total, self._step, self._start = total, start, start
        self._shown: dict[str, str] = {}
        self._began = self._last_line = time.monotonic()
        self._bar = (
            tqdm(total=total, initial=start, unit="step", dynamic_ncols=True)
            if sys.stderr.isatty()
            else None
        )

    def update(self, step: int, shown: Mapping[str, str] | None = None) -> None:
        """Moves on to `step` of the run and shows new values."""
        self._shown.update(shown or {})
        self._shown = {name: value for name, value in self._shown.items() if value}
        advance, self._step = step - self._step, step
        if self._bar is not None:
            elapsed = max(self._bar.format_dict["elapsed"], 1e-9)
            speed = (step - self._start) * self._rows_per_step / elapsed
            self._bar.set_postfix({**self._shown, "examples/s": f"{speed:.0f}"}, refresh=False)
            self._bar.update(advance)
        elif time.monotonic() - self._last_line >= 5.0:
            self._last_line = time.monotonic()
            self._print()

    def say(self, text: str) -> None:
        """Prints a line without tearing the bar."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stdout)
        else:
            print(text, flush=True)

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            self._bar.close()

    def _print(self) -> None:
        per_second = (self._step - self._start) / max(time.monotonic() - self._began, 1e-9)
        left = (self._total - self._step) / per_second if per_second else float("nan")
        values = "".join(f"{name} {value}, " for name, value in self._shown.items())
        speed = per_second * self._rows_per_step
        print(
            f"step {self._step}/{self._total}: {values}{speed:.0f} examples/s, {left:.0f} s left",
            flush=True,
        )


class Pace:
    """How long steps take from one record to the next, and whether devices had rows to work on."""

    def __init__(self) -> None:
        self._steps = 0  # since the last record, of this process: a resumed run's sums are older
        self._began = self._waited = 0.0

    def wait(self, batches: Iterator[ItemT], sums: Sequence[Mapping[str, Any]]) -> ItemT:
        """The batch of the next step, after steps of which these sums are made.

        A wait counts if the devices have nothing to do at its end. They may have become idle in the
        midst of it: what is counted is the most that they can have waited.
        """
        asked = time.perf_counter()
        if not self._steps:
            self._began, self._waited = asked, 0.0
        batch = next(batches)
        if not self._steps or all(value.is_ready() for value in sums[-1].values()):
            self._waited += time.perf_counter() - asked
        self._steps += 1
        return batch

    def values(self, sums: Sequence[Mapping[str, Any]], rows: int) -> dict[str, float]:
        """T5X's `timing/...` of the steps up to here, whose sums have been read; begins anew.

        `waiting_for_rows` is the share of `seconds` in which devices waited for rows. The time that
        the first step takes to compile is in it; evaluating and saving are not. Of no step there is
        nothing to say.
        """
        if not self._steps:
            return {}
        seconds = max(time.perf_counter() - self._began, 1e-9)
        steps, self._steps = self._steps, 0
        tokens = sum(float(one["tokens"]) for one in sums[-steps:])
        return {
            "seconds": seconds,
            "steps_per_second": steps / seconds,
            "seqs_per_second": steps * rows / seconds,
            "target_tokens_per_second": tokens / seconds,
            "waiting_for_rows": min(1.0, self._waited / seconds),
        }


def mean_values(sums: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What is recorded of some steps, given what `loss_fn` sums: means over their target tokens.

    The gradient's norm is a mean over the steps.
    """
    totals = {name: float(sum(one[name] for one in sums)) for name in sums[0]}
    tokens = max(totals["tokens"], 1.0)
    return {
        "loss": totals["loss"] / tokens,
        "cross_entropy": totals["cross_entropy"] / tokens,
        "z_loss": totals["z_loss"] / tokens,
        "token_accuracy": 100.0 * totals["correct"] / tokens,
        "gradient_norm": totals["gradient_norm"] / len(sums),
    }


def describe_training(values: Mapping[str, float], timing: Mapping[str, float]) -> dict[str, str]:
    """What the progress bar shows of a record; of waits only what is worth a look."""
    waiting = timing.get("waiting_for_rows", 0.0)
    return {
        "loss": f"{values['loss']:.3f}",
        "waiting for rows": f"{waiting:.0%}" if waiting >= 0.05 else "",
    }


def draw_curves(model_dir: Path) -> Path | None:
    """Draws loss and validation metrics over steps to curves.png; None with nothing to draw.

    Baselines are dashed lines, so that one look says what the prompt has added.
    """
    records = read_records(model_dir / METRICS)
    loss = [(r["step"], r["value"]) for r in records if r["name"] == "loss"]
    scores: dict[str, list[tuple[int, float]]] = {}
    baselines: dict[str, dict[str, float]] = {}
    for r in records:
        if not is_score(r):
            continue
        name = f"{r['task']} {r['name']}"
        if "prompt" in r:
            baselines.setdefault(name, {})[r["prompt"]] = r["value"]
        else:
            scores.setdefault(name, []).append((r["step"], r["value"]))
    if not loss and not scores:
        return None

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    if loss:
        left.plot(*zip(*loss, strict=True), color="#4063d8")
    left.set(title="training", xlabel="step", ylabel="loss per target token")
    draw_scores(right, scores, baselines)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    path = model_dir / "curves.png"
    with replace_file(path) as new:
        figure.savefig(new, dpi=150, format="png")
    return path


def draw_scores(
    axes: Any,
    scores: Mapping[str, Sequence[tuple[int, float]]],
    baselines: Mapping[str, Mapping[str, float]],
) -> None:
    """Draws scores over steps in a colour each; a baseline is a line of the same colour."""
    for number, (name, points) in enumerate(sorted(scores.items())):
        axes.plot(*zip(*points, strict=True), marker="o", color=f"C{number}", label=name)
        for base, value in baselines.get(name, {}).items():
            axes.axhline(value, ls=BASELINES[base][0], lw=1, color=f"C{number}")
    for base, (style, label) in BASELINES.items():  # once, in grey: the colours say of what
        if any(base in values for values in baselines.values()):
            axes.plot([], [], ls=style, lw=1, color="grey", label=label)
    axes.set(title="validation", xlabel="step", ylabel="per cent")
    if scores:
        axes.legend(fontsize="small")


def is_score(record: Mapping[str, Any]) -> bool:
    """Whether a record is of an evaluation (`accuracy/rank`), not of training (`loss`)."""
    return "/" in record["name"]
