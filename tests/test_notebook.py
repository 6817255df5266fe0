"""The example notebook runs whole, and its stop button loses nothing."""

import shutil
import threading
import time

import nbformat
from nbclient import NotebookClient

from checkpoints.folder import find_checkpoints, verify
from helpers.paths import ROOT, SHIPPED


def test_quickstart_notebook(tmp_path):
    (tmp_path / "examples" / "datasets").mkdir(parents=True)
    shutil.copytree(SHIPPED, tmp_path / "examples" / "datasets" / SHIPPED.name)
    notebook = nbformat.read(ROOT / "examples" / "quickstart.ipynb", as_version=4)
    for cell in notebook.cells:
        cell.source = cell.source.replace("steps=400", "steps=10")
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


def test_interrupting_the_kernel_keeps_the_result_and_the_checkpoint(tmp_path):
    """What a notebook's stop button does."""
    from jupyter_client.manager import KernelManager

    code = f"""
import sys, os; sys.path[:0] = [{str(ROOT / "src")!r}, {str(ROOT / "tests")!r}]
from helpers.paths import SHIPPED
from helpers.runs import small
from train import train
settings = small(dataset_id=str(SHIPPED), episodes="0", image_size=[48, 48], steps=10**6, save_freq=0, output_dir={str(tmp_path / "run")!r})
print("training")
result = train(**settings)
print("stopped_by", result.stopped_by, result.steps == int(result.checkpoint.name.split("-")[1]), len(result.history) > 0)
"""
    manager = KernelManager(kernel_name="python3")
    manager.start_kernel(cwd=str(tmp_path))
    client = manager.client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=60)
        shown = []

        def hook(message):
            shown.append(message["content"].get("text", ""))

        def interrupt_once_it_trains():
            while (
                not (tmp_path / "run" / "metrics.jsonl").exists()
                or not (tmp_path / "run" / "metrics.jsonl").read_text()
            ):
                time.sleep(0.1)
            manager.interrupt_kernel()

        waiter = threading.Thread(target=interrupt_once_it_trains, daemon=True)
        waiter.start()
        client.execute_interactive(code, timeout=120, output_hook=hook)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    assert "stopped_by SIGINT True True" in "".join(shown)
    verify(find_checkpoints(tmp_path / "run")[-1])
