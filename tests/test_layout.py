"""The house: which room may import which, what is heavy, what is shipped."""

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

# The rooms, from the bottom up: each imports only rooms above its own line. `config` holds plain
# dataclasses and is everybody's; only the commands, `upstream` and `api` may read gin files.
ROOMS = (
    "config",
    "runtime",
    "world",
    "model",
    "methods",
    "gin_reader",  # beside the settings in `config`: it looks up methods and checks their settings
    "decoding",
    "vocabularies",
    "checkpoints",
    "prompts",
    "batches",
    "tasks",
    "session",
    "evaluation",
    "serving",
    "training",
    "pretraining",
    "planning",
    "upstream",
    "api",
    "commands",
    "cli",
)
# The only rooms that may import TensorFlow and seqio.
TENSORFLOW = {"tasks", "upstream"}


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
    if relative.name == "gin_reader.py":
        return "gin_reader"
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path):
    own = room(path)
    if own == "__init__":
        return  # of the package: it hands out names when they are asked for
    allowed = ROOMS[: ROOMS.index(own) + 1]
    rooms = {n.split(".")[1] for n in imports(path) if n.startswith("prompt_tuning.")}
    known = {p.stem for p in PACKAGE.iterdir()}
    assert rooms & known <= set(allowed)


def test_few_rooms_import_tensorflow_and_seqio():
    theirs = {"tensorflow", "seqio", "tensorflow_datasets"}
    users = {room(p) for p in SOURCES if theirs & {name.split(".")[0] for name in imports(p)}}
    assert users == TENSORFLOW


def test_one_module_imports_gin_and_one_orbax():
    importing = {
        name: {str(p.relative_to(PACKAGE)) for p in SOURCES if name in imports(p)}
        for name in ("gin", "orbax.checkpoint")
    }
    assert importing == {
        "gin": {"config/gin_reader.py"},
        "orbax.checkpoint": {"checkpoints/run_state.py"},
    }


def test_model_training_loop_and_serving_load_no_tensorflow():
    code = (
        "import sys\n"
        "import prompt_tuning.decoding.decode, prompt_tuning.model.sharding\n"
        "import prompt_tuning.serving.predictor, prompt_tuning.serving.infer\n"
        "import prompt_tuning.batches.batching\n"
        "import prompt_tuning.checkpoints.t5x, prompt_tuning.training.loop\n"
        "found = {'tensorflow', 'seqio', 'tensorflow_datasets', 'gin'} & set(sys.modules)\n"
        "assert not found, found\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_module_has_a_name_that_says_nothing():
    assert {p.stem for p in SOURCES} & {"utils", "common", "helpers", "base", "core"} == set()


def test_the_folder_of_experiments_does_not_shadow_the_package_gin():
    assert not list((ROOT / "gin").rglob("*.py"))
    code = "import gin; gin.parse_config"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


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
