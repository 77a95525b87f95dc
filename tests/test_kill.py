"""Killed or asked to stop at any moment, and the same command again: the bits of a straight run."""

import os
import signal
import time

import pytest
from kill_runs import (
    CACHE,
    START,
    STEPS,
    describe_end,
    finish,
    make_work,
    one_run,
    saved_steps,
    start,
)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kill")
    make_work(folder)
    return folder


@pytest.fixture(scope="module")
def straight(work):
    finish(work, "straight")
    return describe_end(work / "straight")


def wait_for_step(process, folder, step: int) -> None:
    deadline = time.monotonic() + 300
    while max(saved_steps(folder), default=0) < step:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)


def compiled_steps(work) -> set[str]:
    """The programs of steps that were compiled so far, by their hashes."""
    return {path.name for path in (work / CACHE).glob("jit_add-*-cache")}


@pytest.mark.slow
def test_killed_then_stopped_by_a_signal(work, straight):
    folder, compiled = work / "killed", compiled_steps(work)
    assert compiled
    process = start(work, "killed")
    wait_for_step(process, folder, START + 9)
    process.kill()
    process.communicate()
    assert max(saved_steps(folder)) < START + STEPS

    process = start(work, "killed")
    wait_for_step(process, folder, max(saved_steps(folder)) + 3)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 143
    assert time.monotonic() - began < 30
    last = max(saved_steps(folder))
    assert f"stopped by SIGTERM. The state of step {last} is saved in {folder}" in said
    assert last < START + STEPS

    finish(work, "killed")
    assert describe_end(folder) == straight
    assert compiled_steps(work) == compiled, "a step was compiled that was there"


@pytest.mark.weekly
@pytest.mark.parametrize("number", range(6))
def test_killed_at_random_moments(work, straight, number):
    """`python tests/kill_runs.py --kills=100` does this as often as one likes."""
    os.environ.pop("XLA_FLAGS", None)
    places, differing = one_run(work, number, 0, straight, (12.0, 20.0))
    assert differing == [], places
