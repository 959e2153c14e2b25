"""Reading: a data set of LeRobot's own making, the older layout, images kept in parquet."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.data.toyset import FPS, LENGTHS, SPEC, TASKS, VIEWS, edit_info, edit_table, episode
from vlaflow.data.lerobot import Dataset, view_name
from vlaflow.errors import SpecError

TINY = Path(__file__).parent.parent / "fixtures/lerobot_v3_tiny"
DATA = "data/chunk-000/file-000.parquet"
EPISODES = "meta/episodes/chunk-000/file-000.parquet"

CODEC = 12.0  # mean absolute error of crf 20 to 30 with halved chroma on noise and hard edges, in levels; measured 4 to 10
ONE_OFF = 20.0  # an image that is one frame away differs by more; measured 24 (two rows of a coarse pattern) to 57 (noise)


def error(a, b):
    return np.abs(a.astype(int) - b).mean()


@pytest.mark.parametrize("number", range(5))
def test_frames_of_lerobots_own_file_are_the_right_ones(number):
    """Frame i is frame 0 rolled down by i rows, so a reader that is off by one frame, or by one episode, is far off."""
    images = Dataset.open(TINY).frames(number, "top")
    rolled = np.stack([np.roll(images[0], i, axis=0) for i in range(60)])
    assert images.shape == (60, 64, 64, 3)
    assert error(images, rolled) < CODEC
    assert error(images[1:], rolled[:-1]) > ONE_OFF


def test_first_frames_of_lerobots_own_episodes_differ():
    first = [Dataset.open(TINY).frames(i, "top")[0] for i in range(2)]
    assert error(first[0], first[1]) > ONE_OFF


def test_columns_of_lerobots_own_file_equal_the_parquet():
    table = pq.read_table(TINY / "data/chunk-000/file-000.parquet")
    dataset = Dataset.open(TINY)
    columns = dataset.columns()
    assert np.array_equal(columns.action, np.array(table["action"].to_pylist(), np.float32))
    assert np.array_equal(columns.state, np.array(table["observation.state"].to_pylist(), np.float32))
    assert np.array_equal(columns.episode, np.repeat(np.arange(5), 60))
    assert np.array_equal(columns.frame, np.tile(np.arange(60), 5))
    assert [e.task for e in dataset.episodes] == [f"task number {i % 2}" for i in range(5)]
    assert [dataset.tasks[t] for t in columns.task[::60]] == [e.task for e in dataset.episodes]
    assert (dataset.version, dataset.fps, dataset.views) == ("v3.0", 20.0, {"top": "observation.images.top"})
    assert dataset.action_spec is None


@pytest.mark.parametrize("which", ["pristine", "pristine_v21"])
def test_both_versions_read_alike(which, request):
    dataset = Dataset.open(request.getfixturevalue(which))
    columns = dataset.columns()
    assert dataset.tasks == ("push the puck", "open the drawer")
    assert dataset.dimension_names("state") == ("x", "y")
    for i, length in enumerate(LENGTHS):
        images, state, action = episode(i)
        rows = dataset.episode_slice(i)
        assert np.array_equal(columns.state[rows], state)
        assert np.array_equal(columns.action[rows], action)
        assert (dataset.episodes[i].length, dataset.episodes[i].task) == (length, TASKS[i])
        for view in VIEWS:
            assert error(dataset.frames(i, view), images[view]) < CODEC
            assert error(dataset.frames(i, view)[1:], images[view][:-1]) > ONE_OFF


def test_unnamed_task_index_of_converted_data_sets_is_understood(copy):
    """LeRobot's converter leaves the pandas index unnamed."""
    path = copy / "meta/tasks.parquet"
    words = pq.read_table(path)["task"]
    pq.write_table(pa.table({"task_index": [1, 0], "__index_level_0__": words.take([1, 0])}), path)
    assert Dataset.open(copy).tasks == ("push the puck", "open the drawer")


STRINGS = [pa.large_string(), pa.string_view()][: 1 + (int(pa.__version__.split(".")[0]) >= 21)]
"""Which this pyarrow writes; older ones read the latter as a string."""


@pytest.mark.parametrize("kind", STRINGS, ids=str)
def test_words_of_any_string_type_are_tasks(copy, kind):
    """Other writers of parquet than LeRobot's choose their own."""
    path = copy / "meta/tasks.parquet"
    words = pa.array(["push the puck", "open the drawer"], kind)
    pq.write_table(pa.table({"task_index": [0, 1], "task": words}), path)
    assert pq.read_table(path)["task"].type == kind
    assert Dataset.open(copy).tasks == ("push the puck", "open the drawer")


def test_rows_out_of_order_are_put_in_order(copy):
    """Tools that merge data sets do not promise an order of rows."""
    path = copy / "data/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    before = Dataset.open(copy).columns()
    pq.write_table(table.take(np.random.default_rng(0).permutation(len(table))), path)
    after = Dataset.open(copy).columns()
    assert np.array_equal(before.action, after.action)
    assert np.array_equal(before.frame, after.frame)


def with_stored_images(root):
    """Keep one view as PNG in the table; returns the table and the exact frames by episode."""
    exact = [episode(i)[0]["corner"] for i in range(len(LENGTHS))]

    def png(image):
        stream = io.BytesIO()
        Image.fromarray(image).save(stream, "png")
        return {"bytes": stream.getvalue(), "path": None}

    cells = pa.array([png(image) for images in exact for image in images])
    info = json.loads((root / "meta/info.json").read_text())
    info["features"]["observation.images.corner"]["dtype"] = "image"
    edit_info(root, features=info["features"])
    return pq.read_table(root / DATA).append_column("observation.images.corner", cells), exact


def test_images_kept_in_parquet_come_back_exactly(copy):
    """PNG is lossless, so these frames must be equal; rows of several episodes share one row group here."""
    table, exact = with_stored_images(copy)
    pq.write_table(table, copy / DATA, row_group_size=7)
    dataset = Dataset.open(copy)
    for i, images in enumerate(exact):
        assert np.array_equal(dataset.frames(i, "corner"), images)


def test_stored_images_stay_with_their_actions_when_rows_are_out_of_order(copy):
    table, exact = with_stored_images(copy)
    pq.write_table(table.take(np.random.default_rng(0).permutation(len(table))), copy / DATA, row_group_size=7)
    dataset = Dataset.open(copy)
    for i, images in enumerate(exact):
        assert np.array_equal(dataset.frames(i, "corner"), images)
        assert np.array_equal(dataset.columns().action[dataset.episode_slice(i)], episode(i)[2])


def test_stored_images_of_episodes_that_do_not_follow_each_other_in_a_file(copy):
    """Episode 1 lies in a file of its own, so episode 2 comes right after episode 0."""
    table, exact = with_stored_images(copy)
    alone = np.asarray(table["episode_index"]) == 1
    pq.write_table(table.filter(pa.array(~alone)), copy / DATA)
    pq.write_table(table.filter(pa.array(alone)), copy / DATA.replace("file-000", "file-001"))
    edit_table(copy / EPISODES, "data/file_index", lambda files: [int(i == 1) for i, _ in enumerate(files)])
    dataset = Dataset.open(copy)
    for i, images in enumerate(exact):
        assert np.array_equal(dataset.frames(i, "corner"), images)
        assert np.array_equal(dataset.columns().action[dataset.episode_slice(i)], episode(i)[2])


def test_view_names_drop_the_prefix():
    assert view_name("observation.image") == "image"
    assert view_name("observation.images.top") == "top"
    assert view_name("observation.images.wrist.left") == "wrist.left"


def test_channel_first_declarations_are_understood(copy):
    info = json.loads((copy / "meta/info.json").read_text())
    info["features"]["observation.images.corner"] |= {"shape": [3, 32, 48], "names": ["channels", "height", "width"]}
    edit_info(copy, features=info["features"])
    assert Dataset.open(copy).frames(0, "corner").shape == (LENGTHS[0], 32, 48, 3)


def test_depth_maps_are_no_views(copy):
    info = json.loads((copy / "meta/info.json").read_text())
    info["features"]["observation.images.corner"]["info"]["is_depth_map"] = True
    edit_info(copy, features=info["features"])
    assert list(Dataset.open(copy).views) == ["image"]


def test_fingerprint_knows_content_not_place(pristine, copy):
    """Every byte of the tables counts; the folder's name and times do not."""
    assert Dataset.open(copy).fingerprint == Dataset.open(pristine).fingerprint
    table = pq.read_table(copy / "data/chunk-000/file-000.parquet")
    actions = table["action"].to_pylist()
    actions[7][1] += 1e-3
    changed = table.set_column(table.schema.names.index("action"), "action", pa.array(actions, table["action"].type))
    pq.write_table(changed, copy / "data/chunk-000/file-000.parquet")
    assert Dataset.open(copy).fingerprint != Dataset.open(pristine).fingerprint


def test_fingerprint_knows_a_changed_video(pristine, copy):
    video = next(copy.glob("videos/*image/*/*.mp4"))
    video.write_bytes(next(copy.glob("videos/*corner/*/*.mp4")).read_bytes())
    assert Dataset.open(copy).fingerprint != Dataset.open(pristine).fingerprint


def test_action_spec_is_kept_or_given(pristine):
    from dataclasses import replace

    assert Dataset.open(pristine).action_spec == SPEC
    tiny_spec = replace(SPEC, dimensions=(*SPEC.dimensions, replace(SPEC.dimensions[0], name="dz")))
    assert Dataset.open(TINY, action_spec=tiny_spec).action_spec == tiny_spec
    with pytest.raises(SpecError, match=r"have 4 numbers.*describes 3"):
        Dataset.open(TINY, action_spec=SPEC)
    with pytest.raises(SpecError, match=r"runs at 20 fps.*10 actions per second"):
        Dataset.open(TINY, action_spec=replace(tiny_spec, rate_hz=FPS / 2))
    with pytest.raises(SpecError, match="do not mean the same"):
        Dataset.open(pristine, action_spec=replace(SPEC, robot="another arm"))
