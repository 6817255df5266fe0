"""Settings: flags, files and keywords are the same names, checked the same way."""

import json
import resource
import subprocess
import sys

import pytest

import export
from command_line import Parser, parse_command_line
from config import FIELDS, merge, read_config_file
from errors import UserError
from helpers.paths import ROOT
from train import train


def parse(line: str):
    return merge(Parser().given(line.split()))


def test_flags_files_and_keywords_agree(tmp_path):
    given = {"dataset_id": "x", "image_size": [12, 16], "policy_args": {"chunk_size": 5, "pretrained_backbone_weights": None},
             "episodes": [1, 2], "lr": 1e-4, "augment": True}  # fmt: skip
    (tmp_path / "c.json").write_text(json.dumps(given))
    (tmp_path / "c.yaml").write_text("dataset_id: x\nimage_size: [12, 16]\nepisodes: [1, 2]\nlr: 1e-4\naugment: true\n"
                                     "policy_args: {chunk_size: 5, pretrained_backbone_weights: null}\n")  # fmt: skip
    flags = parse("--dataset_id x --image_size 12 16 --policy_args chunk_size=5 pretrained_backbone_weights=none "
                  "--episodes 1,2 --lr 1e-4 --augment")  # fmt: skip
    assert (
        flags
        == merge(given)
        == merge(read_config_file(str(tmp_path / "c.json")))
        == merge(read_config_file(str(tmp_path / "c.yaml")))
    )


@pytest.mark.parametrize("episodes", ['"1:50"', "0:2,5", '"7"'])
def test_yaml_takes_what_the_command_line_takes(tmp_path, episodes):
    flags = f"--dataset_id x --episodes {episodes.strip('"')} --val_episodes 36:40 --frame_cache off --save_async off"
    flags += " --seed 10 --augment off --compile --lr 1e-4 --image_size 12 16"
    lines = [f"episodes: {episodes}", "val_episodes: '36:40'", "frame_cache: off", "save_async: off", "seed: 10"]
    lines += ["dataset_id: x", "augment: off", "compile: yes", "lr: 1e-4", "image_size: [12, 16]"]
    (tmp_path / "c.yaml").write_text("\n".join(lines))
    assert merge(read_config_file(str(tmp_path / "c.yaml"))) == parse(flags)


def test_flags_override_the_file_and_the_checkpoint(tmp_path):
    assert (
        merge({"dataset_id": "x", "steps": 7}, {"steps": 5, "seed": 3, "output_dir": "elsewhere"}).asdict()
        == merge({"dataset_id": "x", "steps": 7, "seed": 3}).asdict()
    )


def test_a_switch_of_a_file_is_turned_off_by_a_flag(tmp_path):
    (tmp_path / "c.json").write_text('{"dataset_id": "x", "compile": true, "quiet": true}')
    config = merge({**read_config_file(str(tmp_path / "c.json")), **parse_command_line(["--compile", "off"])})
    assert (config.compile, config.quiet) == (False, True)


def test_the_other_commands_answer_in_a_line(capsys):
    with pytest.raises(SystemExit) as left:
        export.main(["checkpoint", "net.onnx", "--format", "onxx"])
    assert left.value.code == 2
    assert capsys.readouterr().err.startswith("error: --format must be one of 'lerobot', ")
    assert export.main(["checkpoint", ".", "--format", "onnx"]) == 2
    assert (
        capsys.readouterr().err
        == "error: policy checkpoint: expected an existing folder, or a Hub id written user/name\n"
    )


def test_hyphens_are_underscores():
    assert parse("--dataset-id x-y --batch-size=4").dataset_id == ["x-y"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--dataset_id x --bach_size 3", "unknown flag --bach_size, did you mean '--batch_size'?"),
        ("--dataset_id x --dataset-id=y", "--dataset_id is given more than once. Pass all of its values after one"),
        ("--dataset.root=x", "--dataset.root=x is a flag of lerobot-train. Pass --dataset_id FOLDER"),
        ("--policy.chunk_size=8", "--policy.chunk_size=8 is a flag of lerobot-train. Pass --policy_args NAME=VALUE"),
        (
            "--resume=true",
            "--resume=true is a flag of lerobot-train. Pass --resume_from_checkpoint CHECKPOINT, latest or auto",
        ),
        ("--resume_from_checkpont x", "unknown flag --resume_from_checkpont, did you mean '--resume_from_checkpoint'?"),
        ("--image_size 64", "--image_size must be two numbers, height and width"),
        ("--steps 10k", "--steps must be an integer, got '10k'"),
        ("--dataset_id x --batch_size three", "--batch_size must be an integer, got 'three'"),
        ("--dataset_id x --batch_size 0", "--batch_size must be at least 1, got 0"),
        ("--dataset_id x --lr -1", "--lr must be above 0 and below inf, got -1.0"),
        ("--dataset_id x --lr nan", "--lr must be above 0 and below inf, got nan"),
        ("--dataset_id x --image_size 0 5", "--image_size must be at least 1, got [0, 5]"),
        ("--dataset_id x --steps 5 --warmup_steps 6", "--warmup_steps 6 is more than --steps 5. Pass fewer"),
        ("--steps 5", "no dataset. Pass --dataset_id with a folder or a Hub id, such as lerobot/pusht"),
        ("--dataset_id x y --episodes 0", "--episodes chooses from one dataset, got 2. Leave it out"),
        ("--dataset_id x y --dataset_weights 1", "--dataset_weights: expected one number per dataset, 2, got 1"),
        ("--dataset_id x y --dataset_weights 1 0", "--dataset_weights must be above 0 and below inf, got [1.0, 0.0]"),
        ("stray --dataset_id x", "'stray' belongs to no flag. Pass settings as --name value"),
        ("--dataset_id x --augment maybe", "--augment must be on or off, got 'maybe'"),
        ("--dataset_id x --ema_decay 1", "--ema_decay must be at least 0 and below 1, got 1.0"),
        ("--dataset_id x --eval_freq 5", "--eval_freq needs --eval_env. Pass that as well, or leave --eval_freq out"),
        (
            "--dataset_id x --val_freq 5",
            "--val_freq needs --val_fraction or --val_episodes. Pass that as well, or leave --val_freq out",
        ),
        (
            "--dataset_id x --push_checkpoints",
            "--push_checkpoints needs --push_to_hub. Pass that as well, or leave --push_checkpoints out",
        ),
    ],
)
def test_mistakes_on_the_command_line(line, message):
    with pytest.raises(UserError) as caught:
        parse(line)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"datset_id": "x"}, "unknown setting 'datset_id' for train(), did you mean 'dataset_id'?"),
        ({"dataset_id": "x", "steps": 2.5}, "--steps must be an integer, got 2.5"),
        ({"dataset_id": "x", "augment": "yes"}, "--augment must be a boolean, got 'yes'"),
        ({"dataset_id": "x", "image_size": [3]}, "--image_size must be two numbers, height and width, got [3]"),
        ({"dataset_id": "x", "lr_schedule": "cos"}, "--lr_schedule must be one of constant, linear, cosine, got 'cos'"),
    ],
)
def test_mistakes_in_keywords(settings, message):
    with pytest.raises(UserError) as caught:
        train(**settings)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '{"step": 3}', "unknown setting 'step' in .*a.json, did you mean 'steps'?"),
        ("a.json", "{", "a.json is not valid JSON"),
        ("a.yaml", "a: [", "a.yaml is not valid YAML"),
        ("a.yaml", "steps: 2024-13-45", "a.yaml is not valid YAML: month must be in 1..12"),
        (
            "a.yaml",
            "episodes: 1:50",
            r'YAML reads episodes as the number 110\. Put it in quotes, such as episodes: "0:40"',
        ),
        (
            "a.yaml",
            "val_episodes: 7",
            r'YAML reads val_episodes as the number 7\. Put it in quotes, such as val_episodes: "0:40"',
        ),
        ("a.yaml", "- 1", "must hold one mapping of settings, got list"),
        ("b.json", None, "b.json cannot be read: No such file or directory"),
    ],
)
def test_mistakes_in_files(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        read_config_file(str(tmp_path / name))


def test_help_is_quick_grouped_and_names_every_flag():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    shown = subprocess.run(
        [sys.executable, "src/train.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5  # CPU time, a promise of the issue
    assert shown.stderr == ""
    for group in ("dataset:", "policy:", "training:", "output:", "resume:"):
        assert f"\n{group}\n" in shown.stdout
    for f in FIELDS.values():
        assert f"--{f.name} " in shown.stdout.replace("\n", " \n")
        assert f.metadata["help"]
    assert all(len(line) <= 100 for line in shown.stdout.splitlines())


def test_shipped_configs_are_valid():
    for path in (ROOT / "configs").glob("*.json"):
        config = merge({"dataset_id": "any", **read_config_file(str(path))})
        assert (config.output_dir or "outputs/").startswith("outputs/")
