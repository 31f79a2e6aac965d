"""The notebooks run from top to bottom."""

import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.ipynb")))
def test_notebook_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For two epochs: any error in a cell fails, and what is drawn and printed is there."""
    monkeypatch.setenv("EPOCHS", "2")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(EXAMPLES / name, as_version=4)
    kept = outputs(notebook)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert outputs(notebook) == kept, "the committed notebook has been run, and gives as many outputs of the same kinds"
    assert (tmp_path / "runs/notebook/encoder.safetensors").exists()
    assert os.path.getsize(EXAMPLES / name) < 300_000


def outputs(notebook: nbformat.NotebookNode) -> list[list[str]]:
    """What kinds of output each cell has."""
    return [
        sorted({kind for out in cell.outputs for kind in out.get("data", {"text/plain": ""})})
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]
