"""The tour runs from its first cell to its last, and the notebook that is committed holds the same cells."""

import os
from pathlib import Path

import pytest

jupytext = pytest.importorskip("jupytext")
nbclient = pytest.importorskip("nbclient")

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "docs" / "tour.py"


def cells(notebook):
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def test_the_notebook_holds_the_cells_of_the_script():
    assert cells(jupytext.read(ROOT / "docs" / "tour.ipynb")) == cells(jupytext.read(SCRIPT)), "run: make notebook"


@pytest.mark.slow
def test_the_tour_runs(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    notebook = jupytext.read(SCRIPT)
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    last = notebook.cells[-1].outputs[0]["data"]["text/plain"]
    assert "model.safetensors" in last and "tokenizer.json" in last
