"""Signals, locks and what nobody foresaw, on real processes."""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from prompt_tuning.config import ConfigError
from prompt_tuning.runtime import crash, lock

ROOT = Path(__file__).resolve().parents[1]
BUSY = {
    "in Python": "import time; time.sleep(100)",
    "in compiled code": "import ctypes; ctypes.CDLL(None).sleep(100)",
}


def start_busy(tmp_path: Path, work: str) -> subprocess.Popen:
    """A command that is busy at start-up, once that is so."""
    (tmp_path / "busy_module.py").write_text(f"print('ready', flush=True)\n{work}\n")
    (tmp_path / "busy.gin").write_text("import busy_module\n")
    process = subprocess.Popen(
        [sys.executable, "-m", "prompt_tuning.cli", "show-config", "--gin_file=busy.gin"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # The tests themselves may run under nohup, which a command respects.
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.2)
    return process


@pytest.mark.parametrize("work", BUSY)
@pytest.mark.parametrize(
    ("signum", "code", "name"),
    [
        (signal.SIGTERM, 143, "SIGTERM"),
        (signal.SIGINT, 130, "Ctrl-C"),
        (signal.SIGHUP, 129, "a closed terminal"),
    ],
)
def test_a_signal_ends_a_command_within_seconds(tmp_path, work, signum, code, name):
    process = start_busy(tmp_path, BUSY[work])
    began = time.monotonic()
    process.send_signal(signum)
    if work == "in compiled code" and signum != signal.SIGTERM:
        time.sleep(0.6)
        process.send_signal(signum)  # a second one is not waited for
    out, err = process.communicate(timeout=30)
    assert process.returncode == code
    assert f"t5x show-config: stopped by {name}" in err
    assert "Traceback" not in out + err
    assert time.monotonic() - began < (12 if work == "in compiled code" else 4)


def test_a_signal_that_is_sent_twice_at_once_is_one(tmp_path):
    """As `timeout` does it."""
    process = start_busy(tmp_path, BUSY["in Python"])
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (143, "t5x show-config: stopped by SIGTERM.\n")


def test_nohup_is_respected(tmp_path):
    (tmp_path / "x.py").write_text(
        "import signal\nfrom prompt_tuning.runtime import signals\n"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "with signals.handled('t5x'):\n"
        "    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN\n"
        "assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, tmp_path / "x.py"], env=env, check=True, timeout=60)


# MODEL_DIR's lock


def hold(folder: Path, ready) -> None:
    with lock.hold(folder, "MODEL_DIR"):
        ready.set()
        time.sleep(100)


def test_a_folder_is_one_runs_until_it_ends_or_dies(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    other = context.Process(target=hold, args=(tmp_path, ready))
    other.start()
    try:
        assert ready.wait(60)
        said = rf"in use by another run \(process {other.pid} on "
        with pytest.raises(ConfigError, match=said), lock.hold(tmp_path, "MODEL_DIR"):
            pass
    finally:
        other.kill()
        other.join()
    with lock.hold(tmp_path, "MODEL_DIR"):
        assert json.loads((tmp_path / lock.LOCK).read_text())["pid"] == os.getpid()
        with pytest.raises(ConfigError, match=f"process {os.getpid()} on"):
            lock.hold(tmp_path, "MODEL_DIR").__enter__()
    with lock.hold(tmp_path, "MODEL_DIR"):
        pass


def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / lock.LOCK).mkdir()
    with pytest.raises(ConfigError):
        lock.hold(tmp_path, "MODEL_DIR").__enter__()


# What nobody foresaw


def test_a_defect_is_one_message_and_a_file():
    try:
        raise RuntimeError("first line\nsecond line")
    except RuntimeError as error:
        error.add_note("The state of step 3 is saved.")
        said = crash.describe(error)
    assert "unexpected error: RuntimeError: first line (" in said
    assert "The state of step 3 is saved." in said
    assert "second line" not in said
    (file,) = re.findall(r"is in (\S+\.txt)\.", said)
    text = Path(file).read_text()
    Path(file).unlink()
    assert "second line" in text
    assert 'raise RuntimeError("first line' in text


def test_too_little_memory_is_said_in_words():
    said = crash.describe_refusal(MemoryError("std::bad_alloc"))
    assert "there is not enough memory. Lower BATCH_SIZE" in (said or "")
    error = RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 3221225472 bytes.")
    error.add_note("The state of step 3 is saved.")
    said = crash.describe_refusal(error) or ""
    assert "3.0 GiB" in said
    assert said.endswith("The state of step 3 is saved.")
    full = ValueError("RESOURCE_EXHAUSTED: Failed to write 194 bytes: No space left on device")
    assert crash.describe_refusal(full) is None


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(28, os.strerror(28), "/x/y"), "No space left on device (/x/y). Free some space"),
        (PermissionError(13, os.strerror(13), "/x"), "Permission denied (/x). Change its"),
        (OSError(30, os.strerror(30), b"/x"), "Read-only file system (/x). It is mounted"),
        (OSError(27, os.strerror(27)), "File too large. Raise the limit on the size"),
    ],
)
def test_a_refusal_of_the_system_is_the_users_to_mend(error, message):
    assert message in (crash.describe_refusal(error) or "")


def test_an_error_that_is_none_of_the_systems_refusals():
    assert crash.describe_refusal(ValueError("x")) is None
    assert crash.describe_refusal(ConnectionResetError(104, "reset")) is None
