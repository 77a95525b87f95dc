"""Mistaken settings, rows and places, for `fault_runs.py`: gin text, numbers, disks, clouds."""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from fault_cases import INFER, TRAIN, evaluate, flip, infer, train, truncate
from fault_runs import DONE, REFUSED, Case

Act = Callable[[], object]


def write(file: str, data: str | bytes) -> Act:
    return lambda: Path(file).write_bytes(data.encode() if isinstance(data, str) else data)


def mistyped(kind: str, draw: random.Random, cases: int, template: Path) -> Iterator[Case]:
    """What people mistype on the command line and in gin files."""
    lines: list[tuple[list[str], str]] = [
        (["trian"], "train"),
        (["train"], "--gin_file"),
        (["train", "--gin_fiel=demo.gin"], "--gin_file"),
        (["train", "demo.gin"], "demo.gin"),
        (["train", "--gin_file=dmeo.gin"], "dmeo.gin"),
        (["train", "--gin_file="], "--gin_file"),
        (["train", "--gin_file=."], "."),
        (["train", "--gin_file=rows.csv"], "rows.csv"),
        (["train", "--gin_file=demo.gin", "--gin.BATCH_SIZ=3"], "BATCH_SIZE"),
        (["train", "--gin_file=demo.gin", "--gin.BATCH_SIZE"], "BATCH_SIZE"),
        (["train", "--gin_file=demo.gin", "--BATCH_SIZE=3"], "BATCH_SIZE"),
        (["train", "--gin_file=demo.gin", "--gin.=3"], "=3"),
        (["train", "--gin_file=demo.gin", "--gin.BATCH_SIZE="], "BATCH_SIZE"),
        (["train", "--gin_file=demo.gin", "--gin.TRAIN_FILE=x.csv"], "TRAIN_FILE"),
        (["train", "--gin_file=models/t5_1_1_base.gin"], "runs/"),
        (["train", "--gin_file=runs/prompt_tune.gin"], "NUM_"),
        (["train", "--gin_file=demo.gin", "--gin.MIXTURE_OR_TASK_NAME='tiny_mod'"], "tiny_mood"),
        (["train", "--gin_file=demo.gin", "--gin.MIXTURE_OR_TASK_MODULE='nowhere.x'"], "nowhere"),
        (["train", "--gin_file=demo.gin", "--gin.MIXTURE_OR_TASK_NAME=''"], "MIXTURE_OR_TASK_NAME"),
        (["train", "--gin_file=demo.gin", "--gin.PROMPT_INIT='rnd'"], "PROMPT_INIT"),
        (["train", "--gin_file=demo.gin", "--gin.Experiment.model_dri='x'"], "model_dir"),
        (["train", "--gin_file=demo.gin", "--engine=t6x"], "t6x"),
        (["train", "--gin_file=demo.gin", "--process_count=two"], "process_count"),
        (["train", "--gin_file=demo.gin", "--process_count=2"], "process_"),
        (["train", "--gin_file=demo.gin", "--process_index=-1", "--process_count=2"], "process_"),
        (["verify"], "PATH"),
        (["verify", "nowhere"], "nowhere"),
        (["verify", "in.jsonl"], "in.jsonl"),
        (["verify", "x" * 5000], "long"),
        (["convert", "--input=nowhere", "--output=x"], "nowhere"),
        (["convert", "--input=hf", "--output=hf"], "hf"),
        (["convert", "--input=hf", "--output=x", "--max_shard_size=0GB"], "max_shard_size"),
        (["convert", "--input=hf", "--output=x", "--step=-1"], "step"),
        (["convert", "--input=hf", "--output=x", "--step=x"], "step"),
        (["convert", "--input=hf", "--output=in.jsonl"], "in.jsonl"),
        (["convert", "--input=hf", "--output=in.jsonl/x"], "in.jsonl"),
        (["convert-prompt", "--input=run/prompts/best", "--output=x", "--format=x"], "format"),
        (
            ["convert-prompt", "--input=run/prompts/best", "--output=x", "--format=t5x"],
            "checkpoint",
        ),
        (["convert-prompt", "--input=nowhere", "--output=x", "--format=npy"], "nowhere"),
        (["inspect-prompt", "nowhere", "--checkpoint=checkpoint_9"], "nowhere"),
        (["inspect-prompt", "run/prompts/best", "--checkpoint=nowhere"], "nowhere"),
        (
            ["inspect-prompt", "run/prompts/best", "--checkpoint=checkpoint_9", "--neighbours=0"],
            "neighbours",
        ),
        (
            ["inspect-prompt", "run/prompts/best", "--checkpoint=checkpoint_9", "--plot=x.txt"],
            "x.txt",
        ),
        (
            [
                "inspect-prompt",
                "run/prompts/best",
                "--checkpoint=checkpoint_9",
                "--json=in.jsonl/x",
            ],
            "in.jsonl",
        ),
        (["train-vocabulary", "--input=nowhere", "--output=v", "--size=300"], "nowhere"),
        (
            ["train-vocabulary", "--input=in.jsonl", "--field=inputs", "--output=v", "--size=0"],
            "size",
        ),
        (["train-vocabulary", "--input=in.jsonl", "--output=v", "--size=300"], "in.jsonl"),
        (["train-vocabulary", "--input=rows.csv", "--output=v", "--size=99999"], "size"),
        (["prepare-superglue", "--jsonl_dir=nowhere", "--tfds_data_dir=x"], "nowhere"),
        (["prepare-superglue", "--jsonl_dir=.", "--tfds_data_dir=x"], "jsonl"),
        (["submit-superglue", "--check=nowhere"], "nowhere"),
        (["submit-superglue", "--check=run"], "run"),
        (["submit-superglue", "--check=in.jsonl"], "in.jsonl"),
        (["submit-superglue"], "--submission_dir"),
        (["submit-superglue", "--submission_dir=x"], "--gin_file"),
        (["plan", "--gin_file=demo.gin", "--topology=x:y"], "x:y"),
        (["plan", "--gin_file=demo.gin", "--topology=cpu:0"], "cpu:0"),
        (["plan", "--gin_file=demo.gin", "--utilisation=0"], "utilisation"),
        (["plan", "--gin_file=demo.gin", "--utilisation=nan"], "utilisation"),
        (["plan", "--gin_file=demo.gin", "--utilisation=2"], "utilisation"),
        (["show-config", "--gin_file=demo.gin", "--run_mode=x"], "run_mode"),
        (["eval", "--gin_file=demo.gin"], "runs/"),
        (infer()[:-1], "--output"),
        ([*INFER[:-1], "--input=nowhere", "--output=o"], "nowhere"),
        ([*INFER[:-1], "--input=.", "--output=o"], "."),
        ([*INFER, "--output=run"], "run"),
        ([*INFER, "--output=in.jsonl/x"], "in.jsonl"),
        ([*INFER, "--output=s3://x/y"], "s3://x/y"),
        (infer("EVAL_METHOD='rank'", "LABEL_WORDS=()"), "label words"),
        (train("in.jsonl"), "in.jsonl"),
        (train("in.jsonl/x"), "in.jsonl"),
        (train("other"), "random_seed"),
        (train("run", "PROMPT_LENGTH=5"), "prompt.length"),
        (train("run", "INITIAL_CHECKPOINT_PATH='other_backbone'"), "backbone"),
        (train("new", "TRAIN_STEPS=9", "TRAIN_STEPS_RELATIVE=None"), "TRAIN_STEPS"),
        (train("new", "TRAIN_STEPS_RELATIVE=None"), "TRAIN_STEPS"),
        (train("new", "EMBED_DIM=16"), "checkpoint_9"),
        (train("new", "NUM_ENCODER_LAYERS=3"), "layers_2"),
        (train("new", "INITIAL_CHECKPOINT_PATH='tiny'"), "tiny"),
        (evaluate("EVAL_OUTPUT_DIR='run'"), "MODEL_DIR"),
        (evaluate("EVAL_OUTPUT_DIR='in.jsonl'"), "in.jsonl"),
        (evaluate("EVAL_SPLIT='tset'"), "tset"),
        (evaluate("VOCABULARY='nowhere.model'"), "nowhere.model"),
        (evaluate("VOCABULARY='rows.csv'"), "rows.csv"),
        (infer("VOCABULARY='rows.csv'"), "rows.csv"),
        (infer("VOCABULARY='nowhere.model'"), "nowhere.model"),
        (infer("NUM_MODEL_PARTITIONS=64"), "NUM_MODEL_PARTITIONS"),
    ]
    for command, name in lines:
        allowed = (
            (REFUSED, DONE) if command[:2] == ["convert", "--input=hf"] and name == "x" else ()
        )
        yield Case(
            kind,
            " ".join(command)[:200],
            command,
            allowed=allowed or (REFUSED,),
            names=(name,),
            process=command[0] == "plan",
        )


NUMBERS = {
    "float": ("-1.0", "1e400", "-1e400", "'nan'", "True", "'1'", "[1]", "None", "10**9", "1e308"),
    "int": ("-1", "0", "2**70", "1.5", "True", "'1'", "[1]", str(2**62), "-" + str(2**62), "1e3"),
}


def numbers(kind: str, draw: random.Random, cases: int, template: Path) -> Iterator[Case]:
    """Every numeric setting, out of its range and of other types. What is possible is done."""
    import dataclasses
    import re

    from prompt_tuning import config

    text = (Path(__file__).resolve().parents[1] / "gin/runs/bindings.gin").read_text()
    macros = dict(re.findall(r"^([\w.]+) = %(\w+)", text, re.MULTILINE))
    for cls in vars(config).values():
        if not dataclasses.is_dataclass(cls) or not isinstance(cls, type):
            continue
        for field in dataclasses.fields(cls):
            kinds = [k for k in NUMBERS if re.search(rf"\b{k}\b", str(field.type))]
            if not kinds or f"{cls.__name__}.{field.name}" not in macros:
                continue
            macro = macros[f"{cls.__name__}.{field.name}"]
            mode = {"EvalRun": "eval", "InferRun": "infer"}.get(cls.__name__, "train")
            for value in NUMBERS[kinds[0]]:
                yield Case(
                    kind,
                    f"{macro} = {value}",
                    [
                        "show-config",
                        f"--run_mode={mode}",
                        "--gin_file=demo.gin",
                        *([] if mode == "train" else [f"--gin.{mode.upper()}_OUTPUT_DIR='out'"]),
                        f"--gin.{macro}={value}",
                    ],
                    allowed=(REFUSED, DONE)
                    if value not in ("'1'", "[1]", "2**70", "'nan'")
                    else (REFUSED,),
                    names=(macro, f"{cls.__name__}.{field.name}", "DECODING"),
                )


def runnable_numbers(kind: str, draw: random.Random, cases: int, template: Path) -> Iterator[Case]:
    """Numbers that the settings take as such, in real runs: each ends well or in one message."""
    values = {
        "LEARNING_RATE": ("1e-38", "1e3"),
        "WARMUP_STEPS": ("1000000000", "9" * 18),
        "EVAL_BATCH_SIZE": ("1", "1000000"),
        "NUM_DECODES": ("3", "1000000"),
        "EVALUATOR_NUM_EXAMPLES": ("1", "9" * 18),
        "PROMPT_POPULATION": ("1", "9" * 18),
        "PROMPT_LENGTH": ("1", "1000000000"),
        "LENGTH_GROUPS": ("100", "1000000"),
        "MICROBATCHES": ("8", "9", "1000000"),
        "EVAL_PERIOD": ("1000000", "9" * 18),
        "EVAL_BOOTSTRAP": ("1", "9" * 18),
        "PROMPT_SCALE": ("0.0", "-1.0", "1e308"),
        "Z_LOSS": ("1e308",),
        "WEIGHT_DECAY": ("1e308",),
        "EVAL_SHARE": ("0.999999", "1e-9"),
        "OPTIMIZER_START_STEP": ("9" * 18,),
        "CLIPPING_THRESHOLD": ("1e-300",),
        "DECAY_RATE": ("1e300",),
        "EARLY_STOPPING_EVALS": ("9" * 18,),
        "RELATIVE_ATTENTION_MAX_DISTANCE": ("1", "9" * 18),
        "NUM_MODEL_PARTITIONS": ("2", "9" * 18),
        "TASK_FEATURE_LENGTHS": (
            "{'inputs': 1, 'targets': 1}",
            "{'inputs': 10000000000, 'targets': 5}",
            "{'inputs': 9, 'targets': 10000000000}",
        ),
        "BATCH_SIZE": ("1", "7", "1000000"),
    }
    for macro, numbers in values.items():
        for value in numbers:
            settings = ["TRAIN_STEPS_RELATIVE=1"]
            if macro == "EVAL_SHARE":
                settings.append("EVAL_FILE=''")
            if macro == "PROMPT_SCALE":
                settings.append("PROMPT_INIT='random_uniform'")
            yield Case(
                kind,
                f"{macro} = {value}",
                train("new", *settings, f"{macro}={value}"),
                allowed=(REFUSED, DONE),
            )


PIECES = ["BATCH_SIZE", "MODEL_DIR", "=", " ", "\n", "'x'", "3", "%", "include", "import", "@", "/"]
PIECES += ["(", "[", "{", ":", ",", ".", "'", '"', "\\", "#", "\t", "-", "None", "1e9", "\x00", "é"]
PIECES += ["Experiment", "model_dir", "'demo.gin'", "gin.", "REQUIRED", "os", "system", "\ud800"]


def gin_text(kind: str, draw: random.Random, cases: int, template: Path) -> Iterator[Case]:
    """gin files of pieces in any order, and real ones with a byte or two changed."""
    real = (Path(__file__).resolve().parents[1] / "gin/demo.gin").read_bytes()
    for _ in range(4 * cases):
        if draw.random() < 0.5:
            text = "".join(draw.choices(PIECES, k=draw.randint(1, 14)))
            data = text.encode("utf-8", errors="surrogatepass")
        else:
            changed = bytearray(real)
            for _ in range(draw.randint(1, 3)):
                changed[draw.randrange(len(changed))] = draw.randrange(256)
            data = bytes(changed)
        yield Case(
            kind,
            repr(data[:200]),
            ["show-config", "--gin_file=demo.gin", "--gin_file=fuzz.gin"],
            write("fuzz.gin", data),
            (REFUSED, DONE),
            ("fuzz.gin", "demo.gin", "t5_1_1_tiny.gin", "prompt_tune.gin", "'", "%", "the "),
        )


# Rows -------------------------------------------------------------------------------------------

BAD_TABLES = {
    "nothing": b"",
    "a header alone": b"text,label\n",
    "no field text": b"txt,label\na,yes\n",
    "no field label": b"text,lbl\na,yes\n",
    "a wrong label": b"text,label\na,yes\nb,maybe\n",
    "an empty label": b"text,label\na,yes\nb,\n",
    "a field too few": b"text,label\na,yes\nb\n",
    "a field too many": b"text,label\na,yes\nb,no,x\n",
    "a field twice": b"text,text,label\na,b,yes\n",
    "an open quote": b'text,label\n"a,yes\nb,no\n',
    "Latin-1": b"text,label\n\xe9t\xe9,yes\n",
    "UTF-16": "text,label\na,yes\n".encode("utf-16"),
    "NUL bytes": b"text,label\na\x00b,yes\nc,no\n",
    "noise": bytes(range(256)) * 8,
    "only one label": b"text,label\na,yes\nb,yes\n",
}
BAD_OBJECTS = {
    "nothing": b"",
    "no object": b"[1, 2]\n",
    "a number": b"3\n",
    "no JSON": b'{"text": "a", "label": "yes"}\n{"text": \n',
    "a field missing": b'{"text": "a", "label": "yes"}\n{"label": "no"}\n',
    "a wrong label": b'{"text": "a", "label": "yes"}\n{"text": "b", "label": "maybe"}\n',
    "null": b'{"text": null, "label": "yes"}\n',
    "a list": b'{"text": ["a"], "label": "yes"}\n',
    "NaN": b'{"text": "a", "label": NaN}\n',
    "half a surrogate": b'{"text": "\\ud800", "label": "yes"}\n',
    "a deep one": b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n",
    "a field twice": b'{"text": "a", "text": "b", "label": "yes"}\n',
    "Latin-1": b'{"text": "\xe9", "label": "yes"}\n',
    "a huge number": b'{"text": "a", "label": ' + b"9" * 10_000 + b"}\n",
}


def rows(kind: str, draw: random.Random, cases: int, template: Path) -> Iterator[Case]:
    """Training rows of one's own: malformed, of the wrong encoding, with wrong labels, huge."""
    small = ("TRAIN_STEPS_RELATIVE=1", "EVAL_FILE='rows_eval.csv'")
    for suffix, files in (("csv", BAD_TABLES), ("tsv", BAD_TABLES), ("jsonl", BAD_OBJECTS)):
        for name, data in files.items():
            data = data.replace(b",", b"\t") if suffix == "tsv" and name != "UTF-16" else data
            harmless = name in ("NUL bytes", "only one label", "null", "a list")
            yield Case(
                kind,
                f"{suffix}: {name}",
                train("new", *small, f"TRAIN_FILE='bad.{suffix}'"),
                write(f"bad.{suffix}", data),
                (REFUSED, DONE) if harmless else (REFUSED,),
                (f"bad.{suffix}",),
            )
    line = b"text,label\n" + b"a" * 10_000_000 + b",yes\nb,no\n"
    yield Case(
        kind,
        "csv: a line of 10 MB",
        train("new", *small, "TRAIN_FILE='bad.csv'"),
        write("bad.csv", line),
        (REFUSED, DONE),
        ("bad.csv",),
    )
    for file in ("nowhere.csv", "rows.xlsx", "run", "rows.cvs", "/dev/zero", "s3://x/rows.csv"):
        yield Case(
            kind,
            f"no file {file}",
            train("new", *small, f"TRAIN_FILE='{file}'"),
            names=(file,),
        )
    for name, change in (("bit flipped in", flip), ("truncated", truncate)):
        yield Case(
            kind,
            f"{name} the training file of a run that goes on",
            train("run", "TRAIN_STEPS_RELATIVE=9"),
            lambda c=change: c(Path("rows.csv"), draw),
            names=("rows.csv", "training or evaluation file"),
        )


LINES = [b"{", b"}", b'"inputs"', b":", b'"text"', b",", b"\n", b"\r", b"\xff", b"[", b"null", b" "]
LINES += [b'"\\ud800"', b"\x00", b'"prompt"', b"1e999", b'{"inputs": "a"}', b"\xef\xbb\xbf", b"NaN"]


def asked(kind: str, draw: random.Random, cases: int, template: Path) -> Iterator[Case]:
    """What is asked of `t5x infer`: malformed lines are named; hostile text is text."""
    texts = [
        "<extra_id_0>",
        "</s><pad><unk>",
        "\x00\x01\x1b[2J",
        "",
        " ",
        "a" * 100_000,
        "\u202e\ufeff",
    ]
    texts += ["{0}{inputs}%s%n", "'; rm -rf /", "\U0001d56c", "\n\r\t", '"\\', "é" * 5000]
    for text in texts:
        line = json.dumps({"inputs": text}) + "\n"

        def whole(text: str = text) -> str:
            found = [json.loads(line) for line in Path("out.jsonl").read_text().split("\n") if line]
            good = [one["inputs"] for one in found] == [text] and "prediction" in found[0]
            return "" if good else "the answer is not one to the text"

        yield Case(
            kind, f"text {text[:30]!r}", infer(), write("in.jsonl", line), (DONE,), check=whole
        )
    for _ in range(cases):
        data = b"".join(draw.choices(LINES, k=draw.randint(1, 12)))
        yield Case(
            kind,
            f"lines {data!r}",
            infer(),
            write("in.jsonl", data),
            (REFUSED, DONE),
            ("in.jsonl", "answers"),
        )
    for name, data in (
        ("another type", '{"inputs": 3}\n'),
        ("no inputs", '{"texts": "a"}\n'),
        ("a prompt that is no path", '{"inputs": "a", "prompt": 3}\n'),
        ("a huge prompt's name", json.dumps({"inputs": "a", "prompt": "x" * 10_000}) + "\n"),
    ):
        yield Case(kind, name, infer(), write("in.jsonl", data), names=("in.jsonl",))


def gzipped_texts(kind: str, draw: random.Random, cases: int, template: Path) -> Iterator[Case]:
    """Gzipped text that is damaged."""
    settings = [
        *("OBJECTIVE='span_corruption'", "TRAINABLE='model'", "PROMPT_LENGTH=0"),
        *("MIXTURE_OR_TASK_NAME=()", "TRAIN_FILE=''", "EVAL_FILE=''", "LABEL_WORDS=()"),
        *("TRAIN_STEPS_RELATIVE=1", "TASK_FEATURE_LENGTHS={'inputs': 16}"),
    ]
    pack = gzip.compress(b'{"text": "a b c"}\n' * 50)
    files = {
        "truncated": pack[:-9],
        "a wrong checksum": pack[:-8] + bytes(4) + pack[-4:],
        "no gzip": b"text",
    }
    for name, data in files.items():
        yield Case(
            kind,
            f".jsonl.gz: {name}",
            train("new", *settings, "TEXT_FILES='c.jsonl.gz'"),
            write("c.jsonl.gz", data),
            names=("c.jsonl.gz",),
        )


# Places -----------------------------------------------------------------------------------------


def _mount(size: str, *options: str) -> str:
    """A small tmpfs at `full`; why there is none, where that is so."""
    Path("full").mkdir(exist_ok=True)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", ",".join([f"size={size}", *options]), "tmpfs", "full"],
        capture_output=True,
        text=True,
    )
    return done.stderr.strip()


def can_mount() -> bool:
    """Whether this user may mount a tmpfs."""
    if os.getuid() != 0:
        return False
    done = subprocess.run(
        ["unshare", "-m", "mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", "/mnt"],
        capture_output=True,
    )
    return done.returncode == 0


def full_disks(kind: str, draw: random.Random, cases: int, template: Path) -> Iterator[Case]:
    """A tmpfs that is too small for what is written, at every size from nothing to almost enough.

    The mount is in a namespace of the command's own, so that it goes when the command ends.
    """
    if not can_mount():
        print(f"{kind}: skipped, since a tmpfs cannot be mounted by this user", flush=True)
        return
    pieces = ["--input=in.jsonl", "--field=inputs", "--output=full/v.model", "--size=100"]
    commands = {
        "train": (train("full/run"), ("60k", "120k", "200k")),
        "eval": (evaluate("EVAL_OUTPUT_DIR='full/scores'"), ("4k", "20k")),
        "infer": ([*INFER, "--output=full/o.jsonl"], ("4k",)),
        "train-vocabulary": (["train-vocabulary", *pieces], ("4k",)),
        "convert": (["convert", "--input=checkpoint_9", "--output=full/x"], ("8k", "100k")),
        "convert-prompt": (
            *(["convert-prompt", "--input=run/prompts/best", "--output=full/x", "--format=ours"],),
            ("4k",),
        ),
        "verify --write": (["verify", "full/checkpoint", "--write"], ("420k",)),
        "inspect-prompt": (
            [
                *("inspect-prompt", "run/prompts/best", "--checkpoint=checkpoint_9"),
                "--json=full/x.json",
            ],
            ("4k",),
        ),
    }
    for name, (command, sizes) in commands.items():
        for size in sizes:
            script = f"mkdir -p full && mount -t tmpfs -o size={size} tmpfs full && "
            if name.startswith("verify"):
                script += "cp -r checkpoint_9 full/checkpoint && "
            # Fills what a single page would leave.
            fill = {"4k": 4096}.get(size, 0)
            script += f"head -c {fill} /dev/zero > full/filler; " if fill else ""
            script += 'exec "$@"'
            if name.startswith("verify"):
                script = script.replace(
                    'exec "$@"', 'cat /dev/zero > full/filler 2>/dev/null; exec "$@"'
                )
            yield Case(
                kind,
                f"{name} with {size}",
                command,
                names=("full",),
                process=True,
                before=("unshare", "-m", "sh", "-c", script, "sh"),
                check=lambda: "",
            )


def locked(kind: str, draw: random.Random, cases: int, template: Path) -> Iterator[Case]:
    """Folders and files that may not be read or written, for a user that is not root."""
    if os.getuid() != 0 or shutil.which("setpriv") is None:
        print(f"{kind}: skipped, since the user cannot be changed here", flush=True)
        return
    nobody = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
    probe = subprocess.run([*nobody, sys.executable, "-c", "import jax"], capture_output=True)
    if probe.returncode:
        print(f"{kind}: skipped, since nobody may not run Python here", flush=True)
        return

    def free() -> None:
        subprocess.run(["chmod", "-R", "a+rwX", "."], check=True)
        for folder in Path.cwd().parents:
            if str(folder).startswith(("/tmp/", "/var/tmp/")):
                os.chmod(folder, os.stat(folder).st_mode | 0o755)

    def lock(path: str, mode: int) -> Act:
        def act() -> None:
            free()
            os.chown(path, 0, 0)
            os.chmod(path, mode)

        return act

    best = "PROMPT_FILE='run/prompts/best'"
    cases_of: list[tuple[str, Act, list[str], str]] = [
        ("read-only MODEL_DIR", lock("run", 0o555), train("run", "TRAIN_STEPS_RELATIVE=9"), "run"),
        (
            "read-only checkpoints",
            lock("run/checkpoints", 0o555),
            train("run", "TRAIN_STEPS_RELATIVE=9"),
            "run",
        ),
        (
            "read-only prompts",
            lock("run/prompts", 0o555),
            train("run", "TRAIN_STEPS_RELATIVE=9"),
            "run",
        ),
        ("read-only parent", lock(".", 0o555), train("new"), "new"),
        ("unreadable checkpoint", lock("checkpoint_9", 0o000), train("new"), "checkpoint_9"),
        ("unreadable index", lock("checkpoint_9/checkpoint", 0o000), train("new"), "checkpoint_9"),
        (
            "unreadable array",
            lock("checkpoint_9/target.decoder.logits_dense.kernel/0.0", 0o000),
            infer(),
            "checkpoint_9",
        ),
        ("unreadable prompt", lock("run/prompts/best", 0o000), infer(best), "run/prompts/best"),
        (
            "unreadable prompt's weights",
            lock("run/prompts/best/adapter_model.safetensors", 0o000),
            infer(best),
            "run/prompts/best",
        ),
        (
            "unreadable prompt, verify",
            lock("run/prompts/best/adapter_model.safetensors", 0o000),
            ["verify", "run"],
            "run/prompts/best",
        ),
        (
            "unreadable state",
            lock("run/checkpoints/15", 0o000),
            ["verify", "run"],
            "checkpoints/15",
        ),
        ("unreadable states", lock("run/checkpoints", 0o000), ["verify", "run"], "checkpoints"),
        ("unreadable rows", lock("rows.csv", 0o000), train("new"), "rows.csv"),
        ("unreadable lines", lock("in.jsonl", 0o000), infer(), "in.jsonl"),
        ("unreadable gin file", lock("small.gin", 0o000), train("new"), "small.gin"),
        ("unreadable .npy", lock("prompt_npy", 0o000), ["verify", "prompt_npy"], "prompt_npy"),
        (
            "unreadable manifest",
            lock("recorded/manifest.sha256.json", 0),
            ["verify", "recorded"],
            "recorded",
        ),
        (
            "unreadable model",
            lock("hf/model.safetensors", 0),
            ["convert", "--input=hf", "--output=c"],
            "hf",
        ),
        (
            "unreadable config.json",
            lock("hf/config.json", 0),
            ["convert", "--input=hf", "--output=c"],
            "hf",
        ),
        ("answers, read-only folder", lock(".", 0o555), infer(), "out.jsonl"),
        ("scores, read-only folder", lock(".", 0o555), evaluate("EVAL_OUTPUT_DIR='s2'"), "s2"),
        (
            "convert, read-only folder",
            lock(".", 0o555),
            ["convert", "--input=hf", "--output=c"],
            "c",
        ),
        (
            "manifest, read-only folder",
            lock("checkpoint_9", 0o555),
            ["verify", "checkpoint_9", "--write"],
            "checkpoint_9",
        ),
    ]
    for name, act, command, said in cases_of:
        yield Case(kind, name, command, act, names=(said,), process=True, before=nobody)


def clouds(kind: str, draw: random.Random, cases: int, template: Path) -> Iterator[Case]:
    """Buckets and hubs that cannot be reached: an end within a minute, and what to do."""
    bucket = "gs://a-bucket-that-is-not-there-4711/checkpoint_9"
    hub = "hf://nobody-4711/nothing-4711"
    for command, name in (
        (train("new", f"INITIAL_CHECKPOINT_PATH='{bucket}'"), "gs://"),
        (infer(f"CHECKPOINT_PATH='{bucket}'"), "gs://"),
        (evaluate(f"CHECKPOINT_PATH='{bucket}'"), "gs://"),
        (["convert", f"--input={bucket}", "--output=c"], "gs://"),
        (["inspect-prompt", "run/prompts/best", f"--checkpoint={bucket}"], "gs://"),
        (["inspect-prompt", bucket, "--checkpoint=checkpoint_9"], "gs://"),
        (infer(f"PROMPT_FILE='{bucket}'"), "gs://"),
        (["verify", bucket], "gs://"),
        (evaluate("VOCABULARY='gs://a-bucket-4711/sentencepiece.model'"), "gs://"),
        (infer("VOCABULARY='gs://a-bucket-4711/sentencepiece.model'"), "gs://"),
        (train("gs://a-bucket-4711/run"), "gs://"),
        (evaluate("EVAL_OUTPUT_DIR='gs://a-bucket-4711/scores'"), "gs://"),
        ([*infer()[:-1], "--gin.INFER_OUTPUT_DIR='gs://a-bucket-4711/answers'"], "gs://"),
        (train("new", "TRAIN_FILE='gs://a-bucket-4711/rows.csv'"), "gs://"),
        (["train", "--gin_file=gs://a-bucket-4711/x.gin"], "gs://"),
        (["convert", f"--input={hub}", "--output=c"], "hf://"),
        (infer(f"CHECKPOINT_PATH='{hub}'", "MLP_ACTIVATIONS='from_checkpoint'"), "hf://"),
        (infer(f"CHECKPOINT_PATH='{hub}'"), "hf://"),
        (
            [
                *(
                    "train",
                    "--gin_file=demo.gin",
                    "--gin.MIXTURE_OR_TASK_NAME='super_glue_cb_v102'",
                ),
                *("--tfds_data_dir=nothing", "--gin.MODEL_DIR='new'"),
            ],
            "prepare-superglue",
        ),
    ):
        yield Case(
            kind,
            " ".join(command)[-160:],
            command,
            names=(name,),
            process="nothing" in str(command),
        )


KINDS = {
    "mistyped commands and settings": mistyped,
    "every number": numbers,
    "numbers in runs": runnable_numbers,
    "fuzz of gin text": gin_text,
    "training rows": rows,
    "texts to answer": asked,
    "gzipped text": gzipped_texts,
    "full disks": full_disks,
    "no permission": locked,
    "no network": clouds,
}
# The flags of a training command, for tests.
__all__ = ["KINDS", "TRAIN"]
