"""`--engine=t5x` up to the moment when T5X starts."""

import dataclasses
import re
import subprocess
import sys

import numpy as np
import pytest
from tiny_models import CONFIG, random_params, random_prompt

from prompt_tuning import cli
from prompt_tuning.checkpoints.t5x import write_t5x
from prompt_tuning.config import ConfigError, EvalRun, InferRun, gin_files, gin_reader, to_dict
from prompt_tuning.model.prompt import Prompt
from prompt_tuning.prompts.prompt_file import PromptMetadata, save_prompt
from prompt_tuning.upstream import engine


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    """gin files and bindings of a small run, started in `tmp_path`."""
    monkeypatch.chdir(tmp_path)
    write_t5x(tmp_path / "checkpoint_70", random_params(), 70)
    macros = {
        **{name.upper(): value for name, value in to_dict(CONFIG).items()},
        "VOCABULARY": "bytes",
        "MIXTURE_OR_TASK_NAME": "tiny_mood",
        "TASK_FEATURE_LENGTHS": {"inputs": 24, "targets": 8},
        "INITIAL_CHECKPOINT_PATH": "checkpoint_70",
        "MODEL_DIR": "run",
        "EVAL_OUTPUT_DIR": "scores",
        "INFER_OUTPUT_DIR": "answers",
        "TRAIN_STEPS_RELATIVE": 20,
    }
    text = "".join(f"{name} = {value!r}\n" for name, value in macros.items())
    (tmp_path / "small.gin").write_text(text)
    return ["runs/prompt_tune.gin", "small.gin"]


def load(files, *bindings, run=engine.Experiment):
    return gin_reader.load(files, bindings, run=run, engine="t5x")


def test_writes_a_file_that_says_everything(arguments, tmp_path):
    loaded = load(arguments, "EVAL_STEPS=3", "PROMPT_FILE=''")
    command = engine.prepare("train", loaded, ["--gin.train.gc_period=5"])
    file = tmp_path / "run/t5x.gin"
    assert command[1:4] == ["-m", "t5x.main", "--run_mode=train"]
    assert f"--gin_file={file}" in command
    assert command[-1] == "--gin.train.gc_period=5"
    text = file.read_text()
    assert "include './t5x/prompt_tune.gin'" in text
    assert f"MODEL_DIR = '{tmp_path / 'run'}'" in text
    assert f"INITIAL_CHECKPOINT_PATH = '{tmp_path / 'checkpoint_70'}'" in text
    assert "EVAL_STEPS = 3" in text  # T5X's own
    # It is also the record of the run: the same settings, read back.
    lines = [line for line in text.splitlines() if not line.startswith(("include", "EVAL_STEPS"))]
    (tmp_path / "again.gin").write_text("\n".join(["include 'runs/bindings.gin'", *lines]))
    assert load(["again.gin"]).run == engine.make_absolute(loaded.run)


@pytest.mark.parametrize(
    ("mode", "run", "folder"), [("eval", EvalRun, "scores"), ("infer", InferRun, "answers")]
)
def test_other_modes_have_files_of_their_own(arguments, tmp_path, mode, run, folder):
    command = engine.prepare(mode, load(arguments, run=run))
    assert f"--run_mode={mode}" in command
    assert f"include './t5x/{mode}.gin'" in (tmp_path / folder / "t5x.gin").read_text()


@pytest.mark.parametrize(
    ("binding", "message"),
    [
        ("EVAL_METHOD='rank'", "EVAL_METHOD = 'rank'"),
        ("RANK_SCORE='mean'", "RANK_SCORE"),
        ("CHECKPOINT_PERIOD=300", "CHECKPOINT_PERIOD"),
        ("TRAIN_SPLIT='trian'", "'trian'"),
        ("NUM_EMBEDDINGS=128", "128|does not fit"),
        ("EARLY_STOPPING_EVALS=3", "EARLY_STOPPING_EVALS"),
        ("TASK_METRIC='accuracy'", "TASK_METRIC"),
        ("PROMPT_AVERAGE=0.99", "PROMPT_AVERAGE"),
        ("INPUT_NOISE=0.1", "INPUT_NOISE"),
        ("RELATIVE_ATTENTION_NUM_BUCKETS=16", "32"),
        ("RELATIVE_ATTENTION_MAX_DISTANCE=64", "128"),
        ("MIXTURE_OR_TASK_NAME='tiny_mod'", "Did you mean tiny_mood"),
        ("MIXTURE_OR_TASK_NAME=('tiny_mood', 'tiny_topic')", "takes one"),
        ("NUM_DECODER_LAYERS=3", "does not fit"),
        ("INITIAL_CHECKPOINT_PATH='nowhere'", "nowhere"),
        ("TRAIN_STEPS=70", "TRAIN_STEPS = 70"),
        ("PROMPT_FILE='nowhere'", "nowhere"),
        ("MODEL_DIR='gs://bucket/run'", "gs://bucket/run"),
    ],
)
def test_mistakes_are_found_before_t5x_starts(arguments, tmp_path, binding, message):
    with pytest.raises(ConfigError, match=message):
        engine.prepare("train", load(arguments, binding))
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "gs:").exists()


@pytest.mark.parametrize(
    "name", ["prefix_tuning", "p_tuning_v2", "shared_prompt", "multitask", "mpt"]
)
def test_a_method_of_more_than_rows_is_refused_before_anything_is_read(arguments, name):
    loaded = load(arguments, f"PROMPT_METHOD={name!r}", "INITIAL_CHECKPOINT_PATH='nowhere'")
    with pytest.raises(ConfigError, match=rf"PROMPT_METHOD = '{name}'.*\n.*--engine=embedded"):
        engine.prepare("train", loaded)


@pytest.mark.parametrize(("mode", "run"), [("eval", EvalRun), ("infer", InferRun)])
def test_a_prompt_of_more_than_rows_is_refused_before_anything_is_read(arguments, mode, run):
    rows = random_prompt(3)
    prefix = np.zeros((CONFIG.num_encoder_layers, 2, 3, CONFIG.num_heads, CONFIG.head_dim))
    save_prompt("prefix", Prompt(rows[:0], encoder=prefix), PromptMetadata())
    save_prompt("shared", Prompt(rows), PromptMetadata(visibility="prompt"))
    for file, what in (("prefix", "a prompt of encoder"), ("shared", "a shared prompt")):
        bindings = f"PROMPT_FILE={file!r}", "CHECKPOINT_PATH='nowhere'"
        message = rf"PROMPT_FILE = '{file}', {what}:.*\n.*--engine=embedded"
        with pytest.raises(ConfigError, match=message):
            engine.prepare(mode, load(arguments, *bindings, run=run))


def test_attention_by_cudnn_is_not_upstreams(arguments):
    with pytest.raises(ConfigError, match="ATTENTION"):
        engine.prepare(
            "train", load(arguments, "ATTENTION='cudnn'", "DTYPE='bfloat16'", "HEAD_DIM=32")
        )


def test_of_both_ways_to_evaluate_ranking_is_left_out_and_said(arguments, capsys):
    engine.prepare("train", load(arguments, "EVAL_METHOD='both'"))
    assert (
        "EVAL_METHOD = 'both': upstream T5X generates; it does not rank" in capsys.readouterr().out
    )


def test_infer_needs_a_task(arguments):
    loaded = load(arguments, "MIXTURE_OR_TASK_NAME=()", run=InferRun)
    with pytest.raises(ConfigError, match="--input and --output"):
        engine.prepare("infer", loaded)


@pytest.mark.slow
def test_a_run_goes_on_with_settings_that_are_newer(arguments, tmp_path):
    engine.prepare("train", load(arguments))
    (tmp_path / "run/checkpoint_80").mkdir()
    file = tmp_path / "run" / engine.RESOLVED
    lines = file.read_text().splitlines(keepends=True)
    older = [line for line in lines if not line.startswith(("PROMPT_METHOD", "PROMPT_SETTINGS"))]
    assert len(older) == len(lines) - 2
    file.write_text("".join(older))
    with pytest.raises(ConfigError, match=r"PROMPT_METHOD = 'residual'"):
        engine.prepare("train", load(arguments, "PROMPT_METHOD='residual'"))
    engine.prepare("train", load(arguments))
    assert file.read_text() == "".join(lines)


@pytest.mark.slow
def test_another_experiment_in_model_dir_is_refused(arguments, tmp_path):
    engine.prepare("train", load(arguments))
    engine.prepare("train", load(arguments, "LEARNING_RATE=0.2"))  # nothing is trained yet
    engine.prepare("train", load(arguments))
    (tmp_path / "run/checkpoint_80").mkdir()
    engine.prepare("train", load(arguments, "TRAIN_STEPS_RELATIVE=40", "EVAL_PERIOD=5"))
    with pytest.raises(ConfigError, match=r"(?s)LEARNING_RATE = 0\.3.*LEARNING_RATE = 0\.5"):
        engine.prepare("train", load(arguments, "LEARNING_RATE=0.5"))
    (tmp_path / "other/checkpoints/80").mkdir(parents=True)
    with pytest.raises(ConfigError, match="embedded engine"):
        engine.prepare("train", load(arguments, "MODEL_DIR='other'"))


def test_absolute_paths_leave_names_and_addresses_alone(arguments, tmp_path):
    run = load(arguments, "PROMPT_FILE='p'", "TFDS_DATA_DIR='data'").run
    data = dataclasses.replace(run.data, vocabulary="gs://bucket/model")
    run = dataclasses.replace(run, data=data, initial_checkpoint_path="tiny")
    absolute = engine.make_absolute(run)
    assert absolute.data.vocabulary == "gs://bucket/model"
    assert absolute.initial_checkpoint_path == "tiny"
    assert absolute.prompt.file == str(tmp_path / "p")
    assert absolute.data.tfds_data_dir == str(tmp_path / "data")


# Without T5X --------------------------------------------------------------------------------------

WITHOUT_T5X = "import sys; sys.modules['t5x'] = None; "


def test_the_plugin_says_what_to_do():
    code = WITHOUT_T5X + "import prompt_tuning.upstream.plugin"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "upstream T5X cannot be imported" in result.stderr
    assert "docs/t5x.md" in result.stderr


def test_the_command_line_says_what_to_do(arguments, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "t5x", None)
    monkeypatch.delitem(sys.modules, "prompt_tuning.upstream.plugin", raising=False)
    files = [f"--gin_file={name}" for name in arguments]
    assert cli.main(["train", "--engine=t5x", *files]) == 2
    said = capsys.readouterr().err
    assert "--engine=t5x: upstream T5X cannot be imported" in said
    assert "docs/t5x.md" in said


def test_upstream_knows_every_dataclass_that_is_bound():
    """gin knows a class once a file names it: one that T5X's bindings leave out fails there."""
    folder = gin_files.gin_folder()
    bound = {
        line.split(".")[0]
        for line in (folder / "runs/bindings.gin").read_text().splitlines()
        if re.match(r"[A-Z]\w+\.\w+ = ", line)
    }
    known = set(re.findall(r"config\.([A-Z]\w+)", (folder / "t5x/bindings.gin").read_text()))
    assert bound <= known
