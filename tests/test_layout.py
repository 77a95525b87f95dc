"""The house: which room may import which, what is heavy, how large a file is, what is shipped."""

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "prompt_tuning"
SOURCES = sorted(PACKAGE.rglob("*.py"))

# What each room may import of the others; `config` holds plain dataclasses and is everybody's.
ALLOWED = {
    "config_parts": set(),
    "config": {"config_parts"},
    "gin_settings": set(),
    "gin_config": {"backbones", "gin_settings"},  # for sizes that are to come from a checkpoint
    "model": set(),
    "world": {"checkpoint", "model"},  # `probe.py` runs a model; the rest is plain Python
    "exchange": set(),  # files of others: what they mean here is `checkpoint`'s to say
    "checkpoint": {"exchange", "launch", "model"},
    "backbones": {"checkpoint", "launch", "model", "world"},
    "prompts": {"backbones", "checkpoint", "exchange", "serving"},
    "safety": {"backbones", "checkpoint", "exchange", "model"},
    "launch": set(),
    "text": set(),
    "tables": {"text"},
    "data": {"exchange", "tables", "text", "world"},
    "serving": {
        "backbones",
        "checkpoint",
        "data",
        "exchange",
        "model",
        "safety",
        "tables",
        "world",
    },
    "scoring": {"data", "model", "text"},
    "training": {
        *(
            "backbones",
            "checkpoint",
            "data",
            "launch",
            "model",
            "safety",
            "scoring",
            "tables",
            "text",
            "world",
        ),
    },
    "pretraining": {
        *("backbones", "checkpoint", "data", "launch", "model", "safety", "training", "world"),
    },
    "evaluation": {
        *(
            "backbones",
            "checkpoint",
            "data",
            "exchange",
            "launch",
            "model",
            "scoring",
            "text",
            "training",
        ),
    },
    "t5x_inputs": {"backbones", "checkpoint", "data", "model", "training"},
    "t5x_plugin": {"checkpoint", "model", "t5x_inputs", "training"},
    "t5x_engine": {"checkpoint", "gin_config", "gin_settings", "t5x_inputs", "training"},
    "api": {
        *("backbones", "checkpoint", "evaluation", "gin_config", "launch", "serving", "training"),
        "world",
    },
    "commands": {
        "backbones",
        "checkpoint",
        "data",
        "evaluation",
        "gin_config",
        "launch",
        "model",  # its mesh
        "planning",
        "pretraining",
        "prompts",
        "safety",
        "serving",
        "t5x_engine",
        "training",
        "world",
    },
    "planning": {"data", "model", "pretraining", "training"},
    "cli": {"commands", "launch", "safety"},
}
# Only these may touch the room of TensorFlow.
USES_DATA = {
    "commands/data.py",
    "evaluation/prompts.py",
    "evaluation/submit.py",
    "pretraining/corpus.py",
    "pretraining/documents.py",
    "planning/devices.py",  # for `groups.py`, which is numpy alone
    "scoring/eval_task.py",
    "scoring/evaluate.py",
    "scoring/ranking.py",
    "serving/infer.py",  # for the rows of a task, inside a function
    "t5x_inputs.py",
    "training/course.py",
    "training/health.py",
    "training/loop.py",
    "training/overview.py",
    "training/setup.py",
}


def imports(path: Path) -> set[str]:
    """The full names of what a file imports, wherever in it the import stands."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def room(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path):
    own = room(path)
    if own == "__init__":
        return  # of the package: it hands out names when they are asked for
    ours = {name for name in imports(path) if name.startswith("prompt_tuning.")}
    rooms = {name.split(".")[1] for name in ours} - {own, "config", "config_parts"}
    known = {p.stem for p in PACKAGE.iterdir()}
    assert (rooms & known) <= ALLOWED[own]
    if "data" in rooms:
        assert str(path.relative_to(PACKAGE)) in USES_DATA


def test_only_the_data_room_imports_tensorflow_and_seqio():
    theirs = {"tensorflow", "seqio", "tensorflow_datasets"}
    users = {room(p) for p in SOURCES if theirs & {name.split(".")[0] for name in imports(p)}}
    # T5X's inputs are a tf.data.Dataset; the command line imports TensorFlow quietly, once.
    assert users == {"data", "t5x_inputs", "commands"}


def test_only_two_modules_import_gin_and_one_orbax():
    importing = {
        name: {str(p.relative_to(PACKAGE)) for p in SOURCES if name in imports(p)}
        for name in ("gin", "orbax.checkpoint")
    }
    assert importing == {
        "gin": {"gin_config.py"},
        "orbax.checkpoint": {"checkpoint/run_state.py"},
    }


def test_model_and_serving_load_no_tensorflow():
    code = (
        "import sys\n"
        "import prompt_tuning.model.decode, prompt_tuning.model.sharding\n"
        "import prompt_tuning.serving.predictor, prompt_tuning.serving.infer\n"
        "import prompt_tuning.checkpoint.t5x, prompt_tuning.training.step\n"
        "found = {'tensorflow', 'seqio', 'tensorflow_datasets', 'gin'} & set(sys.modules)\n"
        "assert not found, found\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_files_are_of_a_size_to_be_read():
    lines = {str(p.relative_to(ROOT)): len(p.read_text().splitlines()) for p in SOURCES}
    assert {name: n for name, n in lines.items() if n > 450} == {}
    rooms = {p for p in PACKAGE.iterdir() if p.is_dir() and (p / "__init__.py").exists()}
    assert {p.name for p in rooms if len(list(p.glob("*.py"))) > 11} == set()


def test_no_module_has_a_name_that_says_nothing():
    assert {p.stem for p in SOURCES} & {"utils", "common", "helpers", "base", "core"} == set()


def test_the_folder_of_experiments_does_not_shadow_the_package_gin():
    assert not list((ROOT / "gin").rglob("*.py"))
    code = "import gin; gin.parse_config"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_module_has_a_test_of_its_name():
    tested = {p.stem.removeprefix("test_") for p in (ROOT / "tests").glob("test_*.py")}
    elsewhere = {
        "api": "notebook",
        **dict.fromkeys(("config", "config_parts"), "gin_config"),
        **dict.fromkeys(("chips", "devices", "flops", "hlo", "program"), "plan"),
        **dict.fromkeys(("compilation_cache", "guard", "processes"), "launch"),
        "gin_settings": "gin_config",
        **dict.fromkeys(("command", "runs", "data", "prompts"), "cli"),
        **dict.fromkeys(("setup", "model_dir", "course"), "loop"),
        **dict.fromkeys(("signals", "lock", "crash"), "safety"),
        **dict.fromkeys(("manifest", "file_list"), "verify"),
        "ending": "health",
        **dict.fromkeys(("results", "pictures"), "matrix"),
        "submission_format": "submit",
        **dict.fromkeys(("read", "template", "examples", "scores"), "tables"),
        "overview": "file_tasks",
        **dict.fromkeys(("eval_task", "evaluate", "intervals", "score_table"), "analysis"),
        **dict.fromkeys(("register", "graph"), "tasks"),
        **{"spec": "superglue", "official": "prepare", "answers": "metrics"},
        **dict.fromkeys(("glue", "qa"), "tasks"),
        **dict.fromkeys(("layouts", "chunks"), "checkpoint_t5x"),
        **{"state_arrays": "run_state", "agreement": "launch"},
        "segments": "examples",
        **dict.fromkeys(("language", "make"), "miniatures"),
        **dict.fromkeys(("curves", "run", "saved", "slots"), "pretrain"),
        "t5x": "checkpoint_t5x",
        "storage": "checkpoint_t5x",
        "replace_folder": "checkpoint_t5x",
        "mixed_batch": "predictor",
        "beam": "decode",
        **dict.fromkeys(("npy", "prompt_array"), "prompt_file"),
        **dict.fromkeys(("embedding", "inspection_text", "picture"), "inspection"),
        "layers": "attention",
        "sizes": "gin_config",
        **dict.fromkeys(("architecture", "names", "safetensors_files", "load"), "huggingface"),
        "backbones": "conversion",
        **dict.fromkeys(("assets", "generator", "probe", "tiny"), "world"),
    }
    names = {p.stem for p in SOURCES} - {"__init__"}
    assert {name for name in names if elsewhere.get(name, name) not in tested} == set()


# What is shipped.


def test_the_wheel_holds_every_gin_file_and_the_tiny_backbone(tmp_path):
    source = tmp_path / "source"  # setuptools leaves its work behind where it builds
    for folder in ("prompt_tuning", "gin"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, source / folder, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = "import sys, setuptools.build_meta as b; print(b.build_wheel(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", build, str(tmp_path)], cwd=source, capture_output=True, text=True
    )
    if "No module named 'setuptools'" in done.stderr:
        pytest.skip("setuptools is not installed, so no wheel can be built without a network")
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    shipped = set(zipfile.ZipFile(wheel).namelist())
    needed = {f"prompt_tuning/{p.relative_to(ROOT)}" for p in (ROOT / "gin").rglob("*.gin")}
    tiny = PACKAGE / "world" / "tiny"
    needed |= {str(p.relative_to(ROOT)) for p in tiny.rglob("*") if p.is_file()}
    needed |= {str(p.relative_to(ROOT)) for p in SOURCES}
    assert needed - shipped == set()
    top = {name.split("/")[0] for name in shipped}
    assert {name for name in top if not name.endswith(".dist-info")} == {"prompt_tuning"}


# What the README says.


def test_readme_names_files_and_commands_that_exist():
    from prompt_tuning import cli

    text = (ROOT / "README.md").read_text()
    links = re.findall(r"\]\(((?!http)[^)#]+)\)", text)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
    assert {command for command in cli.COMMANDS if f"t5x {command}" not in text} == set()
    gin_files = set(re.findall(r"--gin_file=([\w/.]+\.gin)", text))
    gin_files -= {"runs/demo/config.gin"}  # the demo writes it
    assert [name for name in gin_files if not (ROOT / "gin" / name).exists()] == []
