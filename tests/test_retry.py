"""Writes are tried again while a disk is full or a folder is away, with real disks and folders."""

import shutil
import signal
import threading
import time

import pytest

from prompt_tuning.checkpoints import retry
from prompt_tuning.runtime import signals
from prompt_tuning.training import report


def after(seconds, act):
    """Does something in a thread, soon; real time, since a retry waits in it."""
    thread = threading.Timer(seconds, act)
    thread.start()
    return thread


def test_records_outlive_a_folder_that_was_away(tmp_path, capsys):
    """The records are written anew, all of them, once there is a place again."""
    folder = tmp_path / "mount" / "run"
    folder.mkdir(parents=True)
    log = report.RunLog(folder, step=-1)
    log.training(1, {"loss": 2.0}, task="cb")
    whole = (folder / "metrics.jsonl").read_bytes()
    shutil.rmtree(folder.parent)
    thread = after(0.5, folder.parent.mkdir)
    log._append("metrics.jsonl", '{"step": 2}\n')
    thread.join()
    log.close()
    assert (folder / "metrics.jsonl").read_bytes() == whole + b'{"step": 2}\n'
    assert "cannot be written to (No such file or directory): trying again in 1 s" in (
        capsys.readouterr().out
    )


def test_a_half_written_record_is_written_anew(tmp_path):
    log = report.RunLog(tmp_path, step=-1)
    log._append("metrics.jsonl", '{"step": 1}\n')
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"st')  # what a full disk leaves
    log._append("metrics.jsonl", '{"step": 2}\n')
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'


def test_what_does_not_pass_is_not_waited_for(tmp_path):
    (tmp_path / "file").write_text("")
    began = time.monotonic()
    with pytest.raises(NotADirectoryError):
        retry.retried(lambda: (tmp_path / "file" / "x").write_text(""), tmp_path)
    assert time.monotonic() - began < 0.5


def test_a_signal_ends_the_waiting(tmp_path):
    began = time.monotonic()
    with signals.handled("t5x") as watch, watch.postponed():
        thread = after(0.3, lambda: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(FileNotFoundError):
            retry.retried(lambda: (tmp_path / "away" / "x").write_text(""), tmp_path)
        thread.join()
    assert time.monotonic() - began < 3
