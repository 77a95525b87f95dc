"""Writes are tried again while a disk is full or a folder is away, with real disks and folders."""

import signal
import threading
import time

import pytest

from prompt_tuning.evaluation import records
from prompt_tuning.runtime import signals
from prompt_tuning.runtime.replace_folder import write_with_retries


def after(seconds, act):
    """Does something in a thread, soon; real time, since a retry waits in it."""
    thread = threading.Timer(seconds, act)
    thread.start()
    return thread


def test_records_outlive_a_folder_that_was_away(tmp_path, capsys):
    folder = tmp_path / "mount" / "run"
    folder.mkdir(parents=True)
    log = records.RunLog(folder, step=-1)
    folder.parent.rename(tmp_path / "away")
    thread = after(0.5, lambda: (tmp_path / "away").rename(folder.parent))
    log.predictions(2, "cb", {"accuracy/rank": 75.0}, [])
    thread.join()
    log.close()
    (line,) = records.read_records(folder / "inference_eval" / "cb-metrics.jsonl")
    assert line["step"] == 2
    assert "cannot be written to (No such file or directory): trying again in 1 s" in (
        capsys.readouterr().out
    )


def test_what_does_not_pass_is_not_waited_for(tmp_path):
    (tmp_path / "file").write_text("")
    began = time.monotonic()
    with pytest.raises(NotADirectoryError):
        write_with_retries(lambda: (tmp_path / "file" / "x").write_text(""), tmp_path)
    assert time.monotonic() - began < 0.5


def test_a_signal_ends_the_waiting(tmp_path):
    began = time.monotonic()
    with signals.handled("t5x") as watch, watch.postponed():
        thread = after(0.3, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(FileNotFoundError):
            write_with_retries(lambda: (tmp_path / "away" / "x").write_text(""), tmp_path)
        thread.join()
    assert time.monotonic() - began < 3
