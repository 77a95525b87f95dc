"""The lines and tables that a person reads while a run goes on and when it ends."""

import io
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prompt_tuning.evaluation import records
from prompt_tuning.evaluation.score_table import score_table
from prompt_tuning.training import model_dir
from prompt_tuning.training.progress import Progress, StepTimer, describe_training


def test_piped_progress_is_plain_lines(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr", io.StringIO())
    progress = Progress(start=10, total=40, rows_per_step=8)
    progress._last_line -= 5.0  # as if five seconds had passed
    progress.update(20, {"loss": "1.500"})
    progress.update(21)
    progress.print_line("step 21/40: accuracy 50.0")
    progress.close()
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("step 20/40: loss 1.500, ")
    assert "examples/s" in first
    assert first.endswith(" s left")
    assert second == "step 21/40: accuracy 50.0"


def test_progress_before_the_first_value_is_no_empty_list(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr", io.StringIO())
    progress = Progress(start=0, total=40, rows_per_step=8)
    progress._last_line -= 5.0
    progress.update(1)
    assert capsys.readouterr().out == "step 1/40\n"


def test_speed_and_time_left_do_not_count_what_was_compiled(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr", io.StringIO())
    progress = Progress(start=0, total=30, rows_per_step=8)
    began = time.monotonic()
    outer = jax.jit(lambda x: sum(jax.jit(lambda x: jnp.sort(x))(x * n) for n in range(60)))
    outer(jnp.ones(8)).block_until_ready()  # two programs, one traced within the other
    compiled = time.monotonic() - began
    assert 0.5 * compiled < progress._compiling.seconds() <= compiled
    time.sleep(0.2)
    progress._last_line -= 5.0
    progress.update(10, {"loss": "1.500"})
    assert 0.2 <= 10 / progress.steps_per_second < 0.2 + 0.6 * compiled
    left = re.search(r"(\d+) s left", capsys.readouterr().out)
    assert int(left[1]) == round(20 / progress.steps_per_second)
    progress.close()


def test_what_is_not_worth_a_look_is_not_shown(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr", io.StringIO())
    progress = Progress(start=0, total=40, rows_per_step=8)
    for step, waiting in ((1, 0.25), (2, 0.04)):
        progress._last_line -= 5.0
        progress.update(step, describe_training({"loss": 1.5}, {"waiting_for_rows": waiting}))
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("step 1/40: loss 1.500, waiting for rows 25%, ")
    assert "waiting" not in second


WAIT = 0.03


def made_slowly(number):
    for _ in range(number):
        time.sleep(WAIT)
        yield "batch"


def sums_of(tokens):
    """What a step that is over leaves."""
    return {"tokens": jax.block_until_ready(jnp.float32(tokens))}


def test_a_device_that_has_nothing_to_do_waits_for_rows():
    timer, sums = StepTimer(), []
    batches = made_slowly(4)
    for _ in range(4):
        assert timer.next_batch(batches, sums) == "batch"
        sums.append(sums_of(6))
    values = timer.values(sums, rows=8)
    assert 4 * WAIT <= values["waiting_for_rows"] * values["seconds"] <= values["seconds"]
    assert values["steps_per_second"] == pytest.approx(4 / values["seconds"])
    assert values["seqs_per_second"] == pytest.approx(32 / values["seconds"])
    assert values["target_tokens_per_second"] == pytest.approx(24 / values["seconds"])


@jax.jit
def work(x):
    """Longer than a wait, on any processor."""
    return jax.lax.fori_loop(0, 100, lambda _, x: jnp.tanh(x @ x), x).sum()


def test_a_device_that_is_at_work_does_not_wait():
    start = jnp.ones((512, 512))
    jax.block_until_ready(work(start))  # compiled
    timer, batches = StepTimer(), made_slowly(3)
    timer.next_batch(batches, [])  # nothing is under way yet
    for _ in range(2):
        sums = [{"tokens": work(start)}]
        timer.next_batch(batches, sums)
        assert not sums[0]["tokens"].is_ready()
        jax.block_until_ready(sums)
    values = timer.values(sums, rows=8)
    waited = values["waiting_for_rows"] * values["seconds"]
    assert WAIT <= waited <= values["seconds"] - 2 * WAIT


def test_steps_of_a_run_that_was_stopped_are_not_of_this_one():
    timer = StepTimer()
    older = [{"tokens": np.float32(1000)}]  # as they come out of a saved state
    assert timer.values(older, rows=8) == {}
    timer.next_batch(made_slowly(1), older)
    values = timer.values([*older, sums_of(6)], rows=8)
    assert values["steps_per_second"] * values["seconds"] == pytest.approx(1)
    assert values["target_tokens_per_second"] * values["seconds"] == pytest.approx(6)
    assert timer.values([], rows=8) == {}, "the next record begins anew"


def summary(folder, tuned):
    log = records.RunLog(folder, step=-1)
    log.scores(0, {"accuracy/rank": 50.0}, task="cb", split="validation", prompt="majority")
    log.scores(4, {"accuracy/rank": tuned}, task="cb", split="validation")
    log.close()
    return model_dir.describe_result(folder, 4, None)


@pytest.mark.parametrize(("tuned", "said"), [(49.0, True), (50.0, True), (51.0, False)])
def test_a_prompt_that_does_not_beat_the_majority_is_said(tmp_path, tuned, said):
    assert ("note: no score of the best prompt on cb is above" in summary(tmp_path, tuned)) == said


@pytest.mark.parametrize("values", [{"a": {"x/rank": 1.0}, "b": {"y/rank": 2.0}}])
def test_a_score_that_is_missing_is_a_dash(values):
    assert score_table("cb", values).splitlines() == [
        "cb  x/rank  y/rank",
        "a      1.0       -",
        "b        -     2.0",
    ]
