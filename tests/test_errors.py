"""A user's mistake is one line, `error: ...`, and exit status 2; nothing is touched."""

import functools
import os
import shutil
import signal
import subprocess
import sys
from socket import gaierror
from urllib.error import URLError

import pytest
from huggingface_hub.errors import LocalTokenNotFoundError

import export
from command_line import parse_command_line
from errors import UserError, as_user_error
from helpers.paths import ROOT
from helpers.runs import small
from train import main, train


@pytest.fixture(scope="module")
def run(made, tmp_path_factory):
    folder = tmp_path_factory.mktemp("errors") / "run"
    train(**small("flow", dataset_id=str(made("video"))), output_dir=str(folder))
    return folder


@pytest.fixture
def damaged(run, tmp_path):
    """A copy of a checkpoint to damage."""
    from pathlib import Path

    return Path(shutil.copytree(run / "checkpoint-2", tmp_path / "checkpoint-2"))


def message(capsys, **settings) -> str:
    """The one line that a run with these settings ends with."""
    capsys.readouterr()
    assert main(settings) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1, shown.err
    assert shown.out == ""
    return shown.err[len("error: ") : -1]


def test_unknown_dataset(capsys):
    assert (
        message(capsys, dataset_id="nowhere")
        == "no dataset nowhere: there is no such folder, and a Hub id is written user/name"
    )


def test_offline_hub_id(capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    line = message(capsys, dataset_id="nobody/nothing", output_dir="outputs/never")
    assert line.startswith("dataset nobody/nothing: the network request failed (")
    assert line.endswith("). Pass a local folder, or try again online")


def test_offline_policy_path(capsys, made):
    line = message(capsys, dataset_id=str(made("video")), policy_path="nobody/nothing", device="cpu")
    assert line.startswith("--policy_path nobody/nothing (no local folder): the network request failed (")
    assert line.endswith("). Check the path, or run this online once: hf download nobody/nothing")


def test_offline_resume(capsys):
    line = message(capsys, resume_from_checkpoint="nobody/nothing")
    assert line.startswith("--resume_from_checkpoint nobody/nothing (no local folder): the network request failed (")


def test_folder_that_is_no_dataset(capsys, tmp_path):
    assert message(capsys, dataset_id=str(tmp_path)) == (
        f"{tmp_path} is not a LeRobot dataset: it has no meta/info.json. Pass the folder that holds meta, data and videos"
    )


def test_no_such_checkpoint(capsys, run):
    line = message(capsys, resume_from_checkpoint=str(run / "checkpoint-3"))
    assert "there is no such folder, did you mean 'checkpoint-" in line
    assert line.endswith(f"? {run} has checkpoint-2, checkpoint-4")


def test_run_folder_instead_of_a_checkpoint(capsys, run):
    line = message(capsys, resume_from_checkpoint=str(run))
    assert line.endswith(f"is not a complete checkpoint (it has no manifest.json). Pass {run}/checkpoint-4")


def test_latest_where_there_is_none(capsys, tmp_path, made):
    line = message(
        capsys, dataset_id=str(made("video")), output_dir=str(tmp_path / "new"), resume_from_checkpoint="latest"
    )
    assert line == (
        f"--resume_from_checkpoint latest: {tmp_path}/new has no checkpoint-<step> folder. Leave the flag out to start afresh"
    )


def test_step_in_the_name_against_trainer_state(capsys, damaged):
    wrong = damaged.rename(damaged.with_name("checkpoint-9"))
    line = message(capsys, resume_from_checkpoint=str(wrong))
    assert line == ("the name checkpoint-9 says step 9, but trainer_state.json inside says 2. "
                    "Rename the folder to checkpoint-2, or pass --resume_step 2")  # fmt: skip
    nameless = wrong.rename(wrong.with_name("best"))
    line = message(capsys, resume_from_checkpoint=str(nameless))
    assert line == "best has no step in its name. Pass --resume_step 2 if it is the checkpoint of that step"
    assert message(capsys, resume_from_checkpoint=str(nameless), resume_step=5).startswith(
        "--resume_step 5 says step 5, but trainer_state.json"
    )


def test_other_dims_than_the_checkpoint(capsys, run, made):
    line = message(capsys, dataset_id=str(made("wide")), resume_from_checkpoint=str(run / "checkpoint-4"), steps=6)
    assert line.endswith(
        "observation.state: expected 3 numbers, as in checkpoint-4, got 5 numbers. "
        "Pass the dataset it was trained on, or train a new policy"
    )


def test_other_camera_than_the_checkpoint(capsys, run, made):
    line = message(capsys, dataset_id=str(made("no_camera")), resume_from_checkpoint=str(run / "checkpoint-4"), steps=6)
    assert line.endswith(
        "it has no observation.images.top, which checkpoint-4 was trained on: expected observation.images.top, got none. "
        "Pass a dataset that has it, or train a new policy"
    )


def test_other_policy_than_the_checkpoint(capsys, run):
    line = message(capsys, resume_from_checkpoint=str(run / "checkpoint-4"), policy="diffusion")
    assert line.startswith(
        "--policy: checkpoint-4 was trained with flow, got diffusion. A resumed run keeps its policy"
    )


def test_corrupt_weights(capsys, damaged):
    weights = damaged / "policy.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.unlink()  # model.safetensors is the same file
    weights.write_bytes(content)
    line = message(capsys, resume_from_checkpoint=str(damaged))
    assert line == f"{damaged} is damaged: policy.safetensors does not match its sha256. Resume from another checkpoint"


def test_truncated_weights(capsys, damaged):
    weights = damaged / "policy.safetensors"
    content = weights.read_bytes()
    weights.unlink()
    weights.write_bytes(content[:-1])
    line = message(capsys, resume_from_checkpoint=str(damaged))
    assert f"policy.safetensors has {len(content) - 1} bytes, expected {len(content)}" in line


def test_missing_file(capsys, damaged):
    (damaged / "config.json").unlink()
    assert message(capsys, resume_from_checkpoint=str(damaged)).endswith(
        "config.json is missing. Resume from another checkpoint"
    )


def test_pickle_that_runs_code_is_refused(capsys, damaged):
    import pickle
    import zipfile

    from checkpoints.folder import write_manifest

    class Evil:
        def __reduce__(self):
            return print, ("this must never be printed",)

    state = damaged / "optimizer_state.pth"
    inside = zipfile.ZipFile(state)
    with zipfile.ZipFile(damaged / "evil", "w") as evil:
        for item in inside.infolist():
            evil.writestr(item, pickle.dumps(Evil(), 2) if item.filename.endswith("data.pkl") else inside.read(item))
    (damaged / "evil").rename(state)
    write_manifest(damaged)
    line = message(capsys, resume_from_checkpoint=str(damaged), steps=6)
    refusal = "optimizer_state.pth is refused: expected tensors and numbers, got code that would run print. "
    assert line.endswith(refusal + "Resume from a checkpoint that you trust")


def test_resumed_from_the_folder_that_one_is_in(capsys, damaged, monkeypatch):
    monkeypatch.chdir(damaged)
    assert "checkpoint-2 is at step 2, past --steps 1" in message(capsys, resume_from_checkpoint=".", steps=1)
    monkeypatch.chdir(damaged.rename(damaged.with_name("nameless")))
    assert message(capsys, resume_from_checkpoint=".").startswith("nameless has no step in its name")


def test_the_home_of_a_user_who_does_not_exist(capsys, made):
    line = message(capsys, resume_from_checkpoint="~no-such-user/checkpoint-2")
    assert line.startswith("--resume_from_checkpoint ~no-such-user/checkpoint-2: there is no such folder")
    line = message(capsys, dataset_id=str(made("video")), policy_path="~no-such-user/policy")
    assert line.startswith("--policy_path ~no-such-user/policy")


def test_output_dir_in_use(capsys, run, made):
    before = sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*"))
    line = message(capsys, dataset_id=str(made("video")), output_dir=str(run))
    assert line == (f"--output_dir {run} already holds checkpoint-4. Pass --resume_from_checkpoint latest to resume from it, "
                    "or another --output_dir")  # fmt: skip
    assert sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*")) == before


def test_episodes_out_of_range(capsys, made):
    line = message(capsys, dataset_id=str(made("video")), episodes="1:9")
    assert line == "--episodes 1:9: 1:9 is out of range, the dataset has 3 episodes, 0:3"


def test_unknown_policy(capsys, made):
    line = message(capsys, dataset_id=str(made("video")), policy="atc")
    assert line.startswith("unknown policy 'atc', did you mean 'act'?: expected one of act, diffusion, ")


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ("chunksize=5", "--policy_args chunksize: policy act has no such setting, did you mean 'chunk_size'?"),
        ("chunk_size=abc", "--policy_args chunk_size: expected int, got 'abc'"),
        ("use_vae=3.5", "--policy_args use_vae: expected bool, got '3.5'"),
        ("chunk_size", "--policy_args chunk_size: expected chunk_size=VALUE"),
        ("vision_backbone=vit", "policy act: `vision_backbone` must be one of the ResNet variants. Got vit."),
    ],
)
def test_policy_args(capsys, made, pairs, expected):
    assert message(capsys, dataset_id=str(made("video")), policy_args=[pairs]) == expected


def test_policy_whose_extra_is_missing(capsys, made):
    import importlib.metadata
    import importlib.util

    if importlib.util.find_spec("transformers"):
        pytest.skip("transformers is installed, so smolvla's extra is not missing")
    line = message(capsys, dataset_id=str(made("video")), policy="smolvla", device="cpu")
    version = importlib.metadata.version("lerobot")
    assert line.startswith("policy smolvla: a package is missing (")
    assert line.endswith(f'). Install it with: uv pip install "lerobot[smolvla]=={version}"')


def test_backbone_that_cannot_be_fetched(capsys, made, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(
        "torch.hub.urlopen",
        lambda *args, **kwargs: (_ for _ in ()).throw(URLError(gaierror("Name or service not known"))),
    )
    line = message(capsys, dataset_id=str(made("video")), device="cpu", output_dir=str(tmp_path / "run"))
    assert line == (
        "policy act: the network request failed (<urlopen error Name or service not known>). "
        "Go online once, or pass --policy_args pretrained_backbone_weights=none"
    )


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ImportError("no\nsimulator"), "it: a package is missing. no simulator"),
        (ConnectionResetError("gone"), "it: the network request failed (gone). Go online"),
        (TimeoutError(), "it: the network request failed (TimeoutError). Go online"),
        (PermissionError(13, "Permission denied", "/file"), "it: /file: Permission denied"),
        (OSError(28, "No space left on device"), "it: No space left on device"),
        (LocalTokenNotFoundError(), "it: you are not logged in to the Hub. Run `hf auth login`"),
        (KeyError("their word for a wrong value"), "it: 'their word for a wrong value'"),
    ],
)
def test_library_errors_that_the_user_can_mend(error, message):
    with pytest.raises(UserError) as caught, as_user_error("it", invalid=KeyError, offline="Go online"):
        raise error
    assert str(caught.value) == message
    assert caught.value.__cause__ is error


def test_a_request_that_a_library_has_wrapped_is_a_network_error():
    """As transformers does, in an OSError of its own."""
    with (
        pytest.raises(UserError, match=r"it: the network request failed \(we could not connect\)"),
        as_user_error("it"),
    ):
        raise OSError("we could not connect") from ConnectionError("refused")


@pytest.mark.parametrize(
    "error",
    [
        OSError("who knows"),
        AttributeError(),
        TypeError(),
        AssertionError(),
        LookupError(),
        RuntimeError(),
        ValueError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_bugs_stay_bugs(error):
    with pytest.raises(type(error)) as caught, as_user_error("it"):
        raise error
    assert caught.value is error


@pytest.mark.parametrize("name", ["train", "export"])
@pytest.mark.parametrize("how", ["flag", "environment", "no"])
def test_debug_shows_the_traceback(tmp_path, capsys, monkeypatch, name, how):
    monkeypatch.setenv("ARMATURE_DEBUG", "1" if how == "environment" else "0")
    debug = ["--debug"] if how == "flag" else []
    if name == "train":
        status = main(parse_command_line(["--dataset_id", "nowhere", *debug]))
    else:
        status = export.main([str(tmp_path / "nowhere"), "x", "--format", "lerobot", *debug])
    assert status == 2
    shown = capsys.readouterr().err
    assert shown.splitlines()[-1].startswith("error: ")
    assert ("Traceback (most recent call last):" in shown) == (how != "no")


def test_device_that_is_not_here(capsys, made):
    assert message(capsys, dataset_id=str(made("video")), device="cuda:99").startswith(
        "--device cuda:99 cannot be used on this machine ("
    )
    assert message(capsys, dataset_id=str(made("video")), device="gpu").startswith(
        "--device gpu cannot be used on this machine ("
    )


def test_frames_all_dropped(capsys, made, tmp_path):
    settings = small("diffusion", dataset_id=str(made("wide")), output_dir=str(tmp_path / "run"))
    settings["policy_args"] = [
        *settings["policy_args"][:-2],
        "drop_n_last_frames=7",
        "pretrained_backbone_weights=none",
    ]
    assert "no episode is longer than the 7 frames that the policy leaves out at its end" in message(capsys, **settings)


def test_output_dir_that_cannot_be_written(capsys, made, tmp_path):
    (tmp_path / "file").write_text("")
    line = message(capsys, **small(dataset_id=str(made("no_camera")), output_dir=str(tmp_path / "file" / "run")))
    assert line == f"--output_dir {tmp_path}/file/run cannot be written: Not a directory"


@pytest.mark.parametrize("file", ["README.md", "meta/info.json"])
def test_output_dir_that_is_no_run_of_ours(capsys, made, tmp_path, file):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("mine")
    line = message(capsys, **small(dataset_id=str(made("no_camera")), output_dir=str(tmp_path)))
    holds = file.split("/")[0]
    assert line == f"--output_dir {tmp_path} is not a run's folder: it holds {holds}. Pass another folder"
    assert [path.name for path in tmp_path.iterdir()] == [file.split("/")[0]]


def test_command_line_exits_with_2():
    for flags in (["--bach_size", "3"], ["--dataset_id", "nowhere"]):
        shown = subprocess.run(
            [sys.executable, "src/train.py", *flags], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert shown.returncode == 2
        assert shown.stderr.startswith("error: ")
        assert shown.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("command", "status", "line"),
    [
        (["src/train.py", "--dataset_id", "x"], -signal.SIGINT, b""),
        (["src/evaluate.py", "x", "--env", "metaworld"], -signal.SIGINT, b""),
        (["src/export.py", "x", "y", "--format", "lerobot"], 130, b"interrupted\n"),
    ],
)
def test_interrupted_while_torch_is_imported(tmp_path, command, status, line):
    """No traceback, and the shell sees that it was Ctrl-C."""
    # evaluate.py's server of worker processes imports torch too. It does not hear Ctrl-C, and holds the output open while it runs.
    lines = ["import os, signal, time", "os.kill(os.getpid(), signal.SIGINT)"]
    lines += ["if signal.sigpending(): os._exit(1)", "time.sleep(60)"]
    (tmp_path / "torch.py").write_text("\n".join(lines))
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    # a shell that runs the suite in the background makes every child ignore Ctrl-C
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    shown = subprocess.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True, preexec_fn=heed)
    assert (shown.returncode, shown.stdout, shown.stderr) == (status, b"", line)
