"""The benchmarks: what is measured once is kept, and a number is a median of rounds."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import run
import suites
import tables
from workload import Workload, measure

sys.path.pop()
PEAK = 1e11


def line(number, engine, seconds, **more):
    workload = dataclasses.replace(suites.BASE, engine=engine, **more)
    found = {"seconds_per_step": seconds, "flops_per_step": 5e10, "task": workload.task}
    return {"round": number, **dataclasses.asdict(workload), **found}


def test_numbers_are_medians_and_ratios_are_of_pairs():
    raw = [{"round": n, "dtype": "float32", "flops_per_second": PEAK} for n in range(3)]
    for number, slow in enumerate((1.0, 3.0, 1.0)):  # a round in which the machine was busy
        raw += [line(number, "ours", slow), line(number, "peft", 2.0 * slow, dtype="bfloat16")]
        raw += [line(number, "ours", 0.5 * slow, dtype="bfloat16")]
    found = tables.summarise(raw)
    narrow, ours, peft = found["results"]
    assert (narrow["dtype"], narrow["beside_ours"]) == ("bfloat16", pytest.approx(0.5))
    assert (ours["engine"], ours["seconds_per_step"], ours["rounds"]) == ("ours", 1.0, 3)
    assert ours["share_of_peak"] == pytest.approx(0.5)
    assert peft["beside_ours"] == pytest.approx(2.0)
    text = tables.describe({"command": "c", "machine": {}, **found})
    assert "| peft | bfloat16 | prompt_tuning | small | 8 | 128 |" in text
    assert "GFLOP/s: float32 100." in text


def test_what_was_measured_is_not_measured_again(tmp_path):
    """Nothing is started here: all of it is there, or there is no time left."""
    raw = tmp_path / "raw.jsonl"
    suite = [Workload(engine="start", size="base")]
    peak = {"dtype": "float32", "flops_per_second": PEAK}
    lines = [{"round": 0, **peak}, {"round": 0, **dataclasses.asdict(suite[0])}]
    raw.write_text("".join(json.dumps(one) + "\n" for one in lines) + '{"round": 1, "engi')
    assert run.measure(suite, raw, rounds=1, seconds=60.0) == 0
    assert run.measure(suite, raw, rounds=3, seconds=-1.0) == 4
    assert len(run.read(raw)) == 2


TINY = Workload(engine="ours", size="tiny", rows=4, inputs=16, targets=2, prompt=4, steps=2)


@pytest.mark.slow
def test_a_step_is_measured(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")  # one device
    found = run.once(TINY)
    assert found.get("failed") is None
    assert len(found["seconds"]) == TINY.steps
    assert min(found["seconds"]) > 0
    assert found["flops_per_step"] > 0
    assert found["save_bytes"] > 0
    assert found["programs"] == 1


@pytest.mark.slow
def test_a_measurement_that_fails_is_named_and_the_others_go_on(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    raw = tmp_path / "raw.jsonl"
    fails = dataclasses.replace(TINY, devices=3, rows=4)  # four rows, three devices
    done = {"round": 0, "dtype": "float32", "flops_per_second": PEAK}
    raw.write_text(json.dumps(done) + "\n" + json.dumps(line(0, "ours", 1.0, size="tiny")) + "\n")
    assert run.measure([fails], raw, rounds=1, seconds=600.0) == 0
    found = tables.summarise(run.read(raw))
    assert [one["size"] for one in found["results"]] == ["tiny"]
    text = tables.describe({"command": "c", "machine": {}, **found})
    assert "ours (dtype float32, size tiny, rows 4, inputs 16, prompt 4) failed: " in text
    assert run.measure([fails], raw, rounds=1, seconds=-1.0) == 1, "it is tried again"


def test_new_shapes_are_compiled_before_they_are_timed():
    calls = []
    workload = Workload(engine="ours", steps=4)
    found = measure(workload, calls.append, 0.0, lambda number: number % 2)
    assert calls == [1, 1, 2, 2, 3, 4]
    assert len(found["seconds"]) == 4


def test_every_suite_names_workloads_and_what_is_drawn(tmp_path):
    for name, (axis, workloads) in suites.SUITES.items():
        assert bool(axis) == bool(workloads) == (name != "superglue")
    assert {w.engine for w in suites.engines(suites.BASE)} >= {"ours"}
    both = suites.measured([suites.BASE], ("float32", "bfloat16"))
    assert {w.dtype for w in both} == {"float32", "bfloat16"}
    assert {w.dtype for w in suites.measured([suites.BASE], ("bfloat16",))} == {"bfloat16"}
    whole = suites.SUITES["accelerator"][1]
    assert {w.dtype for w in suites.measured(whole, ("bfloat16",))} == {"bfloat16"}
    rows = dataclasses.replace(suites.BASE, lengths=str(tmp_path / "boolq.json"), rows=2)
    Path(rows.lengths).write_text("[[7, 9], [30, 500]]")
    assert rows.row_lengths(3) == [30, 500]
    assert [len(x) for x in rows.tokens(2)[0]] == [7, 9]
    found = [(w.engine, w.dtype) for w in suites.engines(rows)][:3]
    assert found == [("ours", "float32"), ("ours", "bfloat16"), ("ours-512", "float32")]
