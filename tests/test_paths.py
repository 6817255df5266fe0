"""Paths that there cannot be, or that may not be entered: one line, for every flag that takes a path."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import evaluate
import export
import infer
import runs
import serve
import train as train_module
from checkpoints.folder import write_manifest
from command_line import print_error, print_warnings
from errors import UserError, find_path, printable
from helpers.paths import ROOT
from helpers.runs import small
from training.chosen_run import gather_settings

TOO_LONG = "a" * 300
BAD = {
    "too long": TOO_LONG,
    "too long below": f"outputs/{TOO_LONG}/run",
    "too long in all": "/".join(["abcdefgh"] * 600),
    "with NUL": "out\0puts/run",
    "with NUL in a home": "~no\0body/run",
    "not UTF-8": os.fsdecode(b"caf\xe9/run"),
}


@contextlib.contextmanager
def as_nobody():
    """Within this, a process of root has no more rights than any other user."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def let_everybody_enter(tmp_path: Path) -> None:
    """Let every user enter a test's folder, and pytest's folders above it."""
    for folder in [tmp_path, *tmp_path.parents]:
        if folder == Path(tempfile.gettempdir()):
            break
        folder.chmod(0o755)


@pytest.fixture
def closed(tmp_path):
    """A folder that may not be entered."""
    folder = tmp_path / "closed"
    (folder / "inside").mkdir(parents=True)
    let_everybody_enter(tmp_path)
    folder.chmod(0o600)
    yield folder
    folder.chmod(0o700)


def test_what_is_there_is_found_and_what_is_not_is_not(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "file").write_text("")
    (tmp_path / "日本 é").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    for name in ("file", "日本 é", "link"):
        assert find_path(tmp_path / name, "it") == tmp_path / name
        assert find_path(f"~/{name}", "it") == tmp_path / name
    for text in ("nothing", "file/below", "dangling", "lerobot/pusht"):
        assert find_path(tmp_path / text, "it") is None
    assert find_path("~nobody_of_this_name/x", "it") is None


@pytest.mark.parametrize("text", BAD.values(), ids=BAD)
def test_what_cannot_be_a_path_is_one_short_line(text):
    with pytest.raises(UserError, match=r"^--flag ") as refused:
        find_path(text, "--flag")
    message = str(refused.value)
    assert message.endswith(". Pass another path")
    assert message.replace("\udce9", "").isprintable()
    assert len(message) < 250


def test_links_in_a_circle_and_folders_that_may_not_be_entered(closed, tmp_path):
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    with pytest.raises(UserError, match="Too many levels of symbolic links"):
        find_path(tmp_path / "circle", "--flag")
    for path in (closed, closed / "inside", closed / "nothing"):
        with as_nobody(), pytest.raises(UserError, match="cannot be opened: Permission denied"):
            find_path(path, "--flag")


def test_a_name_that_this_systems_encoding_lacks():
    code = "import sys; sys.path.insert(0, 'src'); from errors import find_path, UserError\n"
    code += "try: print(find_path(sys.argv[1], '--flag'))\nexcept UserError as error: print(error)"
    name = os.fsencode("日ü")  # as the shell passes it, whatever the encoding
    env = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code, name], cwd=ROOT, env=env, capture_output=True, text=True, check=True
    )
    assert "the encoding of file names here is ascii, which lacks a character of it. Set PYTHONUTF8=1" in done.stdout
    assert done.stdout.count("\n") == 1
    for remedy in ({"PYTHONUTF8": "1"}, {"LC_ALL": "C.UTF-8"}):
        command = [sys.executable, "-c", code, name]
        done = subprocess.run(command, cwd=ROOT, env=env | remedy, capture_output=True, text=True, check=True)
        assert done.stdout == "None\n"


TRAIN_FLAGS = (
    "dataset_id", "dataset_root", "cache_dir", "policy_path", "output_dir", "resume_from_checkpoint", "config_path",
)  # fmt: skip


@pytest.mark.parametrize("text", BAD.values(), ids=BAD)
@pytest.mark.parametrize("flag", TRAIN_FLAGS)
def test_every_path_of_train_is_one_line(tmp_path, capsys, flag, text):
    settings = {"dataset_id": ["somebody/something"], "output_dir": str(tmp_path / "run")}
    settings[flag] = [text] if flag == "dataset_id" else text
    assert train_module.main(settings) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --{flag} ")
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flag", TRAIN_FLAGS)
def test_every_path_of_train_in_a_closed_folder_is_one_line(closed, flag):
    with as_nobody(), pytest.raises(UserError, match=f"^--{flag} .* cannot be opened: Permission denied"):
        gather_settings({flag: str(closed / "inside")})


def test_paths_that_a_checkpoint_or_a_file_of_settings_brings(made, tmp_path):
    file = tmp_path / "settings.json"
    file.write_text('{"cache_dir": "' + TOO_LONG + '"}')
    with pytest.raises(UserError, match=r"^--cache_dir aaa.* cannot be opened: File name too long"):
        gather_settings({"config_path": str(file)})


COMMANDS = {
    "infer checkpoint": (infer, ["{}", "--dataset_id", "x"], "policy"),
    "evaluate checkpoint": (evaluate, ["{}", "--dataset_id", "x"], "policy"),
    "serve checkpoint": (serve, ["{}"], "policy"),
    "export run": (export, ["{}", "out", "--format", "lerobot"], "checkpoint"),
    "export network": (export, ["{}", "out.onnx", "--format", "onnx"], "policy"),
    "export output": (export, ["x/y", "{}", "--format", "onnx"], "output"),
    "runs list": (runs, ["list", "{}"], "PATH"),
    "runs verify": (runs, ["verify", "{}"], "PATH"),
    "runs show": (runs, ["show", "{}"], "PATH"),
    "runs compare": (runs, ["compare", "{}"], "RUN"),
    "runs cache": (runs, ["cache", "list", "--cache_dir", "{}"], "--cache_dir"),
}


@pytest.mark.parametrize("text", BAD.values(), ids=BAD)
@pytest.mark.parametrize("command", COMMANDS)
def test_every_path_of_the_other_commands_is_one_line(capsys, command, text):
    module, arguments, what = COMMANDS[command]
    assert module.main([text if argument == "{}" else argument for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {what} ")
    assert error.count("\n") == 1


@pytest.fixture(scope="module")
def policy(made, tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy") / "run"
    return train_module.train(**small(dataset_id=str(made("no_camera")), output_dir=str(folder), steps=1)).output_dir


@pytest.mark.parametrize("text", BAD.values(), ids=BAD)
def test_datasets_and_outputs_of_the_other_commands(policy, made, capsys, text):
    dataset = str(made("no_camera"))
    for module, arguments, flag in (
        (infer, [str(policy), "--device", "cpu", "--dataset_id", text], "--dataset_id"),
        (evaluate, [str(policy), "--device", "cpu", "--dataset_id", text], "--dataset_id"),
        (evaluate, [str(policy), "--device", "cpu", "--dataset_id", dataset, "--output_dir", text], "--output_dir"),
        (runs, ["compare", str(policy), "--output", text], "--output"),
    ):
        assert module.main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {flag} ")
        assert error.count("\n") == 1


def test_a_home_is_expanded_for_every_command(policy, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(policy.parent))
    assert runs.main(["list", "~/run"]) == 0
    assert runs.main(["verify", "~/run/checkpoint-1"]) == 0
    assert runs.main(["compare", "~/run", "--output", "~/page"]) == 0
    assert (policy.parent / "page.html").is_file()


def test_a_checkpoint_that_may_not_be_entered_is_no_traceback(policy, tmp_path, capsys):
    run = Path(shutil.copytree(policy, tmp_path / "run"))
    let_everybody_enter(tmp_path)
    (run / "checkpoint-1").chmod(0o600)
    run.chmod(0o755)
    with as_nobody():
        assert runs.main(["list", str(run)]) == 2
        assert runs.main(["verify", str(run / "checkpoint-1")]) == 2
    shown = capsys.readouterr().err.splitlines()
    assert shown[0].endswith("is not a checkpoint and holds none. Pass a run's folder or a checkpoint-<step> folder")
    assert shown[1].endswith("checkpoint-1 cannot be opened: Permission denied. Pass another path")


NAMES = {
    "line breaks": "a\nb\r\nc\x0bd\x85e\u2028f",
    "terminal escapes": "a\x1b[2J\x1b]0;title\x07b\x9b1mc",
    "backspaces and NUL": "a\x08\x08\x00b\x7f",
    "other directions": "a\u202eb\u2066c\ufeffd",
    "lone surrogates": "a\udce9b",
}


def is_one_line(text: str) -> bool:
    return text.endswith("\n") and text.isascii() and text[:-1].isprintable()


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_a_message_is_one_line_that_moves_no_cursor_whatever_is_in_its_names(capsys, name):
    print_error(UserError(f"camera {name}: expected another name. Rename it"))
    print_error(UserError(name), prefix="process 1: ")
    print_warnings([f"task {name}"])
    lines = capsys.readouterr().err.splitlines(keepends=True)
    assert len(lines) == 3
    assert all(map(is_one_line, lines))
    assert str(UserError("2 problems:", name, "end")).count("\n") == 2


def test_what_can_be_printed_stays_as_it_is():
    text = "日本　ü\u00a0é 'x' \\n \"y\" 🤖"
    assert printable(text) == text


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_names_in_a_run_and_in_its_checkpoint(policy, made, tmp_path, capsys, name):
    """A folder, a setting, and values of a checkpoint's JSON that somebody wrote."""
    name = name.replace("\0", "")  # which no path can have
    folder = tmp_path / name
    if "\udce9" in name:
        return  # no folder of a run: `find_path` refuses it
    settings = {"dataset_id": [str(made("no_camera"))], "output_dir": str(folder), "steps": 1}
    assert train_module.main({**small(**settings), "quiet": False, "observations": ["state"]}) == 0
    checkpoint = folder / "checkpoint-1"
    edit_json(checkpoint / "training_info.json", saved_at=name, note=name)
    edit_json(checkpoint / "train_config.json", {name: name}, revision=name)
    write_manifest(checkpoint)
    assert train_module.main({"resume_from_checkpoint": str(checkpoint), "steps": 2, "batch_size": 2}) == 0
    for arguments in (["list", str(folder)], ["show", str(checkpoint)], ["verify", str(folder)]):
        assert runs.main(arguments) == 0
    (checkpoint / "notes.safetensors").write_bytes(b"")
    assert runs.main(["verify", str(checkpoint)]) == 2
    shown = capsys.readouterr()
    for line in (shown.out + shown.err).splitlines(keepends=True):
        assert is_one_line(line), line


def edit_json(path: Path, *more: dict, **values) -> None:
    content = json.loads(path.read_text()) | values
    for names in more:
        content |= names
    path.write_text(json.dumps(content))
