"""What is wrong with a dataset is found before step 0, and told all at once."""

import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from data.frames import Frames
from data.loader import Loader
from data.opening import open_source
from errors import UserError
from helpers.dataset_edits import edit_json, rewrite_column
from helpers.runs import SMALL_POLICY_ARGS, small
from infer import compare
from policy.loaded import load_policy
from reports.pages import last
from runtime import enough_memory
from train import train
from training import learner as step
from training.evaluation import Evaluator


def refusal(root, **settings) -> str:
    with pytest.raises(UserError) as caught:
        train(**{**small(dataset_id=str(root), output_dir=str(root / "run")), **settings})
    assert not (root / "run").exists()
    return str(caught.value)


def video_of(root):
    return next((root / "videos").glob("*/*/*.mp4"))


def test_missing_video(copy_of):
    root = copy_of("video")
    video_of(root).unlink()
    message = refusal(root)
    assert "videos/observation.images.top/chunk-000/file-000.mp4 is missing (3 episodes, 0:3)" in message
    assert message.endswith("copy them, or train without, --observations observation.state")


@pytest.mark.parametrize("kept", ["none", "header", "all but 10 bytes"])
def test_truncated_video(copy_of, kept, capfd):
    root = copy_of("video")
    whole = video_of(root).read_bytes()
    video_of(root).write_bytes(whole[: {"none": 20, "header": len(whole) // 2, "all but 10 bytes": -10}[kept]])
    message = refusal(root)
    assert "file-000.mp4 " + ("cannot be read as a video" if kept == "none" else "is cut short") in message
    assert capfd.readouterr().err == ""


def test_frame_count_differs(copy_of, made):
    root = copy_of("video")
    video_of(root).write_bytes(video_of(made("wide")).read_bytes())
    assert "file-000.mp4 has 10 frames, but its episodes have 33 rows" in refusal(root)


def test_not_finite(copy_of):
    root = copy_of("no_camera")

    def change(values):
        values[20][1] = np.nan
        return values

    rewrite_column(root, "action", change)
    assert "action is not finite in 1 row, first in episode 1 frame 7" in refusal(root)


def test_wrong_fps(copy_of):
    root = copy_of("no_camera")
    edit_json(root / "meta" / "info.json", lambda info: info.update(fps=30))
    assert "timestamps advance by 0.1 s a frame: expected 0.03333 s at fps 30 of info.json" in refusal(root)


def test_jitter_is_a_warning(copy_of, capsys):
    root = copy_of("no_camera")
    rewrite_column(root, "timestamp", lambda times: [t + 0.02 * (i % 2) for i, t in enumerate(times)])
    train(**small(dataset_id=str(root), output_dir=str(root / "run"), steps=1))
    assert "warning: timestamps are up to 0.02 s off frame_index / fps" in capsys.readouterr().out


def keep_episodes(root, count):
    path = next((root / "meta" / "episodes").glob("*/*.parquet"))
    pq.write_table(pq.read_table(path).slice(0, count), path)


def test_metadata_of_fewer_episodes_than_the_table_has(copy_of):
    root = copy_of("no_camera")
    keep_episodes(root, 2)
    source = open_source(str(root))
    assert source.episodes == [0, 1]
    assert source.rows == 22
    assert source.problems == []
    assert source.warnings[:2] == [
        "info.json counts 3 episodes, its metadata describes 2: these are read",
        "its table also has rows of episode 2, which its metadata does not describe: they are left out",
    ]
    assert "2 is out of range, the dataset has 2 episodes, 0:2" in refusal(root, episodes="2")


def test_table_of_fewer_episodes_than_the_metadata_has(copy_of):
    root = copy_of("video")
    path = next((root / "data").glob("*/*.parquet"))
    pq.write_table(pq.read_table(path).slice(0, 13), path)
    assert refusal(root, episodes="1") == f"dataset {root}: its table has no rows of episode 1"
    remedy = "To leave those episodes out, pass --episodes 0"
    assert refusal(root) == f"dataset {root}: its table has no rows of 2 episodes, 1:3. {remedy}"
    pq.write_table(pq.read_table(path).slice(0, 0), path)
    assert refusal(root) == f"dataset {root}: its table has no rows of 3 episodes, 0:3"


def test_no_episode_index(copy_of):
    root = copy_of("no_camera")
    path = next((root / "data").glob("*/*.parquet"))
    pq.write_table(pq.read_table(path).drop(["episode_index"]), path)
    assert refusal(root).endswith("its table has no column episode_index, which separates its episodes")
    assert "episode_index" in refusal(root, episodes="0:2")


def set_camera(root, **facts):
    edit_json(root / "meta" / "info.json", lambda info: info["features"]["observation.images.top"].update(facts))


@pytest.mark.parametrize(
    ("kind", "shape", "names"),
    [
        ("video", [64, 96, 3], None),
        ("video", [3, 64, 96], None),
        ("images", [64, 96, 3], None),
        ("video", [64, 96, 3], ["height", "width", "rgb"]),
        ("images", [64, 96, 3], {"height": 64, "width": 96, "rgb": 3}),
        ("video", [3, 64, 96], ["height", "width", "channel"]),
    ],
)
def test_a_camera_whose_axes_have_other_names_or_none(copy_of, kind, shape, names):
    root = copy_of(kind)
    set_camera(root, names=names, shape=shape)
    assert train(**small(dataset_id=str(root), output_dir=str(root / "run"), steps=1)).steps == 1


def test_a_camera_without_three_channels(copy_of):
    root = copy_of("video")
    set_camera(root, shape=[64, 96, 1])
    message = "camera observation.images.top: expected shape (height, width, 3) in info.json, got (64, 96, 1)"
    remedy = 'If it holds depth, write "info": {"is_depth_map": true} beside its shape'
    assert refusal(root) == f"dataset {root}: {message}. {remedy}. Leave it out: --observations observation.state"


def rename_camera(root, new):
    """Call the pictures `new` in the table and its metadata, and give it a text beside them."""
    old, note = "observation.images.top", "observation.image_note"
    path = next((root / "data").glob("*/*.parquet"))
    table = pq.read_table(path).rename_columns({old: new})
    pq.write_table(table.append_column(note, pa.array(["sharp"] * len(table))), path)
    edit_json(root / "meta" / "stats.json", lambda stats: stats.update({new: stats.pop(old)}))

    def change(info):
        info["features"][new] = info["features"].pop(old)
        info["features"][note] = {"dtype": "string", "shape": [1], "names": None}

    edit_json(root / "meta" / "info.json", change)


def test_a_camera_that_lerobot_does_not_resize(copy_of):
    root, old, new = copy_of("images"), "observation.cam_high", "observation.images.cam_high"
    rename_camera(root, old)
    expected = "expected a name with image in it, without which LeRobot does not resize"
    message = f"camera {old}: {expected}, got {old}. Pass --rename {old}={new}"
    assert refusal(root, image_size=[32, 48]) == f"dataset {root}: {message}"
    settings = small(dataset_id=str(root), image_size=[32, 48], rename=[f"{old}={new}"], steps=1)
    loaded = load_policy(train(**settings, output_dir=str(root / "run")).checkpoint, "cpu")
    batch = loaded.batch_of({old: np.zeros((64, 96, 3), np.uint8), "observation.state": np.zeros(3)})
    assert loaded.preprocess(batch)[new].shape == (1, 3, 32, 48)


def test_names_that_lerobot_hands_to_no_policy(copy_of):
    root = copy_of("images")
    rename_camera(root, "front")
    assert refusal(root).startswith(f"dataset {root}: camera front: expected a name that begins with observation., got")
    root = copy_of("no_camera")
    edit_json(root / "meta" / "info.json", lambda info: info["features"].update(actions=info["features"].pop("action")))
    assert "it has no feature action, did you mean 'actions'?" in refusal(root)


@pytest.mark.parametrize("policy", ["act", "diffusion"])
def test_pictures_without_a_state(copy_of, policy):
    root = copy_of("images")
    edit_json(root / "meta" / "info.json", lambda info: info["features"].pop("observation.state"))
    message = f"it has no observation.state, which policy {policy} needs. Pass --policy flow"
    assert refusal(root, policy=policy, policy_args=SMALL_POLICY_ARGS[policy].split()) == f"dataset {root}: {message}"
    assert train(**small("flow", dataset_id=str(root), output_dir=str(root / "run"), steps=1)).steps == 1


def test_a_camera_that_meta_episodes_does_not_know(copy_of):
    root = copy_of("video")
    edit_json(
        root / "meta" / "info.json",
        lambda info: info["features"].update({"observation.front": info["features"]["observation.images.top"]}),
    )
    edit_json(root / "meta" / "info.json", lambda info: info["features"].pop("observation.images.top"))
    assert "info.json has a camera observation.front, but meta/episodes does not say where its videos are" in refusal(
        root
    )


def test_missing_metadata_files(copy_of):
    root = copy_of("no_camera")
    shutil.rmtree(root / "meta" / "episodes")
    remedy = "Copy or download the whole dataset again"
    assert refusal(root) == f"{root}/meta/episodes/*/*.parquet is missing. {remedy}"
    (root / "meta" / "tasks.parquet").unlink()
    assert refusal(root) == f"{root}/meta/tasks.parquet is missing. {remedy}"


def test_stats_that_do_not_fit(copy_of):
    root = copy_of("no_camera")
    edit_json(root / "meta" / "stats.json", lambda stats: stats["action"].update(mean=[0.0] * 4, std=[1.0] * 4))
    assert (
        "meta/stats.json: action: expected 3 numbers as std, got 4. Recompute them: lerobot-edit-dataset --repo_id"
        in refusal(root)
    )


def test_stats_of_which_the_policy_needs_a_part(copy_of):
    root = copy_of("no_camera")
    edit_json(root / "meta" / "stats.json", lambda stats: [stats["action"].pop(name) for name in ("min", "max")])
    assert train(**small("flow", dataset_id=str(root), output_dir=str(root / "run"), steps=1)).steps == 1


@pytest.mark.parametrize("policy", ["flow", "act"])
def test_one_joint_and_whole_numbers(tmp_path, policy):
    """An action and a state of one number, and observations that are whole numbers, yes and no, or have two axes."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    one, kinds = {"shape": (1,), "names": None}, {"grip": "int64", "touch": "bool"}
    features = {name: {"dtype": "float32", **one} for name in ("observation.state", "action")}
    features |= {f"observation.{name}": {"dtype": kind, **one} for name, kind in kinds.items()}
    features["observation.pose"] = {"dtype": "float32", "shape": (2, 3), "names": None}
    dataset = LeRobotDataset.create("test/one", fps=10, features=features, root=tmp_path / "data", use_videos=False)
    for _ in range(2):
        for frame in range(9):
            number = np.array([frame / 9], np.float32)
            own = {f"observation.{name}": np.array([frame % 2], kind) for name, kind in kinds.items()}
            own["observation.pose"] = np.arange(frame, frame + 6, dtype=np.float32).reshape(2, 3)
            dataset.add_frame({"observation.state": number, "action": number, **own, "task": "move"})
        dataset.save_episode()
    dataset.finalize()
    result = train(
        **small(policy, dataset_id=str(tmp_path / "data"), val_fraction=0.5), output_dir=str(tmp_path / "run")
    )
    assert result.final_loss < 100
    assert 0 < last(result.history, "val_action_error") < 10
    compared = compare(load_policy(result.checkpoint, "cpu"), open_source(str(tmp_path / "data")), 0)
    assert compared.predicted.shape == (9, 1)
    assert np.isfinite(compared.error).all()


def test_another_number_of_actions(made, tmp_path):
    settings = small(dataset_id=str(made("no_camera")), output_dir=str(tmp_path), steps=1)
    loaded = load_policy(train(**settings).checkpoint, "cpu")
    source = open_source(str(made("no_camera")))
    source.meta.features["action"]["shape"] = (1,)
    with pytest.raises(UserError, match=r"no_camera has other actions: expected 3, got 1\. Pass the dataset that"):
        compare(loaded, source, 0)


def test_yes_and_no_as_an_action(copy_of):
    root = copy_of("no_camera")
    path = next((root / "data").glob("*/*.parquet"))
    table = pq.read_table(path)
    yes = pa.array([[bool(i % 2)] * 3 for i in range(len(table))])
    pq.write_table(table.set_column(table.schema.get_field_index("action"), "action", yes), path)
    edit_json(root / "meta" / "info.json", lambda info: info["features"]["action"].update(dtype="bool"))
    result = train(**small(dataset_id=str(root), output_dir=str(root / "run"), val_fraction=0.4))
    assert 0 < last(result.history, "val_action_error") < 10


def test_table_shorter_than_metadata(copy_of):
    root = copy_of("no_camera")
    path = next((root / "data").glob("*/*.parquet"))
    pq.write_table(pq.read_table(path).slice(0, 30), path)
    assert "episode 2 has 8 rows in its table, but 11 in its metadata" in refusal(root)


def test_all_at_once(copy_of):
    root = copy_of("two_cameras")
    for video in (root / "videos").glob("*/*/*.mp4"):
        video.unlink()
    edit_json(root / "meta" / "stats.json", lambda stats: stats["observation.state"].update(std=[1.0, -1.0, 1.0]))
    message = refusal(root)
    assert "has 3 problems:" in message
    assert "top/chunk-000/file-000.mp4 is missing" in message
    assert "wrist/chunk-000/file-000.mp4 is missing" in message
    assert "expected 0 or more as std of joint_1, got -1" in message


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA"),
        RuntimeError("[...] can't allocate memory"),
        RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"),
    ],
)
def test_out_of_memory_is_told(made, tmp_path, monkeypatch, error):
    def full(*args):
        raise error

    for place, name in ((step.Learner, "forward"), (Loader, "__next__"), (Evaluator, "results")):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, full)
            with pytest.raises(UserError, match=r"out of memory with --batch_size 4\. These take less: --grad"):
                train(**small(dataset_id=str(made("no_camera")), val_fraction=0.4), output_dir=str(tmp_path / name))


def test_what_a_killed_compilation_left_is_told():
    """torch.compile goes on taking such a file for a finished one."""
    error = RuntimeError(
        "ImportError: /tmp/torchinductor_me/ii/abc.main.so: file too short\n\nSet TORCHDYNAMO_VERBOSE=1"
    )
    message = r"/tmp/torchinductor_me/ii/abc\.main\.so is incomplete: .* Delete that file"
    with pytest.raises(UserError, match=message), enough_memory(4, []):
        raise error


def test_loss_not_finite_names_step_and_frames(made, tmp_path, monkeypatch):
    from training import learner as module

    real = module.to_float_batch

    def poisoned(batch, *rest):
        batch = real(batch, *rest)
        if int(batch["sample"][0]) >= 4 * 5:  # from step 6 on
            batch["action"] = batch["action"] * float("nan")
        return batch

    monkeypatch.setattr(module, "to_float_batch", poisoned)
    settings = small(dataset_id=str(made("no_camera")), steps=20, save_freq=4, log_freq=4)
    with pytest.raises(UserError) as caught:
        train(**settings, output_dir=str(tmp_path))
    monkeypatch.undo()
    message = str(caught.value)
    assert "not finite at step 6" in message
    assert f"last good checkpoint: {tmp_path}/checkpoint-4" in message
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]
    source = open_source(settings["dataset_id"])
    loader = Loader(source, Frames(source), {}, 4, seed=1000).start(20)
    batch = next(loader)
    loader.close()
    pairs = zip(batch["episode_index"].tolist(), batch["frame_index"].tolist(), strict=True)
    assert ", ".join(f"{episode}:{frame}" for episode, frame in pairs) in message
