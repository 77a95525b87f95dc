"""Damages files, settings and disks, runs the commands on them, and judges what they say.

    python tests/fault_runs.py --seed=0 --cases=20

Each kind of fault (`fault_cases.py`, `fault_places.py`) is tried `--cases` times with the real
command line, on a run, a prompt, checkpoints and rows that are small. A fault has to end in one
message that names what is damaged and says what to do (exit code 2), or in a command that makes up
for it and says so; where a checkpoint of others has no checksum a flipped bit may go unseen. All
else is a failure: a traceback, a library's own words, another exit code, a message that names
nothing, silence, lost work. Prints a table; the exit code is 1 if anything failed.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import faulthandler
import functools
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

HERE = Path(__file__).resolve().parent
SECONDS = 90  # that a command may take
REFUSED, RECOVERED, DONE = "refused", "recovered", "unharmed"

# What only a library or a defect says.
_RAW = re.compile(
    r"\b[A-Z][A-Za-z]*(?:Error|Exception|Warning)\b|StopIteration|Traceback|site-packages|"
    r"unexpected error|<class '|object at 0x|tensorstore_spec|source locations"
)
_NOISE = re.compile(r"^(?:WARNING|ERROR|INFO|[IWEF]\d{4})[: ]", re.MULTILINE)
_HINT = re.compile(
    r"(?i)\b(copy|set|give|choose|use|make|lower|raise|free|write|remove|check|did you mean|"
    r"install|train|record|restore|delete|save|prepare|expected|must|known|try|wait|put|change|"
    r"download|needs?|take|move|load|start|run|see)\b"
)
_RECOVERY = re.compile(r"damaged|restored from|was moved|is not what was written|SHA-256")


@dataclasses.dataclass(frozen=True)
class Case:
    """One fault: what is done to a copy of the work folder, and the command that meets it."""

    kind: str
    what: str
    command: list[str]
    damage: Callable[[], object] = lambda: None  # in the working directory
    allowed: tuple[str, ...] = (REFUSED,)
    names: tuple[str, ...] = ()  # one of them stands in the message
    check: Callable[[], str] = lambda: ""  # what is wrong in the end
    process: bool = False  # in a process of its own
    before: tuple[str, ...] = ()  # what that process begins with: setpriv and the like


@dataclasses.dataclass(frozen=True)
class Result:
    """What a command did."""

    code: int
    said: str  # both of its streams
    seconds: float


class TookTooLong(BaseException):
    """Raised in the middle of a command that hangs."""


def run(case: Case) -> Result:
    """Runs the command of a case in the working directory."""
    began = time.monotonic()
    if case.process:
        done = subprocess.run(
            [*case.before, sys.executable, "-m", "prompt_tuning.cli", *case.command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=2 * SECONDS,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)])},
        )
        text = done.stdout.decode(errors="replace")
        return Result(done.returncode, text, time.monotonic() - began)
    with _captured() as said, _limited():
        code = _call(case.command)
    return Result(code, "".join(said), time.monotonic() - began)


def _call(command: list[str]) -> int:
    from prompt_tuning import cli

    try:
        return cli.main(command)
    except TookTooLong:
        return -signal.SIGALRM
    except SystemExit as error:  # `--help`
        return int(error.code or 0)


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TookTooLong

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)


@functools.cache
def _streams() -> tuple[TextIO, TextIO]:
    """Streams on whatever the descriptors are; log handlers keep them, so they are never closed."""
    how: dict[str, Any] = {"mode": "w", "buffering": 1, "encoding": "utf-8", "closefd": False}
    out, error = (open(number, **how) for number in (1, 2))  # noqa: SIM115
    return out, error


@contextlib.contextmanager
def _captured() -> Iterator[list[str]]:
    """Both streams of the block, those of compiled libraries too."""
    said: list[str] = []
    sys.stdout.flush()
    sys.stderr.flush()
    streams = sys.stdout, sys.stderr
    kept = os.dup(1), os.dup(2)
    with tempfile.TemporaryFile() as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        sys.stdout, sys.stderr = _streams()
        try:
            yield said
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            sys.stdout, sys.stderr = streams
            for number, old in zip((1, 2), kept, strict=True):
                os.dup2(old, number)
                os.close(old)
            log.seek(0)
            said.append(log.read().decode(errors="replace"))


def judge(case: Case, result: Result) -> tuple[str, str]:
    """How a case ended, and what is wrong with that: "" if it is as it should be."""
    said = result.said
    if result.code == -signal.SIGALRM:
        return "hung", f"no end after {SECONDS} s"
    if found := _NOISE.search(said):
        return "noise", f"a line of a library: {said[found.start() :][:120]!r}"
    if result.code == 2:
        outcome, problem = REFUSED, _judge_message(case, said)
    elif result.code == 0:
        outcome = RECOVERED if _RECOVERY.search(said) else DONE
        problem = case.check()
        if DONE in case.allowed and RECOVERED not in case.allowed:
            outcome = DONE
    else:
        return f"exit code {result.code}", "wrong exit code"
    if outcome not in case.allowed:
        problem = problem or ("silently accepted" if outcome == DONE else f"was {outcome}")
    return outcome, problem


def _judge_message(case: Case, said: str) -> str:
    heads = [m.start() for m in re.finditer(r"^t5x[ \w-]*: ", said, re.MULTILINE)]
    if len(heads) != 1:
        return f"{len(heads)} messages"
    message = said[heads[0] :]
    if found := _RAW.search(message):
        return f"a library's words: {found.group()}"
    if case.names and not any(name in message for name in case.names):
        return f"names none of {', '.join(case.names[:4])}"
    if len(message) > 6000:
        return f"a message of {len(message)} characters"
    return "" if _HINT.search(message) else "says not what to do"


class Table:
    """Counts by kind, and the failures in full."""

    def __init__(self) -> None:
        self.counts: dict[str, collections.Counter[str]] = {}
        self.failures: list[str] = []

    def add(self, case: Case, outcome: str, problem: str, result: Result) -> None:
        """Counts a case."""
        counts = self.counts.setdefault(case.kind, collections.Counter())
        counts["cases"] += 1
        if problem:
            counts["FAILURES"] += 1
            said = result.said.strip()[-1500:]
            text = f"{case.kind}: {case.what}\n  t5x {' '.join(case.command)[:300]}\n  "
            self.failures.append(f"{text}{problem} (exit code {result.code}):\n{said}\n")
        else:
            counts[outcome] += 1

    def __str__(self) -> str:
        columns = ("cases", REFUSED, RECOVERED, DONE, "FAILURES")
        heads = ("fault", "cases", "refused by name", "recovered", "unharmed", "FAILURES")
        total = sum(self.counts.values(), collections.Counter())
        rows = [(k, *(str(c[n]) for n in columns)) for k, c in self.counts.items()]
        rows.append(("all", *(str(total[n]) for n in columns)))
        widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
        lines = [
            row[0].ljust(widths[0])
            + "".join(
                cell.rjust(width + 2) for cell, width in zip(row[1:], widths[1:], strict=True)
            )
            for row in (heads, *rows)
        ]
        return "\n".join(lines)


@contextlib.contextmanager
def workplace(template: Path) -> Iterator[Path]:
    """A copy of the work folder as the working directory."""
    folder = Path(tempfile.mkdtemp(prefix="fault-", dir=template.parent))
    shutil.copytree(template, folder, dirs_exist_ok=True)
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield folder
    finally:
        os.chdir(before)
        subprocess.run(["chmod", "-R", "u+rwX", str(folder)], check=False, capture_output=True)
        shutil.rmtree(folder, ignore_errors=True)


def try_case(template: Path, case: Case) -> tuple[str, str, Result]:
    """Runs one case in a workplace of its own and judges it."""
    with workplace(template):
        case.damage()
        result = run(case)
        return *judge(case, result), result


def main() -> int:
    """Prints the table and the failures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=20, help="of each kind (all, where few)")
    parser.add_argument("--only", default="", metavar="TEXT", help="kinds whose name holds it")
    parser.add_argument("--verbose", action="store_true", help="show every message")
    args = parser.parse_args()
    faulthandler.dump_traceback_later(3 * 3600, exit=True)
    import fault_cases
    import fault_places

    table = Table()
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
    with tempfile.TemporaryDirectory(prefix="fault-runs-") as folder:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{folder}/cache")
        template = fault_cases.make_work(Path(folder))
        for kinds in (fault_cases.KINDS, fault_places.KINDS):
            for name, make in kinds.items():
                if args.only not in name:
                    continue
                began = time.monotonic()
                draw = random.Random(f"{args.seed} {name}")
                for case in make(name, draw, args.cases, template):
                    outcome, problem, result = try_case(template, case)
                    table.add(case, outcome, problem, result)
                    if problem:
                        print(table.failures[-1], flush=True)
                    elif args.verbose:
                        print(f"{name}: {case.what}: {outcome}\n{result.said[-700:]}", flush=True)
                counts = table.counts.get(name, {})
                print(f"{name}: {dict(counts)}, {time.monotonic() - began:.0f} s", flush=True)
    print(table)
    return 1 if table.failures else 0


if __name__ == "__main__":
    sys.path[:0] = [str(HERE), str(HERE.parent)]
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    sys.exit(main())
