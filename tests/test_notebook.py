"""The example notebook runs whole."""

import shutil

import nbformat
from conftest import ROOT, SHIPPED
from nbclient import NotebookClient


def test_quickstart_notebook(tmp_path):
    (tmp_path / "examples" / "datasets").mkdir(parents=True)
    shutil.copytree(SHIPPED, tmp_path / "examples" / "datasets" / SHIPPED.name)
    notebook = nbformat.read(ROOT / "examples" / "quickstart.ipynb", as_version=4)
    for cell in notebook.cells:
        cell.source = cell.source.replace("steps=60", "steps=10")
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path / "examples")}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    texts = [output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in outputs]
    assert "TrainResult(steps=10, final_loss=" in "".join(texts)
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert "predicted [" in "".join(texts)
    assert not [output for output in outputs if output.get("name") == "stderr"], (
        "the progress bar is a widget, in one place"
    )
    assert any("application/vnd.jupyter.widget-view+json" in output.get("data", {}) for output in outputs)
