"""The example notebook runs whole, and the stop button loses nothing. One kernel for all: it imports LeRobot, which takes seconds."""

import os
import shutil
import signal
import threading
import time

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook

from checkpoints.folder import find_checkpoints, verify
from helpers.paths import ROOT, SHIPPED


@pytest.fixture(scope="module")
def kernel():
    """run(code) -> the outputs of a cell with this code, in a kernel that has imported train()."""
    client = NotebookClient(new_notebook(), timeout=300)

    def run(code: str) -> list:
        client.nb = new_notebook(cells=[new_code_cell(code)])
        return client.execute_cell(client.nb.cells[0], 0).outputs

    with client.setup_kernel():
        run.first = run(
            f"import os, sys; sys.path[:0] = [{str(ROOT / 'src')!r}, {str(ROOT / 'tests')!r}]\n"
            "sys.argv.append('--bogus'); before = list(sys.argv)\n"
            "from train import train\n"
            "assert sys.argv == before\n"
            "os.getpid()"
        )
        yield run


def text_of(outputs: list) -> str:
    return "".join(output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in outputs)


def test_import_touches_no_argv_and_prints_nothing(kernel):
    (output,) = kernel.first
    assert output.output_type == "execute_result"
    assert text_of([output]).isdigit()


def test_quickstart_notebook(kernel, tmp_path):
    (tmp_path / "examples" / "datasets").mkdir(parents=True)
    shutil.copytree(SHIPPED, tmp_path / "examples" / "datasets" / SHIPPED.name)
    kernel(f"os.chdir({str(tmp_path / 'examples')!r})")
    outputs = []
    for cell in nbformat.read(ROOT / "examples" / "quickstart.ipynb", as_version=4).cells:
        if cell.cell_type == "code":
            outputs += kernel(cell.source.replace("steps=400", 'steps=4, episodes="0:4"'))
    text = text_of(outputs)
    assert "TrainResult(steps=4, final_loss=" in text
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert "predicted [" in text
    assert not [output for output in outputs if output.get("name") == "stderr"], (
        "the progress bar is a widget, in one place"
    )
    assert any("application/vnd.jupyter.widget-view+json" in output.get("data", {}) for output in outputs)


def test_interrupting_the_kernel_keeps_the_result_and_the_checkpoint(kernel, tmp_path):
    """What a notebook's stop button does."""
    pid = int(text_of(kernel("os.getpid()")))
    run = tmp_path / "run"
    metrics = run / "metrics.jsonl"

    def interrupt_once_it_trains():
        while not (metrics.exists() and metrics.read_text()):
            time.sleep(0.1)
        os.kill(pid, signal.SIGINT)

    threading.Thread(target=interrupt_once_it_trains, daemon=True).start()
    shown = kernel(f"""
from helpers.paths import SHIPPED
from helpers.runs import small
settings = small(dataset_id=str(SHIPPED), episodes="0", image_size=[48, 48], steps=10**6, save_freq=0, output_dir={str(run)!r})
result = train(**settings)
print("stopped_by", result.stopped_by, result.steps == int(result.checkpoint.name.split("-")[1]), len(result.history) > 0)
""")
    assert "stopped_by SIGINT True True" in text_of(shown)
    verify(find_checkpoints(run)[-1])
