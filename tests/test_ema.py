"""The moving average of the weights: exact for weights of few bits, and only of what is trained."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from checkpoints.folder import TRAINED_WEIGHTS
from checkpoints.writer import save_weights, write_manifest
from helpers.runs import assert_same_run, small
from train import train
from training.learner import AVERAGE, EMA


class Network(nn.Module):
    """A frozen base with a small trained part, in one dtype."""

    def __init__(self, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.base = nn.Linear(64, 64, dtype=dtype)
        self.head = nn.Linear(64, 4, dtype=dtype)
        self.base.requires_grad_(False)


def test_average_of_bf16_weights_is_that_of_fp64():
    """10,000 updates of weights that wander; kept in bf16 the average would stop within a hundred."""
    torch.manual_seed(0)
    network = Network(torch.bfloat16)
    ema = EMA.start(network, decay=0.999)
    expected = network.head.weight.detach().double()
    position = expected.clone()
    for step in range(1, 10_001):
        position += 1e-4 * torch.randn(position.shape, dtype=torch.float64)
        network.head.weight.data.copy_(position)
        ema.update(step)
        expected.lerp_(network.head.weight.detach().double(), 1 - min(0.999, (1 + step) / (10 + step)))
    average = ema.averages["head.weight"].double()
    assert ((average - expected).abs() <= 1e-3 * expected.abs() + 1e-6).all()


@pytest.mark.parametrize("by_copy", [False, True])
def test_applied_average_is_rounded_and_neither_is_lost(by_copy):
    network = Network(torch.bfloat16)
    ema = EMA.start(network, decay=0.9, by_copy=by_copy)
    with torch.no_grad():
        network.head.weight.mul_(1.01)
    ema.update(1)
    trained = network.head.weight.detach().clone()
    average = ema.averages["head.weight"].clone()
    memory = network.head.weight.data_ptr()
    with ema.applied():
        assert network.head.weight.dtype is torch.bfloat16
        assert torch.equal(network.head.weight, average.bfloat16())
    assert torch.equal(network.head.weight, trained)
    assert torch.equal(ema.averages["head.weight"], average)
    if by_copy:
        assert network.head.weight.data_ptr() == memory


def test_a_frozen_base_has_no_average():
    network = Network(torch.bfloat16)
    ema = EMA.start(network, decay=0.9)
    trained = sum(parameter.numel() for parameter in network.head.parameters())
    assert sum(average.nbytes for average in ema.averages.values()) == 4 * trained
    assert ema.without_average(network) == {"base.weight", "base.bias"}


def test_frozen_weights_are_stored_once(made, tmp_path):
    """A run with a frozen backbone: its second file holds what differs, and resumes to the bit with or without the rest."""
    settings = small("act", dataset_id=str(made("video")), freeze=["backbone"], ema_decay=0.4, save_freq=2)
    train(**settings, output_dir=str(tmp_path / "whole"))
    half = tmp_path / "whole" / "checkpoint-2"
    acting = load_file(half / "policy.safetensors")
    trained = load_file(half / TRAINED_WEIGHTS)
    frozen = acting.keys() - trained.keys()
    assert frozen
    assert all("backbone" in name for name in frozen)
    assert any(not torch.equal(tensor, acting[name]) for name, tensor in trained.items())

    shutil.copytree(half, tmp_path / "lean" / half.name)
    # As older versions wrote it: with the frozen weights too.
    older = tmp_path / "older" / half.name
    shutil.copytree(half, older)
    (older / TRAINED_WEIGHTS).unlink()
    save_weights({**acting, **trained}, older / TRAINED_WEIGHTS)
    write_manifest(older)
    for run in ("lean", "older"):
        train(resume_from_checkpoint=str(tmp_path / run / half.name), quiet=True)
        assert_same_run(tmp_path / "whole", tmp_path / run, 4)
        ends = [load_file(tmp_path / name / "checkpoint-4" / TRAINED_WEIGHTS) for name in ("whole", run)]
        assert ends[0].keys() == ends[1].keys()
        assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())
        assert not any(name.startswith(AVERAGE) for name in ends[0])  # fp32 weights hold their average exactly


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_run_can_go_on_without_its_average(made, tmp_path, dtype, capsys):
    """As the message of a run out of memory offers."""
    run = train(
        **small(dataset_id=[str(made("no_camera"))], ema_decay=0.9, weights_dtype=dtype),
        output_dir=str(tmp_path / "run"),
    )
    half = run.checkpoint.with_name("checkpoint-2")
    end = train(resume_from_checkpoint=str(half), ema_decay=0.0, output_dir=str(tmp_path / "without")).checkpoint
    assert "--ema_decay: 0.9 -> 0.0" in capsys.readouterr().out
    assert not (end / TRAINED_WEIGHTS).exists()
    trained = load_file(run.checkpoint / TRAINED_WEIGHTS)
    weights = load_file(end / "policy.safetensors")  # those that the run with the average trained
    assert all(torch.equal(weights[name], tensor) for name, tensor in trained.items() if not name.startswith(AVERAGE))
