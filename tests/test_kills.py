"""However a run is stopped, it goes on as if it had not been, and no checkpoint is ever incomplete."""

import json
import shutil
import signal
import subprocess
import sys

import pytest

from checkpoints.folder import find_checkpoints
from helpers.paths import ROOT, SHIPPED
from helpers.runs import assert_same_run, logged, small

STEPS = 16
SETTINGS = {  # batches of 16 from one episode of 103 frames: epochs end inside the run
    **small(dataset_id=str(SHIPPED), image_size=[32, 32], batch_size=16, steps=STEPS, save_freq=2, log_freq=5),
    "episodes": "0", "augment": True, "keep_last": 3, "quiet": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run that was never stopped."""
    folder = tmp_path_factory.mktemp("kills") / "whole"
    list(lives(folder, SETTINGS, "operation"))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["epoch"] > 2
    return folder


def lives(output_dir, settings, *plan):
    """The lives of a run, as lives.py tells them."""
    path = output_dir.with_suffix(".json")
    path.write_text(json.dumps({**settings, "output_dir": str(output_dir)}))
    command = [sys.executable, "tests/helpers/lives.py", str(path), *map(str, plan)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    message = [json.loads(line) for line in done.stdout.splitlines()]
    assert message[-1]["status"] == 0, output_dir.with_suffix(".log").read_text()[-2000:]
    return message


def assert_equal(whole, folder):
    assert_same_run(whole, folder, STEPS)
    assert logged(whole) == logged(folder)
    assert [path.name for path in folder.glob(".*")] == [".lock"]


@pytest.mark.slow
def test_terminated_and_resumed_by_the_command_it_tells(whole, tmp_path, record_property):
    record_property("trials", ("SIGTERM, resumed by the printed command", 1))
    flags = [f"--{name}" if value is True else f"--{name}={value}" for name, value in SETTINGS.items()
             if value and not isinstance(value, list)]  # fmt: skip
    lists = [["--" + name, *map(str, value)] for name, value in SETTINGS.items() if isinstance(value, list)]
    command = [sys.executable, "src/train.py", *sum(lists, flags), "--output_dir", str(tmp_path / "run")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("step 5/"):
                process.terminate()
                break
        last = process.stdout.read().splitlines()[-2:]
    assert process.returncode == 128 + signal.SIGTERM
    saved = find_checkpoints(tmp_path / "run")[-1]
    assert last[0].startswith("stopped by SIGTERM at step ")
    assert last[1] == f"python src/train.py --resume_from_checkpoint {saved}"
    subprocess.run([sys.executable, *last[1].split()[1:]], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    assert_equal(whole, tmp_path / "run")


@pytest.mark.slow
def test_killed_before_every_file_operation_of_saving_and_pruning(whole, tmp_path, record_property):
    record_property("trials", ("SIGKILL before each file operation of saving and pruning", 59))
    message = lives(tmp_path / "run", {**SETTINGS, "save_freq": 1, "keep_last": 1}, "operation", *range(1, 60))
    assert [life["status"] for life in message] == [-signal.SIGKILL] * 59 + [0]
    assert_equal(whole, tmp_path / "run")


@pytest.mark.slow
def test_killed_before_every_file_operation_of_replacing(whole, tmp_path, record_property):
    """A checkpoint that an earlier branch of the run has left gives way to the new one, or stays whole."""
    record_property("trials", ("SIGKILL before each file operation of replacing a checkpoint", 55))
    run = shutil.copytree(whole, tmp_path / "run")
    again = {**SETTINGS, "keep_last": None, "resume_from_checkpoint": str(run / f"checkpoint-{STEPS - 4}")}
    message = lives(run, again, "operation", *range(1, 56))
    assert [life["status"] for life in message] == [-signal.SIGKILL] * 55 + [0]
    assert all(life["checkpoints"] == [STEPS - 4, STEPS - 2, STEPS] for life in message[:47])
    assert_equal(whole, run)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [4, 5])
def test_replaced_folders_are_left_to_the_run_that_began_there(whole, tmp_path, seed, record_property):
    """The run that was there before ends with a line, and the new one is the run that nobody disturbed."""
    message = lives(tmp_path / "run", {**SETTINGS, "save_freq": 1}, "replaced", 6, seed)
    record_property("trials", ("folder deleted during the run, another run begun there", 6))
    firsts = [life["status"] for life in message[::2]]
    assert set(firsts) <= {0, 2}  # 0: it had finished before
    assert 2 in firsts
    assert [life["status"] for life in message[1::2]] == [0] * 6
    log = (tmp_path / "run.log").read_text()
    lines = [line for line in log.splitlines() if line.startswith("error: ")]
    assert len(lines) == firsts.count(2)
    assert all("during this run" in line for line in lines)
    assert "Traceback" not in log
    assert_equal(whole, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "seed"), [("SIGKILL", 1), ("SIGKILL", 2), ("SIGTERM", 3), ("SIGHUP", 4)])
def test_stopped_at_random_moments(whole, tmp_path, name, seed, record_property):
    message = lives(tmp_path / "run", SETTINGS, "signal", name, seed)
    record_property("trials", (f"{name} at random moments", len(message) - 1))
    number = getattr(signal, name)
    assert {life["status"] for life in message[:-1]} <= {-number if name == "SIGKILL" else 128 + number}
    assert_equal(whole, tmp_path / "run")
