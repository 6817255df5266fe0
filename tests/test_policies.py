"""act and diffusion train on every kind of dataset, and fine-tune."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from config import TrainConfig
from errors import UserError
from helpers.paths import SHIPPED
from helpers.runs import small
from policy.factory import build_policy, policy_config
from policy.loaded import load_policy
from train import train
from training.learner import make_schedule


@pytest.mark.parametrize("policy", ["act", "diffusion"])
@pytest.mark.parametrize("dataset", ["two_cameras", "images", "no_camera", "shipped", "real"])
def test_trains(made, tmp_path, request, policy, dataset):
    folder = {"shipped": lambda: SHIPPED, "real": lambda: request.getfixturevalue("cr5")}.get(
        dataset, lambda: made(dataset)
    )()
    settings = small(policy, dataset_id=str(folder), output_dir=str(tmp_path), steps=3, log_freq=1, save_freq=0)
    if dataset in ("shipped", "real"):
        settings |= {"episodes": "0", "image_size": [48, 64]}
    result = train(**settings)
    assert result.steps == 3
    losses = [line["loss"] for line in result.history]
    assert np.isfinite(losses).all()
    assert len(set(losses)) == len(losses)
    policy = load_policy(result.checkpoint, device="cpu")
    observation = {key: np.zeros([8 if n is None else n for n in shape], "uint8" if kind == "uint8" else "float32")
                   for key, (kind, shape) in policy.expected.items()}  # fmt: skip
    assert ("observation.environment_state" in policy.policy.config.input_features) == (dataset == "no_camera")
    assert "observation.environment_state" not in policy.expected
    if dataset in ("shipped", "real"):
        observation = {
            key: np.zeros((480, 640, 3), "uint8") if "image" in key else value for key, value in observation.items()
        }
    assert np.isfinite(policy.act(observation)).all()


@pytest.mark.slow
def test_lerobot_finds_the_state_only_step_as_a_plugin(made, tmp_path):
    import subprocess
    import sys

    result = train(**small(dataset_id=str(made("no_camera")), output_dir=str(tmp_path), steps=1))
    code = (
        "from lerobot.utils.import_utils import register_third_party_plugins as find; find()\n"
        "from lerobot.policies import make_pre_post_processors\n"
        f"pre, post = make_pre_post_processors(None, pretrained_path={str(result.checkpoint)!r})\n"
        "print([type(step).__name__ for step in pre.steps])"
    )
    shown = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True, check=True).stdout
    assert "StateToEnvironmentState" in shown


def test_fine_tune_keeps_weights_and_takes_the_new_statistics(made, copy_of, tmp_path):
    first = train(
        **small(dataset_id=str(made("two_cameras")), image_size=[32, 48], output_dir=str(tmp_path / "a"), steps=1)
    )
    root = copy_of("many_files")
    stats = json.loads((root / "meta" / "stats.json").read_text())
    stats["action"] |= {"min": [-9.0] * 3, "mean": [5.0, 6.0, 7.0], "max": [9.0] * 3}
    (root / "meta" / "stats.json").write_text(json.dumps(stats))
    settings = small(dataset_id=str(root), policy_path=str(first.output_dir), output_dir=str(tmp_path / "b"), steps=1)
    tuned = train(**{**settings, "policy_args": ["optimizer_lr_backbone=1e-12"], "lr": 1e-12})
    before, after = (load_file(result.checkpoint / "policy.safetensors") for result in (first, tuned))
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[key], after[key], atol=1e-9) for key in before)
    policy = load_policy(tuned.checkpoint, device="cpu")
    assert policy.expected["observation.images.top"] == ("uint8", (None, None, 3))  # its resize step came along
    assert torch.equal(policy.postprocess(torch.zeros(1, 3)), torch.tensor([[5.0, 6.0, 7.0]]))


def test_fine_tune_on_other_dims_is_refused(made, tmp_path):
    first = train(**small("flow", dataset_id=str(made("video")), output_dir=str(tmp_path / "a"), steps=1))
    with pytest.raises(
        ValueError,
        match=r"observation\.state: expected 3 numbers, as in checkpoint-1, got 5 numbers\. Pass the dataset",
    ):
        train(
            **small(
                "flow",
                dataset_id=str(made("wide")),
                policy_path=str(first.checkpoint),
                policy_args=None,
                output_dir=str(tmp_path / "b"),
            )
        )


def test_schedules(made, tmp_path):
    settings = small(dataset_id=str(made("no_camera")), steps=8, log_freq=1, save_freq=0, lr=1e-3)
    rates = {}
    for name in ("constant", "linear", "cosine"):
        history = train(**settings, lr_schedule=name, warmup_steps=2, output_dir=str(tmp_path / name)).history
        rates[name] = [line["lr"] for line in history]
    assert rates["constant"] == pytest.approx([5e-4] + [1e-3] * 7)
    assert rates["linear"] == pytest.approx([5e-4, 1e-3, *(1e-3 * (1 - i / 6) for i in range(6))])
    assert rates["cosine"] == pytest.approx([5e-4, 1e-3, *(5e-4 * (1 + np.cos(np.pi * i / 6)) for i in range(6))])


def test_diffusions_preset_schedule_is_lerobots(made, tmp_path):
    from lerobot.optim import DiffuserSchedulerConfig

    settings = small("diffusion", dataset_id=str(made("no_camera")), steps=6, log_freq=1, save_freq=0, warmup_steps=2)
    history = train(**settings, output_dir=str(tmp_path)).history
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-3)
    schedule = DiffuserSchedulerConfig(name="cosine", num_warmup_steps=2).build(optimizer, 6)
    expected = []
    for _ in range(6):
        expected.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert [line["lr"] for line in history] == pytest.approx(expected)


def test_a_step_that_logs_nothing_does_not_wait_for_the_device(made, tmp_path):
    """On a CPU nothing waits, so the calls that would are counted."""
    from torch.overrides import TorchFunctionMode

    from train import build_run
    from training.plan import plan_run

    waits = (torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.__bool__, torch.Tensor.__int__, torch.Tensor.__float__,
             torch.Tensor.cpu, torch.Tensor.numpy, torch.Tensor.__index__, torch.Tensor.nonzero)  # fmt: skip
    seen = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func in waits:
                seen.append(func.__name__)
            return func(*args, **(kwargs or {}))

    settings = small(dataset_id=str(made("two_cameras")), output_dir=str(tmp_path), ema_decay=0.9)
    with plan_run(settings) as plan, build_run(plan) as run:
        run.count(run.learner.step(next(run.loader), run.step))  # the first step sets up the optimizer's state
        batch = next(run.loader)
        with Watch():
            run.count(run.learner.step(batch, run.step))
    assert seen == []


def test_fine_tune_on_pictures_of_another_size(made, tmp_path):
    """The policy's config has the size that it is trained on now, so that it acts on the new dataset's pictures."""
    first = train(**small("flow", dataset_id=str(made("video")), output_dir=str(tmp_path / "a"), steps=1))
    config = first.checkpoint / "config.json"
    saved = json.loads(config.read_text())
    saved["input_features"]["observation.images.top"]["shape"] = [3, 32, 32]
    for path in (config, first.output_dir / "config.json"):
        path.unlink()
        path.write_text(json.dumps(saved))
    settings = {"dataset_id": str(made("video")), "steps": 1, "batch_size": 4, "device": "cpu", "quiet": True}
    tuned = train(**settings, policy_path=str(first.output_dir), output_dir=str(tmp_path / "b"))
    assert load_policy(tuned.checkpoint, device="cpu").expected["observation.images.top"] == ("uint8", (64, 96, 3))


def test_fine_tune_takes_the_policy_and_checks_its_settings(made, tmp_path):
    first = train(**small("flow", dataset_id=str(made("no_camera")), output_dir=str(tmp_path / "a"), steps=1))
    settings = {"dataset_id": str(made("no_camera")), "policy_path": str(first.output_dir), "steps": 1, "quiet": True}
    tuned = train(**settings, output_dir=str(tmp_path / "b"))
    assert json.loads((tuned.checkpoint / "train_config.json").read_text())["policy"] == "flow"
    with pytest.raises(UserError, match=r"--policy act: --policy_path .* holds a policy flow\. Leave --policy out"):
        train(**settings, policy="act", output_dir=str(tmp_path / "c"))
    with pytest.raises(UserError, match=r"policy flow: n_action_steps must be 1 to chunk_size \(6\), got 9"):
        train(**settings, policy_args=["n_action_steps=9"], output_dir=str(tmp_path / "d"))
    with pytest.raises(UserError, match="--n_action_steps must be 1 or more, got 0"):
        load_policy(first.checkpoint, device="cpu", n_action_steps=0)


@pytest.mark.parametrize("policy", ["flow", "diffusion"])
def test_warm_up_is_as_long_as_asked(policy):
    """Also where the run is shorter than the steps that the preset's schedule decays over."""
    preset = policy_config(policy, None, "cpu")
    factor = make_schedule(preset, TrainConfig(dataset_id=["x"], steps=100, warmup_steps=20))
    assert max(range(100), key=factor) in (19, 20)
    assert factor(10) == pytest.approx(0.5, abs=0.03)
    assert factor(99) < 0.01


NO_SUCH_WEIGHTS = "pretrained_backbone_weights: expected none or one of IMAGENET1K_V1, DEFAULT, got"


@pytest.mark.parametrize(
    ("policy", "pair", "message"),
    [
        ("act", "n_heads=3", "n_heads: expected a divisor of dim_model, which is 512, got 3"),
        ("act", "n_heads=0", "n_heads: expected 1 or more, got 0"),
        ("act", "dim_feedforward=-1", "dim_feedforward: expected 0 or more, got -1"),
        ("act", "feedforward_activation=swish", "feedforward_activation: expected one of relu, gelu, glu, got swish"),
        ("act", "pretrained_backbone_weights=best", f"{NO_SUCH_WEIGHTS} best"),
        ("act", "vision_backbone=resnet34", f"{NO_SUCH_WEIGHTS} ResNet18_Weights.IMAGENET1K_V1"),
        ("act", "vision_backbone=resnet19", "vision_backbone: expected one of resnet101, resnet152, resnet18, "),
        ("act", "vision_backbone=none", "vision_backbone: expected str, got 'none'"),
        ("act", "replace_final_stride_with_dilation=1", "replace_final_stride_with_dilation: expected 0 with resnet18"),
        ("act", "temporal_ensemble_coeff=0.01", "n_action_steps: expected 1 with temporal_ensemble_coeff, got 100"),
        ("diffusion", "n_groups=0", "n_groups: expected 1 or more, got 0"),
        (
            "diffusion",
            "beta_schedule=flat",
            "beta_schedule: expected one of linear, scaled_linear, squaredcos_cap_v2, ",
        ),
        ("diffusion", "down_dims=[]", "down_dims: expected one or more widths, such as [512,1024,2048], got []"),
        ("vqbet", "gpt_n_head=7", "gpt_n_head: expected a divisor of gpt_hidden_dim, which is 512, got 7"),
        ("vqbet", "crop_shape=[0,0]", "crop_shape: expected a height and a width of 1 or more, got [0, 0]"),
    ],
)
def test_settings_that_lerobot_does_not_refuse_in_words(policy, pair, message):
    """LeRobot answers these with an assertion, a KeyError or an error of torch."""
    with pytest.raises(UserError) as error:
        policy_config(policy, [pair], "cpu")
    assert str(error.value).startswith(f"--policy_args {message}")


def test_pi0_as_it_is_published_loads(tmp_path, monkeypatch):
    """Weights under openpi's names, which LeRobot's from_pretrained renames, and as a run of ours saves them."""
    pytest.importorskip("transformers", reason="LeRobot's extra for pi0 is not installed ('lerobot[pi]==0.6.1')")
    from lerobot.configs import FeatureType, PolicyFeature
    from lerobot.policies.pi0 import modeling_pi0 as pi0
    from safetensors.torch import save_file, save_model

    small = pi0.GemmaConfig(width=32, depth=1, mlp_dim=32, num_heads=2, num_kv_heads=1, head_dim=16)
    monkeypatch.setattr(pi0, "get_gemma_config", lambda variant: small)
    known = dict(pi0.CONFIG_MAPPING)
    vision = {
        "num_hidden_layers": 1,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "model_type": "siglip_vision_model",
        "patch_size": 14,
    }
    monkeypatch.setattr(pi0, "CONFIG_MAPPING", {**known, "paligemma": lambda: known["paligemma"](vision_config=vision)})
    config = policy_config("pi0", None, "cpu")
    config.input_features = {"observation.images.top": PolicyFeature(FeatureType.VISUAL, (3, 224, 224)),
                             "observation.state": PolicyFeature(FeatureType.STATE, (3,))}  # fmt: skip
    config.output_features = {"action": PolicyFeature(FeatureType.ACTION, (3,))}
    policy = build_policy(config, None)
    before = policy.state_dict()
    published = {name.removeprefix("model."): tensor.clone() for name, tensor in before.items()}
    for name, save in {
        "published": lambda path: save_file(published, path),
        "ours": lambda path: save_model(policy, path),
    }.items():
        (tmp_path / name).mkdir()
        save(tmp_path / name / "model.safetensors")
        after = build_policy(config, None, tmp_path / name).state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[key], before[key]) for key in before)
    published.popitem()
    save_file(published, tmp_path / "ours" / "model.safetensors")
    with pytest.raises(UserError, match=r"does not fit policy pi0: missing \['model\."):
        build_policy(config, None, tmp_path / "ours")


def test_xvla_as_it_is_published_loads(tmp_path):
    """Weights in the layout of Florence-2's own code, of which each tensor that has two names is there once."""
    pytest.importorskip("transformers", reason="LeRobot's extra for xvla is not installed ('lerobot[xvla]==0.6.1')")
    from lerobot.configs import FeatureType, PolicyFeature
    from safetensors.torch import save_file

    config = policy_config(
        "xvla", ["action_mode=auto", "hidden_size=32", "depth=1", "num_heads=2", "num_domains=2"], "cpu"
    )
    text = {"d_model": 32, "vocab_size": 100}
    for part in ("encoder", "decoder"):
        text |= {f"{part}_layers": 1, f"{part}_ffn_dim": 32, f"{part}_attention_heads": 2}
    vision = {
        "embed_dim": [16, 16, 32, 32],
        "depths": [1] * 4,
        "num_heads": [2] * 4,
        "num_groups": [2] * 4,
        "projection_dim": 32,
    }
    config.florence_config = {"vision_config": vision, "text_config": text, "projection_dim": 32}
    config.input_features = {"observation.images.top": PolicyFeature(FeatureType.VISUAL, (3, 64, 96)),
                             "observation.state": PolicyFeature(FeatureType.STATE, (3,))}  # fmt: skip
    config.output_features = {"action": PolicyFeature(FeatureType.ACTION, (3,))}
    before = build_policy(config, None).state_dict()
    inner, projection = "model.vlm.language_model.", "model.vlm.multi_modal_projector.image_projection.weight"
    published = {name.replace(inner, f"{inner}model."): tensor.clone() for name, tensor in before.items()}
    published["model.vlm.image_projection"] = published.pop(projection).T.contiguous()
    del published[f"{inner}model.encoder.embed_tokens.weight"]  # the same as shared.weight
    save_file(published, tmp_path / "model.safetensors")
    after = build_policy(config, None, tmp_path).state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
