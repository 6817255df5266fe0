"""What a policy reads besides its folder is asked for before the dataset and any weights; what cannot be had is one line."""

import importlib.metadata
import importlib.util
import json
import re
import shutil

import pytest
import torch
from huggingface_hub import constants, snapshot_download
from lerobot.configs import PreTrainedConfig
from safetensors.torch import load_file, save_file

import hub as hub_module
from errors import UserError, as_user_error, lerobot_extra
from helpers.hub_server import Hub, connect
from helpers.runs import small
from infer import load_policy
from policy import requirements, weights
from policy.factory import REINFORCEMENT, policy_config_class
from policy.requirements import repos_of
from policy.weights import load_weights
from processors.pipelines import load_processors
from train import train
from training import plan as plan_module
from training.learner import check_fp16


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub on this machine that huggingface_hub talks to, and no other; nothing is downloaded yet."""
    server = Hub()
    connect(monkeypatch, server)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    yield server
    server.server.shutdown()


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def with_extras(monkeypatch):
    """As if the packages of LeRobot's extras were installed."""
    monkeypatch.setattr(requirements, "require_package", lambda *args, **options: None)


@pytest.fixture
def no_dataset(monkeypatch):
    """Fails a test in which a run opens its dataset."""
    monkeypatch.setattr(plan_module, "build_source", lambda config: pytest.fail("the dataset was opened"))


@pytest.fixture(scope="module")
def trained(made, tmp_path_factory):
    folder = tmp_path_factory.mktemp("offline") / "run"
    train(**small("act", dataset_id=str(made("video")), output_dir=str(folder), steps=1, save_freq=1))
    return folder / "checkpoint-1"


def message_of(policy: str, tmp_path, **settings) -> str:
    with pytest.raises(UserError) as caught:
        train(dataset_id="nobody/nothing", policy=policy, output_dir=str(tmp_path / "run"), device="cpu", **settings)
    assert not (tmp_path / "run").exists()
    return str(caught.value)


@pytest.mark.parametrize(
    ("policy", "repos"),
    [
        ("pi05", ["google/paligemma-3b-pt-224"]),
        ("pi0_fast", ["google/paligemma-3b-pt-224", "lerobot/fast-action-tokenizer"]),
        ("xvla", ["facebook/bart-large"]),
    ],
)
def test_all_that_is_missing_offline_is_one_line(offline, with_extras, no_dataset, tmp_path, policy, repos):
    commands = " && ".join(f"hf download {repo} --exclude '*.safetensors'" for repo in repos)
    assert message_of(policy, tmp_path) == (
        f"policy {policy}: HF_HUB_OFFLINE is set, and the files needed of {' and '.join(repos)} are not on this machine. "
        f"Run this online once: {commands}"
    )


def test_weights_that_a_setting_asks_for_are_downloaded_too(offline, with_extras, no_dataset, tmp_path):
    small_files = message_of("smolvla", tmp_path)
    assert small_files.endswith("hf download HuggingFaceTB/SmolVLM2-500M-Video-Instruct --exclude '*.safetensors'")
    whole = message_of("smolvla", tmp_path, policy_args=["load_vlm_weights=true"])
    assert whole.endswith("hf download HuggingFaceTB/SmolVLM2-500M-Video-Instruct")


def test_a_gated_and_a_missing_repo_are_named_together(hub, with_extras, no_dataset, tmp_path):
    hub.repos["google/paligemma-3b-pt-224"] = [{"config.json": b"{}"}]
    hub.gated.add("google/paligemma-3b-pt-224")
    assert message_of("pi0_fast", tmp_path) == (
        "policy pi0_fast: google/paligemma-3b-pt-224 is gated. Accept its licence on "
        "https://huggingface.co/google/paligemma-3b-pt-224, then run `hf auth login`. lerobot/fast-action-tokenizer: the Hub "
        "has no such repo or revision. Check the name, or run `hf auth login` if it is private"
    )


def test_what_can_be_had_or_is_here_is_not_refused(hub, monkeypatch, tmp_path):
    hub.repos["me/tokenizer"] = [{"tokenizer.json": b"{}"}]  # no config.json, which is what is asked for
    hub_module.require_repos({"me/tokenizer": False}, "it")
    snapshot = tmp_path / "hub" / "models--me--other" / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub_module.require_repos({"me/other": False}, "it")
    with pytest.raises(UserError, match=r"hf download me/other$"):
        hub_module.require_repos({"me/other": True}, "it")


def test_a_base_that_is_not_here_is_named_with_its_download(hub, trained, monkeypatch):
    files = files_of(trained)
    hub.repos["me/base"] = [files, {**files, "README.md": b"newer"}]
    hub.tags["me/base"] = {"v1": 0}
    for repo, command in (("me/base", "hf download me/base"), ("me/base@v1", "hf download me/base --revision v1")):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(UserError) as caught:
            load_policy(repo, device="cpu")
        assert str(caught.value).endswith(f"Check the path, or run this online once: {command}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        _, _, repo_id, *revision = command.split()
        snapshot_download(repo_id, revision=revision[-1] if revision else None)  # what the command does
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert load_policy(repo, device="cpu").expected


def files_of(folder) -> dict[str, bytes]:
    """A policy as LeRobot would publish it."""
    names = ("config.json", "model.safetensors", "policy_preprocessor.json", "policy_postprocessor.json")
    names += tuple(path.name for path in folder.glob("policy_p*processor_step*"))
    return {name: (folder / name).read_bytes() for name in names}


def test_a_bases_tokenizer_is_asked_for_before_its_weights(hub, with_extras, no_dataset, trained, tmp_path):
    files = files_of(trained)
    pipeline = json.loads(files["policy_preprocessor.json"])
    step = {"registry_name": "tokenizer_processor", "config": {"tokenizer_name": "me/tokenizer", "max_length": 8}}
    pipeline["steps"].insert(0, step)
    files["policy_preprocessor.json"] = json.dumps(pipeline).encode()
    hub.repos["me/base"] = [files]
    with pytest.raises(UserError, match=r"^policy act: me/tokenizer: the Hub has no such repo"):
        train(dataset_id="nobody/nothing", policy_path="me/base", device="cpu", output_dir=str(tmp_path / "run"))
    with pytest.raises(UserError, match=r"^policy act: me/tokenizer: the Hub has no such repo"):
        load_policy("me/base", device="cpu")
    assert "config.json" in hub.read
    assert "model.safetensors" not in hub.read


def test_a_base_without_its_weights_offline(hub, trained, monkeypatch):
    hub.repos["me/base"] = [files_of(trained)]
    hub_module.fetch("me/base", "policy", weights=False)
    assert "model.safetensors" not in hub.read
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="me/base") as caught:
        load_policy("me/base", device="cpu")
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert load_policy("me/base", device="cpu").expected
    assert "model.safetensors" in hub.read


def test_repos_that_a_policy_is_sure_to_read(tmp_path):
    def repos(name: str, **settings) -> dict:
        return repos_of(policy_config_class(name)(device="cpu", push_to_hub=False, **settings), None)

    assert repos("act") == repos("diffusion") == repos("vqbet") == repos("flow") == {}
    assert repos("smolvla") == {"HuggingFaceTB/SmolVLM2-500M-Video-Instruct": False}
    assert repos("smolvla", vlm_model_name=str(tmp_path)) == {}
    assert repos("multi_task_dit") == {"openai/clip-vit-base-patch16": True}
    assert "facebook/vjepa2-vitl-fpc64-256" in repos("vla_jepa")
    assert "facebook/vjepa2-vitl-fpc64-256" not in repos("vla_jepa", enable_world_model=False)


# Policies and packages.


@pytest.mark.parametrize("name", REINFORCEMENT)
def test_a_policy_that_learns_from_rewards_is_refused(name, tmp_path, no_dataset):
    assert re.match(f"--policy {name}: policy {name} learns by reinforcement", message_of(name, tmp_path))
    folder = tmp_path / "old"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"type": name}))
    with pytest.raises(UserError, match=f"old: policy {name} learns by reinforcement"):
        load_policy(folder, device="cpu")


def test_every_policy_that_needs_packages_has_an_extra():
    without = {"act", "flow", "vqbet", *REINFORCEMENT}
    ours = {
        name: config_class
        for name, config_class in PreTrainedConfig.get_known_choices().items()
        if config_class.__module__.startswith("lerobot.")
    }
    for name in ours:
        assert (lerobot_extra(name) is None) == (name in without), name
    assert lerobot_extra("multi_task_dit") == "multi-task-dit"
    assert lerobot_extra("pi05") == "pi"


def test_a_missing_package_behind_an_error_of_lerobots_own():
    version = importlib.metadata.version("lerobot")
    with pytest.raises(UserError) as caught, as_user_error("it", invalid=ValueError, policy="pi05"):
        raise ValueError("Failed to instantiate processor step") from ImportError(
            "The 'transformers' library is not installed. Please install it with `pip install 'lerobot[transformers-dep]'`"
        )
    assert str(caught.value) == (
        "it: a package is missing (The 'transformers' library is not installed). Install it with: "
        f'uv pip install "lerobot[pi]=={version}"'
    )


@pytest.mark.parametrize(("kind", "extra"), [("pi05", "pi"), ("act", "transformers-dep"), (3, "transformers-dep")])
def test_the_extra_of_a_saved_policy_is_named(trained, tmp_path, kind, extra):
    """That of the policy, which has all its packages; without one, that of the step which lacks them."""
    if importlib.util.find_spec("transformers"):
        pytest.skip("transformers is installed, so its extra is not missing")
    for name, content in files_of(trained).items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "config.json").write_text(json.dumps({"type": kind}))
    pipeline = json.loads((tmp_path / "policy_preprocessor.json").read_text())
    step = {"registry_name": "tokenizer_processor", "config": {"tokenizer_name": str(tmp_path), "max_length": 8}}
    pipeline["steps"].insert(0, step)
    (tmp_path / "policy_preprocessor.json").write_text(json.dumps(pipeline))
    version = importlib.metadata.version("lerobot")
    with pytest.raises(UserError) as caught:
        load_processors(tmp_path, "cpu")
    assert str(caught.value).endswith(f'Install it with: uv pip install "lerobot[{extra}]=={version}"')


def test_settings_that_do_not_fit_the_dataset_are_a_line(made, tmp_path, monkeypatch):
    """fastwam refuses another width than its setting's when it gets the dataset's features."""
    monkeypatch.setattr(plan_module, "check_policy", lambda chosen, distributed: None)
    with pytest.raises(UserError, match=r"^policy fastwam: FastWAM action feature shape must be \(7,\), got \(3,\)"):
        train(dataset_id=str(made("video")), policy="fastwam", output_dir=str(tmp_path / "run"), device="cpu")


@pytest.mark.parametrize(("dtype", "is_refused"), [("float32", False), ("bfloat16", True), ("float16", True)])
def test_fp16_with_weights_that_it_does_not_compute_with(trained, dtype, is_refused):
    """The CPU normalises no float16 with bfloat16 weights, and torch's GradScaler scales no float16 gradients."""
    policy = load_policy(trained, device="cpu").policy.to(getattr(torch, dtype))
    check_fp16(policy, "bf16", torch.device("cpu"))
    if not is_refused:
        check_fp16(policy, "fp16", torch.device("cpu"))
        return
    with pytest.raises(UserError, match=f"--precision fp16: expected float32 weights, got {dtype} in policy act"):
        check_fp16(policy, "fp16", torch.device("cpu"))


# Weights.


def test_weights_in_shards_are_those_of_one_file(trained, tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    for name, content in files_of(trained).items():
        (folder / name).write_bytes(content)
    whole = load_policy(folder, device="cpu").policy
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, of_file in shards.items():
        save_file({name: tensors[name] for name in of_file}, folder / file)
    (folder / "model.safetensors").unlink()
    weight_map = {name: file for file, of_file in shards.items() for name in of_file}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert load_same(folder, whole)
    index.write_text(json.dumps({"weight_map": {**weight_map, "x": "../elsewhere.safetensors"}}))
    with pytest.raises(UserError, match="expected the file of each tensor"):
        load_policy(folder, device="cpu")
    index.write_text(json.dumps({"weight_map": {**weight_map, "x": "model-3.safetensors"}}))
    with pytest.raises(UserError, match=r"has no model-3\.safetensors"):
        load_policy(folder, device="cpu")


def load_same(folder, other) -> bool:
    loaded = load_policy(folder, device="cpu").policy.state_dict()
    return all(torch.equal(tensor, loaded[name]) for name, tensor in other.state_dict().items())


def test_the_bar_counts_the_bytes_and_is_silent_when_quick(trained, monkeypatch, capfd):
    bars = []

    class Bar(weights.CopyBar):
        def __init__(self, files, quiet):
            super().__init__(files, quiet)
            bars.append((self.bar, quiet))

    monkeypatch.setattr(weights, "CopyBar", Bar)
    policy = load_policy(trained, device="cpu").policy
    ((bar, quiet),) = bars
    assert not quiet
    assert 0.9 * bar.total < bar.n <= bar.total
    load_weights(policy, trained)
    assert bars[1][1]
    assert "loading the weights" not in capfd.readouterr().err


def test_a_folder_without_weights_is_a_line(made, trained, tmp_path):
    folder = tmp_path / "bare"
    folder.mkdir()
    for name, content in files_of(trained).items():
        (folder / name).write_bytes(content)
    (folder / "model.safetensors").unlink()
    shutil.copytree(folder, tmp_path / "copy")
    with pytest.raises(UserError, match=r"has no model\.safetensors, which holds weights of the policy"):
        load_policy(folder, device="cpu")
    with pytest.raises(UserError, match=r"has no model\.safetensors"):
        train(dataset_id=str(made("video")), policy_path=str(folder), device="cpu", output_dir=str(tmp_path / "run"))
