"""The order of samples: a function of (seed, sample), with as little memory as its samples take, however large the dataset is."""

import resource
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from data import order as module
from data.loader import Loader
from data.order import (
    BLOCK,
    Order,
    TrainableRows,
    list_of_epoch,
    list_of_weighted_epoch,
    permuted_by_formula,
    weighted_order,
)
from errors import UserError
from helpers.paths import SHIPPED
from helpers.runs import small
from train import train


def rows_of(lengths: list[int], drop: int = 0) -> TrainableRows:
    ends = torch.tensor(lengths).cumsum(0)
    return TrainableRows(ends - torch.tensor(lengths), ends, drop)


@pytest.fixture
def by_formula(monkeypatch):
    """Small datasets are ordered as large ones."""
    monkeypatch.setattr(module, "LARGEST_LIST", 0)


def test_trainable_rows():
    rows = rows_of([4, 1, 5, 2], drop=2)
    assert len(rows) == 5
    assert rows.at(torch.arange(5)).tolist() == [0, 1, 5, 6, 7]
    assert len(rows_of([1, 2], drop=2)) == 0
    assert len(rows_of([])) == 0


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 16, 17, 1000, 4096, 4097, 65_536])
def test_the_formula_is_a_permutation(count):
    seen = [permuted_by_formula(torch.arange(count), count, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    for order in seen:
        assert torch.equal(order.sort().values, torch.arange(count))
    if count > 10:
        assert len({tuple(order.tolist()) for order in seen}) == 4
    some = torch.tensor([count - 1, 0, count // 2])
    assert torch.equal(permuted_by_formula(some, count, 1, 1), seen[3][some])


def test_the_formula_shuffles_as_a_list_does():
    count = 100_000
    order = permuted_by_formula(torch.arange(count), count, 5, 0).double()
    steps = torch.diff(order).abs()
    assert abs(steps.mean() / count - 1 / 3) < 0.01  # of two random numbers
    parts = torch.histc(order[:1000], bins=10, min=0, max=count)
    assert ((parts - 100) ** 2 / 100).sum() < 27.9  # chi-squared of 9 degrees of freedom, one in a thousand
    again = permuted_by_formula(torch.arange(count), count, 5, 1).double()
    assert abs(np.corrcoef(order, again)[0, 1]) < 0.02
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.02


@pytest.mark.parametrize("shuffle", ["full", "blocks"])
@pytest.mark.parametrize("is_large", [False, True])
def test_each_row_comes_once_an_epoch(shuffle, is_large, request):
    if is_large:
        request.getfixturevalue("by_formula")
    lengths = torch.randint(1, 40, (100,), generator=torch.Generator().manual_seed(0)).tolist()
    rows = rows_of(lengths, drop=2)
    expected = rows.at(torch.arange(len(rows)))
    order = Order(rows, 3, shuffle)
    epochs = order.rows_of(torch.arange(3 * len(rows))).split(len(rows))
    assert all(torch.equal(epoch.sort().values, expected) for epoch in epochs)
    assert not torch.equal(epochs[0], epochs[1])
    assert torch.equal(order.rows_of(torch.tensor([len(rows) + 7, 2])), torch.stack([epochs[1][7], epochs[0][2]]))
    if shuffle == "blocks":
        episode = torch.searchsorted(torch.tensor(lengths).cumsum(0), epochs[0], right=True)
        assert len(torch.unique_consecutive(episode)) > 0.9 * len(rows), "shuffled within a block"
        assert all(len(episode[some].unique()) <= 2 * BLOCK for some in torch.arange(len(rows)).split(64))
        assert len(episode[:300].unique()) <= BLOCK < len(episode.unique())


def test_weights_by_formula_share_out_the_samples_as_the_list_does(by_formula):
    rows = rows_of([10, 20, 5])
    order = Order(rows, 7, weights=[3, 1, 1], rows_per_dataset=[10, 20, 5])
    epochs = order.rows_of(torch.arange(10 * 35)).split(35)
    listed = [weighted_order([10, 20, 5], [3, 1, 1], 7, epoch) for epoch in range(10)]
    for epoch, expected in zip(epochs, listed, strict=True):
        assert int((epoch < 10).sum()) == int((expected < 10).sum())
        assert int((epoch >= 30).sum()) == int((expected >= 30).sum())
    counts = torch.bincount(torch.cat(epochs), minlength=35)
    assert counts[:10].tolist() == [21] * 10
    assert counts[30:].tolist() == [14] * 5


def test_a_million_episodes_of_a_thousand_frames():
    """Memory and the cost of a batch do not grow with the number of rows: a list of these would take 8 GB."""
    list_of_epoch.cache_clear()
    list_of_weighted_epoch.cache_clear()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    episodes = 1_000_000
    ends = torch.full((episodes,), 1000).cumsum(0)
    source = SimpleNamespace(
        name="made up", starts=ends - 1000, ends=ends, episodes=range(episodes), tasks={}, columns={}, videos={}, images={},
        episode_of=lambda rows: torch.searchsorted(ends, rows, right=True),
        dataset_of_episode=torch.arange(episodes) // 500_000,
    )  # fmt: skip
    frames = SimpleNamespace(is_streamed=False)
    for options in ({}, {"shuffle": "blocks"}, {"weights": [2.0, 1.0]}):
        loader = Loader(source, frames, {"action": list(range(100))}, 256, seed=1, **options)
        assert loader.samples_per_epoch == 10**9
        for step in (0, 10**6, 10**9 // 256):  # the last one ends in the second epoch
            rows = loader.rows_at(256 * step)
            assert int(rows.min()) >= 0
            assert int(rows.max()) < 10**9
            assert len(rows.unique()) > 200
            assert torch.equal(rows, loader.rows_at(256 * step))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 400_000, "kB"


def test_blocks_are_another_order_and_a_resume_keeps_it(tmp_path):
    settings = small(
        dataset_id=str(SHIPPED), steps=4, save_freq=2, image_size=[32, 32], cache_dir=str(tmp_path / "cache")
    )
    runs = {}
    for shuffle in ("full", "blocks"):
        run = train(**settings, shuffle=shuffle, output_dir=str(tmp_path / shuffle))
        runs[shuffle] = load_file(run.checkpoint / "policy.safetensors")
    assert any(not torch.equal(value, runs["full"][key]) for key, value in runs["blocks"].items())
    checkpoint = str(tmp_path / "blocks" / "checkpoint-2")
    resumed = train(**settings, output_dir=str(tmp_path / "again"), resume_from_checkpoint=checkpoint)
    got = load_file(resumed.checkpoint / "policy.safetensors")
    assert all(torch.equal(value, got[key]) for key, value in runs["blocks"].items())
    with pytest.raises(
        UserError, match="--shuffle blocks reads every frame once per epoch, --dataset_weights does not"
    ):
        train(**{**settings, "dataset_id": [str(SHIPPED)] * 2}, dataset_weights=[1, 2], shuffle="blocks")
