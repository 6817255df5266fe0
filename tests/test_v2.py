"""Formats v2.0, v2.1 and odd v3.0: which files are read, what is said of those that cannot be, and episodes by their own index."""

import json
import os
import re
import shutil
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from data import open_dataset
from data.episodes import counted, parse_episodes, ranges
from data.opening import open_source
from errors import UserError
from helpers.dataset_edits import edit_json
from helpers.hub_server import Hub, connect
from helpers.runs import small
from helpers.v2_dataset import LFS_POINTER, numbers_of, state_of, write_lines, write_v2
from helpers.videos import shown_number
from train import train
from training.progress import TrainResult, closing_message

CAMERA = "observation.images.top"
LENGTHS = {0: 5, 1: 4, 2: 6, 3: 3}


def info_of(root):
    return root / "meta" / "info.json"


def table_of(root, episode, chunk=0):
    return root / "data" / f"chunk-{chunk:03d}" / f"episode_{episode:06d}.parquet"


def video_of(root, episode, camera=CAMERA):
    return root / "videos" / "chunk-000" / camera / f"episode_{episode:06d}.mp4"


def expect_rows(source, lengths):
    """The rows of exactly these episodes, each in its place."""
    assert source.problems == []
    assert source.episodes == list(lengths)
    assert (source.ends - source.starts).tolist() == list(lengths.values())
    expected = [state_of(episode, frame) for episode, length in lengths.items() for frame in range(length)]
    assert source.columns["action"].tolist() == expected


def message_of(dataset, **arguments) -> str:
    """Why a dataset is refused."""
    with pytest.raises(UserError) as caught:
        open_source(str(dataset), **arguments).require()
    return str(caught.value)


# Formats.


@pytest.mark.parametrize(("version", "by_episode"), [("v2.0", False), ("v2.1", True), ("v2.1", False)])
def test_v2_is_read(tmp_path, version, by_episode):
    root = write_v2(tmp_path / "data", LENGTHS, version=version, cameras=(CAMERA,), by_episode=by_episode)
    with open_dataset(root) as dataset:
        expect_rows(open_source(str(root)), LENGTHS)
        expected = ["meta/episodes_stats.jsonl is missing, the statistics are those of meta/stats.json"]
        assert dataset.warnings == (expected if version == "v2.1" and not by_episode else [])
        assert dataset.tasks == {0: "lift", 1: "push"}
        assert dataset.stats["action"]["max"].tolist() == [3.0, 5.0, 4.0]
        assert dataset.stats["action"]["count"].tolist() == [18]
        batch = dataset[:]
        assert batch["task"] == ["lift"] * 5 + ["push"] * 4 + ["lift"] * 6 + ["push"] * 3
        shown = [shown_number(picture) for picture in batch[CAMERA]]
        assert shown == [number for episode, length in LENGTHS.items() for number in numbers_of(episode, length)]


def test_no_statistics_at_all(tmp_path):
    root = write_v2(tmp_path / "data", LENGTHS)
    (root / "meta" / "episodes_stats.jsonl").unlink()
    expect_rows(open_source(str(root)), LENGTHS)


def test_several_chunks(tmp_path):
    root = write_v2(tmp_path / "data", dict.fromkeys(range(5), 3), chunks_size=2)
    assert table_of(root, 4, chunk=2).is_file()
    expect_rows(open_source(str(root)), dict.fromkeys(range(5), 3))


@pytest.mark.parametrize("version", ["v1.6", "v3.1", "v4.0", "2.1", 3.0])
def test_another_format_is_refused_by_name(tmp_path, version):
    root = write_v2(tmp_path / "data", {0: 3})
    edit_json(info_of(root), lambda info: info.update(codebase_version=version))
    assert f"expected codebase_version v3.0, v2.1 or v2.0, got {version!r}. " in message_of(root)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda info: info.pop("codebase_version"), "has no codebase_version"),
        (lambda info: info.update(storage_format="zarr"), "expected storage_format parquet, lance or none, got 'zarr'"),
        (lambda info: info.update(chunks_size="many"), "expected chunks_size of 1 or more, got 'many'"),
    ],
)
def test_info_that_does_not_fit(tmp_path, change, said):
    root = write_v2(tmp_path / "data", {0: 3})
    edit_json(info_of(root), change)
    assert said in message_of(root)


@pytest.mark.parametrize("name", ["parquet", None])
def test_storage_format_parquet_is_read(tmp_path, name):
    expect_rows(open_source(str(write_v2(tmp_path / "data", {0: 3}, storage_format=name))), {0: 3})


# Statistics by episode.


def edit_stats(root, change):
    path = root / "meta" / "episodes_stats.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    write_lines(path, change(lines) or lines)


def mean_of(source):
    return source.meta.stats["action"]["mean"].tolist()


def test_statistics_of_episodes_that_are_no_longer_described(tmp_path):
    root = write_v2(tmp_path / "data", LENGTHS)
    whole = mean_of(open_source(str(root)))
    edit_stats(root, lambda lines: [*lines, {**lines[3], "episode_index": 7}])
    source = open_source(str(root))
    assert mean_of(source) == whole
    assert source.warnings == []


def test_an_episode_without_statistics(tmp_path):
    root = write_v2(tmp_path / "data", LENGTHS)
    whole = mean_of(open_source(str(root)))
    edit_stats(root, lambda lines: lines[:3])
    source = open_source(str(root))
    assert mean_of(source) == pytest.approx(whole)
    assert source.warnings[0] == "meta/episodes_stats.jsonl is left out: it has no statistics of episode 3"
    assert "computed from the 18 rows of the table" in source.warnings[1]


@pytest.mark.parametrize("wrong", [[1, 2], [[1, 2], [3]], 3.0, [[[1, 2, 3]], [[1, 2, 3]]]])
def test_statistics_that_do_not_merge_are_left_out(tmp_path, wrong):
    root = write_v2(tmp_path / "data", LENGTHS)
    whole = open_source(str(root)).meta.stats
    edit_stats(root, lambda lines: lines[1]["stats"]["action"].update(mean=wrong))
    source = open_source(str(root))
    assert source.problems == []
    assert source.warnings[0].startswith("meta/episodes_stats.jsonl: the statistics of action do not fit each other (")
    assert "meta/episodes_stats.jsonl lacks mean std min max of action: computed" in source.warnings[1]
    assert mean_of(source) == pytest.approx(whole["action"]["mean"].tolist())
    assert source.meta.stats["observation.state"]["mean"].tolist() == whole["observation.state"]["mean"].tolist()


def test_camera_statistics_that_do_not_merge_are_no_obstacle(tmp_path):
    """ImageNet's are used."""
    root = write_v2(tmp_path / "data", LENGTHS, cameras=(CAMERA,))
    values = {name: [0.5, 0.5] for name in ("mean", "std", "min", "max")} | {"count": [5]}
    edit_stats(root, lambda lines: [line["stats"].update({CAMERA: values}) for line in lines] and lines)
    settings = small("flow", dataset_id=str(root), steps=1, output_dir=str(tmp_path / "run"))
    assert train(**settings).steps == 1


# File names.


@pytest.mark.parametrize(
    ("data_path", "video_path"),
    [
        (
            "data/task-{episode_chunk:04d}/e{episode_index:08d}.parquet",
            "videos/task-{episode_chunk:04d}/{video_key}/e{episode_index:08d}.mp4",
        ),
        ("data/a/{file_index}.parquet", "videos/{chunk_index}/{video_key}-{file_index}.mp4"),
        ("data/a/../{episode_index}/t.parquet", "videos/{chunk}/{key}/{episode}.mp4"),
    ],
)
def test_other_names_of_files(tmp_path, data_path, video_path):
    root = write_v2(tmp_path / "data", LENGTHS, cameras=(CAMERA, "second"), data_path=data_path, video_path=video_path)
    for episode in LENGTHS:
        names = {"episode_chunk": 0, "chunk_index": 0, "chunk": 0} | dict.fromkeys(
            ("episode_index", "episode", "file_index"), episode
        )
        table = root / data_path.replace("a/../", "").format(**names)
        table.parent.mkdir(parents=True, exist_ok=True)
        table_of(root, episode).rename(table)
        for camera in (CAMERA, "second"):
            video = root / video_path.format(**names, video_key=camera, key=camera)
            video.parent.mkdir(parents=True, exist_ok=True)
            video_of(root, episode, camera).rename(video)
    with open_dataset(root) as dataset:
        expect_rows(open_source(str(root)), LENGTHS)
        assert dataset.warnings == []
        assert [shown_number(picture) for picture in dataset[5:9]["second"]] == numbers_of(1, 4)


def test_folders_that_the_template_has_wrong(tmp_path):
    """As in published GR00T data: every file is in chunk-000."""
    wrong = {
        "data_path": "data/chunk-{episode_index:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_index:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    }
    root = write_v2(tmp_path / "data", LENGTHS, version="v2.0", cameras=(CAMERA, "second"), by_episode=False, **wrong)
    told = "not where data_path of info.json says, read from data/chunk-000"
    with open_dataset(root) as dataset:
        expect_rows(open_source(str(root)), LENGTHS)
        assert dataset.warnings[0] == f"3 files, such as data/chunk-001/episode_000001.parquet: {told}"
        assert [line.rpartition("read from ")[2] for line in dataset.warnings] == [
            "data/chunk-000",
            f"videos/chunk-000/{CAMERA}",
            "videos/chunk-000/second",
        ]
        assert [shown_number(picture) for picture in dataset[15:]["second"]] == numbers_of(3, 3)


@pytest.mark.parametrize("copies", ["data/before_fix", f"videos/old_takes/{CAMERA}"])
def test_a_copy_in_another_folder_does_not_stand_in_for_a_missing_file(tmp_path, copies):
    root = write_v2(tmp_path / "data", LENGTHS, cameras=(CAMERA,))
    place = table_of(root, 2).parent if copies.startswith("data") else video_of(root, 2).parent
    shutil.copytree(place, root / copies)
    gone = next(place.glob("episode_000002.*"))
    gone.unlink()
    message = message_of(root)
    assert f"{gone.relative_to(root)} is missing (episode 2)" in message
    assert message.endswith("To leave those episodes out, pass --episodes 0:2,3")
    expect_rows(open_source(str(root), episodes="0:2,3"), {0: 5, 1: 4, 3: 3})


def test_all_files_of_a_kind_in_another_folder(tmp_path):
    root = write_v2(tmp_path / "data", LENGTHS, cameras=(CAMERA,))
    (root / "videos" / "chunk-000").rename(root / "videos" / "clips")
    (root / "data" / "chunk-000").rename(root / "data" / "tables")
    (root / "data" / "tables" / "episode_000002.parquet").unlink()
    message = message_of(root)
    assert "data/chunk-000/episode_000002.parquet is missing (episode 2)" in message
    source = open_source(str(root), episodes="0:2,3")
    expect_rows(source, {0: 5, 1: 4, 3: 3})
    told = "not where data_path of info.json says, read from data/tables"
    assert source.warnings[0] == f"3 files, such as data/chunk-000/episode_000000.parquet: {told}"


def test_the_file_of_another_episode_does_not_stand_in(tmp_path):
    root = write_v2(tmp_path / "data", {0: 4, 1: 4}, cameras=(CAMERA,), video_path="videos/{video_key}/{episode}/v.mp4")
    video = root / "videos" / CAMERA / "0" / "v.mp4"
    video.parent.mkdir(parents=True)
    video_of(root, 0).rename(video)
    assert f"videos/{CAMERA}/1/v.mp4 is missing (episode 1)" in message_of(root)


def test_v3_rows_in_a_folder_of_older_copies_are_not_read(copy_of):
    root = copy_of("many_files")
    shutil.copytree(root / "data" / "chunk-000", root / "data" / "backup")
    v3_tables(root)[-1].unlink()
    assert v3_tables(root)[-1].parent.name == "chunk-000"
    assert "is missing" in message_of(root)


@pytest.mark.parametrize(
    ("setting", "template", "said"),
    [
        ("data_path", "", "expected the name of a file with placeholders"),
        ("data_path", "data/{episode_index:0999999999d}.parquet", "expected a width of at most 255, got 0999999999d"),
        ("data_path", "data/{episode_index:0{chunks}d}.parquet", "cannot be filled in"),
        ("data_path", "data/" + "x" * 300 + "{episode_index}.parquet", "expected names of at most 255 bytes"),
        ("data_path", "data/{shard}.parquet", "has the placeholder {shard}: expected one of episode_index, "),
        ("data_path", "data/{}.parquet", "has the placeholder {}: expected"),
        ("data_path", "data/{episode_index.real}.parquet", "has the placeholder {episode_index.real}: expected"),
        ("data_path", "data/{episode_index", "cannot be filled in: "),
        ("data_path", "data/{episode_index:q}", "cannot be filled in: "),
        ("data_path", "../{episode_index}.parquet", "leads out of the dataset, to ../0.parquet"),
        ("data_path", "data/../../x/{episode_index}.parquet", "leads out of the dataset"),
        ("video_path", "/tmp/{video_key}/{episode_index}.mp4", "leads out of the dataset, to /tmp/"),
        ("video_path", "videos/{camera}.mp4", "has the placeholder {camera}: expected"),
        ("data_path", 7, "expected the name of a file with placeholders"),
    ],
)
def test_templates_that_cannot_be_followed(tmp_path, setting, template, said):
    root = write_v2(tmp_path / "data", {0: 3}, cameras=(CAMERA,), **{setting: template})
    message = message_of(root)
    assert f"info.json: {setting} {template!r}" in message
    assert said in message
    assert "\n" not in message


def test_a_camera_name_does_not_lead_out_of_the_dataset(tmp_path):
    root = write_v2(tmp_path / "data", {0: 3}, cameras=(CAMERA,))
    edit_json(info_of(root), lambda info: info["features"].update({"../../../x": info["features"].pop(CAMERA)}))
    assert "leads out of the dataset" in message_of(root)


# Episodes by their own index.


def test_ranges():
    assert ranges([1, 2, 4]) == "1:3,4"
    assert ranges([]) == ""
    assert ranges([7, 3, 3, 9, 8]) == "3,7:10"
    assert parse_episodes(ranges([0, 1, 5, 9, 10]), range(20)) == [0, 1, 5, 9, 10]
    assert counted([4]) == "episode 4"
    assert counted([3, 4, 5, 9]) == "4 episodes, 3:6,9"
    assert re.fullmatch(r"100 episodes, (\d+,)+\.\.\.", counted(range(0, 200, 2)))
    assert len(counted(range(0, 2000, 2))) < 90


@pytest.mark.parametrize(
    ("text", "expected"),
    [("3", [3]), ("0:4", [0, 2, 3]), ("1:3", [2]), ("2,0", [0, 2]), (None, [0, 2, 3])],
)
def test_episodes_with_a_gap(text, expected):
    assert parse_episodes(text, [0, 2, 3]) == expected


@pytest.mark.parametrize("text", ["1", "0:5", "1:2", "4", "0,1", "3:3", "9:10"])
def test_episodes_that_are_not_there(text):
    with pytest.raises(UserError, match=r"is out of range, the dataset has 3 episodes, 0,2:4"):
        parse_episodes(text, [0, 2, 3])


def test_an_episode_was_deleted_by_hand(tmp_path):
    lengths = {0: 5, 2: 6, 3: 3}
    root = write_v2(tmp_path / "data", lengths, cameras=(CAMERA,))
    with open_dataset(root) as dataset:
        expect_rows(open_source(str(root)), lengths)
        assert [shown_number(picture) for picture in dataset[5:]["observation.images.top"]] == [
            *numbers_of(2, 6),
            *numbers_of(3, 3),
        ]
    expect_rows(open_source(str(root), episodes="3"), {3: 3})
    expect_rows(open_source(str(root), episodes="1:4"), {2: 6, 3: 3})
    assert "1 is out of range, the dataset has 3 episodes, 0,2:4" in message_of(root, episodes="1")


def test_a_run_on_episodes_with_a_gap(tmp_path, capsys):
    root = write_v2(tmp_path / "data", {2: 6, 5: 6, 9: 6})
    settings = small("flow", dataset_id=str(root), output_dir=str(tmp_path / "run"), steps=1, quiet=False)
    train(**{**settings, "val_episodes": "9", "episodes": "5:10"})
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1].endswith("--episode 5")
    assert "1 episode (9)" in printed.out


def test_the_next_command_names_an_episode_of_the_first_dataset():
    plan = SimpleNamespace(
        config=SimpleNamespace(steps=4, dataset_id=["a/b#c", "d"]),
        source=SimpleNamespace(episodes=["a/b#c#7", "d#0"]),
        distributed=SimpleNamespace(size=1),
    )
    result = TrainResult(4, 0.5, [], "checkpoint-4", None, "run")
    assert closing_message(result, plan, 0).endswith("--dataset_id 'a/b#c' --episode 7")


def test_the_count_of_info_json_is_a_warning(tmp_path):
    root = write_v2(tmp_path / "data", LENGTHS, total_episodes=9)
    source = open_source(str(root))
    expect_rows(source, LENGTHS)
    assert source.warnings == ["info.json counts 9 episodes, its metadata describes 4: these are read"]


def test_v3_whose_info_counts_no_episodes_or_tasks(copy_of):
    root = copy_of("no_camera")
    edit_json(info_of(root), lambda info: info.update(total_episodes=0, total_tasks=0))
    source = open_source(str(root))
    assert source.problems == []
    assert source.episodes == [0, 1, 2]
    assert source.warnings == ["info.json counts 0 episodes, its metadata describes 3: these are read"]


def test_empty_episodes_are_left_out(tmp_path):
    root = write_v2(tmp_path / "data", {0: 5, 1: 0, 2: 6, 3: 0})
    source = open_source(str(root))
    expect_rows(source, {0: 5, 2: 6})
    assert source.warnings == ["left out, since their length is 0: 2 episodes, 1,3"]


def test_only_empty_episodes(tmp_path):
    assert message_of(write_v2(tmp_path / "data", {0: 0})).endswith(
        "has no episodes: record some, or download it again"
    )
    root = write_v2(tmp_path / "none", {})
    assert "has no episodes: its metadata describes none" in message_of(root)


# Files of episodes.


def test_stray_files_are_a_warning(tmp_path):
    root = write_v2(tmp_path / "data", LENGTHS, cameras=(CAMERA,))
    shutil.copy(table_of(root, 0), table_of(root, 7))
    table_of(root, 8).write_bytes(b"damaged")
    shutil.copy(table_of(root, 1), root / "data" / "chunk-000" / "episode_000001 (copy).parquet")
    video_of(root, 9).write_bytes(b"damaged")
    source = open_source(str(root))
    expect_rows(source, LENGTHS)
    assert source.warnings == [
        "not read, since they belong to no episode: 4 files, such as data/chunk-000/episode_000001 (copy).parquet"
    ]


def test_rows_of_other_episodes_in_a_file_are_left_out(tmp_path):
    root = write_v2(tmp_path / "data", LENGTHS)
    both = pa.concat_tables([pq.read_table(table_of(root, 3)), pq.read_table(table_of(root, 1))])
    pq.write_table(both, table_of(root, 1))
    edit_json(info_of(root), lambda info: info.update(total_episodes=4))
    other = pq.read_table(table_of(root, 0))
    column = other.schema.get_field_index("episode_index")
    foreign = other.set_column(column, "episode_index", pa.array([40] * len(other)))
    pq.write_table(pa.concat_tables([other, foreign]), table_of(root, 0))
    source = open_source(str(root))
    expect_rows(source, LENGTHS)
    assert source.warnings == [
        "its table also has rows of episode 40, which its metadata does not describe: they are left out"
    ]
    expect_rows(open_source(str(root), episodes="1"), {1: 4})
    expect_rows(open_source(str(root), episodes="0,2"), {0: 5, 2: 6})


def damage(path):
    path.write_bytes(path.read_bytes()[:50])


def make_pointer(path):
    path.write_text(LFS_POINTER)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda path: path.unlink(), "is missing"),
        (damage, "cannot be read"),
        (make_pointer, "is a Git LFS pointer and not the file itself (run `git lfs pull`"),
    ],
)
@pytest.mark.parametrize("kind", [table_of, video_of])
def test_episodes_whose_files_are_not_whole(tmp_path, kind, harm, said):
    lengths = {0: 5, 1: 4, 2: 6, 3: 3, 5: 4, 6: 4}
    root = write_v2(tmp_path / "data", lengths, cameras=(CAMERA,))
    for episode in (1, 5):
        harm(kind(root, episode))
    message = message_of(root)
    assert f"{kind(root, 1).relative_to(root)} {said}" in message
    assert "and 1 more file like it (2 episodes, 1,5)" in message
    assert message.endswith("To leave those episodes out, pass --episodes 0,2:4,6")
    assert len(message.splitlines()) == 1
    expect_rows(open_source(str(root), episodes=message.split()[-1]), {0: 5, 2: 6, 3: 3, 6: 4})
    assert message_of(root, episodes="0:3", flag="--trial").endswith("pass --trial 0,2")
    assert "To leave" not in message_of(root, episodes="5")


def test_tables_and_videos_that_are_not_whole_are_told_together(tmp_path):
    root = write_v2(tmp_path / "data", dict.fromkeys(range(8), 3), cameras=(CAMERA,))
    table_of(root, 1).unlink()
    video_of(root, 4).unlink()
    pq.write_table(pq.read_table(table_of(root, 6)).slice(0, 2), table_of(root, 6))
    message = message_of(root)
    assert message.splitlines()[1:] == [
        "  - data/chunk-000/episode_000001.parquet is missing (episode 1)",
        "  - episode 6 has 2 rows in its table, but 3 in its metadata",
        f"  - videos/chunk-000/{CAMERA}/episode_000004.mp4 is missing (episode 4)",
        "To leave those episodes out, pass --episodes 0,2:4,5,7",
    ]
    settings = small("flow", dataset_id=str(root), output_dir=str(tmp_path / "run"), steps=1)
    with pytest.raises(UserError, match=r"pass --episodes 0,2:4,5,7 --val_episodes 2$"):
        train(**settings, val_episodes="2,4")
    train(**settings, episodes="0,2:4,5,7", val_episodes="2")


def test_many_episodes_of_another_length(tmp_path):
    root = write_v2(tmp_path / "data", dict.fromkeys(range(20), 3))
    for episode in range(3, 15):
        pq.write_table(pq.read_table(table_of(root, episode)).slice(0, 2), table_of(root, episode))
    message = message_of(root)
    assert "episode 3 has 2 rows in its table, but 3 in its metadata, and so on in 12 episodes, 3:15" in message
    assert message.endswith("--episodes 0:3,15:20")


def test_a_camera_without_any_file(tmp_path):
    root = write_v2(tmp_path / "data", LENGTHS, cameras=(CAMERA, "observation.images.gone"))
    shutil.rmtree(video_of(root, 0, "observation.images.gone").parent)
    message = message_of(root)
    assert (
        "/observation.images.gone/episode_000000.mp4 is missing, and 3 more files like it (4 episodes, 0:4)" in message
    )
    assert "No video of observation.images.gone is there: copy them, or train without, --observations" in message
    names = message.partition("--observations ")[2].split()
    assert names == [CAMERA, "observation.state"]
    expect_rows(open_source(str(root), observations=names), LENGTHS)


# v3.0.


def v3_tables(root):
    return sorted((root / "data").glob("*/*.parquet"))


@pytest.mark.parametrize("harm", [lambda path: path.unlink(), damage, make_pointer])
def test_v3_files_that_no_selected_episode_needs(copy_of, harm):
    root = copy_of("many_files")
    whole = open_source(str(root))
    for path in (v3_tables(root)[1], sorted((root / "videos").glob("*/*/*.mp4"))[2]):
        harm(path)
    source = open_source(str(root), episodes="0")
    assert source.problems == []
    assert source.warnings == []
    assert torch.equal(source.columns["action"], whole.columns["action"][: source.rows])
    message = message_of(root)
    assert "data/chunk-000/file-001.parquet" in message
    assert "(episode 1)" in message
    assert message.endswith("To leave those episodes out, pass --episodes 0")


def test_v3_file_says_which_episodes_it_holds(copy_of):
    root = copy_of("two_cameras")
    next((root / "videos" / "observation.images.wrist").glob("*/*.mp4")).write_bytes(b"x" * 100)
    message = message_of(root)
    assert "videos/observation.images.wrist/chunk-000/file-000.mp4 cannot be read as a video" in message
    assert message.endswith("(3 episodes, 0:3)")


def test_v3_rows_that_the_metadata_finds_in_the_wrong_file(copy_of):
    """Without the columns that say which file, or with wrong ones, all files are looked through."""
    root = copy_of("many_files")
    expected = open_source(str(root)).columns["action"]
    path = next((root / "meta" / "episodes").glob("*/*.parquet"))
    table = pq.read_table(path)
    column = table.schema.get_field_index("data/file_index")
    pq.write_table(table.set_column(column, "data/file_index", pa.array([0, 0, 0])), path)
    for change in (lambda table: table, lambda table: table.drop(["data/file_index", "data/chunk_index"])):
        pq.write_table(change(pq.read_table(path)), path)
        source = open_source(str(root))
        assert source.problems == []
        assert torch.equal(source.columns["action"], expected)
    damage(v3_tables(root)[2])
    assert message_of(root).endswith("--episodes 0:2")
    assert open_source(str(root), episodes="0:2").problems == []


def test_v3_episodes_out_of_order_or_over_two_files(copy_of):
    root = copy_of("no_camera")
    expected = open_source(str(root)).columns
    path = v3_tables(root)[0]
    table = pq.read_table(path)
    pq.write_table(pa.concat_tables([table.slice(22), table.slice(0, 22)]), path)
    source = open_source(str(root))
    assert source.problems == []
    assert all(torch.equal(source.columns[key], values) for key, values in expected.items())
    pq.write_table(table.slice(0, 18), path)
    pq.write_table(table.slice(18), path.with_name("file-001.parquet"))
    source = open_source(str(root))
    assert source.problems == []
    assert all(torch.equal(source.columns[key], values) for key, values in expected.items())


def test_v3_from_timestamps_that_contradict_the_frames(copy_of):
    """Two episodes of a video, the second of which is said to begin within the first."""
    root = copy_of("video")
    assert open_source(str(root)).warnings == []
    path = next((root / "meta" / "episodes").glob("*/*.parquet"))
    table = pq.read_table(path)
    name = f"videos/{CAMERA}/from_timestamp"
    begins = table[name].to_pylist()
    begins[1] -= 0.3
    column = pa.array(begins)
    pq.write_table(table.set_column(table.schema.get_field_index(name), name, column), path)
    source = open_source(str(root))
    assert source.problems == []
    (warning,) = source.warnings
    assert f"{CAMERA}: episode 1 begins at " in warning
    assert f"its from_timestamp in meta/episodes is {begins[1]:.4g} s" in warning


@pytest.mark.parametrize("left", [b"PAR1" + bytes(300), b""])
def test_v3_recording_that_was_interrupted(copy_of, left):
    root = copy_of("many_files")
    episodes = open_source(str(root)).episodes
    unfinished = root / "meta" / "episodes" / "chunk-000" / "file-009.parquet"
    unfinished.write_bytes(left)
    source = open_source(str(root))
    assert source.problems == []
    assert source.episodes == episodes
    assert source.warnings[0].startswith(f"{unfinished} cannot be read: ")
    assert source.warnings[0].endswith("The episodes that it describes are left out")
    for path in unfinished.parent.glob("*.parquet"):  # one that is not the last
        path.rename(path.with_name(path.name.replace("file-009", "file--01")))
    assert "cannot be read" in message_of(root)


def test_v3_several_files_of_episodes_in_any_order(copy_of):
    root = copy_of("many_files")
    expected = open_source(str(root))
    path = next((root / "meta" / "episodes").glob("*/*.parquet"))
    table = pq.read_table(path)
    pq.write_table(table.slice(2), path)
    pq.write_table(table.slice(0, 2), path.with_name("file-001.parquet"))
    source = open_source(str(root))
    assert source.problems == []
    assert all(torch.equal(source.columns[key], values) for key, values in expected.columns.items())
    assert [str(path) for path in source.videos[CAMERA].files] == [str(p) for p in expected.videos[CAMERA].files]
    pq.write_table(table.slice(0, 3), path.with_name("file-001.parquet"))
    assert "meta/episodes describes episode 2 more than once, in 2 files" in message_of(root)


# Damaged metadata.


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"episode_index": 1, "tasks"', "episodes.jsonl line 2 is not valid JSON"),
        ("[" * 100_000, "episodes.jsonl line 2 is not valid JSON"),
        (f'{{"episode_index": 1, "length": {2**63}}}', "line 2: expected length of type int, got 9223372036854775808"),
        ('{"episode_index": 1}', "episodes.jsonl line 2: expected length of type int, got None"),
        ('{"length": 4}', "episodes.jsonl line 2: expected episode_index of type int, got None"),
        ('{"episode_index": "1", "length": 4}', "line 2: expected episode_index of type int, got '1'"),
        ('{"episode_index": 1, "length": -4}', "line 2: expected length of type int, got -4"),
        ("[1, 4]", "line 2: expected episode_index of type int, got None"),
        ('{"episode_index": 0, "length": 4}', "line 2 has episode_index 0, as line 1: remove one of the two"),
    ],
)
def test_damaged_lines(tmp_path, text, said):
    root = write_v2(tmp_path / "data", LENGTHS)
    path = root / "meta" / "episodes.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], text, *lines[2:]]))
    message = message_of(root)
    assert said in message
    assert len(message.splitlines()) == 1


def test_texts_with_other_line_breaks(tmp_path):
    """JSON allows these characters as they are, and str.splitlines splits at them."""
    root = write_v2(tmp_path / "data", {0: 3, 1: 2})
    texts = ["lift\u2028it", "push\x85it \u2029"]
    lines = [json.dumps({"task_index": i, "task": text}, ensure_ascii=False) for i, text in enumerate(texts)]
    (root / "meta" / "tasks.jsonl").write_text("\r\n".join(lines), encoding="utf-8")
    assert open_source(str(root)).tasks == dict(enumerate(texts))


@pytest.mark.parametrize("name", ["tasks.jsonl", "episodes.jsonl", "info.json"])
def test_metadata_that_is_not_in_utf8(tmp_path, name):
    root = write_v2(tmp_path / "data", {0: 3, 1: 2})
    path = root / "meta" / name
    path.write_bytes(path.read_bytes() + '{"note": "la bo\xeete"}\n'.encode("latin-1"))
    assert re.search(
        rf"{name} line \d: expected text in UTF-8, got byte 0xee\. Save the file as UTF-8$", message_of(root)
    )


@pytest.mark.parametrize(
    "name", ["meta", "meta/info.json", "meta/tasks.jsonl", "data/chunk-000/episode_000001.parquet"]
)
def test_what_may_not_be_read(tmp_path, name):
    """As another user, since root may read everything."""
    root = write_v2(tmp_path / "data", {0: 3, 1: 2})
    open_source(str(root))  # what is imported late, that user may not read
    for folder in (tmp_path, *tmp_path.parents[:-2]):
        folder.chmod(0o755)
    (root / name).chmod(0)
    is_root = os.geteuid() == 0
    if is_root:
        os.setegid(65534)
        os.seteuid(65534)
    try:
        message = message_of(root)
    finally:
        if is_root:
            os.seteuid(0)
            os.setegid(0)
    (root / name).chmod(0o755)
    assert name in message
    assert "Permission denied" in message
    assert "\n" not in message


def test_lines_out_of_order_twice_alike_and_without_tasks(tmp_path):
    root = write_v2(tmp_path / "data", LENGTHS)
    path = root / "meta" / "episodes.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        line.pop("tasks")
    lines[1]["tasks"] = "push"
    lines[2]["tasks"] = [7]
    write_lines(path, [lines[2], lines[0], lines[0], lines[3], lines[1]])
    expect_rows(open_source(str(root)), LENGTHS)


@pytest.mark.parametrize("name", ["info.json", "stats.json", "tasks.parquet", "episodes/chunk-000/file-000.parquet"])
@pytest.mark.parametrize(("harm", "said"), [(make_pointer, "is a Git LFS pointer"), (damage, "")])
def test_v3_metadata_files_that_are_pointers_or_damaged(copy_of, name, harm, said):
    root = copy_of("no_camera")
    harm(root / "meta" / name)
    message = message_of(root)
    assert f"meta/{name} {said}" in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize("name", ["info.json", "episodes.jsonl", "tasks.jsonl", "episodes_stats.jsonl"])
def test_v2_metadata_files_that_are_pointers_or_missing(tmp_path, name):
    root = write_v2(tmp_path / "data", LENGTHS)
    make_pointer(root / "meta" / name)
    assert f"meta/{name} is a Git LFS pointer and not the file itself (run `git lfs pull`" in message_of(root)
    if name in ("episodes.jsonl", "tasks.jsonl"):
        (root / "meta" / name).unlink()
        assert f"meta/{name} is missing. Copy or download the whole dataset again" in message_of(root)


def test_a_picture_file_that_is_a_pointer(copy_of):
    root = copy_of("images")
    path = v3_tables(root)[0]
    table = pq.read_table(path)
    pictures = [{"bytes": None, "path": "images/first.png"}] * len(table)
    column = table.schema.get_field_index(CAMERA)
    pq.write_table(
        table.set_column(column, table.schema.field(column), pa.array(pictures, table.schema.field(column).type)), path
    )
    (root / "images").mkdir(exist_ok=True)
    make_pointer(root / "images" / "first.png")
    assert "images/first.png is a Git LFS pointer and not the file itself (run `git lfs pull`" in message_of(root)


# Folders that are something else.


@pytest.mark.parametrize(
    ("file", "kind"),
    [
        ("episode_0.hdf5", "HDF5"),
        ("1.0.0/bridge-train.tfrecord-00000-of-00001", "RLDS"),
        ("replay.zarr/.zgroup", "Zarr"),
        ("run/run_0.db3", "rosbag"),
        ("meta_data/info.json", "LeRobot v1"),
    ],
)
def test_data_of_another_kind(tmp_path, file, kind):
    path = tmp_path / "data" / file
    path.parent.mkdir(parents=True)
    path.write_bytes(b"x")
    message = message_of(tmp_path / "data")
    assert f"data is not a LeRobot dataset: expected meta/info.json, got {kind} data such as " in message


def test_folders_that_are_no_dataset(tmp_path):
    for name in ("one", "two"):
        write_v2(tmp_path / "all" / name, {0: 3})
    message = message_of(tmp_path / "all")
    assert message.startswith(
        f"{tmp_path}/all is a folder of 2 LeRobot datasets, not one itself: pass {tmp_path}/all/one"
    )
    assert message_of(tmp_path / "all" / "one" / "data").endswith(
        f"a part of a LeRobot dataset: pass {tmp_path}/all/one"
    )
    (tmp_path / "empty").mkdir()
    assert "empty is not a LeRobot dataset: it has no meta/info.json" in message_of(tmp_path / "empty")
    (tmp_path / "file.hdf5").write_bytes(b"x")
    assert "file.hdf5 is a file: expected the folder of a LeRobot dataset" in message_of(tmp_path / "file.hdf5")


# Silence, and the Hub.


@pytest.mark.parametrize("version", ["v2.0", "v2.1", "v3.0"])
def test_nothing_is_said_on_the_way(tmp_path, copy_of, version, capfd, caplog, recwarn):
    root = copy_of("two_cameras") if version == "v3.0" else write_v2(tmp_path / "v2", LENGTHS, version=version)
    edit_json(info_of(root), lambda info: info.update(my_own_field=1, total_videos=4))
    capfd.readouterr()
    assert open_source(str(root)).problems == []
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []
    assert [str(warning.message) for warning in recwarn] == []


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub on this machine that huggingface_hub talks to, and no other."""
    from lerobot.utils import constants as lerobot_constants

    server = Hub()
    connect(monkeypatch, server)
    monkeypatch.setattr(lerobot_constants, "HF_LEROBOT_HOME", tmp_path / "lerobot")
    monkeypatch.setattr(lerobot_constants, "HF_LEROBOT_HUB_CACHE", tmp_path / "lerobot" / "hub")
    yield server
    server.server.shutdown()
    server.server.server_close()


def upload(hub, root, *tags):
    """Put a folder on the Hub as me/data, on branch main, with tags."""
    files = {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}
    hub.repos["me/data"] = [{}, files]
    hub.tags["me/data"] = dict.fromkeys(tags, 1)


@pytest.mark.parametrize(
    ("version", "tags"), [("v2.0", ()), ("v2.0", ("v2.0",)), ("v2.1", ()), ("v2.1", ("v2.0", "v2.1"))]
)
def test_v2_from_the_hub(hub, tmp_path, version, tags):
    cameras = (CAMERA, "observation.images.wrist")
    root = write_v2(tmp_path / "data", LENGTHS, version=version, cameras=cameras, by_episode=version == "v2.1")
    upload(hub, root, *tags)
    expect_rows(open_source("me/data", episodes="1,3", observations=["top", "state"]), {1: 4, 3: 3})
    got = {path for path in hub.read if not path.startswith("meta/")}
    assert got == {
        path.relative_to(root).as_posix()
        for episode in (1, 3)
        for path in (table_of(root, episode), video_of(root, episode))
    }
    expect_rows(open_source("me/data"), LENGTHS)
    count = len(hub.read)
    expect_rows(open_source("me/data", dataset_root=str(tmp_path / "here")), LENGTHS)
    assert video_of(tmp_path / "here", 2).is_file()
    assert len(hub.read) > count


def test_files_on_the_hub_that_the_template_has_wrong(hub, tmp_path):
    root = write_v2(
        tmp_path / "data",
        LENGTHS,
        version="v2.0",
        by_episode=False,
        data_path="data/chunk-{episode_index:03d}/episode_{episode_index:06d}.parquet",
    )
    upload(hub, root)
    expect_rows(open_source("me/data", episodes="1:3"), {1: 4, 2: 6})


@pytest.mark.parametrize("tags", [(), ("v3.0",)])
def test_v3_from_the_hub(hub, made, tags):
    root = made("many_files")
    upload(hub, root, *tags)
    expected = open_source(str(root), episodes="0,2", observations=["wrist", "state"])
    source = open_source("me/data", episodes="0,2", observations=["wrist", "state"])
    assert source.problems == []
    assert all(torch.equal(source.columns[key], values) for key, values in expected.columns.items())
    got = {path for path in hub.read if not path.startswith("meta/")}
    assert len(got) == 4
    assert not any("top" in path or "file-001" in path for path in got)
    assert open_source("me/data").problems == []


def test_hub_repos_that_are_no_dataset(hub, tmp_path):
    hub.repos["me/data"] = [{}, {"README.md": b"x"}]
    assert "me/data is not a LeRobot dataset" in message_of("me/data")
    assert "the Hub has no such repo or revision" in message_of("me/nothing")
    root = write_v2(tmp_path / "data", {0: 3}, version="v3.1")
    hub.repos["me/newer"] = [{}, {"meta/info.json": (root / "meta" / "info.json").read_bytes()}]
    hub.tags["me/newer"] = {"v3.1": 1}
    assert "expected codebase_version v3.0, v2.1 or v2.0, got 'v3.1'" in message_of("me/newer")


def offline(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def test_many_files_in_other_folders_on_the_hub(hub, tmp_path):
    """So many that they are asked for by a pattern."""
    lengths = dict.fromkeys(range(205), 1)
    root = write_v2(tmp_path / "data", lengths, data_path="tables/{episode_chunk}/e{episode_index}.parquet")
    for episode in lengths:
        table = root / "tables" / "0" / f"e{episode}.parquet"
        table.parent.mkdir(parents=True, exist_ok=True)
        table_of(root, episode).rename(table)
    upload(hub, root)
    source = open_source("me/data")
    assert source.problems == []
    assert source.episodes == list(lengths)


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
@pytest.mark.parametrize("reachable", [True, False])
def test_a_recording_in_lerobots_folder_that_is_not_whole(hub, monkeypatch, tmp_path, copy_of, version, reachable):
    """Its own problems are told, whether the Hub knows no such dataset or cannot be asked."""
    made_here = copy_of("many_files") if version == "v3.0" else write_v2(tmp_path / "data", LENGTHS, cameras=(CAMERA,))
    root = tmp_path / "lerobot" / "me" / "data"
    shutil.copytree(made_here, root)
    gone = v3_tables(root)[0] if version == "v3.0" else video_of(root, 2)
    gone.unlink()
    if not reachable:
        offline(monkeypatch)
    source = open_source("me/data")
    assert f"{gone.relative_to(root)} is missing" in source.problems[0]
    assert source.remedy.startswith("To leave those episodes out, pass --episodes ")
    assert len(source.problems) == (1 if reachable else 2)
    if not reachable:
        assert source.problems[1].startswith("what is missing was not downloaded: dataset me/data: the network request")
    if source.remedy:
        assert open_source("me/data", episodes=source.remedy.rpartition(" ")[2]).problems == []


@pytest.mark.parametrize("tags", [(), ("v2.1",)])
def test_a_cached_dataset_is_read_offline(hub, monkeypatch, tmp_path, tags):
    root = write_v2(tmp_path / "data", LENGTHS, cameras=(CAMERA,))
    upload(hub, root, *tags)
    expect_rows(open_source("me/data", episodes="1,3"), {1: 4, 3: 3})
    offline(monkeypatch)
    expect_rows(open_source("me/data", episodes="1,3"), {1: 4, 3: 3})
    message = message_of("me/data")
    assert "episode_000000.parquet is missing, and 1 more file like it" in message
    assert "what is missing was not downloaded: dataset me/data: the network request failed" in message
    assert "the network request failed" in message_of("me/other")


def test_a_repo_that_is_gated(hub, monkeypatch):
    refused = (403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "restricted"}, {"error": "restricted"})
    monkeypatch.setattr(hub, "answer", lambda *request: refused)
    assert (
        "me/data is gated. Accept its licence on https://huggingface.co/me/data, then run `hf auth login`"
        in message_of("me/data")
    )


def test_a_revision_in_the_name():
    assert "Pass me/data --revision v2.1, or" in message_of("me/data@v2.1")


def test_a_dataset_root_that_holds_another_dataset(hub, tmp_path):
    root = write_v2(tmp_path / "data", LENGTHS)
    card = "Look at it: https://huggingface.co/spaces/lerobot/visualize_dataset?path=me/data\n"
    (root / "README.md").write_text(card)
    upload(hub, root)
    here = str(tmp_path / "here")
    assert open_source("me/data", dataset_root=here).warnings == []
    assert open_source("me/data", dataset_root=here).warnings == []
    assert open_source("me/other", dataset_root=here).warnings == [
        f"{here}/README.md is that of dataset me/data, not of me/other: is {here} the folder you mean?"
    ]


@pytest.mark.parametrize("file", ["info.json", "stats.json"])
def test_deeply_nested_json_is_a_line(copy_of, file):
    root = copy_of("no_camera")
    (root / "meta" / file).write_text("[" * 100_000)
    with pytest.raises(UserError, match=file):
        open_source(str(root))


def test_a_template_with_characters_that_no_file_has(copy_of):
    root = copy_of("video")
    edit_json(root / "meta" / "info.json", lambda info: info.update(video_path="videos/\0/{video_key}.mp4"))
    with pytest.raises(UserError, match="expected the name of a file"):
        open_source(str(root))
