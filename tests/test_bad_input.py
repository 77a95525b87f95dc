"""What people mistype and what disks do: one message and exit code 2, whatever it is; a fuzz of it.

Only mistakes that are found before anything heavy is loaded; the others stand beside the modules
that find them.
"""

import contextlib
import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import seqio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import as_prompt, random_params

from prompt_tuning import cli
from prompt_tuning.checkpoints import load
from prompt_tuning.checkpoints.conversion import convert
from prompt_tuning.checkpoints.t5x import read_step, read_t5x, write_t5x
from prompt_tuning.config import ConfigError, CorpusConfig, FileTask, gin_reader
from prompt_tuning.pretraining.documents import read_texts
from prompt_tuning.prompts.prompt_file import PromptMetadata, load_prompt, save_prompt
from prompt_tuning.runtime.replace_folder import replace_text
from prompt_tuning.serving.lines import Line, read_lines
from prompt_tuning.tasks import registry
from prompt_tuning.tasks.file_reader import read_source
from prompt_tuning.tasks.prepare import prepare_superglue
from prompt_tuning.tasks.vocabulary import load_seqio_vocabulary
from prompt_tuning.training.model_dir import repair_best
from prompt_tuning.vocabularies.vocabulary import load_vocabulary
from prompt_tuning.world.assets import tiny_checkpoint, tiny_vocabulary

ROOT = Path(__file__).resolve().parents[1]
DEMO = ("train", "--gin_file=demo.gin")


def run(capsys, *arguments: str) -> str:
    code = cli.main(arguments)
    captured = capsys.readouterr()
    assert code == 2, captured.err
    assert "Traceback" not in captured.err
    messages = [line for line in captured.err.splitlines() if line.startswith("t5x")]
    assert len(messages) == 1
    return captured.err


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("BATCH_SIZE=0", "BATCH_SIZE = 0: out of range. Expected at least 1"),
        ("BATCH_SIZE=3", "BATCH_SIZE = 3 does not divide by the 8 data-parallel devices"),
        ("BATCH_SIZE=8000000000", "BATCH_SIZE = 8000000000 with rows of 84 + 8 tokens"),
        ("EVAL_BATCH_SIZE=8000000000", "lower EVAL_BATCH_SIZE or the lengths"),
        ("PROMPT_LENGTH=8000000000", "lower BATCH_SIZE or the lengths"),
        ("PROMPT_LENGTH=-1", "PROMPT_LENGTH = -1: out of range. Expected at least 0"),
        ("EVAL_PERIOD=0", "EVAL_PERIOD = 0: out of range. Expected at least 1"),
        ("CHECKPOINT_PERIOD=-2", "CHECKPOINT_PERIOD = -2: out of range. Expected at least 1"),
        ("LEARNING_RATE=1e400", "LEARNING_RATE = inf: out of range. Expected a finite number"),
        ("LEARNING_RATE='fast'", "LEARNING_RATE must be a number, found 'fast'"),
        ("DROPOUT_RATE=1.0", "DROPOUT_RATE = 1.0: out of range. Expected at least 0 and below 1"),
        ("ATTENTION='cudnn'", "found HEAD_DIM = 32 and DTYPE = 'float32'"),
        ("ATTENTION='flash'", "ATTENTION must be one of 'xla', 'cudnn', found 'flash'"),
        ("RANDOM_SEED=-1", "RANDOM_SEED = -1: out of range. Expected at least 0 and below 2**32"),
        ("PROMPT_AVERAGE=1.0", "PROMPT_AVERAGE = 1.0: out of range. Expected at least 0 and bel"),
        ("PROMPT_METHOD='shared'", "there is no such method. Did you mean shared_prompt?"),
        ("INPUT_NOISE=-0.1", "INPUT_NOISE = -0.1: out of range. Expected at least 0"),
        ("NUM_MODEL_PARTITIONS=3", "does not divide the 8 devices"),
        ("TASK_FEATURE_LENGTHS={'input': 8}", "TASK_FEATURE_LENGTHS must be"),
        ("TRAIN_STEPS_RELATIVE=1000000000000", "Expected at least 1 and below 2**30"),
        ("TRAIN_STEPS_RELATIVE=0", "TRAIN_STEPS_RELATIVE = 0: out of range"),
        ("BATCH_SIZE=10**9", "cannot read `BATCH_SIZE=10**9`"),
        ("BATCH_SIZ=8", "Did you mean BATCH_SIZE?"),
        ("INITIAL_CHECKPOINT_PATH='nowhere'", "there is no T5X checkpoint at"),
        ("INITIAL_CHECKPOINT_PATH=''", "there is no T5X checkpoint at"),
        ("INITIAL_CHECKPOINT_PATH='s3://x/y'", "expected a local path or gs://bucket/path"),
        ("MODEL_DIR=''", "MODEL_DIR"),
        ("MODEL_DIR='gs://bucket/x'", "MODEL_DIR must be a local folder"),
        ("MODEL_DIR='/proc/x'", "MODEL_DIR /proc/x cannot be made"),
        ("MODEL_DIR='a\\0b'", "NUL character"),
        ("MODEL_DIR='file'", "cannot be made or is not a folder"),
        ("MODEL_DIR='locked'", "cannot be written to"),
    ],
)
def test_mistakes_in_settings(capsys, tmp_path, monkeypatch, setting, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "locked" / ".lock").mkdir(parents=True)
    assert message in run(capsys, *DEMO, "--gin.MODEL_DIR='m'", f"--gin.{setting}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"BATCH_SIZE = = 3\n", "mine.gin:1: cannot read"),
        (b"\xff\xfe\x00", "cannot read gin file"),
        (b"BATCH_SIZE = 3\x00\n", "cannot read"),
        (b"X = " + b"[" * 5000 + b"]" * 5000, "cannot read"),
        (b"BATCH_SIZE = (", "cannot read"),
        (b"import no_such_module", "cannot import no_such_module"),
        (b"include 'mine.gin'", "include each other in a circle"),
        (b"BATCH_SIZE = %BATCH_SIZE", "refer to each other in a circle"),
        (b"BATCH_SIZE = %NOTHING", "%NOTHING is not set anywhere"),
        (b"BATCH_SIZE = " + b"9" * 5000, "cannot read"),
    ],
)
def test_mistakes_in_gin_files(capsys, tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.gin").write_bytes(text)
    said = run(capsys, *DEMO, "--gin_file=mine.gin")
    assert message in said
    assert len(said) < 5000


# Fuzz: an error of ours, or success. Hypothesis repeats the same examples every time.

FUZZ = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
PIECES = ["BATCH_SIZE", "MODEL_DIR", "=", " ", "\n", "'x'", "3", "%", "include", "import", "@", "/"]
PIECES += ["(", "[", "{", ":", ",", ".", "'", '"', "\\", "#", "\t", "-", "None", "1e9", "\x00", "é"]


@FUZZ
@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
def test_any_gin_text(tmp_path, text):
    file = tmp_path / "fuzz.gin"
    file.write_text(text, encoding="utf-8")
    with contextlib.suppress(ConfigError):
        gin_reader.load(["demo.gin", str(file)])


LINES = [b"{", b"}", b'"inputs"', b":", b'"text"', b",", b"\n", b"\r", b"\xff", b"[", b"null", b" "]
LINES += [b'"\\ud800"', b"\x00", b'"prompt"', b"1e999", b'{"inputs": "a"}', b"\xef\xbb\xbf", b"["]


@FUZZ
@given(
    st.lists(st.sampled_from(LINES), max_size=12).map(b"".join), st.sampled_from(["jsonl", "txt"])
)
def test_any_file_of_lines(tmp_path, data, suffix):
    file = tmp_path / f"fuzz.{suffix}"
    file.write_bytes(data)
    with contextlib.suppress(ConfigError):
        assert all(isinstance(line.text, str) for line in read_lines_of(file))


def read_lines_of(file: Path) -> list[Line]:
    return read_lines(read_source(str(file), ["text"], FileTask()), prompt=None)


def test_lines_that_are_large_or_deep_are_no_more_than_that(tmp_path):
    file = tmp_path / "hostile.jsonl"
    file.write_text('{"inputs": "' + "a" * 10_000_000 + '"}\n')
    assert len(read_lines_of(file)[0].text) == 10_000_000
    file.write_text('{"inputs": ' + "[" * 100_000 + "]" * 100_000 + "}\n")
    with pytest.raises(ConfigError, match=r"hostile\.jsonl:1"):
        read_lines_of(file)


def damage(data: bytes, draw: random.Random) -> bytes:
    """Flips, cuts, repeats or overwrites, once to thrice."""
    for _ in range(draw.randint(1, 3)):
        kind, place = draw.randrange(4), draw.randrange(max(1, len(data)))
        if kind == 0:
            data = data[:place]
        elif kind == 1 and data:
            data = (
                data[:place] + bytes([data[place] ^ (1 << draw.randrange(8))]) + data[place + 1 :]
            )
        elif kind == 2:
            data = data[:place] + data[place : place + 8] * 2 + data[place + 8 :]
        else:
            data = data[:place] + draw.randbytes(4) + data[place + 4 :]
    return data


def test_damaged_prompts_are_refused(tmp_path):
    save_prompt(tmp_path / "p", as_prompt(np.ones((4, 8), np.float32)), PromptMetadata(task="x"))
    draw = random.Random(0)
    for number in range(60):
        folder = Path(shutil.copytree(tmp_path / "p", tmp_path / str(number)))
        file = draw.choice(sorted(folder.iterdir()))
        whole = file.read_bytes()
        file.write_bytes(damage(whole, draw))
        if file.read_bytes() != whole:
            with pytest.raises(ConfigError, match=file.stem):
                load_prompt(folder)


def test_damaged_checkpoints_are_refused_or_are_other_numbers(tmp_path):
    shapes = random_params()
    write_t5x(tmp_path / "c", shapes, 9)
    draw = random.Random(0)
    names = ["checkpoint", "target.decoder.logits_dense.kernel/.zarray"]
    names += ["target.decoder.logits_dense.kernel/0.0"]
    for number in range(30):
        file = tmp_path / "c" / names[number % 3]
        whole = file.read_bytes()
        file.write_bytes(damage(whole, draw))
        with contextlib.suppress(ConfigError):
            read_step(tmp_path / "c")
            params, _ = read_t5x(tmp_path / "c", shapes)
            assert all(params[name].shape == shapes[name].shape for name in shapes)
        file.write_bytes(whole)


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 52\n"


@pytest.mark.parametrize(
    ("source", "names"),
    [
        (tiny_checkpoint(), ["target.token_embedder.embedding/0.0", "checkpoint"]),
        (ROOT / "tests" / "golden" / "hf" / "t5_1_1", ["model.safetensors", "config.json"]),
    ],
)
def test_a_git_lfs_pointer_in_place_of_weights_is_named(tmp_path, source, names):
    model = load.read_model(source)
    shutil.copytree(source, tmp_path / "model")
    for name in names:
        (tmp_path / "model" / name).write_text(LFS)
        with pytest.raises(ConfigError, match=rf"{re.escape(name)} is a pointer of Git LFS"):
            dict(load.iter_backbone(tmp_path / "model", model))
        (tmp_path / "model" / name).unlink()


def test_a_git_lfs_pointer_in_place_of_a_prompt_or_a_vocabulary_is_named(tmp_path):
    save_prompt(tmp_path / "p", as_prompt(np.ones((4, 8), np.float32)), PromptMetadata())
    pointers = ("p/adapter_model.safetensors", "a.npy", "b/a.npy")
    (tmp_path / "b").mkdir()
    for file in pointers:
        (tmp_path / file).write_text(LFS)
    for place in ("p", "a.npy", "b"):
        with pytest.raises(ConfigError, match="is a pointer of Git LFS"):
            load_prompt(tmp_path / place)
    for file in ("spiece.model", "tokenizer.json"):
        (tmp_path / file).write_text(LFS)
        with pytest.raises(ConfigError, match=rf"VOCABULARY: .*{file} is a pointer of Git LFS"):
            load_vocabulary(str(tmp_path / file))


def test_a_git_lfs_pointer_in_place_of_data_is_named(tmp_path):
    (tmp_path / "RTE").mkdir()
    for file in ("rows.csv", "rows.jsonl", "rows.txt", "RTE/train.jsonl"):
        (tmp_path / file).write_text(LFS)
        for read in (
            lambda path: read_source(path, ["text"], FileTask()),
            lambda path: list(read_texts(path, CorpusConfig())),
        ):
            with pytest.raises(ConfigError, match=rf"{file} is a pointer of Git LFS"):
                read(str(tmp_path / file))
    with pytest.raises(ConfigError, match=r"RTE/train\.jsonl is a pointer of Git LFS"):
        prepare_superglue(tmp_path, tmp_path / "tfds")


@pytest.mark.parametrize(
    ("method", "cure"), [("PROMPT_TUNING", "PROMPT_FILE"), ("LORA", "merge_and_unload")]
)
def test_an_adapter_in_place_of_a_model_is_named(tmp_path, method, cure):
    config = {"peft_type": method, "base_model_name_or_path": "google/t5-small"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    message = rf"peft_type {method}.*google/t5-small.*{cure}"
    for read in (load.read_step, load.read_model):
        with pytest.raises(ConfigError, match=message):
            read(tmp_path)
    shutil.copy(ROOT / "tests" / "golden" / "hf" / "t5_1_1" / "config.json", tmp_path)
    with pytest.raises(ConfigError, match=message):  # config.json may be there, too
        dict(load.iter_backbone(tmp_path, load.read_model(tmp_path)))


def test_a_tilde_is_the_home_folder_in_every_path(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copy(tiny_vocabulary(), tmp_path / "t5.model")
    assert load_vocabulary("~/t5.model").sha256 == load_vocabulary("tiny").sha256
    assert load_seqio_vocabulary("~/t5.model").sentencepiece_model_file == str(
        tmp_path / "t5.model"
    )
    registry.register("tiny", tfds_data_dir="~/data")
    assert str(tmp_path / "data") == seqio.utils._TFDS_DATA_DIR_OVERRIDE
    (tmp_path / "superglue").mkdir()
    with pytest.raises(ConfigError, match=str(tmp_path / "superglue")):
        prepare_superglue("~/superglue", "~/data")
    shutil.copytree(tiny_checkpoint(), tmp_path / "tiny")
    (tmp_path / "tiny" / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=str(tmp_path / "tiny" / "config.json")):
        convert("~/tiny", "~/converted")
    registry.register("tiny")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"chunks":[32,384]', '"chunks":[1000000000,384]'),
        ('"shape":[32,384]', '"shape":[1000000000000,384]'),
    ],
)
def test_sizes_are_checked_before_memory_is_taken(tmp_path, old, new):
    """The first would take 1.5 TB for one chunk, the second as much for the array."""
    write_t5x(tmp_path / "c", random_params(), 9)
    file = tmp_path / "c" / "target.decoder.logits_dense.kernel" / ".zarray"
    text = file.read_text().replace(" ", "").replace("\n", "")
    assert old in text
    file.write_text(text.replace(old, new))
    with pytest.raises(ConfigError, match="decoder/logits_dense/kernel"):
        read_t5x(tmp_path / "c", random_params())


@pytest.mark.slow
def test_a_disk_that_is_full(tmp_path):
    """`ulimit -f` refuses what a full disk refuses; the state is not half written."""
    code = (
        "import resource, signal, sys, numpy as np\n"
        "from prompt_tuning.checkpoints.run_state import RunStateStore, SaveError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "store = RunStateStore(sys.argv[1])\n"
        "rng = np.random.default_rng(0)\n"
        "store.save(1, {'x': rng.normal(size=10)})\n"
        "store.wait()\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))\n"
        "try:\n"
        "    store.save(2, {'x': rng.normal(size=2**16)})\n"
        "    store.wait()\n"
        "except SaveError as error:\n"
        "    print(error.strerror)\n"
        "assert store.latest_step() == 1\n"
        "store.restore({'x': np.zeros(10)})\n"
        "store.save(2, {'x': rng.normal(size=10)})\n"
        "store.wait()\n"
        "assert store.latest_step() == 2\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (0, "File too large\n"), done.stderr
    assert "Traceback" not in done.stderr


def test_a_text_that_cannot_be_written_leaves_the_old_one(tmp_path):
    file = tmp_path / "matrix.txt"
    replace_text(file, "old\n")
    with pytest.raises(UnicodeEncodeError):
        replace_text(file, "new \ud800")
    with pytest.raises(OSError, match="too long"):
        replace_text(tmp_path / ("a" * 300), "new")
    assert file.read_text() == "old\n"
    assert [p.name for p in tmp_path.iterdir()] == ["matrix.txt"]


def test_the_best_prompt_is_made_anew_where_it_was_damaged(tmp_path, capsys):
    folder = tmp_path / "prompts"
    for name in ("best", "step_000012"):
        save_prompt(folder / name, as_prompt(np.ones((4, 8), np.float32)), PromptMetadata(task="x"))
    file = folder / "best" / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + b"x")
    repair_best(tmp_path, 12)
    assert file.read_bytes() == whole
    assert "from step_000012" in capsys.readouterr().out
    shutil.rmtree(folder / "best")
    repair_best(tmp_path, 12)
    assert file.read_bytes() == whole
    file.write_bytes(b"")
    shutil.rmtree(folder / "step_000012")
    with pytest.raises(ConfigError, match="step_000012"):
        repair_best(tmp_path, 12)


@pytest.mark.slow
def test_a_prompt_that_does_not_fit_the_disk_is_an_error_of_the_disk(tmp_path):
    """Which the run answers by saving its state elsewhere."""
    code = (
        "import resource, signal, sys, numpy as np\n"
        "from prompt_tuning.model.prompt import Prompt\n"
        "from prompt_tuning.prompts.prompt_file import PromptMetadata, save_prompt\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        "prompt = Prompt(np.ones((100, 128), np.float32))\n"
        "try: save_prompt(sys.argv[1], prompt, PromptMetadata(task='x'))\n"
        "except OSError as error: print('refused', error.errno)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "p")], capture_output=True, text=True, cwd=ROOT
    )
    assert ran.stdout == "refused 27\n", ran.stderr
    assert list(tmp_path.iterdir()) == []
