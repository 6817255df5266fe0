"""Several processes: the same course as one, the same folder, and an end when one of them is gone."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from checkpoints.folder import write_manifest
from errors import UserError
from helpers.paths import ROOT
from helpers.runs import DETERMINISTIC_ACT, assert_same_optimizer, assert_same_run, logged, read_metrics, small
from policy.factory import imitation_policies
from policy.flow import FlowConfig
from policy.losses import loss_averages_over_actions, unknown_average
from reports.pages import read_history
from train import train
from training.distributed import Distributed
from training.launch import check_device
from training.means import SubLossMeans, mean_of, scalars, totals_of_rank

WAYS = {
    "DDP": {},
    "FSDP": {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_TRANSFORMER_CLS_TO_WRAP": "ACTEncoderLayer,ACTDecoderLayer",
    },
    "ZeRO 2": {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
    "ZeRO 3": {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"},
}


@pytest.fixture(scope="module")
def team():
    """Run settings in several processes; their exit statuses."""
    command = [sys.executable, str(ROOT / "tests" / "helpers" / "processes.py")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(settings: dict, processes: int = 2, env: dict | None = None, kill: list | None = None) -> list[int]:
        job = {"settings": settings, "processes": processes, "env": env or {}, "kill": kill}
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    yield run
    process.stdin.close()
    process.wait(20)


def apart(settings: dict, env: dict) -> list[int]:
    """The same in two processes that are started afresh: DeepSpeed's kernels hang in forked ones."""
    place = {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29517",
        "OMP_NUM_THREADS": "1",
    }
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'src')!r}); from train import main; sys.exit(main({settings!r}))"
    )
    with open(settings["output_dir"] + ".log", "w") as log:
        ranks = [{**os.environ, **place, **env, "RANK": str(r), "LOCAL_RANK": str(r)} for r in range(2)]
        processes = [subprocess.Popen([sys.executable, "-c", code], env=e, stdout=log, stderr=log) for e in ranks]
        return [process.wait(180) for process in processes]


def losses(output_dir: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def sub_losses(output_dir: Path) -> list[float]:
    return [line["l1_loss"] for line in read_metrics(output_dir)]


def weights(checkpoint: Path) -> dict:
    return load_file(checkpoint / "policy.safetensors")


@pytest.mark.parametrize("way", [pytest.param(way, marks=[pytest.mark.slow] * (way != "DDP")) for way in WAYS])
def test_two_processes_are_one(team, made, tmp_path, way):
    """9 steps of 2 x 4 samples follow those of 1 x 8; stopped and resumed by two they are the same to the bit."""
    two_are_one(team, made, tmp_path, way)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_handed_from_two_processes_to_one_and_back(team, made, tmp_path, way):
    """The course stays what it was up to rounding, and LeRobot loads what comes out."""
    one, run = two_are_one(team, made, tmp_path, way)
    checkpoint = str(tmp_path / "two" / "checkpoint-5")
    alone = train(resume_from_checkpoint=checkpoint, steps=7, output_dir=str(tmp_path / "alone"), quiet=True)
    back = {"resume_from_checkpoint": str(alone.checkpoint), "output_dir": str(tmp_path / "back"), "steps": 9}
    assert run(back) == [0, 0]
    there = {line["step"]: line["loss"] for line in read_history(tmp_path / "back")}
    assert [there[line["step"]] for line in one.history] == pytest.approx(
        [line["loss"] for line in one.history], rel=1e-5
    )

    from lerobot.policies.act.modeling_act import ACTPolicy

    end = tmp_path / "back" / "checkpoint-9"
    loaded = ACTPolicy.from_pretrained(str(end)).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights(end).items())


def two_are_one(team, made, tmp_path, way: str):
    """The run of one process, and how to run two; compares their courses, and two's with its own resume."""
    if way.startswith("ZeRO"):
        pytest.importorskip("deepspeed", reason="deepspeed is not installed (uv pip install deepspeed)")
        team = apart
    settings = {**small(dataset_id=[str(made("video"))], steps=9, save_freq=5, log_freq=3), **DETERMINISTIC_ACT}
    settings["ema_decay"] = 0.9 if way != "ZeRO 3" else 0
    one = train(**settings, output_dir=str(tmp_path / "one"))
    two = {**settings, "output_dir": str(tmp_path / "two")}
    assert team(two, env=WAYS[way]) == [0, 0], Path(f"{two['output_dir']}.log").read_text()
    assert losses(tmp_path / "two") == pytest.approx([line["loss"] for line in one.history], rel=1e-5)
    assert {p.name for p in (tmp_path / "two").iterdir()} >= {"checkpoint-5", "checkpoint-9"}
    ends = [weights(run.joinpath("checkpoint-9")) for run in (tmp_path / "two", tmp_path / "one")]
    assert ends[0].keys() == ends[1].keys()
    if settings["ema_decay"]:  # the average is saved, not what is being trained
        own = load_file(tmp_path / "two" / "checkpoint-9" / "training_weights.safetensors")
        rounding, distance = (max((a - other[name]).abs().max() for name, a in ends[0].items() if a.is_floating_point())
                          for other in (ends[1], own))  # fmt: skip
        assert rounding < distance / 5

    again = {"resume_from_checkpoint": str(tmp_path / "two" / "checkpoint-5"), "output_dir": str(tmp_path / "again")}
    assert team(again, env=WAYS[way]) == [0, 0]
    ends = [tmp_path / name / "checkpoint-9" for name in ("two", "again")]
    assert all(torch.equal(a, weights(ends[1])[name]) for name, a in weights(ends[0]).items())
    assert losses(tmp_path / "again") == losses(tmp_path / "two")  # of which one line began before the save
    # Its loss is its one sub-loss: the mean over the processes, and over the steps of a line.
    for name in ("one", "two", "again"):
        assert sub_losses(tmp_path / name) == pytest.approx(losses(tmp_path / name), rel=1e-6)
    assert sub_losses(tmp_path / "again") == sub_losses(tmp_path / "two")
    assert_same_optimizer(*ends)
    return one, lambda settings: team(settings, env=WAYS[way])


def test_a_killed_process_ends_the_run(team, made, tmp_path):
    """kill -9 of one: the other reports the whole error and ends, and the last checkpoint is complete."""
    from checkpoints.folder import find_checkpoints, verify

    settings = {
        **small(dataset_id=[str(made("video"))], steps=100_000, save_freq=50),
        **DETERMINISTIC_ACT,
        "log_freq": 50,
    }
    settings["output_dir"] = str(tmp_path / "run")
    codes = team(settings, kill=[1, 1.0, "SIGKILL"])
    assert codes == [1, -signal.SIGKILL]
    log = Path(f"{settings['output_dir']}.log").read_text()
    assert len(re.findall("^error: process 0 of this run has lost process 1: .*gloo.*peer", log, re.MULTILINE)) == 1
    assert "Checkpoints are complete: launch the run again with --resume_from_checkpoint auto" in log
    assert "Traceback" not in log
    for path in find_checkpoints(tmp_path / "run"):
        verify(path)


def test_a_signal_to_one_process_stops_all_at_one_step(team, made, tmp_path):
    settings = {**small(dataset_id=[str(made("video"))], steps=100_000, save_freq=0), **DETERMINISTIC_ACT}
    settings["output_dir"] = str(tmp_path / "run")
    assert team(settings, kill=[1, 0.5, "SIGUSR1"], env={"SLOW_DISK": "0.1"}) == [138, 138]
    (saved,) = (tmp_path / "run").glob("checkpoint-*")
    log = Path(f"{settings['output_dir']}.log").read_text()
    assert "stopped by SIGUSR1" in log
    assert f"process 1 left {saved.name}" in log  # a launcher kills the others once one has left with such a status
    assert json.loads((saved / "trainer_state.json").read_text())["world_size"] == 2


def test_only_the_main_process_hashes_and_simulates(team, made, tmp_path):
    """A run and its resume, with a simulation in each."""
    env = {"SIMULATION": "3", "TELL_WORK": "1"}
    settings = small("flow", dataset_id=[str(made("no_camera"))], eval_env="pusht", eval_episodes=1, steps=2)
    settings["output_dir"] = str(tmp_path / "run")
    assert team(settings, env=env) == [0, 0]
    assert team({**settings, "resume_from_checkpoint": "latest", "steps": 4}, env=env) == [0, 0]
    log = Path(f"{settings['output_dir']}.log").read_text()
    assert log.count("process 0 calls open_simulation") == 2
    assert "process 0 calls sha256" in log
    assert "process 1 calls" not in log
    assert [line["step"] for line in read_metrics(tmp_path / "run") if "eval_success_rate" in line] == [2, 4]


def test_what_the_main_process_refuses_is_told_by_all(team, made, tmp_path):
    settings = small("flow", dataset_id=[str(made("no_camera"))], steps=2, output_dir=str(tmp_path / "run"))
    assert team(settings) == [0, 0]
    (tmp_path / "run" / "checkpoint-2" / "policy.safetensors").write_bytes(b"damaged")
    assert team({**settings, "resume_from_checkpoint": str(tmp_path / "run" / "checkpoint-2")}) == [2, 2]
    log = Path(f"{settings['output_dir']}.log").read_text()
    assert log.count("checkpoint-2 is damaged: ") == 2
    assert "error: process 1: " in log
    assert "Traceback" not in log
    assert "lost process" not in log


def test_a_signal_to_another_process_ends_the_main_ones_simulation(team, made, tmp_path):
    """Which would take a day."""
    settings = small(
        "flow", dataset_id=[str(made("no_camera"))], eval_env="pusht", eval_freq=3, log_freq=1, save_freq=0
    )
    settings["output_dir"] = str(tmp_path / "run")
    assert team(settings, env={"SIMULATION": "10000000"}, kill=[1, 1.0, "SIGTERM"]) == [143, 143]
    (saved,) = (tmp_path / "run").glob("checkpoint-*")
    assert saved.name == "checkpoint-3"
    assert json.loads((saved / "trainer_state.json").read_text())["evaluation_is_missing"] is True
    resumed = {"resume_from_checkpoint": str(saved), "output_dir": settings["output_dir"]}
    assert team(resumed, env={"SIMULATION": "3"}) == [0, 0]
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines if "eval_success_rate" in line] == [3, 4]


def test_an_error_of_one_processes_data_saves_the_steps_before_it(team, made, tmp_path):
    settings = small(dataset_id=[str(made("no_camera"))], save_freq=0, log_freq=3)
    assert team({**settings, "output_dir": str(tmp_path / "whole")}) == [0, 0]
    settings["output_dir"] = str(tmp_path / "run")
    assert team(settings, env={"BREAK_LOADER_1": "2", "SLOW_DISK": "0.1"}) == [1, 2]
    log = Path(f"{settings['output_dir']}.log").read_text()
    assert "warning: step 3 fails: the steps before it are saved in checkpoint-2" in log
    assert "error: process 1: frame 7 cannot be decoded" in log
    assert "error: the data of this step could not be read in another process" in log
    assert "Traceback" not in log
    resumed = {"resume_from_checkpoint": str(tmp_path / "run" / "checkpoint-2"), "output_dir": settings["output_dir"]}
    assert team(resumed) == [0, 0]
    assert_same_run(tmp_path / "whole", tmp_path / "run", 4)
    assert logged(tmp_path / "whole") == logged(tmp_path / "run")


def test_more_processes_than_gpus_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(
        UserError, match=r"at most 2 processes on this machine, got 8\. Launch with .*--num_processes 2"
    ):
        check_device("auto")


def test_an_error_while_the_peers_live_is_no_lost_peer(team, made, tmp_path):
    """An error of one process stays what it is, whatever its text: only the other process has lost a peer."""
    settings = {**small(dataset_id=[str(made("video"))]), "output_dir": str(tmp_path / "run")}
    error = "NCCL error: invalid usage, connection closed by peer"
    assert team(settings, env={"BREAK_RANK_1": error}) == [1, 1]
    log = Path(f"{settings['output_dir']}.log").read_text()
    assert f"torch.distributed.DistBackendError: {error}" in log
    assert log.count("Traceback") == 1
    assert "process 1 of this run has lost" not in log
    assert log.count("error: process 0 of this run has lost process 1: ") == 1


def test_processes_that_cannot_connect_are_told(team, made, tmp_path):
    settings = {**small(dataset_id=[str(made("video"))]), "output_dir": str(tmp_path / "run")}
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert team(settings, processes=1, env={"WORLD_SIZE": "2", "MASTER_PORT": port}) == [2]
    log = Path(f"{settings['output_dir']}.log").read_text()
    assert f"error: the processes of this run cannot connect at 127.0.0.1:{port} (" in log
    assert "address already in use" in log
    assert "Traceback" not in log


def test_a_mistake_is_told_once(team, made, tmp_path):
    settings = {**small(dataset_id=[str(made("video"))], batch_size=3), "output_dir": str(tmp_path / "run")}
    assert team(settings) == [2, 2]
    log = Path(f"{settings['output_dir']}.log").read_text()
    assert "error: --batch_size is the whole batch of a step, split evenly by --grad_accumulation_steps (1) and" in log
    assert "expected a multiple of 2, got 3. Pass --batch_size 4" in log


@pytest.mark.slow
def test_fsdp_of_layers_that_the_policy_has_not_is_told(team, made, tmp_path):
    settings = {**small("flow", dataset_id=[str(made("video"))]), "output_dir": str(tmp_path / "run")}
    assert team(settings, env=WAYS["FSDP"]) == [2, 2]
    log = Path(f"{settings['output_dir']}.log").read_text()
    assert "error: FSDP: Could not find the transformer layer class ACTEncoderLayer" in log
    assert "Traceback" not in log


@pytest.mark.parametrize("policy", ["act", "flow"])
def test_accumulated_parts_are_the_batch(made, tmp_path, policy):
    """8 samples in one part, two or four: the same course up to rounding, padded actions and all."""
    # A small step: Adam's is as large for a gradient that is nothing but rounding.
    settings = small(policy, steps=4, save_freq=0, lr=1e-4) | DETERMINISTIC_ACT
    if policy == "act":
        settings["dataset_id"] = str(made("no_camera"))
    else:
        settings["dataset_id"] = str(made("video"))
        settings["policy_args"] = ["size=tiny", "head=regression", "chunk_size=6", "n_action_steps=3"]
    courses = []
    for parts in (1, 2, 4):
        result = train(**settings, grad_accumulation_steps=parts, output_dir=str(tmp_path / str(parts)))
        courses.append([line["loss"] for line in result.history])
    assert courses[1] == pytest.approx(courses[0], rel=1e-5)
    assert courses[2] == pytest.approx(courses[0], rel=1e-5)


def test_sub_losses_are_means_over_micro_batches_and_steps(made, tmp_path):
    """With a latent, whose loss is another sub-loss: they make up the logged loss, in each line, stopped or not."""
    settings = small(dataset_id=str(made("no_camera")), batch_size=8, steps=7, save_freq=5, log_freq=3)
    settings["grad_accumulation_steps"] = 4
    whole = train(**settings, output_dir=str(tmp_path / "whole"))
    for line in whole.history:
        assert line["l1_loss"] + 10 * line["kld_loss"] == pytest.approx(line["loss"], rel=1e-5)
    checkpoint = str(tmp_path / "whole" / "checkpoint-5")
    train(resume_from_checkpoint=checkpoint, output_dir=str(tmp_path / "part"), quiet=True)
    names = ("step", "loss", "l1_loss", "kld_loss")
    lines = [[[line[name] for name in names] for line in read_metrics(tmp_path / run)] for run in ("whole", "part")]
    assert lines[0] == lines[1]  # of which one line began before the save

    # A checkpoint of an older version knows no such sums: the means begin at its step.
    state = json.loads((tmp_path / "whole" / "checkpoint-5" / "trainer_state.json").read_text())
    assert state["sub_loss_sums"][0]["l1_loss"][1] == 2 * 4
    assert train_without_sums(tmp_path / "whole" / "checkpoint-5", tmp_path / "old") == whole.final_loss


def train_without_sums(checkpoint: Path, output_dir: Path) -> float:
    """The final loss of a resume from a checkpoint without the sums of sub-losses."""
    old = Path(shutil.copytree(checkpoint, output_dir / checkpoint.name))
    state = json.loads((old / "trainer_state.json").read_text())
    del state["sub_loss_sums"]
    (old / "trainer_state.json").write_text(json.dumps(state))
    (old / "manifest.json").unlink()
    write_manifest(old)
    result = train(resume_from_checkpoint=str(old), quiet=True)
    assert result.history[-1]["l1_loss"] > 0
    return result.final_loss


def test_means_of_numbers_that_not_all_report():
    means = SubLossMeans({})
    means.add({"a": torch.tensor(1.0), "b": 2.0})
    means.add({"a": torch.tensor(3.0)})
    assert means.totals() == {"a": [4.0, 2], "b": [2.0, 1]}
    by_rank = [means.totals(), {"a": [2.0, 2], "c": [5.0, 1]}]
    assert mean_of(by_rank) == {"a": 1.5, "b": 2.0, "c": 5.0}
    alone = Distributed()
    assert totals_of_rank(by_rank, alone) == {"a": [6.0, 4], "b": [2.0, 1], "c": [5.0, 1]}
    assert totals_of_rank([], alone) == {}
    numbers = {"a": torch.tensor(2, dtype=torch.int64), "b": True, "c": torch.ones(2), "d": "text"}
    assert scalars(numbers) == {"a": 2.0, "b": 1}
    assert scalars(None) == {}


@pytest.mark.parametrize("declared", [True, False, None])
def test_a_policy_says_what_its_loss_averages_over(made, tmp_path, monkeypatch, capsys, declared):
    """Two micro-batches follow the whole batch if the loss is what the config declares; where it says nothing, that is told."""
    monkeypatch.setattr(FlowConfig, "loss_averages_over_actions", declared)
    settings = small("flow", dataset_id=str(made("no_camera")), steps=3, log_freq=1, save_freq=0, batch_size=8, lr=1e-4)
    settings["policy_args"] = ["size=tiny", "head=regression", "chunk_size=6", "n_action_steps=3"]
    one, two = (
        train(**settings, grad_accumulation_steps=parts, output_dir=str(tmp_path / str(parts))).history
        for parts in (1, 2)
    )
    is_whole = [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], rel=1e-5)
    assert is_whole == (declared is True)
    warning = (
        "warning: each step adds up 2 parts of its batch, and policy flow does not say what its loss averages over"
    )
    assert capsys.readouterr().out.count(warning) == (declared is None)


def test_every_policy_of_lerobot_is_known_or_told():
    """What a newer LeRobot brings is told, as those are whose loss is a mean over tokens."""
    from lerobot.configs import PreTrainedConfig

    unknown = set()
    for name in imitation_policies():
        config = object.__new__(
            PreTrainedConfig.get_choice_class(name)
        )  # with its defaults; some ask for packages as they are made
        if loss_averages_over_actions(config) is None:
            unknown.add(name)
            assert unknown_average(config, micro_batches=2)
            assert not unknown_average(config, micro_batches=1)
    assert unknown == {"molmoact2", "pi0_fast", "wall_x"}


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_precision_resumes_to_the_bit(made, tmp_path, precision):
    """Half precision, whose scaler has grown and shrunk, stopped and resumed; fp16 must differ from fp32."""
    dataset = made("video" if precision == "bf16" else "no_camera")  # a CPU takes seconds for convolutions in fp16
    settings = small("flow", dataset_id=[str(dataset)], steps=4, save_freq=2, precision=precision)
    whole = train(**settings, output_dir=str(tmp_path / "whole"))
    state = json.loads((whole.checkpoint / "trainer_state.json").read_text())
    assert ("scale" in state["scaler"]) == (precision == "fp16")
    part = train(
        resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"), output_dir=str(tmp_path / "part"), quiet=True
    )
    assert all(torch.equal(a, weights(part.checkpoint)[name]) for name, a in weights(whole.checkpoint).items())
    plain = train(**{**settings, "precision": "fp32"}, output_dir=str(tmp_path / "plain"))
    assert plain.final_loss != whole.final_loss
    assert plain.final_loss == pytest.approx(whole.final_loss, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["act", "flow"])
def test_compiled_loss_is_the_loss(made, tmp_path, policy):
    """torch.compile on the CPU: the loss of each of 3 steps to 1e-5."""
    settings = small(policy, dataset_id=[str(made("video"))], steps=3, save_freq=0, log_freq=1, lr=1e-4)
    # 32 keypoints, not 4: torch 2.11's generated kernel for such a small softmax writes past its memory on the CPU
    settings |= DETERMINISTIC_ACT if policy == "act" else {"policy_args": ["size=tiny"]}
    plain, compiled = (train(**settings, compile=c, output_dir=str(tmp_path / str(c))) for c in (False, True))
    assert [line["loss"] for line in compiled.history] == pytest.approx(
        [line["loss"] for line in plain.history], rel=1e-5
    )


@pytest.mark.slow
def test_accelerate_launch(made, tmp_path):
    """The launcher itself: a run, and one whose second process is killed, which ends within a minute."""
    settings = {**small(dataset_id=[str(made("video"))]), **DETERMINISTIC_ACT, "output_dir": str(tmp_path / "run")}
    flags = [
        f"--{name}" if value is True else f"--{name}={value}"
        for name, value in settings.items()
        if type(value) is not list
    ]
    flags += ["--dataset_id", *settings["dataset_id"], "--policy_args", *settings["policy_args"]]
    launcher = str(Path(sys.executable).parent / "accelerate")
    launch = [
        launcher,
        "launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]  # also where there is none
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", str(ROOT / "src" / "train.py")]
    done = subprocess.run([*launch, *flags], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "done:" in done.stdout
    assert done.stdout.count("done:") == 1
    state = json.loads((tmp_path / "run" / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["world_size"] == 2
    long = [*launch, *flags, "--steps", "100000", "--output_dir", str(tmp_path / "long"), "--log_freq", "1"]
    process = subprocess.Popen(long, stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "long" / "metrics.jsonl"
    while not (metrics.exists() and metrics.stat().st_size):
        assert process.poll() is None
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert re.search("error: process 0 of this run has lost process 1: .*gloo", errors)
