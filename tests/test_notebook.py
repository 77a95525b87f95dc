"""The notebook runs from top to bottom, as a newcomer would run it, with fewer steps."""

import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).resolve().parents[1] / "notebooks" / "prompt_tuning.ipynb"


def test_the_notebook_runs(tmp_path, monkeypatch):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    tags = [cell.metadata.get("tags", []) for cell in notebook.cells]
    assert tags[1] == ["install"]
    assert tags[2] == ["parameters"]
    assert "STEPS = 600" in notebook.cells[2].source
    notebook.cells[2].source = notebook.cells[2].source.replace("STEPS = 600", "STEPS = 200")
    del notebook.cells[1]
    # The commands of this environment, not another one's.
    monkeypatch.setenv("PATH", os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"])
    client = NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    )
    client.execute()
    assert (tmp_path / "runs" / "mood" / "curves.png").exists()
    printed = "".join(
        output.text
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output.output_type == "stream"
    )
    assert "majority class" in printed
    assert "right:" in printed
    images = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    assert len(images) == 1
