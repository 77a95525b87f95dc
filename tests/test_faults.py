"""A sample of `fault_runs.py` in every run of the tests; the whole of it is slow."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import fault_cases
import fault_places
import pytest
import tiny_models
from fault_runs import DONE, REFUSED, Case, Result, judge, try_case

from prompt_tuning.config import ConfigError, DataConfig, Experiment, FileTask, to_dict
from prompt_tuning.training.model_dir import refuse_other_experiment

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    return fault_cases.make_work(tmp_path_factory.mktemp("faults"), small=True)


def sample(kind: str, template: Path, cases: int) -> list[Case]:
    make = {**fault_cases.KINDS, **fault_places.KINDS}[kind]
    draw = random.Random(kind)
    found = list(make(kind, draw, cases, template))
    return draw.sample(found, min(cases, len(found)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "cases", "commands"),
    [
        ("the array of a prompt", 12, ("verify", "convert-prompt")),
        ("prompts of others", 10, ("verify", "convert-prompt")),
        ("files of a run's state", 6, ("verify",)),
        ("files of a T5X checkpoint", 8, ("verify", "convert")),
        ("parameters of a T5X checkpoint", 14, ("verify",)),
        ("tensors of a Hugging Face model", 5, ("convert",)),
        ("manifests", 5, ("verify",)),
        ("fuzz of gin text", 5, ("show-config",)),
        ("every number", 15, ("show-config",)),
    ],
)
def test_a_sample_of_faults(template, kind, cases, commands):
    failures = []
    for case in sample(kind, template, cases):
        if case.command[0] not in commands:
            continue
        outcome, problem, result = try_case(template, case)
        if problem:
            failures.append(f"{case.what}: {outcome}, {problem}\n{result.said[-500:]}")
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize(
    ("code", "said", "problem"),
    [
        (2, "t5x verify: error: p is damaged. Copy it again.", ""),
        (2, "t5x verify: error: KeyError: 'p'. Copy it again.", "a library's words"),
        (2, "t5x verify: error: it is damaged. Copy it again.", "names none of p/x"),
        (2, "t5x verify: error: p/x is bad.", "says not what to do"),
        (2, "Traceback ...", "0 messages"),
        (1, "t5x verify: unexpected error", "wrong exit code"),
        (0, "all good", "silently accepted"),
        (0, "WARNING:absl:Given directory", "a line of a library"),
    ],
)
def test_what_counts_as_a_failure(code, said, problem):
    names = ("p/x", "p is")
    found = judge(Case("", "", ["verify", "p"], names=names), Result(code, said, 0.0))[1]
    assert found.startswith(problem)
    assert bool(found) == bool(problem)
    assert judge(Case("", "", [], allowed=(DONE, REFUSED)), Result(0, "", 0.0)) == (DONE, "")


def test_a_run_with_label_words_is_the_same_experiment(tmp_path):
    """Their default is no mapping, so that its name is none of a setting of theirs."""
    files = FileTask(train_file="x.csv", label_words={"1": "yes", "0": "no"})
    lengths = {"inputs": 8, "targets": 4}
    data = DataConfig(mixture_or_task_name="x", task_feature_lengths=lengths, files=files)
    run = Experiment(
        model_dir="x", initial_checkpoint_path="tiny", model=tiny_models.CONFIG, data=data
    )
    meta = {"experiment": json.loads(json.dumps(to_dict(run)))}
    refuse_other_experiment(meta, run, tmp_path)
    del meta["experiment"]["data"]["files"]["eval_share"]  # of an older version
    meta["experiment"]["data"]["files"]["quote_char"] = '"'  # its default
    refuse_other_experiment(meta, run, tmp_path)
    meta["experiment"]["data"]["files"]["label_words"]["1"] = "no"
    with pytest.raises(ConfigError, match=r"label_words\.1.*'no'.*'yes'"):
        refuse_other_experiment(meta, run, tmp_path)


@pytest.mark.weekly
def test_all_faults():
    """Half an hour."""
    command = [sys.executable, HERE / "fault_runs.py", "--cases=12"]
    done = subprocess.run(command, cwd=HERE.parent, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:]
