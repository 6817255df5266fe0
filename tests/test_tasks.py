"""Tasks go by their own index, in whatever form tasks.parquet has them."""

import json
import types

import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from data.frames import Frames
from data.loader import Loader
from data.opening import open_source
from data.union import renumber_tasks, unite
from errors import UserError, first_of
from helpers.dataset_edits import edit_json, rewrite_column
from helpers.runs import small
from infer import compare
from policy.loaded import load_policy
from train import train
from training.changes import describe_data


def write_tasks(root, **columns):
    """A tasks.parquet without pandas' own metadata, as other tools write it."""
    pq.write_table(pa.table(columns), root / "meta" / "tasks.parquet")


def renumber(root, new):
    """Give the rows' tasks other indices, {old: new}."""
    rewrite_column(root, "task_index", lambda indices: [new[index] for index in indices])


def texts_of(source) -> list[str]:
    """The text of every row's task, as batches have it."""
    loader = Loader(source, Frames(source), {}, 4, seed=1)
    try:
        return loader.batch_of(torch.arange(source.rows))["task"]
    finally:
        loader.close()


RIGHT = ["lift"] * 13 + ["push"] * 9 + ["lift"] * 11  # of the made dataset


@pytest.mark.parametrize(
    ("columns", "new"),
    [
        ({"task_index": [0, 1], "task": ["lift", "push"]}, {0: 0, 1: 1}),
        ({"task_index": [1, 0], "task": ["push", "lift"]}, {0: 0, 1: 1}),
        ({"task_index": [1, 2], "task": ["lift", "push"]}, {0: 1, 1: 2}),
        ({"task_index": [0, 5, 900], "task": ["lift", "WRONG", "push"]}, {0: 0, 1: 900}),
        ({"task_index": [0, 1, 2], "task": ["lift", "push", "lift"]}, {0: 2, 1: 1}),
        ({"__index_level_0__": ["lift", "push"], "task_index": [0, 1]}, {0: 0, 1: 1}),
        ({"task_index": [0.0, 1.0], "instruction": ["lift", "push"], "weight": [1.0, 2.0]}, {0: 0, 1: 1}),
        ({"task_index": [0, 1, 2], "task": ["lift", "push", None]}, {0: 0, 1: 1}),
    ],
)
def test_every_form_gives_each_row_its_own_text(copy_of, columns, new):
    root = copy_of("no_camera")
    write_tasks(root, **columns)
    renumber(root, new)
    source = open_source(str(root))
    source.require()
    assert texts_of(source) == RIGHT
    assert list(source.tasks) == sorted(source.tasks)
    assert source.meta.tasks.loc["push"].task_index in new.values()  # LeRobot's own form


def test_an_index_that_was_stored_is_the_task_index(copy_of):
    root = copy_of("no_camera")
    frame = pandas.DataFrame({"task": ["lift", "push"]}, index=pandas.Index([3, 7], name="task_index"))
    frame.to_parquet(root / "meta" / "tasks.parquet")
    renumber(root, {0: 3, 1: 7})
    assert texts_of(open_source(str(root))) == RIGHT


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"task_index": [0, 0], "task": ["lift", "push"]}, "meta/tasks.parquet: task_index 0 has two texts, 'lift' and 'push'"),
        ({"task_index": [0, 1]}, "meta/tasks.parquet has no texts: expected a column task of texts, got columns"),
        ({"task_index": [0, 1], "task": [4, 5]}, "meta/tasks.parquet has no texts"),
        ({"task": ["lift", "push"]}, "meta/tasks.parquet: expected a column task_index"),
        ({"task_index": [0, 1.5], "task": ["lift", "push"]}, "expected whole numbers as task_index, got 1.5 of task 'push'"),
        ({"task_index": [0, 1e30], "task": ["lift", "push"]}, "expected whole numbers as task_index, got 1e+30 of task 'push'"),
        ({"task_index": [0, None], "task": ["lift", "push"]}, "expected whole numbers as task_index"),
        (
            {"task_index": [0, 2], "task": ["lift", "push"]},
            "no task in meta/tasks.parquet has task_index 1 of episode 1 frame 0: expected one of 0,2",
        ),
        ({"task_index": [0, 1], "task": ["lift", None]}, "no task in meta/tasks.parquet has task_index 1 of episode 1 frame 0"),
    ],
)  # fmt: skip
def test_what_names_no_text_is_one_line(copy_of, columns, message):
    root = copy_of("no_camera")
    write_tasks(root, **columns)
    problems = open_source(str(root)).problems
    assert len(problems) == 1
    assert message in problems[0]


def test_a_negative_task_index(copy_of):
    root = copy_of("no_camera")
    renumber(root, {0: -1, 1: 1})
    assert "task_index -1 of episode 0 frame 0: expected one of 0:2" in open_source(str(root)).problems[0]


def drop_task_index(root, column=True, feature=True):
    if column:
        path = next((root / "data").glob("*/*.parquet"))
        pq.write_table(pq.read_table(path).drop(["task_index"]), path)
    if feature:
        edit_json(root / "meta" / "info.json", lambda info: info["features"].pop("task_index"))


@pytest.mark.parametrize("feature", [True, False])
def test_a_dataset_of_one_task_needs_no_task_index(copy_of, feature):
    root = copy_of("no_camera")
    write_tasks(root, task_index=[4], task=["tidy up"])
    drop_task_index(root, feature=feature)
    source = open_source(str(root))
    source.require()
    assert texts_of(source) == ["tidy up"] * 33
    assert source.columns["task_index"].tolist() == [4] * 33


def test_of_several_tasks_a_row_must_name_its_own(copy_of):
    root = copy_of("no_camera")
    drop_task_index(root)
    assert open_source(str(root)).problems == [
        "its table has no column task_index, which says which of the 2 tasks a row belongs to"
    ]


def test_a_column_that_info_json_does_not_list_is_read(copy_of):
    root = copy_of("no_camera")
    drop_task_index(root, column=False)
    assert texts_of(open_source(str(root))) == RIGHT


def test_info_json_that_counts_no_tasks(copy_of):
    root = copy_of("no_camera")
    edit_json(root / "meta" / "info.json", lambda info: info.update(total_tasks=0))
    assert texts_of(open_source(str(root))) == RIGHT


def test_what_meta_episodes_says_of_tasks_is_not_trusted(copy_of):
    root = copy_of("no_camera")
    path = next((root / "meta" / "episodes").glob("*/*.parquet"))
    table = pq.read_table(path)
    position = table.schema.get_field_index("tasks")
    wrong = pa.array([["another"]] * len(table), table.schema.field("tasks").type)
    pq.write_table(table.set_column(position, "tasks", wrong), path)
    assert texts_of(open_source(str(root))) == RIGHT


def test_datasets_with_other_indices_are_merged_by_text(made, copy_of):
    root = copy_of("no_camera")
    write_tasks(root, task_index=[3, 8, 9], task=["push", "lift", "sort"])
    renumber(root, {0: 8, 1: 3})
    for order in ([root, made("no_camera")], [made("no_camera"), root]):
        both = unite([open_source(str(folder)) for folder in order])
        assert texts_of(both) == RIGHT * 2
        assert sorted(both.tasks.values()) == ["lift", "push", "sort"]
        assert list(both.tasks) == [0, 1, 2]


class CountedText(str):
    """A text that counts how often texts are compared."""

    compared = 0

    def __eq__(self, other):
        CountedText.compared += 1
        return str.__eq__(self, other)

    __hash__ = str.__hash__


def test_merging_many_tasks_compares_each_text_a_few_times():
    """Not each with each: of 30,000 tasks that would be a billion times."""
    texts = [CountedText(f"task {i}") for i in range(2000)]
    source = types.SimpleNamespace(
        tasks={3 * i: text for i, text in enumerate(texts)}, columns={"task_index": torch.arange(0, 6000, 3)}
    )
    new_index = {CountedText(text): i for i, text in enumerate(reversed(texts))}
    CountedText.compared = 0
    assert renumber_tasks(source, new_index).tolist() == list(range(1999, -1, -1))
    assert CountedText.compared <= 3 * len(texts)


def test_the_hash_of_a_datasets_content_is_that_of_older_checkpoints(made, copy_of):
    """For indices 0 to n - 1 it is over the list of texts, for others over the mapping."""
    import hashlib

    source = open_source(str(made("no_camera")))
    digest = hashlib.sha256(json.dumps([source.starts.tolist(), ["lift", "push"]]).encode())
    for _, values in sorted(source.columns.items()):
        digest.update(values.numpy())
    nothing = torch.zeros(0, dtype=torch.int64)
    assert describe_data(source, nothing)["sha256"] == digest.hexdigest()

    root = copy_of("no_camera")
    hashes = set()
    renumber(root, {0: 0, 1: 2})
    for columns in (
        {"task_index": [0, 2, 3], "task": ["lift", "a", "b"]},
        {"task_index": [0, 1, 2], "task": ["lift", "a", "b"]},
    ):
        write_tasks(root, **columns)
        hashes.add(describe_data(open_source(str(root)), nothing)["sha256"])
    assert len(hashes) == 2


def test_flow_embeds_each_text_once_and_acts_on_it(copy_of, tmp_path):
    root = copy_of("no_camera")
    write_tasks(root, task_index=[2, 5, 7], task=["lift", "push", "lift"])
    renumber(root, {0: 7, 1: 5})
    settings = small("flow", dataset_id=str(root), output_dir=str(tmp_path / "run"), steps=1)
    settings["policy_args"] = [*settings["policy_args"], "task_embedding=true"]
    result = train(**settings)
    loaded = load_policy(result.checkpoint, "cpu")
    assert loaded.policy.config.tasks == ["lift", "push"]
    assert loaded.policy.encoder.task.num_embeddings == 2
    compare(loaded, open_source(str(root)), 1)  # an observation has the text of its own row
    with pytest.raises(UserError, match="task 'sort' is not one that this policy was trained on"):
        loaded.act({"observation.state": [0.0, 0.0, 0.0], "task": "sort"})


def test_a_message_names_some_of_many_tasks():
    assert first_of(["a", "b"]) == "['a', 'b']"
    assert first_of([str(i) for i in range(30_000)]).endswith("'8', '9'] and 29990 more")
