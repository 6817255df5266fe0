"""The door for notebooks: `from data import open_dataset`."""

import copy
import gc
import os

import numpy as np
import pytest
import torch

from data import open_dataset
from data.frames import Frames
from data.loader import Loader
from data.opening import open_source
from errors import UserError
from helpers.dataset_edits import edit_json, rewrite_column
from infer import recorded_observations


def test_rows_are_the_batch_that_training_sees(made):
    root = made("two_cameras")
    rows = [0, 7, 30]
    source = open_source(str(root))
    loader = Loader(source, Frames(source), deltas={}, batch_size=4, seed=0)
    expected = loader.batch_of(torch.tensor(rows))
    with open_dataset(root) as dataset:
        batch = dataset[rows]
    assert batch.keys() == expected.keys()
    for key, value in expected.items():
        assert batch[key] == value if isinstance(value, list) else torch.equal(batch[key], value)
    assert batch["observation.images.top"].dtype == torch.uint8
    loader.close()


def test_what_a_dataset_says_of_itself(made):
    with open_dataset(made("video")) as dataset:
        assert len(dataset) == 33
        assert dataset.episodes == [0, 1, 2]
        assert dataset.tasks == {0: "lift", 1: "push"}
        assert dataset.problems == dataset.warnings == []
        assert dataset.stats["action"]["mean"].shape == (3,)


def test_a_choice_of_episodes_observations_and_size(made):
    with open_dataset(made("two_cameras"), "1:3", ["*wrist", "observation.state"], [30, 40]) as dataset:
        assert dataset.episodes == [1, 2]
        batch = dataset[::10]
        assert batch["observation.images.wrist"].shape == (2, 3, 30, 40)
        assert "observation.images.top" not in batch


@pytest.mark.parametrize(
    ("rows", "frames"),
    [
        (4, [4]),
        (slice(3, 6), [3, 4, 5]),
        (slice(None, None, -16), [10, 3, 0]),
        ((1, 2), [1, 2]),
        (np.array([1, 2], np.uint8), [1, 2]),
        (torch.tensor([5, 0]), [5, 0]),
        (np.arange(33) < 2, [0, 1]),
        ([], []),
    ],
)
def test_rows_in_every_form(made, rows, frames):
    with open_dataset(made("no_camera")) as dataset:
        assert dataset[rows]["frame_index"].tolist() == frames


def test_rows_that_are_not_there(made):
    dataset = open_dataset(made("no_camera"))
    assert dataset[-1]["episode_index"].tolist() == [2]
    with pytest.raises(IndexError):
        dataset[[99]]


@pytest.mark.parametrize("episodes", ["0,2", [0, 2], range(0, 3, 2), np.array([0, 2])])
def test_episodes_in_every_form(made, episodes):
    assert open_dataset(made("no_camera"), episodes, "state").episodes == [0, 2]


@pytest.mark.parametrize("image_size", [32, [32], [0, 1], [1, 2, 3]])
def test_a_wrong_image_size(made, image_size):
    with pytest.raises(UserError, match=r"image_size: expected \[height, width\]"):
        open_dataset(made("video"), image_size=image_size)


def first_of(rows: list):
    return rows[0]


def test_closed_copied_and_read_in_other_processes(made):
    dataset = open_dataset(made("video"))
    before = dataset[[3]]["observation.images.top"]
    twin = copy.deepcopy(dataset)
    loader = torch.utils.data.DataLoader(
        dataset, batch_sampler=[[3], [4]], num_workers=1, collate_fn=first_of, multiprocessing_context="fork"
    )
    assert torch.equal(next(iter(loader))["observation.images.top"], before)
    dataset.close()
    dataset.close()
    assert torch.equal(dataset[[3]]["observation.images.top"], before)
    assert torch.equal(twin[[3]]["observation.images.top"], before)


def test_a_dataset_with_problems_opens_and_has_no_batches(copy_of):
    root = copy_of("no_camera")

    def spoil(values):
        values[2][0] = float("nan")
        return values

    rewrite_column(root, "action", spoil)
    dataset = open_dataset(root)
    assert "action is not finite" in dataset.problems[0]
    with pytest.raises(UserError, match="action is not finite"):
        dataset[[0]]


def test_a_folder_that_is_no_dataset(tmp_path, copy_of):
    with pytest.raises(UserError, match="not a LeRobot dataset"):
        open_dataset(tmp_path)
    root = copy_of("no_camera")
    edit_json(root / "meta" / "info.json", lambda info: info.update(storage_format="lance"))
    with pytest.raises(UserError, match="lance"):
        open_dataset(root)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc to count open files")
def test_garbage_collection_closes_the_videos(copy_of):
    root = copy_of("video")

    def open_videos() -> list[str]:
        paths = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
        names = [os.readlink(path) for path in paths if os.path.islink(path)]
        return [name for name in names if name.startswith(str(root))]

    dataset = open_dataset(root)
    dataset[[0]]
    assert open_videos()
    del dataset
    gc.collect()
    assert not open_videos()


def test_a_dataset_is_a_source(made):
    with open_dataset(made("no_camera")) as dataset:
        observation, action = next(recorded_observations(dataset, 1, ["observation.state"]))
    assert observation["task"] == "push"
    assert action.shape == (3,)
