"""Data sets that other tools write or people edit: each reads, with a note where something is not as meta says, or is refused
with a cure that works."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.cases import build
from tests.data.toyset import FPS, LENGTHS, SPEC, TASKS, edit_info, edit_table, episode
from vlaflow.data.check import check
from vlaflow.data.edit import repair
from vlaflow.data.lerobot import Dataset
from vlaflow.data.reading import Reading
from vlaflow.data.video import encode_video
from vlaflow.errors import ConfigError, DataError, SpecError

LEROBOTS_OWN = Path(__file__).parents[2] / "fixtures/lerobot_v3_tiny"
CODEC = 12.0  # mean absolute error of the codec on these patterns, in levels; another frame differs by more than 20


def error(a, b):
    return np.abs(a.astype(int) - b).mean()


def notes_of(dataset):
    return " ".join((*dataset.notes, *dataset.row_notes))


def require_sound(dataset, episodes=(0, 1, 2, 3, 4)):
    """Rows and pictures of these episodes are the right ones."""
    columns = dataset.columns()
    for number in episodes:
        images, state, action = episode(number)
        rows = dataset.episode_slice(number)
        assert np.array_equal(columns.action[rows], action)
        assert np.array_equal(columns.state[rows], state)
        assert set(columns.episode[rows].tolist()) == {number}
        assert error(dataset.frames(number, "corner"), images["corner"]) < CODEC


# -- versions, numbers, instructions -------------------------------------------------------------------------------------


def test_v20_reads(old):
    edit_info(old, codebase_version="v2.0")
    require_sound(Dataset.open(old))


def test_episodes_removed_v21_keep_their_numbers(old):
    build.remove_episode_v21(old, 1)
    dataset = Dataset.open(old)
    assert dataset.numbers == (0, 2, 3, 4)
    assert "numbered up to 4 with gaps (1 missing, the first is 1)" in notes_of(dataset)
    require_sound(dataset, dataset.numbers)
    with pytest.raises(SpecError, match=r"no episode 1; it has 0 to 4, with gaps"):
        dataset.frames(1, "corner")


def test_empty_episode_v3_is_named_and_left_out(new):
    build.empty_episode(new, 1)
    dataset = Dataset.open(new)
    assert "Episode 1 has no frames and is left out" in notes_of(dataset)
    assert dataset.numbers == (0, 2, 3, 4)
    assert len(dataset) == sum(LENGTHS) - LENGTHS[1]
    require_sound(dataset, dataset.numbers)
    with pytest.raises(SpecError, match=r"no episode 1"):
        dataset.frames(1, "corner")


def test_only_empty_episodes_are_refused(new):
    edit_table(new / build.EPISODES, "length", lambda lengths: [0] * len(lengths))
    edit_info(new, total_frames=0)
    with pytest.raises(DataError, match=r"holds no episodes with frames"):
        Dataset.open(new)


def test_groot_annotation_has_its_instructions_in_the_rows(old):
    build.no_listed_tasks_v21(old)
    dataset = Dataset.open(old)
    assert [e.task for e in dataset.episodes] == list(TASKS)
    assert "gives no task to 5 of 5 episodes" in notes_of(dataset)
    require_sound(dataset)


def test_a_v3_set_without_tasks_of_an_episode_has_them_in_the_rows(new):
    edit_table(new / build.EPISODES, "tasks", lambda tasks: [t if i != 2 else [] for i, t in enumerate(tasks)])
    dataset = Dataset.open(new)
    assert dataset.episode(2).task == TASKS[2]
    assert "gives no task to 1 of 5 episodes (first 2)" in notes_of(dataset)


def test_a_task_that_the_table_lacks_gives_way_to_the_rows(new):
    edit_table(new / build.EPISODES, "tasks", lambda tasks: [t if i != 3 else ["juggle"] for i, t in enumerate(tasks)])
    dataset = Dataset.open(new)
    assert dataset.episode(3).task == TASKS[3]
    assert "gives 1 of 5 episodes (first 3) a task that meta/tasks.parquet lacks" in notes_of(dataset)


def test_an_episode_without_any_task_is_refused(new):
    edit_table(new / build.EPISODES, "tasks", lambda tasks: [t if i != 2 else [] for i, t in enumerate(tasks)])
    edit_table(new / build.DATA, "task_index", lambda tasks: [-1] * len(tasks))
    with pytest.raises(DataError, match=r"Episode 2 of .* has no task, and its rows' task_index names none either"):
        Dataset.open(new)


def test_subtasks_undeclared_count_frame_by_frame(new):
    """Row 14 is frame 2 of episode 1, in which a drawer is opened."""
    edit_table(new / build.DATA, "task_index", lambda tasks: [t if i != 14 else 0 for i, t in enumerate(tasks)])
    dataset = Dataset.open(new)
    assert dataset.columns().task[13:16].tolist() == [1, 0, 1]
    assert "1 frames have a task_index that meta does not list" in notes_of(dataset)
    assert "episode 1, frame 2: 'push the puck'" in notes_of(dataset)


def test_rows_in_another_file_than_meta_names_are_found(new):
    """Both where the named file is missing and where it holds other episodes."""
    table = pq.read_table(new / build.DATA)
    last = np.asarray(table["episode_index"]) == 4
    pq.write_table(table.filter(pa.array(last)), new / build.DATA.replace("file-000", "file-007"))
    pq.write_table(table.filter(pa.array(~last)), new / build.DATA)
    dataset = Dataset.open(new)
    assert "Rows of episode 4 are not in the file that meta names" in notes_of(dataset)
    require_sound(dataset)
    edit_table(new / build.EPISODES, "data/file_index", lambda files: [*files[:4], 3])
    dataset = Dataset.open(new)
    assert "Rows of episode 4 are not in the file that meta names" in notes_of(dataset)
    require_sound(dataset)


def test_a_file_of_its_own_says_which_episode_its_rows_are(old):
    """Tools that renumber episodes rename the files and leave the rows as they were."""
    edit_table(old / "data/chunk-000/episode_000003.parquet", "episode_index", lambda rows: [17] * len(rows))
    dataset = Dataset.open(old)
    require_sound(dataset)
    assert (
        "Rows of data/chunk-000/episode_000003.parquet say that they belong to episode 17; the file's number, 3, counts"
        in notes_of(dataset)
    )


# -- time ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", [False, True], ids=["hw_timestamps", "hw_timestamps_images"])
def test_wall_clock_timestamps_address_frames_by_number(new, stored):
    if stored:
        build.stored_images(new)
    build.clock(new, 0.003)
    dataset = Dataset.open(new)
    require_sound(dataset)
    assert "Timestamps are up to 3 ms away from frame_index / fps" in notes_of(dataset)
    assert not check(dataset).problems


def test_the_quarter_of_a_frame_and_the_option_beyond_it(new):
    build.clock(new, 0.24 / FPS)
    require_sound(Dataset.open(new))
    build.clock(new, 0.3 / FPS)
    with pytest.raises(
        DataError, match=r"'timestamp' .* by 12.5 ms or more.* give a larger --tolerance-s \(0\.0\d+ "
    ) as refused:
        Dataset.open(new).columns()
    enough = float(re.search(r"\((\S+) is enough\)", str(refused.value))[1])
    require_sound(Dataset.open(new, reading=Reading.of(tolerance_s=enough)))


def test_a_time_that_is_no_number_is_cured_by_repair_and_by_no_tolerance(new, tmp_path):
    edit_table(new / build.DATA, "timestamp", lambda times: [t if i != 14 else float("nan") for i, t in enumerate(times)])
    with pytest.raises(
        DataError, match=r"Episode 1 of .*'timestamp' is nan at frame 2.* no time.*vlaflow data repair"
    ) as refused:
        Dataset.open(new).columns()
    assert "tolerance" not in str(refused.value)
    require_sound(Dataset.open(repair(new, tmp_path / "out").root))


def test_a_stamp_of_a_neighbour_is_refused(new):
    edit_table(new / build.DATA, "timestamp", lambda times: [t if i != 14 else t + 1 / FPS for i, t in enumerate(times)])
    with pytest.raises(DataError, match=r"Episode 1 of .*'timestamp' is 0.15 at frame 2"):
        Dataset.open(new).columns()


def test_a_video_on_a_wall_clock_reads(old):
    """Frames a fraction of a frame off their place are still nearest to it."""
    path = old / f"videos/chunk-000/{build.TOP}/episode_000001.mp4"
    content = path.with_suffix(".old")
    shutil.move(path, content)
    with av.open(str(content)) as source, av.open(str(path), "w") as out:
        own = source.streams.video[0]
        stream = out.add_stream_from_template(own)
        for i, packet in enumerate(source.demux(own)):
            if packet.pts is not None:
                stray = int((0.0 if i == 0 else 0.004 * (-1) ** i) / own.time_base)
                packet.pts, packet.dts, packet.stream = packet.pts + stray, packet.dts + stray, stream
                out.mux(packet)
    content.unlink()
    require_sound(Dataset.open(old))


def test_pts_offset_is_refused_with_a_cure_that_works(old):
    path = build.late_video_v21(old, 1, 2)
    with pytest.raises(DataError, match=r"begins late: encode it again with its first frame at 0 s"):
        Dataset.open(old).frames(1, "corner")
    encode_video(episode(1)[0]["corner"], path, FPS)
    require_sound(Dataset.open(old))


# -- cameras -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(["c", "h", "w"], id="chw_cdim"),
        pytest.param([], id="chw_empty"),
        None,
        ["channels", "height", "width"],
        ["height", "width", "channel"],
    ],
)
def test_channel_first_however_it_is_named(new, names):
    build.feature(new, build.TOP, shape=[3, 32, 48], names=names)
    dataset = Dataset.open(new)
    assert dataset.image_size("corner") == (32, 48)
    require_sound(dataset)


@pytest.mark.parametrize(
    "names", [pytest.param([], id="names_empty_hwc"), None, ["h", "w", "c"], {"axes": ["height", "width", "channel"]}]
)
def test_channel_last_however_it_is_named(new, names):
    build.feature(new, build.TOP, names=names)
    require_sound(Dataset.open(new))


def test_lerobot_cnames_is_read_as_channel_first(tmp_path):
    root = shutil.copytree(LEROBOTS_OWN, tmp_path / "cnames")
    build.feature(root, "observation.images.top", shape=[3, 64, 64], names=["c", "h", "w"])
    images, right = (Dataset.open(folder).frames(1, "top") for folder in (root, LEROBOTS_OWN))
    assert np.array_equal(images, right)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (build.depth_png16, "observation.images.range"),
        (build.depth_png16_with_transparency, "observation.images.range"),
        (build.depth_video, build.TOP),
    ],
)
def test_depth_that_nothing_marks_is_left_out_with_a_note(new, change, key):
    change(new)
    dataset = Dataset.open(new)
    assert key not in dataset.views.values()
    assert re.search(
        f"'{key}' is not used as a camera: its pictures have one channel of more than eight bits", notes_of(dataset)
    )
    with pytest.raises(SpecError, match=rf"'{key}' of .* cannot be a view"):
        Dataset.open(new, reading=Reading.of(views=(f"depth={key}",)))


def test_a_depth_picture_among_colour_pictures_is_refused(new):
    build.stored_images(new)
    deep = build.png(np.full((32, 48), 900, np.uint16))
    edit_table(new / build.DATA, build.TOP, lambda cells: [c if i != 14 else deep for i, c in enumerate(cells)])
    with pytest.raises(DataError, match=r"Image 2 of '.*corner' in episode 1 of .* is not a colour picture"):
        Dataset.open(new).frames(1, "corner")


@pytest.mark.parametrize("change", [build.image_raw_uint8, build.image_raw_channel_first])
def test_pictures_as_nested_lists_are_a_camera(new, change):
    change(new)
    dataset = Dataset.open(new)
    assert np.array_equal(dataset.frames(2, "corner"), episode(2)[0]["corner"])


def test_pictures_as_bytes_alone_are_a_camera(new):
    build.column(new, build.TOP, [build.png(i)["bytes"] for i in build.pictures()], pa.binary(), dtype="image")
    assert np.array_equal(Dataset.open(new).frames(2, "corner"), episode(2)[0]["corner"])


def test_numbers_that_look_like_a_picture_are_not_read_and_noted(new):
    cells = [np.zeros((8, 8, 3)).tolist()] * build.ROWS
    build.column(new, "observation.heat", cells, pa.list_(pa.list_(pa.list_(pa.float32()))), dtype="float32", shape=[8, 8, 3])
    dataset = Dataset.open(new)
    assert "'observation.heat' has the shape of a picture" in notes_of(dataset)
    cells = [np.zeros((32, 48)).tolist()] * build.ROWS
    build.column(new, "observation.range", cells, pa.list_(pa.list_(pa.uint16())), dtype="uint16", shape=[32, 48])
    assert "'observation.range' has the shape of a picture, [32, 48], but holds 'uint16'" in notes_of(Dataset.open(new))
    require_sound(dataset)


def test_views_collide_and_both_are_kept(new):
    build.colliding_views(new)
    dataset = Dataset.open(new)
    assert dataset.views == {"image": "observation.image", "images.image": "observation.images.image"}
    assert "told apart by longer ones" in notes_of(dataset)
    for view, name in (("image", "image"), ("images.image", "corner")):
        assert error(dataset.frames(1, view), episode(1)[0][name]) < CODEC


# -- numbers -------------------------------------------------------------------------------------------------------------


def test_action_2d_is_flattened_with_names(new):
    values = build.action_2d(new)
    dataset = Dataset.open(new)
    assert np.array_equal(dataset.columns().action, values)
    assert dataset.dimension_names("action")[6:8] == ("arm 0 joint 6", "arm 1 joint 0")


def test_names_in_groups_and_lists_are_flattened(new):
    build.feature(new, "action", names={"left": ["x"], "right": ["x", "y"]})
    assert Dataset.open(new).dimension_names("action") == ("left x", "right x", "right y")
    build.feature(new, "action", names=[["a", "b"], ["c"]])
    assert Dataset.open(new).dimension_names("action") == ("a", "b", "c")
    build.feature(new, "action", names=["a", "a", "b"])
    assert Dataset.open(new).dimension_names("action") == ("a 0", "a 1", "b")


def test_shape_empty_is_one_number(new):
    build.column(new, "action", [i / 7 for i in range(build.ROWS)], pa.float32(), shape=[], names=["a0"])
    build.no_spec(new)
    dataset = Dataset.open(new)
    assert dataset.columns().action.shape == (build.ROWS, 1)
    assert np.array_equal(dataset.columns().action[:, 0], np.arange(build.ROWS, dtype=np.float32) / 7)
    assert dataset.dimension_names("action") == ("a0",)


def test_no_state_reads_as_width_zero(new):
    found = {key: value for key, value in build.features(new).items() if key != "observation.state"}
    edit_info(new, features=found)
    dataset = Dataset.open(new)
    assert dataset.columns().state.shape == (build.ROWS, 0)
    assert dataset.dimension_names("state") == ()


def test_feature_no_dtype_is_named(new):
    build.feature(new, build.TOP, dtype=None)
    with pytest.raises(DataError, match=r"The feature 'observation.images.corner' in .*info.json states no 'dtype'"):
        Dataset.open(new)
    build.feature(new, build.TOP, dtype="video")
    require_sound(Dataset.open(new))


@pytest.mark.parametrize("shape", [7, ["a"], None, [-1]])
def test_feature_of_no_shape_is_named(new, shape):
    build.feature(new, "action", shape=shape)
    with pytest.raises(DataError, match=r"The feature 'action' in .*info.json states the 'shape'"):
        Dataset.open(new)


# -- names that are not LeRobot's ----------------------------------------------------------------------------------------


def followed(refusal):
    """The reading that the options in a refusal ask for."""
    return Reading.of(re.findall(r"--key (\S+)", str(refusal)))


def test_openpi_keys_v21_read_when_told_and_the_refusal_says_how(old):
    build.renamed(old, action="actions", observation__state="state")
    with pytest.raises(DataError, match=r": --key action=actions --key state=state$") as refusal:
        Dataset.open(old)
    require_sound(Dataset.open(old, reading=followed(refusal.value)))


def test_split_columns_read_in_the_stated_order(new):
    values = build.split_columns(new)
    with pytest.raises(DataError, match=r"--key action=actions.joint.position,actions.effector --key state=") as refusal:
        Dataset.open(new)
    dataset = Dataset.open(new, reading=followed(refusal.value))
    assert np.array_equal(dataset.columns().action, values)
    assert dataset.columns().state.shape[1] == 2
    turned = Dataset.open(new, reading=Reading.of(("action=actions.effector,actions.joint",)))
    assert np.array_equal(turned.columns().action, values[:, [2, 0, 1]])


def test_without_anything_like_an_action_its_columns_are_listed(new):
    build.renamed(new, action="torque")
    with pytest.raises(DataError, match=r"--key action=COLUMN .* out of torque, observation.state|observation.state, torque"):
        Dataset.open(new)
    require_sound(Dataset.open(new, reading=Reading.of(("action=torque",))))


def test_a_state_of_another_name_is_noted(new):
    build.renamed(new, observation__state="observation.states")
    assert "--key state=observation.states" in notes_of(Dataset.open(new))


@pytest.mark.parametrize(
    ("keys", "views", "sentence"),
    [
        (("action",), (), "--key takes action=COLUMN"),
        (("velocity=a",), (), "--key takes action=COLUMN"),
        (("action=a", "action=b"), (), "given twice"),
        ((), ("=top",), "--view takes NAME=KEY"),
        ((), ("a/b=top",), "cannot be named 'a/b'"),
        ((), ("top=a", "top=b"), "Two views are named 'top'"),
    ],
)
def test_options_of_another_form_are_refused(keys, views, sentence):
    with pytest.raises(ConfigError, match=sentence):
        Reading.of(keys, views)


@pytest.mark.parametrize(
    ("keys", "views", "sentence", "kind"),
    [
        (("action=actoin",), (), "no column 'actoin'.*did you mean 'action'", DataError),
        (("state=observation",), (), "'observation' may be .* name them in order", DataError),
        (("action=action,action",), (), "twice", DataError),
        (("action=observation.images.corner",), (), "holds no numbers", DataError),
        (("state=timestamp",), (), "'timestamp' .* only tells where a row belongs.* Choose among ", DataError),
        ((), ("corn",), "has no view 'corn'; did you mean 'corner'", SpecError),
    ],
)
def test_columns_and_views_that_do_not_exist_are_refused(new, keys, views, sentence, kind):
    with pytest.raises(kind, match=sentence):
        Dataset.open(new, reading=Reading.of(keys, views))


def test_views_are_chosen_ordered_and_renamed(new):
    chosen = Dataset.open(new, reading=Reading.of(views=("front=observation.images.corner", "image")))
    assert list(chosen.views) == ["front", "image"]
    assert np.array_equal(chosen.frames(0, "front"), Dataset.open(new).frames(0, "corner"))
    alone = Dataset.open(new, reading=Reading.of(views=("corner",)))
    assert list(alone.views) == ["corner"]
    assert check(alone).frames == sum(LENGTHS)


def test_the_action_spec_of_one_column_is_not_that_of_another(new):
    """`--key action=COLUMN` chooses numbers that the data set's own spec does not describe, so another spec may be given."""
    joints = replace(SPEC, dimensions=SPEC.dimensions[:2])
    dataset = Dataset.open(new, joints, reading=Reading(action=("observation.state",)))
    assert dataset.action_spec == joints
    assert any("describes 3 numbers of 'action', not 'observation.state'; it is not used" in note for note in dataset.notes)
    assert Dataset.open(new, reading=Reading(action=("observation.state",))).action_spec is None
    with pytest.raises(SpecError, match="do not mean the same"):
        Dataset.open(new, joints)
