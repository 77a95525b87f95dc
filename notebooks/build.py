"""Keeps the notebooks in step, and stores their outputs.

    python notebooks/build.py          # the address of the repository, in badges and install cells
    python notebooks/build.py --run prompt_tuning your_own_method    # also executes these

The address stands once, in setup.py. The tests of the notebooks use the same functions.
"""

import argparse
import copy
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent
SETUP = FOLDER.parent / "setup.py"
STORED = ("prompt_tuning", "your_own_method")  # a few minutes on a CPU; their outputs are kept
# What each needs beside the package: real_t5 downloads from Hugging Face, and compares with PEFT.
NEEDS = {"real_t5": " huggingface_hub peft transformers"}
BADGE = re.compile(r"\[!\[Open in Colab\].*\n\n")

INSTALL = """\
# From the checkout that the notebook lies in, if there is one, else from the repository; with JAX
# for the chips that are here.
import glob
import os
import shutil

source = ".." if os.path.exists("../setup.py") else "git+{address}"
tpu = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")
chips = "jax[cuda12]" if shutil.which("nvidia-smi") else "jax[tpu]" if tpu else "jax"
if INSTALL:
    %pip install -q {{source}} {{chips}}{needs}"""


def read_address() -> str:
    """The address of the repository."""
    (address,) = re.findall(r'^URL = "(.+)"', SETUP.read_text(), flags=re.MULTILINE)
    return address


def render(notebook: Any, name: str) -> Any:
    """The notebook with badge and install cell of today's address; its outputs stay."""
    notebook, address = copy.deepcopy(notebook), read_address()
    path = address.replace("https://github.com/", "github/") + f"/blob/main/notebooks/{name}.ipynb"
    badge = (
        "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
        f"(https://colab.research.google.com/{path})\n\n"
    )
    notebook.cells[0].source = badge + BADGE.sub("", notebook.cells[0].source)
    install = INSTALL.format(address=address, needs=NEEDS.get(name, ""))
    find(notebook, "install").source = install
    return notebook


def find(notebook: Any, tag: str) -> Any:
    """The cell with a tag: "parameters" or "install"."""
    (cell,) = [cell for cell in notebook.cells if tag in cell.metadata.get("tags", ())]
    return cell


def set_parameters(notebook: Any, **values: Any) -> Any:
    """The notebook with other values in the cell of its parameters."""
    notebook = copy.deepcopy(notebook)
    cell = find(notebook, "parameters")
    for name, value in values.items():
        line = re.compile(rf"^{name} = .*$", flags=re.MULTILINE)
        assert len(line.findall(cell.source)) == 1, f"{name} is no parameter"
        cell.source = line.sub(lambda _, text=f"{name} = {value!r}": text, cell.source)
    return notebook


def execute(notebook: Any, folder: Path, client: type[NotebookClient] = NotebookClient) -> Any:
    """The notebook, executed in a folder with this Python; in place, so that a failure is kept.

    Raises:
      CellExecutionError: a cell failed.
    """
    commands = os.path.dirname(sys.executable)
    path = commands + os.pathsep + os.environ["PATH"]
    # As on a laptop, not as in the tests, which set flags of XLA and several devices.
    unset = ("XLA_FLAGS", "NPROC", "TF_CPP_MIN_LOG_LEVEL", "JAX_PLATFORMS")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    running = client(
        notebook,
        timeout=1800,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
    )
    running.execute(env={**environment, "PATH": path})
    return notebook


def clean(output: Any, folder: Path) -> Any:
    """An output as a screen shows it: progress bars at their end, paths relative to the folder."""
    output = copy.deepcopy(output)
    if output.output_type == "stream":
        text = output.text.replace("\r\n", "\n").replace(f"{folder}/", "")
        output.text = re.sub(r"[^\n]*\r", "", text)
    return output


def join_streams(outputs: list[Any]) -> list[Any]:
    """The outputs, with neighbouring pieces of a stream as one."""
    joined: list[Any] = []
    for output in outputs:
        last = joined[-1] if joined else None
        same = last is not None and "stream" == last.output_type == output.output_type
        if same and last.name == output.name:
            last.text += output.text
        else:
            joined.append(copy.deepcopy(output))
    return joined


def main() -> None:
    """Rewrites the notebooks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", nargs="*", default=(), metavar="NAME", choices=STORED)
    run = parser.parse_args().run
    for file in sorted(FOLDER.glob("*.ipynb")):
        notebook = render(nbformat.read(file, as_version=4), file.stem)
        if file.stem in run:
            with tempfile.TemporaryDirectory() as folder:
                done = execute(set_parameters(notebook, INSTALL=False), Path(folder))
            for cell, executed in zip(notebook.cells, done.cells, strict=True):
                if cell.cell_type == "code":
                    outputs = join_streams(executed.outputs)
                    cell.outputs = [clean(output, Path(folder)) for output in outputs]
                    cell.execution_count = executed.execution_count
        nbformat.validate(notebook)
        nbformat.write(notebook, file)


if __name__ == "__main__":
    main()
