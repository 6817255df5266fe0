"""Augmented pictures and states: what is drawn, for which samples, and that nothing else changes."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from config import TrainConfig
from processors.augment import augment, draws, vary, vary_fast

CAMERAS = ["observation.images.0", "observation.images.1"]
STATE = "observation.state"
META = SimpleNamespace(
    camera_keys=CAMERAS,
    depth_keys=[],
    stats={
        STATE: {"mean": np.array([5.0, -5.0]), "std": np.array([2.0, 0.0])},
        CAMERAS[0]: {"mean": np.full((3, 1, 1), 0.25)},
    },
)


def a_batch(count=400, pixels=8, steps=()):
    batch = {key: torch.full((count, *steps, 3, pixels, pixels), 0.75) for key in CAMERAS}
    return {**batch, STATE: torch.zeros(count, *steps, 2), "sample": torch.arange(count), "action": torch.ones(count)}


def settings(**given):
    return TrainConfig(dataset_id=["x"], output_dir="y", **given)


@pytest.mark.parametrize("steps", [(), (2,)])
def test_a_sample_is_augmented_by_its_number_alone(steps):
    """Whatever the batch that a sample is in, and the same over its history."""
    torch.manual_seed(0)
    given = {"augment": True, "augment_style": "fast", "state_noise": 0.1, "state_dropout": 0.3, "camera_dropout": 0.3}
    batch = a_batch(8, steps=steps)
    for key in CAMERAS:
        batch[key] = torch.rand(8, 3, 8, 8).reshape(8, *[1 for _ in steps], 3, 8, 8).expand(8, *steps, 3, 8, 8)
    whole = augment(batch, META, settings(**given))
    part = augment({key: value[3:5] for key, value in batch.items()}, META, settings(**given))
    for key, value in part.items():
        torch.testing.assert_close(value, whole[key][3:5], rtol=0, atol=1e-6, msg=key)
        if steps and key in CAMERAS:
            assert torch.equal(whole[key][:, 0], whole[key][:, 1])
    other = augment(batch, META, settings(seed=1, **given))
    assert not torch.equal(other[CAMERAS[0]], whole[CAMERAS[0]])
    assert torch.equal(whole["action"], batch["action"])


def test_nothing_is_changed_without_settings():
    batch = a_batch(4)
    same = augment(batch, META, settings(augment=False))
    assert all(torch.equal(same[key], value) for key, value in batch.items())


def test_state_dropout_and_noise_are_as_many_and_as_large_as_asked():
    dropped = augment(a_batch(4000), META, settings(augment=False, state_dropout=0.25))[STATE]
    is_mean = (dropped == torch.tensor([5.0, -5.0])).all(1)
    assert is_mean.float().mean() == pytest.approx(0.25, abs=0.03)
    assert (dropped[~is_mean] == 0).all()

    noise = augment(a_batch(4000), META, settings(augment=False, state_noise=0.5))[STATE]
    assert noise[:, 0].std() == pytest.approx(0.5 * 2.0, abs=0.05)
    assert noise[:, 0].mean() == pytest.approx(0.0, abs=0.05)
    assert (noise[:, 1] == 0).all()  # a joint that is still


@pytest.mark.parametrize("style", ["full", "fast"])
def test_depth_is_moved_only(style):
    meta = SimpleNamespace(camera_keys=CAMERAS, depth_keys=CAMERAS[1:], stats={})
    changed = augment(a_batch(50, pixels=16), meta, settings(augment=True, augment_style=style))
    middle = [changed[key][..., 8, 8] for key in CAMERAS]
    torch.testing.assert_close(middle[1], torch.full((50, 3), 0.75))
    assert (middle[0] - 0.75).abs().mean() > 0.02


def test_camera_dropout_leaves_a_camera():
    changed = augment(a_batch(4000), META, settings(augment=False, camera_dropout=0.4))
    means = torch.stack([changed[key].mean((1, 2, 3)) for key in CAMERAS], dim=1)  # (B, cameras)
    dropped = means < 0.7
    assert set(means[dropped].tolist()) == {0.25, 0.5}  # the camera's mean, or grey where there are no statistics
    assert dropped.any(1).float().mean() == pytest.approx(0.4, abs=0.03)
    assert not dropped.all(1).any()
    alone = SimpleNamespace(camera_keys=CAMERAS[:1], depth_keys=[], stats=META.stats)
    same = augment(a_batch(100), alone, settings(augment=False, camera_dropout=0.4))
    assert (same[CAMERAS[0]] == 0.75).all()


def test_fast_augmentation_moves_and_colours_as_the_full_one():
    """A smooth picture ends nearly the same, away from the edges, which differ: black, or the edge's colour."""
    across = torch.linspace(0.3, 0.6, 64)
    picture = torch.stack([across.expand(64, 64), across[:, None].expand(64, 64), torch.full((64, 64), 0.4)])
    pictures = picture.expand(32, 3, 64, 64)
    drawn = draws(0, np.arange(32), 0)
    drawn["sharpness"] = torch.ones(32)
    still = {name: torch.zeros(32) for name in ("rotation", "shift_x", "shift_y", "hue")}
    plain = {name: torch.ones(32) for name in ("brightness", "contrast", "saturation", "sharpness")}
    inside = (..., slice(8, 56), slice(8, 56))
    for name in ("shift_x", "shift_y", "hue", "contrast", "saturation"):
        only = {**still, **plain, name: drawn[name]}
        fast = vary_fast(pictures, only)[inside]
        full = vary(pictures, only)[inside]
        allowed = 0.04 if name in ("hue", "saturation") else 0.01
        assert (fast - full).abs().max() < allowed, name
    fine = torch.rand(32, 3, 64, 64)  # stays as sharp as it is
    shifted = vary_fast(fine, {**still, **plain, "shift_y": torch.full((32,), 0.04)})
    torch.testing.assert_close(shifted[..., 3:, :], fine[..., :61, :], rtol=0, atol=1e-6)
    moved = vary_fast(pictures, {**still, **plain, "shift_x": torch.full((32,), 0.25)})
    torch.testing.assert_close(moved[..., 16:], pictures[..., :48], rtol=0, atol=1e-5)
    torch.testing.assert_close(moved[..., :16], pictures[..., :1].expand(32, 3, 64, 16), rtol=0, atol=1e-2)
