"""The command line answers in one message and an exit code, and calls the right room.

Whole runs (train, then infer) are tested where the rooms are; here, what stands before them.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from prompt_tuning import cli
from prompt_tuning.config import EvalRun, gin_reader

SIZES = ["--gin_file=models/t5_1_1_tiny.gin", "--gin_file=superglue/cb.gin"]
ROOT = Path(__file__).resolve().parents[1]


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = cli.main(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def run_process(*arguments: str, cwd: Path = ROOT, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "prompt_tuning.cli", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        **options,
    )


# Showing the configuration


def test_show_config_prints_a_gin_file_with_places(capsys, tmp_path):
    code, out, err = run(capsys, "show-config", "--gin_file=demo.gin", "--gin.BATCH_SIZE=16")
    assert code == 0
    assert "\nBATCH_SIZE = 16  # the command line\n" in out
    assert "PROMPT_LENGTH = 100 (runs/prompt_tune.gin:" in err
    assert "is overridden by 20 (demo.gin:" in err
    (tmp_path / "config.gin").write_text(out)
    again = gin_reader.load([str(tmp_path / "config.gin")]).run
    assert again == gin_reader.load(["demo.gin"], ["BATCH_SIZE=16"]).run


def test_all_ways_to_set_a_macro(capsys, tmp_path):
    (tmp_path / "mine.gin").write_text("NUM_DECODES = 4\nBATCH_SIZE = 8\n")
    _, out, _ = run(
        capsys,
        "show-config",
        "--gin_search_paths=nowhere," + str(tmp_path),
        "--gin_file",
        "demo.gin",
        "--gin_file=mine.gin",
        "--gin.BATCH_SIZE=16",
        "--gin_bindings=EVAL_PERIOD = 7",
        "--gin.MODEL_DIR='a=b'",
        "--gin.CLASS_LABELS=['a','b']",
        "--tfds_data_dir=/data's",
    )
    assert "NUM_DECODES = 4  # mine.gin:1\n" in out
    for line in ("BATCH_SIZE = 16", "EVAL_PERIOD = 7", "MODEL_DIR = 'a=b'"):
        assert f"\n{line}  # the command line\n" in out
    assert "\nCLASS_LABELS = ('a', 'b')  # the command line\n" in out
    assert '\nTFDS_DATA_DIR = "/data\'s"  # the command line\n' in out


def test_the_last_flag_wins(capsys):
    flags = ["--gin.BATCH_SIZE=1", "--gin_bindings=BATCH_SIZE=2", "--gin.BATCH_SIZE=3"]
    _, out, err = run(capsys, "show-config", "--gin_file=demo.gin", *flags)
    assert "\nBATCH_SIZE = 3  #" in out
    assert err.count("BATCH_SIZE") == 3


@pytest.mark.parametrize("engine", ["embedded", "t5x"])
def test_dry_run_prints_the_configuration_and_writes_nothing(capsys, tmp_path, monkeypatch, engine):
    monkeypatch.chdir(tmp_path)
    flags = ["--gin_file=demo.gin", f"--engine={engine}"]
    code, out, _ = run(capsys, "train", "--dry_run", *flags)
    assert (code, list(tmp_path.iterdir())) == (0, [])
    settings = run(capsys, "show-config", "--gin_file=demo.gin")[1]
    assert out.startswith(settings)
    devices = out.removeprefix(settings).strip().splitlines()  # comments, so that gin reads it back
    assert [line.split(":")[0] for line in devices] == ["# mesh", "# weights", "# batch"]


def test_show_config_of_an_evaluation(capsys, tmp_path):
    flags = [*SIZES, "--gin_file=runs/eval.gin", "--gin.EVAL_OUTPUT_DIR='out'"]
    code, out, err = run(capsys, "show-config", "--run_mode=eval", *flags)
    assert (code, err) == (0, "")
    (tmp_path / "config.gin").write_text(out)
    assert gin_reader.load([str(tmp_path / "config.gin")], run=EvalRun).run.eval_output_dir == "out"
    assert run(capsys, "eval", "--dry_run", *flags)[1] == out


def test_infer_needs_neither_task_nor_directory_with_input_and_output(capsys):
    flags = [
        "--gin_file=models/t5_1_1_tiny.gin",
        "--gin_file=runs/infer.gin",
        "--gin.TASK_FEATURE_LENGTHS={'inputs': 64, 'targets': 8}",
        "--dry_run",
    ]
    code, out, err = run(capsys, "infer", *flags, "--input=-", "--output=-")
    assert (code, err) == (0, "")
    assert "\nMIXTURE_OR_TASK_NAME = ()" in out
    code, _, err = run(capsys, "infer", *flags)
    assert code == 2
    assert "MIXTURE_OR_TASK_NAME: " in err
    assert "INFER_OUTPUT_DIR: " in err


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "Did you mean train?"),
        (["train"], "--gin_file"),
        (["train", "--gin_fil=x"], "Did you mean --gin_file?"),
        (["train", "--gin_file=demo.gin", "--dryrun"], "Did you mean --dry_run?"),
        (["train", "--gin_file=demo.gin", "--BATCH_SIZE=3"], "--gin.BATCH_SIZE=VALUE"),
        (["train", "demo.gin"], "--gin_file=demo.gin"),
        (["train", "--gin.BATCH_SIZE", "3"], "--gin.BATCH_SIZE=VALUE"),
        (["train", "--gin_file=demo.gin", "--engine=fast"], "'embedded', 't5x'"),
        (["train", "--gin_file"], "--gin_file"),
        (["train", "--gin_file=dmo.gin"], "dmo.gin"),
        (["show-config", "--gin_file=demo.gin", "--gin.BTCH_SIZE=1"], "Did you mean BATCH_SIZE?"),
        (["train", "--gin_file=demo.gin", "--gin.BATCH_SIZE='x'"], "BATCH_SIZE"),
        (["eval", "--gin_file=demo.gin"], "EVAL_OUTPUT_DIR: "),
        (["train", *SIZES, "--gin_file=runs/prompt_tune.gin"], "MODEL_DIR: "),
        (["prepare-superglue", "--jsonl_dir=x"], "--tfds_data_dir"),
        (["list-tasks", "--gin_file=demo.gin"], "--gin_file"),
        (["infer", "--gin_file=demo.gin", "--inputs=x"], "Did you mean --input?"),
    ],
)
def test_mistakes_are_one_message_and_exit_code_2(capsys, arguments, message):
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err
    command = f" {arguments[0]}" if arguments[0] in cli.COMMANDS else ""
    errors = [line for line in err.splitlines() if line.startswith("t5x")]
    assert len(errors) == 1
    assert errors[0].startswith(f"t5x{command}: error: ")


def test_t5xs_own_parameters_and_flags_belong_to_its_engine(capsys):
    own = ["--gin.train.eval_period=5", "--gin.EVAL_STEPS=2", "--logtostderr"]
    code, _, err = run(capsys, "train", "--gin_file=demo.gin", own[2])
    assert code == 2
    assert "--logtostderr" in err
    code, _, err = run(capsys, "train", "--gin_file=demo.gin", *own[:2])
    assert code == 2
    assert "train.eval_period: " in err
    assert "EVAL_STEPS" in err
    flags = ["--gin_file=demo.gin", "--engine=t5x", "--dry_run", *own]
    assert run(capsys, "train", *flags)[0] == 0


@pytest.mark.parametrize("name", ["t5x", "prompt-tuning"])
def test_both_names_are_installed(name):
    script = Path(sys.executable).with_name(name)
    if not script.exists():
        pytest.skip(f"the package is not installed beside {sys.executable}")
    done = subprocess.run([script, "trian"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith(f"{name}: error: unknown command trian")


# What the process does


def test_help_and_show_config_import_nothing_heavy():
    code = (
        "import sys\n"
        "from prompt_tuning import cli\n"
        "try:\n    cli.main(['--help'])\nexcept SystemExit as stop:\n    assert stop.code == 0\n"
        "assert 'gin' not in sys.modules\n"
        "assert cli.main(['show-config', '--gin_file=demo.gin']) == 0\n"
        "heavy = {'jax', 'flax', 'tensorflow', 'seqio', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert all(command in done.stdout for command in cli.COMMANDS)


def test_help_of_every_command_names_its_flags(capsys):
    for command in cli.COMMANDS:
        with pytest.raises(SystemExit) as stop:
            cli.main([command, "--help"])
        assert stop.value.code == 0
        out = capsys.readouterr().out
        assert f"usage: t5x {command}" in out
        reads_gin = command in ("train", "eval", "infer", "show-config", "plan", "submit-superglue")
        assert ("--gin.NAME=VALUE" in out) == ("--gin_file" in out) == reads_gin


def test_nothing_asked_for_shows_the_help(capsys):
    code, out, _ = run(capsys)
    assert code == 2
    assert "t5x train --gin_file=demo.gin" in out


@pytest.mark.parametrize(
    ("body", "code", "message"),
    [
        ("raise KeyboardInterrupt", 130, "t5x show-config: interrupted"),
        ("raise RuntimeError('a bug')", 1, "RuntimeError: a bug (MODULE, line 1)"),
    ],
)
def test_interrupts_and_bugs(tmp_path, body, code, message):
    (tmp_path / "my_module.py").write_text(body)
    (tmp_path / "mine.gin").write_text("import my_module\n")
    done = run_process("show-config", "--gin_file=mine.gin", cwd=tmp_path)
    assert done.returncode == code
    assert message.replace("MODULE", str(tmp_path / "my_module.py")) in done.stderr
    assert "Traceback" not in done.stderr
    if code == 1:
        (file,) = re.findall(r"is in (\S+\.txt)\.", done.stderr)
        assert "RuntimeError: a bug" in Path(file).read_text()
        Path(file).unlink()


@pytest.mark.slow
def test_the_first_run_is_quiet(tmp_path):
    """A few steps of the demo: on stderr are the overrides, and nothing of the libraries."""
    flags = ["--gin_file=demo.gin", "--gin.TRAIN_STEPS_RELATIVE=2", "--gin.EVAL_PERIOD=2"]
    flags += ["--gin.EVALUATOR_NUM_EXAMPLES=8", "--gin.EVAL_METHOD='rank'"]
    flags += ["--gin.EVAL_BASELINES=False", "--gin.LENGTH_GROUPS=1"]  # fewer programs to compile
    environment = {k: v for k, v in os.environ.items() if k != "TF_CPP_MIN_LOG_LEVEL"}
    done = subprocess.run(
        [sys.executable, "-m", "prompt_tuning.cli", "train", *flags],
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert [line for line in lines if not re.match(r"[A-Z_]+ = .* is overridden by ", line)] == []
    assert "2/2" in done.stdout
    assert (tmp_path / "runs/demo/prompts/best/prompt_tuning.json").exists()


def test_a_reader_that_stops_early_is_no_error(tmp_path):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe:
        done = subprocess.run(
            [sys.executable, "-m", "prompt_tuning.cli", "show-config", "--gin_file=demo.gin"],
            cwd=ROOT,
            stdout=pipe,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
        )
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert done.returncode == 1


def test_the_commands_of_the_data_room(capsys, tmp_path):
    row = {"premise": "It rains.", "hypothesis": "It is wet.", "label": "entailment", "idx": 0}
    (tmp_path / "CB").mkdir()
    (tmp_path / "CB" / "train.jsonl").write_text(json.dumps(row) + "\n")
    prepare = ["prepare-superglue", f"--tfds_data_dir={tmp_path / 'tfds'}"]
    code, out, err = run(capsys, "list-tasks")
    assert (code, err) == (0, "")
    names = out.splitlines()
    assert {"tiny_mood", "tiny_topic", "taskless_super_glue_cb_v102"} <= set(names)
    assert names == sorted(names)
    code, out, err = run(capsys, *prepare, f"--jsonl_dir={tmp_path}")
    assert (code, err) == (0, "")
    assert out.startswith("cb: train 1")
    assert list((tmp_path / "tfds").rglob("dataset_info.json"))
    code, out, err = run(capsys, *prepare, f"--jsonl_dir={tmp_path / 'nowhere'}")
    assert (code, out) == (2, "")
    assert err.startswith("t5x prepare-superglue: error: --jsonl_dir: ")
