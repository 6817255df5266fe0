"""Adapters of PEFT: every setting, 4-bit bases, several processes, merging, and runs of lerobot-train."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import export
from errors import UserError
from helpers.dataset_edits import edit_json
from helpers.paths import ROOT
from helpers.runs import assert_same_run, read_metrics, small
from policy.loaded import load_policy
from train import train

SKIP = "peft is not installed (uv pip install peft)"
LAYERS = 'target_modules=["linear1","linear2"]'


@pytest.fixture(scope="module")
def base(made, tmp_path_factory):
    """A policy to adapt."""
    output = tmp_path_factory.mktemp("base") / "run"
    return train(**small("act", dataset_id=[str(made("no_camera"))], steps=2), output_dir=str(output)).checkpoint


@pytest.fixture
def settings(made, base):
    """Settings of a run with adapters."""
    pytest.importorskip("peft", reason=SKIP)
    return small(
        "act", dataset_id=[str(made("no_camera"))], policy_args=None, policy_path=str(base), peft="lora", peft_r=4,
        peft_args=[LAYERS],
    )  # fmt: skip


def lerobots(folder, meta):
    """The policy in a folder as LeRobot loads it."""
    from lerobot.configs import PreTrainedConfig
    from lerobot.policies import make_policy

    config = PreTrainedConfig.from_pretrained(folder)
    config.pretrained_path = folder
    config.device = "cpu"
    return make_policy(config, ds_meta=meta).eval()


def chunk(policy) -> torch.Tensor:
    """What a policy predicts for one observation."""
    torch.manual_seed(0)
    batch = {key: torch.rand(1, *feature.shape) for key, feature in policy.config.input_features.items()}
    return policy.predict_action_chunk(batch)


@pytest.fixture(scope="module")
def meta(made):
    from data.opening import open_source

    return open_source(str(made("no_camera"))).meta


@pytest.mark.parametrize(
    ("method", "args"),
    [
        ("lora", ["lora_dropout=0.3", "use_dora=true", 'modules_to_save=["action_head"]']),
        ("lora", ["use_rslora=true", "bias=all", 'rank_pattern={"decoder.*linear1": 8}', 'alpha_pattern={"linear2": 32}']),
        ("lora", ["init_lora_weights=pissa", "layers_to_transform=[0]", "layers_pattern=layers"]),
        ("lora", [r"target_modules=.*encoder.*linear[12]", "init_type=orthogonal", "ema"]),
        ("lora", ["target_modules=all-linear", "exclude_modules=[action_head]", "lora_bias=true"]),
        ("loha", []), ("lokr", []), ("ia3", []), ("oft", []), ("vera", ["r=8"]), ("hra", []),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)  # fmt: skip
def test_a_run_is_the_same_when_resumed_and_acts_in_lerobot(settings, meta, tmp_path, method, args):
    own = {"peft": method, "peft_r": 16 if method == "ia3" else 4}
    if "ema" in args:
        own["ema_decay"] = 0.9
    args = [LAYERS, *(arg for arg in args if arg != "ema")]
    end = train(**{**settings, **own, "peft_args": args}, output_dir=str(tmp_path / "run")).checkpoint
    train(resume_from_checkpoint=str(end.parent / "checkpoint-2"), output_dir=str(tmp_path / "part"), quiet=True)
    assert_same_run(tmp_path / "run", tmp_path / "part", 4)
    first = load_file(end.parent / "checkpoint-2" / "adapter_model.safetensors")
    last = load_file(end / "adapter_model.safetensors")
    assert any(not torch.equal(first[name], last[name]) for name in first)
    acts = chunk(load_policy(end, device="cpu").policy)
    assert torch.equal(acts, chunk(lerobots(end, meta)))
    assert not torch.equal(acts, chunk(load_policy(settings["policy_path"], device="cpu").policy))


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"peft": "loro"}, "--peft: expected one of adamss, beft, "),
        ({"peft": "adalora"}, "--peft adalora: this method moves rank between layers by calls between the steps"),
        ({"peft": "prompt_tuning"}, "--peft prompt_tuning: this method changes the prompt of a language model"),
        ({"peft": "ia3"}, "--peft_r: ia3 has no rank. Leave it out"),
        ({"peft_args": ["lora_dropot=1"]}, "--peft_args lora_dropot: PEFT has no such setting, did you mean 'lora_dropout'?"),
        ({"peft_args": ["use_dora=2"]}, "--peft_args use_dora: expected bool, got '2'"),
        ({"peft_args": ["lora_dropout=1.5"]}, "--peft_args lora_dropout: expected 0 or more, and less than 1, got 1.5"),
        ({"peft_args": ["modules_to_save=head"]}, "--peft_args modules_to_save: expected typing.Optional[list[str]], got 'head'"),
        ({"peft_args": ['rank_pattern={"a": "x"}']}, "--peft_args rank_pattern: expected a number above 0 for a, got 'x'"),
        ({"peft_args": ["target_modules=(a"]}, "--peft_args target_modules: expected a regular expression, got '(a'"),
        ({"peft_args": ["task_type=CAUSAL_LM"]}, "--peft_args task_type: the run sets it by itself. Leave it out"),
        ({"peft_args": ["init_lora_weights=eva"]}, "--peft_args init_lora_weights=eva needs data before training"),
        ({"peft_args": ["eva_config={}"]}, "--peft_args eva_config: needs data or steps of its own"),
        ({"peft_args": [LAYERS, "r=0"]}, "--peft lora: `r` should be a positive integer value but the value passed is 0"),
        ({"peft_args": None}, "--peft lora: Policy 'act' does not define default target_modules"),
        ({"peft_args": [LAYERS, "modules_to_save=[nothing]"]}, "--peft_args modules_to_save: nothing matches no module"),
        ({"peft_args": [LAYERS, "rank_pattern={nothing: 2}"]}, "--peft_args rank_pattern: nothing matches no adapted module"),
        ({"peft_args": [LAYERS, "modules_to_save=[encoder.layers.0]"]},
         "--peft_args modules_to_save: model.vae_encoder.layers.0 holds layers that are adapted"),
        ({"peft_args": ["target_modules=[self_attn]"]}, "by changing its frozen weights in each step"),
        ({"peft": None, "peft_args": None, "peft_quantize": "4bit"},
         "--peft_quantize rounds the weights below adapters: expected --peft, got none. Pass --peft lora"),
        ({"peft": "loha", "peft_quantize": "4bit"}, "--peft_quantize: PEFT does not adapt layers of 4 bits by loha"),
        ({"peft_args": [LAYERS, "init_lora_weights=pissa"], "peft_quantize": "4bit"},
         "--peft_quantize: init_lora_weights=pissa changes the frozen weights"),
    ],
    ids=lambda value: " ".join(map(str, value.values())) if isinstance(value, dict) else "",
)  # fmt: skip
def test_mistakes(settings, tmp_path, own, message):
    with pytest.raises(UserError, match=r"^[^\n]*$") as error:
        train(**{**settings, **own}, output_dir=str(tmp_path / "run"))
    assert message in str(error.value)


def test_what_is_not_installed_is_named(made, base, tmp_path, monkeypatch):
    from policy import quantize

    own = small("act", dataset_id=[str(made("no_camera"))], policy_args=None, policy_path=str(base), peft="lora")
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(UserError, match=r"--peft needs the package peft. Install it with: uv pip install peft==\d"):
        train(**own, output_dir=str(tmp_path / "run"))
    monkeypatch.setattr(quantize.importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else name)
    with pytest.raises(
        UserError, match=r"needs the package bitsandbytes. Install it with: uv pip install bitsandbytes==\d"
    ):
        quantize.check_quantize("lora", {}, "one")


def test_a_base_of_4_bits(settings, meta, tmp_path, capsys):
    """Its linear layers are rounded while adapters are trained, and resumed to the bit; the files hold adapters only."""
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    own = {
        **settings,
        "peft_quantize": "4bit",
        "peft_args": [LAYERS, "use_dora=true", 'modules_to_save=["action_head"]'],
    }
    result = train(**own, val_fraction=0.4, output_dir=str(tmp_path / "run"))
    layers = dict(result.policy.named_modules())
    layer = layers["base_model.model.model.encoder.layers.0.linear1.base_layer"]
    assert isinstance(layer, bitsandbytes.nn.Linear4bit)
    assert layer.weight.dtype == torch.float32
    assert layer.weight.nbytes < 32 * 32  # of 32 x 32 numbers
    assert result.policy.get_base_model().model.action_head.weight.dtype == torch.float32
    end = result.checkpoint
    part = train(resume_from_checkpoint=str(end.parent / "checkpoint-2"), output_dir=str(tmp_path / "part"), quiet=True)
    assert_same_run(tmp_path / "run", tmp_path / "part", 4)
    assert torch.equal(chunk(result.policy), chunk(part.policy))
    names = load_file(end / "adapter_model.safetensors")
    assert all("lora_" in name or "action_head" in name for name in names)
    assert json.loads((end / "adapter_config.json").read_text())["base_model_name_or_path"] == settings["policy_path"]
    unrounded = chunk(load_policy(end, device="cpu").policy)
    assert torch.equal(unrounded, chunk(lerobots(end, meta)))
    torch.testing.assert_close(chunk(result.policy), unrounded, atol=0.3, rtol=0)
    with pytest.raises(UserError, match=r"a base of 4 bits: lerobot-train cannot resume it"):
        from_lerobot_imports().to_lerobot(end, tmp_path / "lerobot")
    assert export.main([str(end), str(tmp_path / "merged"), "--merge"]) == 0
    assert "was trained on weights of 4 bits: its adapters are merged into the weights of" in capsys.readouterr().err
    torch.testing.assert_close(
        chunk(load_policy(tmp_path / "merged", device="cpu").policy), unrounded, atol=1e-5, rtol=0
    )


def from_lerobot_imports():
    from exchange import lerobot_runs

    return lerobot_runs


def test_what_is_beside_a_base_of_4_bits_can_be_bf16(settings, tmp_path, capsys):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    own = {**settings, "peft_quantize": "4bit", "weights_dtype": "bf16", "ema_decay": 0.9, "quiet": False}
    end = train(**own, output_dir=str(tmp_path / "run")).checkpoint
    assert re.search(r"\nmemory    weights .* 4-bit", capsys.readouterr().out)
    train(resume_from_checkpoint=str(end.parent / "checkpoint-2"), output_dir=str(tmp_path / "part"), quiet=True)
    assert_same_run(tmp_path / "run", tmp_path / "part", 4)
    assert load_policy(end, device="cpu")


@pytest.mark.parametrize("method", ["ia3", "randlora", "road", "hira", "pvera"])
def test_other_methods_on_4_bits(settings, tmp_path, method):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    own = {"peft": method, "peft_r": 16 if method in ("ia3", "road") else 4, "peft_quantize": "4bit"}
    args = [LAYERS, "group_size=8"] if method == "road" else [LAYERS]
    result = train(**{**settings, **own, "peft_args": args}, output_dir=str(tmp_path / "run"))
    train(
        resume_from_checkpoint=str(result.checkpoint.parent / "checkpoint-2"),
        output_dir=str(tmp_path / "part"),
        quiet=True,
    )
    assert_same_run(tmp_path / "run", tmp_path / "part", 4)


@pytest.mark.parametrize(
    "args", [[], ["use_dora=true", 'modules_to_save=["action_head"]', "bias=all"], ["init_lora_weights=olora"]]
)
def test_merge(settings, meta, tmp_path, capsys, args):
    end = train(**{**settings, "peft_args": [LAYERS, *args]}, output_dir=str(tmp_path / "run")).checkpoint
    assert export.main([str(end), str(tmp_path / "merged"), "--merge"]) == 0
    assert "a policy without adapters" in capsys.readouterr().out
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert {"config.json", "model.safetensors", "policy_preprocessor.json", "policy_postprocessor.json"} <= names
    assert not any("adapter" in name for name in names)
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["use_peft"] is False
    acts = chunk(load_policy(end, device="cpu").policy)
    merged = load_policy(tmp_path / "merged", device="cpu")
    torch.testing.assert_close(chunk(merged.policy), acts, atol=1e-5, rtol=0)
    assert torch.equal(chunk(merged.policy), chunk(lerobots(tmp_path / "merged", meta)))
    assert merged.joint_names == load_policy(end, device="cpu").joint_names
    own = {**settings, "peft": None, "peft_args": None, "policy_path": str(tmp_path / "merged"), "steps": 1}
    assert train(**own, output_dir=str(tmp_path / "tuned")).steps == 1


def test_a_base_that_was_moved(adapted, tmp_path):
    folder = Path(shutil.copytree(adapted, tmp_path / "adapted"))
    (folder / "manifest.json").unlink(missing_ok=True)
    edit_json(folder / "adapter_config.json", lambda config: config.update(base_model_name_or_path="/moved/away"))
    with pytest.raises(
        UserError, match=r"holds adapters of the policy in /moved/away, which is not there\. Move it back"
    ):
        load_policy(folder, device="cpu")


def test_merge_refuses_what_has_no_adapters(base, tmp_path, capsys):
    assert export.main([str(base), str(tmp_path / "merged"), "--merge"]) == 2
    assert "has no adapters to merge. It is a policy by itself: leave --merge out" in capsys.readouterr().err
    (tmp_path / "merged").mkdir()
    assert export.main([str(base), str(tmp_path / "merged"), "--merge"]) == 2
    assert "exists already" in capsys.readouterr().err
    assert export.main([str(base), str(tmp_path / "other"), "--merge", "--int8"]) == 2
    assert "--int8 needs --format onnx, got --merge" in capsys.readouterr().err


def test_adapters_that_do_not_merge_are_told(settings, tmp_path, capsys):
    end = train(**{**settings, "peft": "lily", "steps": 1}, output_dir=str(tmp_path / "run")).checkpoint
    assert export.main([str(end), str(tmp_path / "merged"), "--merge"]) == 2
    assert "PEFT does not merge these adapters (lily): This method is not supported" in capsys.readouterr().err
    assert not list(tmp_path.glob("*merged*"))


def test_out_to_lerobot_and_in_again(settings, meta, tmp_path):
    """Adapters, optimizer and settings are what they were, and the run goes on to the same bits."""
    lerobot_runs = from_lerobot_imports()
    args = [LAYERS, "lora_dropout=0.3", 'modules_to_save=["action_head"]', 'rank_pattern={"decoder.*linear1": 8}']
    end = train(**{**settings, "peft_args": args}, output_dir=str(tmp_path / "run")).checkpoint
    folder = lerobot_runs.to_lerobot(end.parent / "checkpoint-2", tmp_path / "lerobot")
    model = folder / "pretrained_model"
    assert json.loads((model / "train_config.json").read_text())["peft"]["method_type"] == "LORA"
    assert not (model / "model.safetensors").exists()
    assert torch.equal(
        chunk(load_policy(end.parent / "checkpoint-2", device="cpu").policy), chunk(lerobots(model, meta))
    )
    back = lerobot_runs.from_lerobot(folder)
    config = json.loads((back / "train_config.json").read_text())
    assert (config["peft"], config["peft_r"], config["policy_path"]) == ("lora", 4, settings["policy_path"])
    assert "lora_dropout=0.3" in config["peft_args"]
    train(resume_from_checkpoint=str(folder), output_dir=str(tmp_path / "part"), quiet=True)
    assert_same_run(tmp_path / "run", tmp_path / "part", 4)
    # the settings that were read make the same adapters anew
    own = {**settings, **{name: config[name] for name in ("peft", "peft_r", "peft_args")}}
    train(**own, output_dir=str(tmp_path / "anew"))
    assert_same_run(tmp_path / "run", tmp_path / "anew", 4)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"r": 10**8}, "is refused|do not fit"),
        ({"r": "four"}, "r: expected int"),
        ({"target_modules": "(a"}, "target_modules: expected a regular expression"),
        ({"modules_to_save": {"a": 1}}, "modules_to_save: expected"),
        ({"modules_to_save": [["a"]]}, "modules_to_save: expected"),
        ({"lora_dropout": 7}, "lora_dropout: expected 0 or more"),
        ({"rank_pattern": {"linear1": -1}}, "rank_pattern: expected a number above 0"),
        ({"rank_pattern": {"linear1": 10**8}}, "is refused|do not fit"),
        ({"init_lora_weights": "pissa_niter_4"}, "changed the frozen weights at random"),
        (
            {"peft_type": "PROMPT_TUNING", "prompt_tuning_init_state_dict_path": "/elsewhere"},
            "holds adapters of the kind",
        ),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_a_strangers_settings_are_checked(adapted, tmp_path, change, why):
    folder = shutil.copytree(adapted, tmp_path / "policy")
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    (folder / "manifest.json").unlink()
    path.unlink()  # which may be a link
    path.write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=why) as error:
        load_policy(folder, device="cpu")
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def adapted(made, base, tmp_path_factory):
    """A checkpoint with adapters."""
    pytest.importorskip("peft", reason=SKIP)
    own = {
        "policy_args": None,
        "policy_path": str(base),
        "peft": "lora",
        "peft_r": 4,
        "peft_args": [LAYERS],
        "steps": 1,
    }
    output = tmp_path_factory.mktemp("adapted") / "run"
    return train(**small("act", dataset_id=[str(made("no_camera"))], **own), output_dir=str(output)).checkpoint


def test_frozen_batch_norms_stay_as_the_base_has_them(made, tmp_path):
    """Their running means are in no checkpoint of adapters, so training must not move them."""
    pytest.importorskip("peft", reason=SKIP)
    plain = small("flow", dataset_id=[str(made("video"))])
    args = [*plain["policy_args"], "backbone=resnet18", "n_obs_steps=1"]
    base = train(**{**plain, "policy_args": args, "steps": 1}, output_dir=str(tmp_path / "base")).checkpoint
    adapters = {"policy_args": None, "policy_path": str(base), "peft": "lora"}
    run = train(**{**plain, **adapters}, output_dir=str(tmp_path / "run"))
    train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"), output_dir=str(tmp_path / "part"), quiet=True)
    assert_same_run(tmp_path / "run", tmp_path / "part", 4)
    before = load_file(base / "policy.safetensors")
    means = {name: tensor for name, tensor in run.policy.get_base_model().state_dict().items() if "running_" in name}
    assert means
    assert all(torch.equal(tensor, before[name]) for name, tensor in means.items())


@pytest.mark.parametrize("own", [{}, {"peft_quantize": "4bit"}], ids=["", "4 bits"])
def test_adapters_are_trained_further(settings, adapted, tmp_path, own):
    if own:
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    further = {**settings, "peft": None, "peft_args": None, "peft_r": 16, "policy_path": str(adapted), **own}
    train(**further, output_dir=str(tmp_path / "run"))
    train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"), output_dir=str(tmp_path / "part"), quiet=True)
    assert_same_run(tmp_path / "run", tmp_path / "part", 4)
    with pytest.raises(UserError, match=r"holds adapters already\. Leave the flag out to train those further"):
        train(**{**further, "peft": "lora"}, output_dir=str(tmp_path / "twice"))


FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "ACTEncoderLayer,ACTDecoderLayer",
}
DETERMINISTIC = ["chunk_size=4", "dim_model=32", "dim_feedforward=32", "n_heads=2", "n_encoder_layers=1", "dropout=0",
    "use_vae=false", "pretrained_backbone_weights=none"]  # fmt: skip


def two_processes(runs: list[tuple[dict, dict]]) -> list[list[int]]:
    """Train in two processes, once for each (settings, environment); their exit statuses."""
    command = [sys.executable, str(ROOT / "tests" / "helpers" / "processes.py")]
    jobs = [json.dumps({"settings": settings, "processes": 2, "env": env}) for settings, env in runs]
    done = subprocess.run(command, input="\n".join(jobs) + "\n", capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("env", "own"),
    [
        ({}, {"ema_decay": 0.9}),
        (FSDP, {}),
        (FSDP, {"ema_decay": 0.9, "peft_args": [LAYERS, "use_dora=true", 'modules_to_save=["action_head"]', "lora_dropout=0.1"]}),
        ({}, {"peft_quantize": "4bit"}),
    ],
    ids=["DDP", "FSDP", "FSDP with more settings", "DDP on 4 bits"],
)  # fmt: skip
def test_two_processes(made, tmp_path, env, own):
    """They follow one process, resume to the bit, and write what one process resumes and LeRobot loads."""
    pytest.importorskip("peft", reason=SKIP)
    if "peft_quantize" in own:
        pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    data = str(made("no_camera"))
    plain = {**small("act", dataset_id=[data], batch_size=8, log_freq=1, save_freq=2), "policy_args": DETERMINISTIC}
    base = train(**{**plain, "steps": 1}, output_dir=str(tmp_path / "base")).checkpoint
    adapters = {
        "policy_path": str(base),
        "peft": "lora",
        "peft_r": 4,
        "peft_args": [LAYERS],
        **own,
        "policy_args": None,
    }
    one = train(**{**plain, **adapters}, output_dir=str(tmp_path / "one"))
    two = {**plain, **adapters, "output_dir": str(tmp_path / "two")}
    resumed = {"resume_from_checkpoint": str(tmp_path / "two" / "checkpoint-2"), "output_dir": str(tmp_path / "part")}
    log = tmp_path / "two.log"
    assert two_processes([(two, env), ({**resumed, "quiet": True}, env)]) == [[0, 0], [0, 0]], log.read_text()[-3000:]
    assert_same_run(tmp_path / "two", tmp_path / "part", 4)
    assert not (tmp_path / "two" / "checkpoint-4" / "model.safetensors").exists()
    there = train(
        resume_from_checkpoint=str(tmp_path / "two" / "checkpoint-2"), output_dir=str(tmp_path / "three"), quiet=True
    )
    if "lora_dropout=0.1" not in adapters["peft_args"]:  # which each process draws for itself
        losses = [line["loss"] for line in read_metrics(tmp_path / "two")]
        assert losses == pytest.approx([line["loss"] for line in one.history], rel=1e-5)
        torch.testing.assert_close(chunk(there.policy), chunk(one.policy), atol=1e-5, rtol=1e-4)
    assert load_policy(tmp_path / "two" / "checkpoint-4", device="cpu")


@pytest.mark.slow
def test_4_bits_are_not_sharded(made, adapted, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    config = json.loads((adapted / "train_config.json").read_text())
    own = {name: config[name] for name in ("dataset_id", "peft", "peft_args", "policy_path")}
    settings = {**own, "peft_quantize": "4bit", "device": "cpu", "steps": 1, "output_dir": str(tmp_path / "run")}
    ((first, _),) = two_processes([(settings, FSDP)])
    assert first == 2
    assert (
        "--peft_quantize does not work with FSDP, which splits the weights. Launch with DDP"
        in (tmp_path / "run.log").read_text()
    )


def lerobot_train(*flags: str) -> None:
    command = [str(Path(sys.executable).parent / "lerobot-train"), *flags]
    done = subprocess.run(
        command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_lerobot_train_takes_over_and_hands_back(made, tmp_path):
    """The real lerobot-train: its adapters go on here, ours go on there, with the same actions at each hand-over."""
    pytest.importorskip("peft", reason=SKIP)
    data = made("no_camera")
    base = train(**small("act", dataset_id=[str(data)], steps=1), output_dir=str(tmp_path / "base")).checkpoint
    lerobot_train(
        "--dataset.repo_id=test/made", f"--dataset.root={data}", f"--policy.path={base}", "--policy.push_to_hub=false",
        "--policy.device=cpu", "--batch_size=4", "--steps=6", "--save_freq=4", "--num_workers=0",
        f"--output_dir={tmp_path / 'theirs'}", "--peft.method_type=LORA", "--peft.r=4", "--peft.lora_alpha=8",
        '--peft.target_modules=["linear1","linear2"]', '--peft.full_training_modules=["action_head"]',
    )  # fmt: skip
    theirs = tmp_path / "theirs" / "checkpoints" / "000004"
    given = load_file(theirs / "pretrained_model" / "adapter_model.safetensors")
    back = from_lerobot_imports().from_lerobot(theirs)
    taken = load_file(back / "adapter_model.safetensors")
    assert given.keys() == taken.keys()
    assert all(torch.equal(given[name], taken[name]) for name in given)
    state = load_file(theirs / "training_state" / "optimizer_state.safetensors")
    moments = torch.load(back / "optimizer_state.pth", weights_only=True)["state"]
    assert all(
        torch.equal(tensor, moments[int(name.split("/")[1])][name.split("/")[2]]) for name, tensor in state.items()
    )
    runs = []
    for name in ("one", "two"):
        run = train(resume_from_checkpoint=str(theirs), save_freq=1, output_dir=str(tmp_path / name), quiet=True)
        runs.append(run.checkpoint)
    assert_same_run(tmp_path / "one", tmp_path / "two", 6)
    part = train(
        resume_from_checkpoint=str(runs[0].parent / "checkpoint-5"), output_dir=str(tmp_path / "part"), quiet=True
    )
    assert part.steps == 6
    assert_same_run(tmp_path / "one", tmp_path / "part", 6)

    folder = from_lerobot_imports().to_lerobot(runs[0].parent / "checkpoint-5", tmp_path / "lerobot")
    lerobot_train("--resume=true", f"--config_path={folder / 'pretrained_model' / 'train_config.json'}")
    end = tmp_path / "lerobot" / "checkpoints" / "000006" / "pretrained_model"
    lasts = [
        load_file(path)
        for path in (end / "adapter_model.safetensors", folder / "pretrained_model" / "adapter_model.safetensors")
    ]
    assert lasts[0].keys() == lasts[1].keys()
    assert any(not torch.equal(lasts[0][name], lasts[1][name]) for name in lasts[0])
    assert load_policy(end, device="cpu")
