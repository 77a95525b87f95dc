"""Damaged files, for `fault_runs.py`: prompts, run states, checkpoints of T5X and Hugging Face."""

from __future__ import annotations

import filecmp
import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
from fault_runs import DONE, RECOVERED, REFUSED, Case, _call, _captured

HERE = Path(__file__).resolve().parent
START, STEPS, SAVED = 9, 6, (12, 15)
Kind = Callable[[str, random.Random, int, Path], Iterator[Case]]

TRAIN = ["train", "--gin_file=runs/prompt_tune.gin", "--gin_file=small.gin"]
EVAL = ["eval", "--gin_file=runs/eval.gin", "--gin_file=small.gin"]
INFER = ["infer", "--gin_file=runs/infer.gin", "--gin_file=small.gin", "--input=in.jsonl"]


def train(folder: str = "run", *settings: str) -> list[str]:
    return [*TRAIN, f"--gin.MODEL_DIR='{folder}'", *(f"--gin.{text}" for text in settings)]


def evaluate(*settings: str) -> list[str]:
    return [*EVAL, "--gin.EVAL_OUTPUT_DIR='scores'", *(f"--gin.{text}" for text in settings)]


def infer(*settings: str) -> list[str]:
    return [*INFER, "--output=out.jsonl", *(f"--gin.{text}" for text in settings)]


def make_work(folder: Path, *, small: bool = False) -> Path:
    """Two runs with two states each, checkpoints, a Hugging Face model, rows; made by the commands.

    `straight` is what the run comes to when it goes on for three more steps. A `small` one has
    neither this nor the second run, and no evaluation.
    """
    from tiny_models import CONFIG, random_params

    from prompt_tuning.checkpoints.t5x import write_t5x
    from prompt_tuning.config import to_dict

    work = folder / "template"
    work.mkdir()
    write_t5x(work / f"checkpoint_{START}", random_params(), START)
    write_t5x(work / "other_backbone", random_params(seed=5), START)
    shutil.copytree(HERE / "golden" / "hf" / "t5_1_1", work / "hf")
    shutil.copytree(HERE / "golden" / "hf" / "flan_t5", work / "hf_shards")
    draw = random.Random(0)
    words = ["".join(draw.choices("abcd", k=6)) for _ in range(40)]
    rows = [f"{word},{'yes' if word.count('a') > 1 else 'no'}\n" for word in words]
    (work / "rows.csv").write_text("text,label\n" + "".join(rows[:30]))
    (work / "rows_eval.csv").write_text("text,label\n" + "".join(rows[30:]))
    (work / "in.jsonl").write_text("".join(f'{{"inputs": "{word}"}}\n' for word in words[:4]))
    macros = {
        **{name.upper(): value for name, value in to_dict(CONFIG).items()},
        "VOCABULARY": "bytes",
        "MIXTURE_OR_TASK_NAME": "mine",
        "TASK_FEATURE_LENGTHS": {"inputs": 12, "targets": 5},
        "TRAIN_FILE": "rows.csv",
        "EVAL_FILE": "rows_eval.csv",
        "LABEL_WORDS": {"yes": "yes", "no": "no"},
        "BATCH_SIZE": 8,
        "EVAL_BATCH_SIZE": 16,
        "PROMPT_LENGTH": 4,
        "EVAL_PERIOD": 3,
        "CHECKPOINT_PERIOD": 3,
        "EVAL_BASELINES": False,
        "EVAL_BOOTSTRAP": 0,
        "TRAIN_STEPS_RELATIVE": STEPS,
        "INITIAL_CHECKPOINT_PATH": f"checkpoint_{START}",
        "CHECKPOINT_PATH": f"checkpoint_{START}",
    }
    (work / "small.gin").write_text("".join(f"{n} = {v!r}\n" for n, v in macros.items()))
    before = Path.cwd()
    os.chdir(work)
    try:
        make(train("run"))
        if not small:
            make(train("other", "RANDOM_SEED=3"))
            shutil.copytree("run", "straight")
            make(train("straight", "TRAIN_STEPS_RELATIVE=9"))
            make(evaluate("PROMPT_FILE='run/prompts/best'"))
        make(["convert", "--input=hf", "--output=converted"])
        for form in ("peft", "npy"):
            flags = ["--input=run/prompts/best", f"--output=prompt_{form}", f"--format={form}"]
            make(["convert-prompt", *flags])
        shutil.copytree(f"checkpoint_{START}", "recorded")
        make(["verify", "recorded", "--write"])
    finally:
        os.chdir(before)
    return work


def make(command: list[str]) -> None:
    """Runs a command that has to succeed."""
    with _captured() as said:
        code = _call(command)
    if code:
        raise SystemExit(f"{' '.join(command)}: exit code {code}\n{''.join(said)}")


# What can happen to a file ----------------------------------------------------------------------


def flip(file: Path, draw: random.Random) -> None:
    data = bytearray(file.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    file.write_bytes(data)


def truncate(file: Path, draw: random.Random) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: draw.choice((0, 1, draw.randrange(len(data)), len(data) - 1))])


def append(file: Path, draw: random.Random) -> None:
    with file.open("ab") as opened:
        opened.write(draw.randbytes(draw.randint(1, 9)))


def overwrite(file: Path, draw: random.Random) -> None:
    file.write_bytes(draw.randbytes(file.stat().st_size))


def remove(file: Path, draw: random.Random) -> None:
    file.unlink()


def as_folder(file: Path, draw: random.Random) -> None:
    file.unlink()
    file.mkdir()


CHANGES = {"bit flipped in": flip, "truncated": truncate, "overwritten": overwrite}
LOSSES = {"removed": remove, "a folder instead of": as_folder}
FAULTS = {**CHANGES, "appended to": append, **LOSSES}


def files_of(folder: Path) -> list[Path]:
    """Every file that is not empty, relative to the folder."""
    return sorted(
        p.relative_to(folder) for p in folder.rglob("*") if p.is_file() and p.stat().st_size
    )


# Prompts ----------------------------------------------------------------------------------------


def prompt_commands(path: str) -> list[list[str]]:
    return [
        ["verify", path],
        ["inspect-prompt", path, f"--checkpoint=checkpoint_{START}"],
        ["convert-prompt", f"--input={path}", "--output=converted_prompt", "--format=npy"],
        infer(f"PROMPT_FILE='{path}'"),
        evaluate(f"PROMPT_FILE='{path}'"),
        train("new", f"PROMPT_FILE='{path}'"),
    ]


def prompt_files(kind: str, draw: random.Random, cases: int, template: Path) -> Iterator[Case]:
    """Files of a prompt folder of ours: every fault at every file."""
    place = Path("run/prompts/best")
    pairs = [(f, n) for f in files_of(template / place) for n in [*FAULTS, "swapped"]]
    draw.shuffle(pairs)
    for number, (file, name) in zip(range(cases), cycle(pairs), strict=False):
        target = place / file
        if name == "swapped":
            damage = lambda t=target, f=file: shutil.copy(Path("other/prompts/best", f), t)  # noqa: E731
            if filecmp.cmp(template / target, template / "other/prompts/best" / file, False):
                continue
        else:
            damage = lambda t=target, n=name: FAULTS[n](t, draw)  # noqa: E731
        commands = prompt_commands(str(place))
        yield Case(
            kind,
            f"{name} {target}",
            commands[number % len(commands)],
            damage,
            # Without its metadata it is PEFT's prompt, without a checksum.
            allowed=(REFUSED, DONE) if name == "removed" and file.suffix == ".json" else (REFUSED,),
            names=(str(place),),
        )


def cycle(items: list[Any]) -> Iterator[Any]:
    while items:
        yield from items


def _tensors(arrays: dict[str, np.ndarray]) -> Callable[[Path], None]:
    from safetensors.numpy import save_file

    return lambda folder: save_file(arrays, folder / "adapter_model.safetensors")


def _header(text: bytes) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        data = len(text).to_bytes(8, "little") + text
        (folder / "adapter_model.safetensors").write_bytes(data)

    return write


def _json(file: str, **changes: object) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        values = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**values, **changes}))

    return write


def prompt_arrays(kind: str, draw: random.Random, cases: int, template: Path) -> Iterator[Case]:
    """The array of a prompt: renamed, of another shape or type, more of them, not finite."""
    del cases, template
    good = np.ones((4, 32), np.float32)
    bad = np.where(np.arange(32) == 7, np.nan, good)
    huge = b'{"prompt_embeddings":{"dtype":"F32","shape":[%d,32],"data_offsets":[0,%d]}}'
    writers = {
        "renamed array": _tensors({"prompt": good}),
        "another array besides": _tensors({"prompt_embeddings": good, "extra": good}),
        "no array": _tensors({}),
        "a vector": _tensors({"prompt_embeddings": good[0]}),
        "three dimensions": _tensors({"prompt_embeddings": good[None]}),
        "more rows": _tensors({"prompt_embeddings": np.ones((5, 32), np.float32)}),
        "no rows": _tensors({"prompt_embeddings": good[:0]}),
        "another width": _tensors({"prompt_embeddings": np.ones((4, 16), np.float32)}),
        "integers": _tensors({"prompt_embeddings": good.astype(np.int32)}),
        "half precision": _tensors({"prompt_embeddings": good.astype(np.float16)}),
        "NaN": _tensors({"prompt_embeddings": bad.astype(np.float32)}),
        "infinity": _tensors({"prompt_embeddings": good * np.float32(np.inf)}),
        "other values": _tensors({"prompt_embeddings": good}),
        "a huge shape": _header(huge % (2**40, 2**47)),
        "a huge header": lambda folder: (folder / "adapter_model.safetensors").write_bytes(
            (2**62).to_bytes(8, "little") + b"{}"
        ),
        "a deep header": _header(b'{"a":' * 100_000),
        "another length in its settings": _json("adapter_config.json", num_virtual_tokens=2**40),
        "another method": _json("adapter_config.json", peft_type="LORA"),
        "settings of the wrong type": _json("adapter_config.json", num_virtual_tokens="4"),
        "another task in its metadata": _json("prompt_tuning.json", task="x"),
        "a path in its metadata": _json("prompt_tuning.json", files={"../../small.gin": "0" * 64}),
        "a list for its metadata": lambda f: (f / "prompt_tuning.json").write_text("[1]"),
    }
    place = Path("run/prompts/best")
    for number, (name, write) in enumerate(writers.items()):
        commands = prompt_commands(str(place))
        yield Case(kind, name, commands[number % 6], lambda w=write: w(place), names=(str(place),))


def npy(array: np.ndarray | None = None, header: bytes = b"") -> Callable[[], object]:
    def write() -> None:
        if array is not None:
            with open("p.npy", "wb") as file:
                np.save(file, array, allow_pickle=True)
        else:
            text = header.ljust(118) + b"\n"
            size = len(text).to_bytes(2, "little")
            Path("p.npy").write_bytes(b"\x93NUMPY\x01\x00" + size + text)

    return write


def foreign_prompts(kind: str, draw: random.Random, cases: int, template: Path) -> Iterator[Case]:
    """Prompts of others: pickles, objects, absurd headers, other models'."""
    head = b"{'descr': '<f4', 'fortran_order': False, 'shape': (%s, 32), }"
    arrays = {
        "objects": npy(np.array([[os.system, 1]], dtype=object)),
        "a huge shape": npy(header=head % b"1099511627776"),
        "a negative shape": npy(header=head % b"-1"),
        "code in its header": npy(header=b"__import__('os').system('touch harmed')"),
        "integers": npy(np.ones((4, 32), np.int64)),
        "NaN": npy(np.full((4, 32), np.nan, np.float32)),
        "a vector": npy(np.ones(32, np.float32)),
        "another width": npy(np.ones((4, 31), np.float32)),
        "a record type": npy(np.zeros((4, 32), [("a", "<f4")])),
        "a pickle": lambda: Path("p.npy").write_bytes(
            b"\x80\x04cos\nsystem\n(S'touch harmed'\ntR."
        ),
        "nothing in it": lambda: Path("p.npy").write_bytes(b""),
    }
    harmed = lambda: "code was run" if Path("harmed").exists() else ""  # noqa: E731
    for number, (name, write) in enumerate(arrays.items()):
        commands = prompt_commands("p.npy")
        if name == "another width":
            commands = commands[1:2] + commands[3:]
        command = commands[number % len(commands)]
        yield Case(kind, f".npy: {name}", command, write, names=("p.npy",), check=harmed)
    for number, (name, change) in zip(range(cases), cycle(list(FAULTS.items())), strict=False):
        for path in ("prompt_npy", "prompt_peft/adapter_model.safetensors"):
            yield Case(
                kind,
                f"{name} {path}",
                prompt_commands(path.split("/")[0])[number % 6],
                lambda p=path, c=change: c(Path(p), draw),
                (REFUSED, DONE) if name in CHANGES else (REFUSED,),
                (path.split("/")[0],),
            )
    best = "PROMPT_FILE='run/prompts/best'"
    others = {
        "another backbone": (infer(best, "CHECKPOINT_PATH='other_backbone'"), "backbone"),
        "another length": (train("new", best, "PROMPT_LENGTH=5"), "PROMPT_LENGTH"),
        "another model": (infer(best, "CHECKPOINT_PATH='tiny'"), "tiny"),
        "another vocabulary": (
            evaluate(best, "VOCABULARY='tiny'", "NUM_EMBEDDINGS=512"),
            "token_embedder/embedding",
        ),
        "a model's checkpoint as a prompt": (
            infer("PROMPT_FILE='checkpoint_9'"),
            "checkpoint_9",
        ),
        "a MODEL_DIR as a prompt": (infer("PROMPT_FILE='run'"), "run/prompts/best"),
        "no such prompt": (infer("PROMPT_FILE='nowhere'"), "nowhere"),
    }
    for name, (command, said) in others.items():
        yield Case(kind, name, command, names=(said,))
    inside = '{"inputs": "a", "prompt": "%s"}\n'
    for path in ("../../../etc/passwd", "nowhere", "run/config.gin", "/dev/zero", "run/\\u0000"):
        yield Case(
            kind,
            f"a row that names {path}",
            infer(),
            lambda p=path: Path("in.jsonl").write_text(inside % p),
            names=("in.jsonl:1",),
        )


# Run states -------------------------------------------------------------------------------------


def same_end() -> str:
    """What is wrong with the run, compared with the one that was not disturbed."""
    for name in ("best", "step_000018"):
        pair = [
            Path(run, "prompts", name, "adapter_model.safetensors") for run in ("run", "straight")
        ]
        if not all(p.is_file() for p in pair) or not filecmp.cmp(*pair, shallow=False):
            return f"lost work: prompts/{name} is not that of an undisturbed run"
    return ""


GO_ON = train("run", "TRAIN_STEPS_RELATIVE=9")


def run_states(kind: str, draw: random.Random, cases: int, template: Path) -> Iterator[Case]:
    """Files of the newest state, the older one, both: the run goes on, `verify` names them."""
    root = Path("run/checkpoints")
    files = {step: files_of(template / root / str(step)) for step in SAVED}
    which = [(SAVED[1],), (SAVED[0],), SAVED]
    # Some of Orbax's files are not needed to restore a state: unharmed then.
    outcomes = {which[0]: (RECOVERED, DONE), which[1]: (RECOVERED, DONE)}
    outcomes[SAVED] = (REFUSED, RECOVERED, DONE)
    for number in range(cases):
        steps = which[number % 3]
        name = draw.choice(list(FAULTS))
        chosen = [(root / str(step) / draw.choice(files[step])) for step in steps]
        verifies = number % 2 == 0

        def damage(chosen: list[Path] = chosen, name: str = name) -> None:
            for file in chosen:
                FAULTS[name](file, draw)

        yield Case(
            kind,
            f"{name} {', '.join(map(str, chosen))}",
            ["verify", "run"] if verifies else GO_ON,
            damage,
            (REFUSED, DONE) if verifies else outcomes[steps],
            (*(f"checkpoints/{step}" for step in steps), str(root)),
            same_end if not verifies else lambda: "",
        )


def whole_states(kind: str, draw: random.Random, cases: int, template: Path) -> Iterator[Case]:
    """States that are gone, of another run, or not states at all."""
    newest, other = Path("run/checkpoints/15"), Path("other/checkpoints/15")

    def swap(part: str = "") -> None:
        shutil.rmtree(newest / part)
        shutil.copytree(other / part, newest / part)

    def empty(folder: Path) -> None:
        shutil.rmtree(folder)
        folder.mkdir()

    acts: dict[str, Callable[[], object]] = {
        "the newest is empty": lambda: empty(newest),
        "the newest has no arrays": lambda: shutil.rmtree(newest / "state"),
        "the newest has no values": lambda: shutil.rmtree(newest / "meta"),
        "the newest is a file": lambda: (shutil.rmtree(newest), newest.write_text("x")),
        "arrays of another run": lambda: swap("state"),
        "values of another run": lambda: swap("meta"),
        "the state of another run": swap,
        "another step's arrays": lambda: (
            shutil.rmtree(newest / "state"),
            shutil.copytree(newest.parent / "12" / "state", newest / "state"),
        ),
        "another step's name": lambda: (newest.parent / "12").rename(newest.parent / "17"),
    }
    for name, act in acts.items():
        yield Case(
            kind,
            f"{name}: verify",
            ["verify", "run"],
            act,
            (REFUSED, DONE) if name == "the state of another run" else (REFUSED,),
            ("checkpoints/1",),
        )
        yield Case(
            kind,
            f"{name}: train",
            GO_ON,
            act,
            (REFUSED, RECOVERED),
            ("checkpoints", "MODEL_DIR"),
            same_end,
        )
    for step in SAVED:
        yield Case(
            kind,
            f"no state {step}",
            GO_ON,
            lambda s=step: shutil.rmtree(newest.parent / str(s)),
            (DONE, RECOVERED),
            check=same_end,
        )


def other_files(kind: str, draw: random.Random, cases: int, template: Path) -> Iterator[Case]:
    """The settings that a run writes, fed back."""
    for name, change in CHANGES.items():
        yield Case(
            kind,
            f"{name} run/config.gin: read",
            ["show-config", "--gin_file=run/config.gin"],
            lambda c=change: c(Path("run/config.gin"), draw),
            (REFUSED, DONE),
            names=("run/config.gin", "what kind of run"),
        )


# Checkpoints ------------------------------------------------------------------------------------


def checkpoint_commands(path: str) -> list[list[str]]:
    at = f"CHECKPOINT_PATH='{path}'"
    return [
        ["verify", path],
        train("new", f"INITIAL_{at}"),
        infer(at),
        ["convert", f"--input={path}", "--output=converted_again"],
        evaluate(at),
        ["inspect-prompt", "run/prompts/best", f"--checkpoint={path}"],
    ]


def t5x_files(kind: str, draw: random.Random, cases: int, template: Path) -> Iterator[Case]:
    """Files of a T5X checkpoint. Without a manifest, only what is missing has to be found."""
    places = ["checkpoint_9", "recorded"]
    for number in range(cases):
        place = Path(places[number % 2])
        file = place / draw.choice(files_of(template / place))
        name = draw.choice(list(FAULTS))
        if file.name == "manifest.sha256.json":
            continue
        verifies = place.name == "recorded"
        commands = checkpoint_commands(str(place))
        command = commands[0] if verifies else commands[1 + draw.randrange(4)]
        unseen = name in ("bit flipped in", "overwritten", "appended to") and not verifies
        yield Case(
            kind,
            f"{name} {file}",
            command,
            lambda f=file, n=name: FAULTS[n](f, draw),
            (REFUSED, DONE) if unseen else (REFUSED,),
            (str(place),),
        )


def _index(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """Edits T5X's msgpack index."""

    def edit(place: Path) -> None:
        tree = msgpack.unpackb((place / "checkpoint").read_bytes(), strict_map_key=False)
        change(tree["optimizer"]["target"])
        (place / "checkpoint").write_bytes(msgpack.packb(tree))

    return edit


def _zarray(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def edit(place: Path) -> None:
        file = place / "target.decoder.logits_dense.kernel" / ".zarray"
        values = json.loads(file.read_text())
        change(values)
        file.write_text(json.dumps(values))

    return edit


def _rename(old: str, new: str) -> Callable[[Path], object]:
    return lambda place: (place / old).rename(place / new)


LOGITS = "target.decoder.logits_dense.kernel"
T5X_EDITS: dict[str, Callable[[Path], object]] = {
    "array folder renamed": _rename(LOGITS, "target.decoder.logits_dense.weights"),
    "array folder missing": lambda p: shutil.rmtree(p / LOGITS),
    "chunk missing": lambda p: (p / LOGITS / "0.0").unlink(),
    "chunk renamed": _rename(f"{LOGITS}/0.0", f"{LOGITS}/0.1"),
    "two arrays swapped": lambda p: (
        (p / "target.encoder.layers_0.mlp.wi_0.kernel").rename(p / "x"),
        (p / "target.encoder.layers_0.mlp.wo.kernel").rename(
            p / "target.encoder.layers_0.mlp.wi_0.kernel"
        ),
        (p / "x").rename(p / "target.encoder.layers_0.mlp.wo.kernel"),
    ),
    "parameter renamed in the index": _index(
        lambda t: t["decoder"]["logits_dense"].update(
            weights=t["decoder"]["logits_dense"].pop("kernel")
        )
    ),
    "parameter missing in the index": _index(lambda t: t["decoder"].pop("logits_dense")),
    "vector missing in the index": _index(lambda t: t["encoder"].pop("encoder_norm")),
    "vector renamed in the index": _index(
        lambda t: t["encoder"].update(another_norm=t["encoder"].pop("encoder_norm"))
    ),
    "parameter besides in the index": _index(
        lambda t: t["encoder"].update(extra={"scale": t["encoder"]["encoder_norm"]["scale"]})
    ),
    "shape of the array": _zarray(lambda z: z.update(shape=[32, 385])),
    "huge shape of the array": _zarray(lambda z: z.update(shape=[2**40, 384])),
    "huge chunks": _zarray(lambda z: z.update(chunks=[2**40, 384])),
    "type of the array": _zarray(lambda z: z.update(dtype="<i4")),
    "type that does not exist": _zarray(lambda z: z.update(dtype="<f3")),
    "objects": _zarray(lambda z: z.update(dtype="|O")),
    "path out of the folder": _index(
        lambda t: t["decoder"]["logits_dense"]["kernel"]["kvstore"].update(
            path="../other_backbone/target.decoder.logits_dense.kernel"
        )
    ),
    "absolute path": _index(
        lambda t: t["decoder"]["logits_dense"]["kernel"]["kvstore"].update(path="/etc")
    ),
    "index of another checkpoint": lambda p: shutil.copy("converted/checkpoint", p / "checkpoint"),
    "no index": lambda p: (p / "checkpoint").unlink(),
}


def t5x_structure(kind: str, draw: random.Random, cases: int, template: Path) -> Iterator[Case]:
    """Parameters that are missing, extra, renamed, of another shape; paths that lead out."""
    for place, edits in (("checkpoint_9", T5X_EDITS), ("converted", {})):
        for number, (name, edit) in enumerate(edits.items()):
            commands = checkpoint_commands(place)
            for command in (commands[0], commands[1 + number % 4]):
                yield Case(
                    kind,
                    f"{name}: {command[0]}",
                    command,
                    lambda e=edit, p=place: e(Path(p)),
                    names=(f"{place}",),
                )


def foreign_checkpoints(
    kind: str, draw: random.Random, cases: int, template: Path
) -> Iterator[Case]:
    """T5X's own checkpoints, where the reference data is: legacy, Orbax, and released ones."""
    shared = HERE.parents[1] / "shared"
    if not shared.is_dir():
        return
    found = sorted({p.parent for p in shared.rglob("checkpoint") if p.is_file()})
    found += sorted({p.parent for p in shared.rglob("_METADATA") if p.parent.name == "state"})
    for place in found:
        yield Case(kind, f"whole {place}", ["verify", str(place)], allowed=(DONE, REFUSED))
    faults = {name: FAULTS[name] for name in ("truncated", "removed")}
    for _ in range(cases if found else 0):
        place = draw.choice(found)
        file = draw.choice([f for f in files_of(place) if "state.param_states" not in str(f)])
        name = draw.choice(list(faults))

        def damage(place: Path = place, file: Path = file, name: str = name) -> None:
            shutil.copytree(place, "foreign")
            os.chmod("foreign", 0o755)
            for folder, folders, files in os.walk("foreign"):
                for entry in (*folders, *files):
                    os.chmod(Path(folder, entry), 0o755)
            faults[name](Path("foreign", file), draw)

        yield Case(
            kind,
            f"{name} {place}/{file}",
            ["verify", "foreign"],
            damage,
            (REFUSED, DONE) if file.suffix in (".gin", ".txt") else (REFUSED,),
            ("foreign",),
        )


def hf_files(kind: str, draw: random.Random, cases: int, template: Path) -> Iterator[Case]:
    """A Hugging Face folder, whole or in shards."""
    for number in range(cases):
        place = Path(("hf", "hf_shards")[number % 2])
        file = place / draw.choice(files_of(template / place))
        name = draw.choice(list(FAULTS))
        unseen = name in CHANGES or name == "appended to"
        commands = [
            ["convert", f"--input={place}", "--output=converted_again"],
            infer(
                f"CHECKPOINT_PATH='{place}'",
                *(f"{n}='from_checkpoint'" for n in SIZES),
            ),
        ]
        yield Case(
            kind,
            f"{name} {file}",
            commands[number // 2 % 2],
            lambda f=file, n=name: FAULTS[n](f, draw),
            (REFUSED, DONE) if unseen and name != "truncated" else (REFUSED,),
            (str(place),),
        )


SIZES = (
    *("NUM_ENCODER_LAYERS", "NUM_DECODER_LAYERS", "NUM_HEADS", "HEAD_DIM", "EMBED_DIM", "MLP_DIM"),
    *("NUM_EMBEDDINGS", "MLP_ACTIVATIONS", "LOGITS_VIA_EMBEDDING"),
    *("RELATIVE_ATTENTION_NUM_BUCKETS", "RELATIVE_ATTENTION_MAX_DISTANCE"),
)


def hf_structure(kind: str, draw: random.Random, cases: int, template: Path) -> Iterator[Case]:
    """Tensors missing, extra, renamed, of another shape or type; files out of the folder."""
    from safetensors.numpy import load_file, save_file

    def tensors(change: Callable[[dict[str, np.ndarray]], object]) -> Callable[[], None]:
        def edit() -> None:
            arrays = load_file("hf/model.safetensors")
            change(arrays)
            save_file(arrays, "hf/model.safetensors", metadata={"format": "pt"})

        return edit

    def settings(place: str = "hf/config.json", **changes: object) -> Callable[[], None]:
        def edit() -> None:
            values = json.loads(Path(place).read_text())
            values = {k: v for k, v in {**values, **changes}.items() if v != "absent"}
            Path(place).write_text(json.dumps(values))

        return edit

    def weight_map(name: str) -> Callable[[], None]:
        def edit() -> None:
            place = Path("hf/model.safetensors.index.json")
            Path("hf/model.safetensors").rename("outside.safetensors")
            arrays = load_file("outside.safetensors")
            place.write_text(json.dumps({"weight_map": dict.fromkeys(arrays, name)}))

        return edit

    name = "encoder.final_layer_norm.weight"
    edits = {
        "tensor missing": tensors(lambda a: a.pop(name)),
        "tensor besides": tensors(lambda a: a.update(extra=a[name])),
        "tensor renamed": tensors(lambda a: a.update(extra=a.pop(name))),
        "another shape": tensors(lambda a: a.update({name: a[name][:-1]})),
        "integers": tensors(lambda a: a.update({name: a[name].astype(np.int32)})),
        "another width in config.json": settings(d_model=13),
        "another type in config.json": settings(d_model="12"),
        "a negative size": settings(num_layers=-1),
        "a huge size": settings(vocab_size=2**40),
        "no size": settings(d_model="absent"),
        "another kind of model": settings(model_type="bert"),
        "another activation": settings(feed_forward_proj="gated-tanh"),
        "a list for config.json": lambda: Path("hf/config.json").write_text("[]"),
        "a file out of the folder": weight_map("../outside.safetensors"),
        "an absolute path": weight_map("/etc/passwd"),
        "a pickle alone": lambda: (
            Path("hf/model.safetensors").unlink(),
            Path("hf/pytorch_model.bin").write_bytes(b"\x80\x04."),
        ),
    }
    for what, edit in edits.items():
        command = ["convert", "--input=hf", "--output=converted_again"]
        yield Case(kind, what, command, edit, names=("hf", name))


def manifests(kind: str, draw: random.Random, cases: int, template: Path) -> Iterator[Case]:
    """The manifest itself, damaged or full of lies."""
    place = Path("recorded/manifest.sha256.json")
    for name, change in FAULTS.items():
        yield Case(
            kind,
            f"{name} it",
            ["verify", "recorded"],
            lambda c=change: c(place, draw),
            # Without it there is nothing to compare with; its last byte is the end of a line.
            {"removed": (REFUSED, DONE), "truncated": (REFUSED, RECOVERED)}.get(name, (REFUSED,)),
            ("recorded",),
        )
    lies = {
        "no files": {"files": {}},
        "a path out of the folder": {"files": {"../small.gin": {"bytes": 1, "sha256": "0" * 64}}},
        "nonsense": {"files": {"checkpoint": []}},
        "a number": 3,
    }
    for name, values in lies.items():
        yield Case(
            kind,
            name,
            ["verify", "recorded"],
            lambda v=values: place.write_text(json.dumps(v)),
            names=("recorded",),
        )


def fingerprint(folder: Path) -> str:
    """Of all files, to see that nothing was touched."""
    digest = hashlib.sha256()
    for file in files_of(folder):
        digest.update(str(file).encode() + (folder / file).read_bytes())
    return digest.hexdigest()


KINDS: dict[str, Kind] = {
    "files of a prompt": prompt_files,
    "the array of a prompt": prompt_arrays,
    "prompts of others": foreign_prompts,
    "files of a run's state": run_states,
    "states of a run": whole_states,
    "settings of a run": other_files,
    "files of a T5X checkpoint": t5x_files,
    "parameters of a T5X checkpoint": t5x_structure,
    "T5X's own checkpoints": foreign_checkpoints,
    "files of a Hugging Face model": hf_files,
    "tensors of a Hugging Face model": hf_structure,
    "manifests": manifests,
}
