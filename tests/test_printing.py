"""Printing never ends a run: closed pipes, full disks, closed streams, terminals that lack a character."""

import contextlib
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

import runs
from checkpoints.folder import verify
from helpers.paths import ROOT
from helpers.runs import assert_same_run, logged, small
from printing import SafeStream, fill_closed_numbers, safe_output
from train import main, train

TASK = "抓住方块, réussi \udc80"  # as no terminal has it: with half a character


def broken_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    return open(writer, "w", encoding="utf-8")


def closed_file():
    file = io.TextIOWrapper(io.BytesIO())
    file.close()
    return file


def full_disk():
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    return open("/dev/full", "w", encoding="utf-8")


def of_encoding(name):
    return lambda: io.TextIOWrapper(io.BytesIO(), encoding=name)


STREAMS = {
    "broken pipe": broken_pipe,
    "full disk": full_disk,
    "closed": closed_file,
    "never open": lambda: None,
    "ascii": of_encoding("ascii"),
    "latin-1": of_encoding("latin-1"),
    "utf-8": of_encoding("utf-8"),
}


def give_up(stream) -> None:
    """Close a stream that perhaps cannot be flushed."""
    if stream is not None:
        with contextlib.suppress(OSError):
            stream.close()


@pytest.fixture(params=STREAMS)
def stream(request):
    stream = STREAMS[request.param]()
    yield stream
    give_up(stream)


def test_writing_to_a_stream_never_fails(stream):
    safe = SafeStream(stream)
    for text in ("plain\n", f"{TASK}\n", "x" * 100_000):
        assert safe.write(text) == len(text)
        print(text, file=safe, flush=True)
    safe.writelines(["a\n", TASK])
    safe.flush()
    assert not safe.isatty()
    safe.close_own()


def test_what_an_encoding_lacks_is_escaped():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    print("réussi: 抓", file=SafeStream(stream), flush=True)
    assert stream.buffer.getvalue() == "réussi: ".encode("latin-1") + rb"\u6293" + b"\n"


def test_a_full_disk_is_told_once_and_a_closed_pipe_is_not(capsys):
    for make, count in ((full_disk, 1), (broken_pipe, 0)):
        errors = io.StringIO()
        stream = make()
        safe = SafeStream(stream, errors)
        for _ in range(3):
            print("a line", file=safe, flush=True)
        assert errors.getvalue().count("warning: standard output cannot be written (No space left on device)") == count
        assert (safe.failure is not None) == bool(count)
        give_up(stream)


def test_the_streams_are_put_back():
    output = sys.stdout
    errors = sys.stderr

    @safe_output()
    def fail():
        assert sys.stdout is not output
        raise ValueError("of the run")

    with pytest.raises(ValueError, match="of the run"):
        fail()
    assert sys.stdout is output
    assert sys.stderr is errors


@pytest.fixture
def foreign(copy_of):
    """A dataset whose tasks few terminals can show."""
    root = copy_of("no_camera")
    path = root / "meta" / "tasks.parquet"
    tasks = pd.read_parquet(path)
    tasks.index = [f"{TASK[:-2]} {i}" for i in range(len(tasks))]
    tasks.to_parquet(path)
    return root


@pytest.fixture(scope="module")
def whole(made, tmp_path_factory):
    folder = tmp_path_factory.mktemp("printing") / "whole"
    train(**small(dataset_id=str(made("no_camera")), output_dir=str(folder)))
    return folder


def test_a_run_ends_as_it_would_whatever_becomes_of_its_output(whole, foreign, tmp_path, monkeypatch, stream):
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    settings = small(dataset_id=str(foreign), output_dir=str(tmp_path / "run"), quiet=False)
    assert main(settings) == 0
    monkeypatch.undo()
    assert_same_run(whole, tmp_path / "run", 4)
    assert logged(whole) == logged(tmp_path / "run")


def test_a_bar_on_a_terminal_survives_a_closed_pipe(whole, made, tmp_path, monkeypatch):
    """`train.py | head` in a terminal: the bar prints its lines to the pipe."""
    stream = broken_pipe()
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", terminal)
    settings = small(dataset_id=str(made("no_camera")), output_dir=str(tmp_path / "run"), quiet=False)
    assert main(settings) == 0
    monkeypatch.undo()
    assert "4/4" in terminal.getvalue()
    assert_same_run(whole, tmp_path / "run", 4)
    give_up(stream)


@pytest.mark.parametrize(("name", "status"), [("broken pipe", 0), ("never open", 0), ("closed", 0), ("full disk", 1)])
def test_a_command_says_by_its_status_whether_its_output_was_lost(whole, monkeypatch, name, status):
    stream = STREAMS[name]()
    monkeypatch.setattr(sys, "stdout", stream)
    assert runs.main(["show", str(whole)]) == status
    assert runs.main(["show", str(whole / "nothing")]) == 2
    monkeypatch.undo()
    give_up(stream)


def test_numbers_of_closed_streams_are_not_given_to_files():
    """The next file would be number 2, and what a library prints there would get into it."""
    code = (
        "import os, sys; sys.path.insert(0, 'src'); from printing import fill_closed_numbers; fill_closed_numbers(); "
        "sys.exit(os.open(os.devnull, os.O_RDONLY))"
    )
    done = subprocess.run(["bash", "-c", f'exec {sys.executable} -c "{code}" <&- >&- 2>&-'], cwd=ROOT, check=False)
    assert done.returncode == 3
    before = [os.fstat(number).st_ino for number in (0, 1, 2)]
    fill_closed_numbers()
    assert [os.fstat(number).st_ino for number in (0, 1, 2)] == before


def command_of(settings: dict) -> list[str]:
    words = []
    for name, value in settings.items():
        if value is not True and value is not False:
            words += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return ["src/train.py", *words]


def test_the_commands_themselves(whole, foreign, tmp_path):
    """Without a locale, errors closed, read by `head -1`: a run to its end, with its model card, and no traceback."""
    run = tmp_path / "run"
    settings = small(dataset_id=str(foreign), output_dir=str(run), quiet=False, save_async="on")
    pipeline = '"$@" 2>&- | head -1; echo "status ${PIPESTATUS[0]}"'
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}

    def head(*command):
        words = ["bash", "-c", pipeline, "bash", sys.executable, *command]
        done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert "Traceback" not in done.stderr + done.stdout
        return done.stdout.splitlines()

    assert head(*command_of(settings)) == [f"dataset   {foreign}: 3 episodes, 33 frames at 10 fps", "status 0"]
    verify(run / "checkpoint-4")
    assert_same_run(whole, run, 4)
    assert "act" in Path(run / "README.md").read_text(encoding="utf-8")
    assert head("src/runs.py", "show", str(run)) == ["policy          act", "status 0"]
    assert head("src/train.py", "--help")[-1] == "status 0"
    shutil.rmtree(run)
