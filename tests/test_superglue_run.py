"""CB from its JSONL to a prompt, its scores and its answers, by the commands of the README.

Once with rows that were made for the tests, and once with the real rows and T5's real vocabulary.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import superglue_rows
from tiny_models import CONFIG, random_params

from prompt_tuning import cli, load_prompt
from prompt_tuning.checkpoints.t5x import write_t5x
from prompt_tuning.config import ModelConfig, to_dict

pytestmark = pytest.mark.slow
START, STEPS = 11, 8
HERE = Path(__file__).parent
TASK = "taskless_super_glue_cb_v102"


def has_t5x() -> bool:
    done = subprocess.run([sys.executable, "-c", "import t5x.train"], capture_output=True)
    return done.returncode == 0


@pytest.fixture(scope="module", params=["made", "real"])
def work(request, tmp_path_factory):
    """A folder with a TFDS directory, a random backbone, and what the recipe leaves open."""
    folder = tmp_path_factory.mktemp("cb")
    if request.param == "made":
        source, vocabulary, size = superglue_rows.write_jsonl(folder / "jsonl"), "bytes", 384
    else:
        shared = request.getfixturevalue("shared_dir") / "data"
        source, size = shared / "superglue", 32128
        vocabulary = str(shared / "t5_vocab" / "sentencepiece.model")
    arguments = [f"--jsonl_dir={source}", f"--tfds_data_dir={folder / 'tfds'}"]
    assert cli.main(["prepare-superglue", *arguments]) == 0
    model = ModelConfig(**{**CONFIG.__dict__, "num_embeddings": size})
    write_t5x(folder / f"checkpoint_{START}", random_params(model), START)
    macros = {
        **{name.upper(): value for name, value in to_dict(model).items()},
        "VOCABULARY": vocabulary,
        "INITIAL_CHECKPOINT_PATH": str(folder / f"checkpoint_{START}"),
        "PROMPT_LENGTH": 5,
        "BATCH_SIZE": 8,
        "EVAL_PERIOD": 4,
        "EVAL_METHOD": "both",
        "EVAL_BOOTSTRAP": 20,  # of F1, by scikit-learn: half a minute otherwise
        "TRAIN_STEPS_RELATIVE": STEPS,
        # Labels are longer in bytes than in T5's pieces.
        "TASK_FEATURE_LENGTHS": {"inputs": 128, "targets": 16 if vocabulary == "bytes" else 8},
    }
    text = "".join(f"{name} = {value!r}\n" for name, value in macros.items())
    (folder / "small.gin").write_text(text)
    return folder


def command(work: Path, mode: str, recipe: str, *flags: str, **macros: object) -> list[str]:
    files = ["superglue/cb.gin", f"runs/{recipe}", str(work / "small.gin")]
    return [
        mode,
        *(f"--gin_file={name}" for name in files),
        *(f"--gin.{name}={value!r}" for name, value in macros.items()),
        f"--tfds_data_dir={work / 'tfds'}",
        *flags,
    ]


@pytest.fixture(scope="module")
def tuned(work):
    macros = {"MODEL_DIR": str(work / "run")}
    assert cli.main(command(work, "train", "prompt_tune.gin", **macros)) == 0
    return work / "run"


def scores(records, **wanted):
    return {
        r["name"]: r["value"]
        for line in records.read_text().splitlines()
        if all((r := json.loads(line)).get(k) == v for k, v in wanted.items())
    }


def test_training_records_t5s_metrics_beside_what_they_have_to_beat(tuned):
    names = {
        f"{metric}/{method}"
        for metric in ("mean_3class_f1", "accuracy")
        for method in ("generate", "rank")
    }
    file = tuned / "metrics.jsonl"
    last = START + STEPS
    for wanted in ({"prompt": "majority"}, {"prompt": "none"}, {"step": last, "prompt": None}):
        found = scores(file, task=TASK, split="validation", **wanted)
        assert set(found) == names
        assert all(0.0 <= value <= 100.0 for value in found.values())
    prompt, metadata = load_prompt(tuned / "prompts" / f"step_{last:06d}")
    assert prompt.shape == (5, CONFIG.embed_dim)
    assert metadata.label_words == ("entailment", "contradiction", "neutral")
    assert metadata.score == pytest.approx(
        np.mean([v for k, v in scores(file, step=last).items() if k.endswith("/generate")])
    )


def test_evaluation_gives_the_scores_of_training(work, tuned):
    prompts = [str(tuned / "prompts" / f"step_{START + n:06d}") for n in (4, 8)]
    macros = {"PROMPT_FILE": prompts, "EVAL_OUTPUT_DIR": str(work / "scores")}
    assert cli.main(command(work, "eval", "eval.gin", **macros)) == 0
    for n, prompt in zip((4, 8), prompts, strict=True):
        expected = scores(tuned / "metrics.jsonl", step=START + n, task=TASK, split="validation")
        assert scores(work / "scores" / "metrics.jsonl", prompt=prompt) == expected


def test_answers_are_those_of_the_evaluation(work, tuned):
    last = f"{START + STEPS:06d}"
    macros = {
        "PROMPT_FILE": str(tuned / "prompts" / f"step_{last}"),
        "INFER_OUTPUT_DIR": str(work / "answers"),
    }
    assert cli.main(command(work, "infer", "infer.gin", **macros)) == 0
    answers = (work / "answers" / f"{TASK}-predict.jsonl-00000-of-00001").read_text().splitlines()
    rows = (tuned / "inference_eval" / f"{TASK}-{last}.jsonl").read_text().splitlines()
    assert [json.loads(a)["prediction"] for a in answers] == [json.loads(r)["output"] for r in rows]


@pytest.mark.t5x
def test_both_engines_tune_the_same_prompt(work, tuned):
    """The same files, flags and seed without dropout: real batches, in the same order."""
    if not has_t5x():
        pytest.skip("upstream T5X cannot be imported; docs/t5x.md says how to install it")
    (work / "runs").mkdir()  # gin alone would take it for the package of its file runs/...
    macros = {"MODEL_DIR": str(work / "t5x")}
    arguments = command(work, "train", "prompt_tune.gin", "--engine=t5x", **macros)
    done = subprocess.run(
        [sys.executable, "-m", "prompt_tuning.cli", *arguments],
        cwd=work,
        env={**os.environ, "PYTHONPATH": str(HERE.parent), "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    last = f"{START + STEPS:06d}"
    (ours, known), (theirs, same) = (
        load_prompt(folder / "prompts" / f"step_{last}") for folder in (tuned, work / "t5x")
    )
    np.testing.assert_allclose(theirs, ours, atol=1e-4 * np.abs(ours).max())
    for name in ("task", "label_words", "backbone", "vocabulary", "init", "step", "config_hash"):
        assert getattr(same, name) == getattr(known, name), name
    folders = (tuned, work / "t5x")
    rows, predictions = (
        (folder / "inference_eval" / f"{TASK}-{last}.jsonl").read_text().splitlines()
        for folder in folders
    )
    assert len(rows) == len(predictions)
    same_text = [
        json.loads(r)["prediction"] == json.loads(p)["prediction"]
        for r, p in zip(rows, predictions, strict=True)
    ]
    assert all(same_text)
