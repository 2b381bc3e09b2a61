"""The notebooks run from their first cell to their last, and those that are committed hold the same cells."""

import os
from pathlib import Path

import pytest

jupytext = pytest.importorskip("jupytext")
nbclient = pytest.importorskip("nbclient")

ROOT = Path(__file__).parents[1]
TOUR, FORGETTING = ROOT / "docs" / "tour.py", ROOT / "docs" / "forgetting.py"


def cells(notebook):
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


@pytest.mark.parametrize("script", [TOUR, FORGETTING], ids=lambda path: path.stem)
def test_the_notebook_holds_the_cells_of_the_script(script):
    assert cells(jupytext.read(script.with_suffix(".ipynb"))) == cells(jupytext.read(script)), "run: make notebook"


def executed(script, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    notebook = jupytext.read(script)
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    return notebook


@pytest.mark.slow
def test_the_tour_runs(monkeypatch):
    last = executed(TOUR, monkeypatch).cells[-1].outputs[0]["data"]["text/plain"]
    assert "model.safetensors" in last and "tokenizer.json" in last


@pytest.mark.slow
def test_the_tutorial_on_compression_runs(monkeypatch):
    printed = "".join(
        out.get("text", "") for cell in executed(FORGETTING, monkeypatch).cells for out in cell.get("outputs", ())
    )
    assert "knorm" in printed and "refeed" in printed
    full, compressed = sizes(printed)
    assert compressed < 0.5 * full


def sizes(printed):
    """Bytes of the whole cache, and of the first compressed one."""
    found = [int(line.split()[-2].replace(",", "")) for line in printed.splitlines() if line.endswith(" bytes")]
    return found[:2]
