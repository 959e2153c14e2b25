"""Every kind of damage gives one sentence that names the place. Each test damages a good data set in one way."""

import json
import re
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.data.toyset import FPS, LENGTHS, cut_in_half, edit_info, edit_table, episode
from vlaflow.cli.main import main
from vlaflow.data.lerobot import Dataset
from vlaflow.data.lerobot_meta import missing_files
from vlaflow.data.reading import Reading
from vlaflow.data.video import encode_video
from vlaflow.errors import DataError, SpecError

DATA = "data/chunk-000/file-000.parquet"
EPISODES = "meta/episodes/chunk-000/file-000.parquet"
VIDEO = "videos/observation.images.corner/chunk-000/file-000.mp4"


def refused(pattern, call, *args, kind=DataError):
    """The call must raise one sentence of one line that matches."""
    with pytest.raises(kind) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    assert re.search(pattern, str(caught.value)), str(caught.value)


def feature(root, key, **changes):
    info = json.loads((root / "meta/info.json").read_text())
    info["features"][key] |= changes
    edit_info(root, features=info["features"])


def test_the_undamaged_data_set_is_accepted(copy):
    """Without this the tests below could pass for a reason of their own."""
    dataset = Dataset.open(copy)
    dataset.columns()
    assert [len(dataset.frames(i, "corner")) for i in range(5)] == list(LENGTHS)


def test_no_folder(tmp_path):
    refused("There is no folder .*nowhere", Dataset.open, tmp_path / "nowhere")


def test_folder_that_is_no_data_set(tmp_path):
    refused("not a LeRobot data set: meta/info.json is missing", Dataset.open, tmp_path)


def test_info_that_is_no_json(copy):
    cut_in_half(copy / "meta/info.json")
    refused(r"meta/info\.json is not valid JSON", Dataset.open, copy)


@pytest.mark.parametrize("key", ["fps", "features", "codebase_version"])
def test_info_without_a_key(copy, key):
    info = json.loads((copy / "meta/info.json").read_text())
    del info[key]
    (copy / "meta/info.json").write_text(json.dumps(info))
    refused(f"does not state '{key}'", Dataset.open, copy)


@pytest.mark.parametrize("version", ["v1.6", "v4.0"])
def test_unsupported_version(copy, version):
    edit_info(copy, codebase_version=version)
    refused(f"has format version {version}; vlaflow reads v2.0, v2.1, v3.0", Dataset.open, copy)


@pytest.mark.parametrize("path", ["meta/tasks.parquet", EPISODES])
def test_meta_parquet_cut_in_half(copy, path):
    cut_in_half(copy / path)
    refused(f"{path} is damaged or cut off", Dataset.open, copy)


def test_data_parquet_cut_in_half(copy):
    cut_in_half(copy / DATA)
    refused(f"{DATA} is damaged or cut off", Dataset.open(copy).columns)


def test_data_parquet_without_a_column(copy):
    table = pq.read_table(copy / DATA).drop_columns(["action"])
    pq.write_table(table, copy / DATA)
    refused(f"{DATA} has no column 'action'", Dataset.open(copy).columns)


@pytest.mark.parametrize("path", [DATA, VIDEO])
def test_missing_file(copy, path):
    (copy / path).unlink()
    refused(f"Episode 0 of .*copy needs {path}, which is missing", Dataset.open, copy)


def test_a_camera_that_is_not_used_needs_no_files(copy):
    """As when only some cameras were downloaded; the error says which can be used."""
    whole = Dataset.open(copy, reading=Reading.of(views=("image",)))
    before = (whole.fingerprint, whole.frames(0, "image"))
    (copy / VIDEO).unlink()
    refused(r"needs .*corner.*, which is missing\. .*files are all here: --view image$", Dataset.open, copy)
    refused(f"needs {VIDEO}, which is missing", lambda: Dataset.open(copy, reading=Reading.of(views=("corner",))))
    partial = Dataset.open(copy, reading=Reading.of(views=("image",)))
    assert list(partial.views) == ["image"]
    assert np.array_equal(partial.frames(0, "image"), before[1])
    assert partial.fingerprint == Dataset.open(copy, reading=Reading.of(views=("image",))).fingerprint != before[0]


def test_missing_episode_file_of_the_older_layout(pristine_v21, tmp_path):
    root = shutil.copytree(pristine_v21, tmp_path / "old")
    (root / "data/chunk-000/episode_000003.parquet").unlink()
    refused("Episode 3 of .*episode_000003.parquet, which is missing", Dataset.open, root)


def test_all_missing_videos_are_told_at_once_and_the_cure_works(pristine_v21, tmp_path):
    """A copy that broke off lacks many; told one at a time, each would have to be cured to learn of the next."""
    root = shutil.copytree(pristine_v21, tmp_path / "old")
    lost = [root / f"videos/chunk-000/observation.images.corner/episode_00000{n}.mp4" for n in (0, 1, 2, 4)]
    for path in lost:
        path.unlink()
    refused(
        r"^Episode 0 of .*old needs videos/\S*_000000\.mp4, which is missing\. So are \S*_000001\.mp4, \S*_000002\.mp4 and "
        r"\S*_000004\.mp4; 4 episodes need these files\. Copy them again, or leave these episodes out: "
        r"vlaflow data drop .*old --episodes 0-2 4 --out DIR\. To use only .*: --view image$",
        *(Dataset.open, root),
    )
    assert main(["data", "drop", str(root), "--episodes", "0-2", "4", "--out", str(tmp_path / "fewer")]) == 0
    assert [each.length for each in Dataset.open(tmp_path / "fewer").episodes] == [LENGTHS[3]]


def test_missing_videos_of_several_cameras_are_told_together(pristine_v21, tmp_path):
    root = shutil.copytree(pristine_v21, tmp_path / "old")
    for view, number in (("images.corner", 1), ("image", 1), ("image", 3)):
        (root / f"videos/chunk-000/observation.{view}/episode_00000{number}.mp4").unlink()
    refused(r"So are .*; 2 episodes need these files\. .*--episodes 1 3 --out DIR$", Dataset.open, root)


def test_all_missing_data_files_are_told_at_once(pristine_v21, tmp_path):
    root = shutil.copytree(pristine_v21, tmp_path / "old")
    for number in (1, 3):
        (root / f"data/chunk-000/episode_00000{number}.parquet").unlink()
    refused(r"Episode 1 .*_000001\.parquet, which is missing\. So is \S*3\.parquet; .*--episodes 1 3 ", Dataset.open, root)


def test_a_list_of_missing_files_stays_readable(tmp_path):
    """Every other episode of many, of which no span can be made."""
    sentence = missing_files(tmp_path, [(n, tmp_path / f"{n:03}.mp4") for n in range(0, 900, 2)], 900)
    assert "So are 002.mp4, 004.mp4, 006.mp4 and 446 more; 450 episodes" in sentence
    assert sentence.endswith(f"leave these episodes out: vlaflow data repair {tmp_path} --out DIR")


def test_a_missing_file_that_every_episode_needs_can_only_be_copied(copy):
    (copy / VIDEO).unlink()
    refused(r"missing\. All 5 episodes need it\. Copy it again\. To use only", Dataset.open, copy)


def test_missing_episode_table(copy):
    shutil.rmtree(copy / "meta/episodes")
    refused("meta/episodes holds no parquet", Dataset.open, copy)


def test_fewer_episodes_than_counted(copy):
    edit_info(copy, total_episodes=7)
    refused(r"counts 7 episodes but .* describes 5", Dataset.open, copy)


@pytest.mark.parametrize("key", ["data_path", "video_path"])
@pytest.mark.parametrize("path", ["/etc/hostname", "../other/file.parquet", "data/../../file.parquet"])
def test_path_that_leads_out_of_the_folder(copy, key, path):
    edit_info(copy, **{key: path})
    refused(f"'{key}' in meta/info.json of .* leads out of the data set", Dataset.open, copy)


@pytest.mark.parametrize("key", ["data_path", "video_path"])
@pytest.mark.parametrize("path", ["{chunk}.x", "{0}.x", "{chunk_index:q}.x", "{chunk_index", 7])
def test_path_that_cannot_be_filled_in(copy, key, path):
    edit_info(copy, **{key: path})
    refused(f"meta/info.json of .* states '{key}' = .*cannot be filled in.*chunk_index, file_index", Dataset.open, copy)


def test_path_that_leads_out_of_the_older_layout(pristine_v21, tmp_path):
    root = shutil.copytree(pristine_v21, tmp_path / "copy")
    edit_info(root, data_path="../{episode_index}.parquet")
    refused("'data_path' in meta/info.json of .* leads out of the data set", Dataset.open, root)


@pytest.mark.parametrize("path", ["/etc/hostname", "../image.png"])
def test_stored_image_outside_the_folder(copy, path):
    Image.fromarray(np.zeros((32, 48, 3), np.uint8)).save(copy.parent / "image.png")
    table = pq.read_table(copy / DATA)
    cells = pa.array([{"bytes": None, "path": path}] * len(table), pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    pq.write_table(table.append_column("observation.images.corner", cells), copy / DATA)
    feature(copy, "observation.images.corner", dtype="image")
    refused("The path of image 0 of .*corner' in episode 1 of .* leads out", Dataset.open(copy).frames, 1, "corner")


def test_episode_without_a_task(copy):
    """Neither in meta nor in its rows; rows that name one are believed (cases/test_reading.py)."""
    edit_table(copy / EPISODES, "tasks", lambda tasks: [t if i != 2 else [] for i, t in enumerate(tasks)])
    edit_table(copy / DATA, "task_index", lambda tasks: [9] * len(tasks))
    refused("Episode 2 of .* has no task, and its rows", Dataset.open, copy)


def test_episode_with_an_unknown_task(copy):
    edit_table(copy / EPISODES, "tasks", lambda tasks: [t if i != 3 else ["juggle"] for i, t in enumerate(tasks)])
    edit_table(copy / DATA, "task_index", lambda tasks: [9] * len(tasks))
    refused(r"Episode 3 of .* names the task 'juggle'.*tasks\.parquet", Dataset.open, copy)


def test_row_with_an_unknown_task(copy):
    edit_table(copy / DATA, "task_index", lambda tasks: [t if i != 14 else 9 for i, t in enumerate(tasks)])
    refused(f"Episode 1 of .*'task_index' is 9 at frame 2 .*{DATA}", Dataset.open(copy).columns)


def test_an_episode_may_have_several_tasks(copy):
    """Its own is the first, and a row may have any of them."""
    edit_table(copy / EPISODES, "tasks", lambda tasks: [[*t, "push the puck"] if i == 1 else t for i, t in enumerate(tasks)])
    edit_table(copy / DATA, "task_index", lambda tasks: [t if i != 14 else 0 for i, t in enumerate(tasks)])
    dataset = Dataset.open(copy)
    assert dataset.episodes[1].task == "open the drawer"
    assert dataset.columns().task[13:16].tolist() == [1, 0, 1]


@pytest.mark.parametrize(("key", "value", "name"), [("action", np.nan, "gripper"), ("observation.state", -np.inf, "y")])
def test_value_that_is_not_finite(copy, key, value, name):
    """Row 24 is frame 3 of episode 2; the last dimension of either vector is spoilt."""

    def spoil(rows):
        rows[24][-1] = value
        return rows

    edit_table(copy / DATA, key, spoil)
    refused(
        f"Episode 2 of .* holds {value} in '{key}' at frame 3, dimension . \\('{name}'\\) .*{DATA}", Dataset.open(copy).columns
    )


def test_vector_of_another_length_than_declared(copy):
    feature(copy, "action", shape=[4])
    edit_info(copy, x_vlaflow={})
    refused(f"Episode 0 of .*'action' holds 3 numbers at frame 0 .*{DATA}.* declares 4", Dataset.open(copy).columns)


def test_one_vector_of_another_length(copy):
    table = pq.read_table(copy / DATA)
    rows = table["action"].to_pylist()
    rows[22] = rows[22][:2]
    column = pa.array(rows, pa.list_(pa.float32()))
    pq.write_table(table.set_column(table.schema.names.index("action"), "action", column), copy / DATA)
    refused(f"Episode 2 of .*'action' holds 2 numbers at frame 1 .*{DATA}", Dataset.open(copy).columns)


def test_action_spec_of_another_length_than_the_action(copy):
    feature(copy, "action", shape=[4])
    refused("actions of .*copy have 4 numbers, but its action spec describes 3", Dataset.open, copy, kind=SpecError)


def test_rows_missing_from_an_episode(copy):
    table = pq.read_table(copy / DATA)
    pq.write_table(pa.concat_tables([table.slice(0, 15), table.slice(16)]), copy / DATA)
    refused(f"Episode 1 of .* has 9 frames according to meta, but {DATA} holds 8 rows", Dataset.open(copy).columns)


def test_frame_counted_twice(copy):
    edit_table(copy / DATA, "frame_index", lambda frames: [f if i != 5 else 4 for i, f in enumerate(frames)])
    refused(f"Episode 0 of .*'frame_index' is 4 at frame 5 .*{DATA}", Dataset.open(copy).columns)


def test_timestamps_that_disagree_with_fps(copy):
    edit_info(copy, fps=30, x_vlaflow={})
    refused(f"Episode 0 of .*'timestamp' is 0.05 at frame 1 .*{DATA}.*fps = 30", Dataset.open(copy).columns)


def test_video_that_disagrees_with_fps(copy):
    edit_info(copy, fps=30, x_vlaflow={})
    refused(f"Episode 1 of .*{VIDEO}.* runs at 20 fps, .*fps = 30", Dataset.open(copy).frames, 1, "corner")


def test_video_cut_in_half(copy):
    cut_in_half(copy / VIDEO)
    refused(f"Episode 0 of .*{VIDEO}.* cannot be decoded after 0 of 12 frames", Dataset.open(copy).frames, 0, "corner")


def test_video_with_fewer_frames_than_actions(copy):
    """The file ends three frames into episode 2: the first two episodes are whole, the third is refused."""
    frames = np.concatenate([episode(i)[0]["corner"] for i in range(3)])[: 12 + 9 + 3]
    encode_video(frames, copy / VIDEO, FPS)
    dataset = Dataset.open(copy)
    assert len(dataset.frames(1, "corner")) == 9
    refused(f"Episode 2 of .* has 15 actions but video '.*corner' holds 3 frames of it .*{VIDEO}", dataset.frames, 2, "corner")


def test_video_with_a_frame_left_out_in_the_middle(copy):
    """The times of the frames after the gap are a twentieth of a second late, the count of frames alone would not tell."""
    import av

    source = copy / "gap.mp4"
    (copy / VIDEO).rename(source)
    with av.open(str(source)) as old, av.open(str(copy / VIDEO), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for i, packet in enumerate(old.demux(old.streams.video[0])):
            if packet.dts is not None and i != 17:  # GOP 2: frame 5 of episode 1 depends on frame 4 alone
                packet.stream = stream
                new.mux(packet)
    refused("Episode 1 of .*frame 5 is at .*frames are missing", Dataset.open(copy).frames, 1, "corner")


def test_video_of_another_size_than_declared(copy):
    feature(copy, "observation.images.corner", shape=[32, 64, 3])
    refused("Episode 0 of .*frame 0 of 'observation.images.corner' is 32x48.*32x64", Dataset.open(copy).frames, 0, "corner")


def test_view_that_does_not_exist(copy):
    refused("no view 'korner'; did you mean 'corner'", Dataset.open(copy).frames, 0, "korner", kind=SpecError)


def test_episode_that_does_not_exist(copy):
    refused("no episode 5; it has 0 to 4", Dataset.open(copy).frames, 5, "corner", kind=SpecError)
    refused("no episode -1", Dataset.open(copy).episode_slice, -1, kind=SpecError)
