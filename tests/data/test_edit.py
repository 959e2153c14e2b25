"""Repairing, dropping, merging and renaming: what must come out the same, and what a repaired data set must be."""

import json
import re
import shutil

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.cases import build
from tests.data.toyset import FPS, LENGTHS, cut_in_half, edit_info, edit_table, episode, files_of, full_disk
from vlaflow.cli.main import main
from vlaflow.data.check import check
from vlaflow.data.edit import drop, merge, rename, repair
from vlaflow.data.edit_survey import survey
from vlaflow.data.edit_video import read_timeline
from vlaflow.data.edit_write import CHANGES
from vlaflow.data.lerobot import Dataset
from vlaflow.data.video import ENCODER
from vlaflow.errors import ConfigError, DataError, SpecError

VIDEO = f"videos/{build.TOP}/chunk-000/file-000.mp4"
START = f"videos/{build.TOP}/from_timestamp"


@pytest.fixture
def new(pristine, tmp_path):
    """A good v3.0 data set to change."""
    return shutil.copytree(pristine, tmp_path / "new")


@pytest.fixture
def old(pristine_v21, tmp_path):
    """A good v2.1 data set to change."""
    return shutil.copytree(pristine_v21, tmp_path / "old")


def rows(root):
    return pa.concat_tables([pq.read_table(path) for path in sorted((root / "data").rglob("*.parquet"))]).to_pydict()


def content(root):
    """All files but the log, and tables as their values: a type of list is named differently once it has been read."""
    files = {path: data for path, data in files_of(root).items() if path != CHANGES and not path.startswith("data/")}
    return files, rows(root)


def assert_sound(root):
    findings = check(Dataset.open(root))
    assert findings.problems == ()
    assert not [remark for remark in findings.remarks if "episode" in remark.lower()]
    assert json.loads((root / "meta/info.json").read_text())["codebase_version"] == "v3.0"


# -- nothing is lost or altered ----------------------------------------------------------------------------------------


def test_repairing_a_sound_data_set_changes_nothing_and_says_so(pristine, tmp_path):
    edited = repair(pristine, tmp_path / "out")
    assert edited.changes == ()
    assert content(tmp_path / "out") == content(pristine)
    assert (tmp_path / "out" / CHANGES).read_text() == "Nothing was changed.\n"


@pytest.mark.parametrize("cut", [1, 3])
def test_what_is_dropped_and_merged_again_is_the_original(pristine, tmp_path, cut):
    everything = range(len(LENGTHS))
    drop(pristine, everything[cut:], tmp_path / "first")
    drop(pristine, everything[:cut], tmp_path / "second")
    merge([tmp_path / "first", tmp_path / "second"], tmp_path / "both")
    assert content(tmp_path / "both") == content(pristine)
    assert_sound(tmp_path / "first")
    assert_sound(tmp_path / "second")


def test_renaming_there_and_back_is_the_original(pristine, tmp_path):
    names = {"observation.state": "observation.joints"}
    rename(pristine, tmp_path / "there", names, {"corner": "front"})
    there = Dataset.open(tmp_path / "there")
    assert set(there.views) == {"image", "front"}
    assert np.array_equal(there.frames(2, "front"), Dataset.open(pristine).frames(2, "corner"))
    rename(tmp_path / "there", tmp_path / "back", {"observation.joints": "observation.state"}, {"front": "corner"})
    assert content(tmp_path / "back") == content(pristine)


def test_the_source_is_not_touched(new, tmp_path):
    before = files_of(new)
    drop(new, [2], tmp_path / "out")
    assert files_of(new) == before


def test_an_older_format_is_written_as_the_current_one(pristine_v21, tmp_path):
    edited = repair(pristine_v21, tmp_path / "out")
    assert [change for change in edited.changes if "episode" in change.lower()] == []
    assert_sound(tmp_path / "out")
    assert_kept(pristine_v21, tmp_path / "out", range(len(LENGTHS)))


# -- each kind of damage -----------------------------------------------------------------------------------------------


def offsets(root, change):
    edit_table(root / build.EPISODES, START, lambda times: [change(t) for t in times])


def empty_and_drifting(root):
    """An empty episode, wall-clock times, and offsets that are off by a fraction of a millisecond."""
    build.clock(root, 0.003)
    build.empty_episode(root, 1)
    offsets(root, lambda t: t + 2e-4)


def no_episode_table(root):
    shutil.rmtree(root / "meta/episodes")


def wrong_meta(root):
    """Totals, statistics, tasks and pointers of the meta folder are not those of the rows."""
    edit_info(root, total_episodes=99, total_frames=1)
    (root / "meta/stats.json").write_text("{")
    edit_table(root / build.EPISODES, "tasks", lambda tasks: [["nobody has said this"] for _ in tasks])
    (root / build.DATA).rename(root / "data/chunk-000/file-007.parquet")


def not_finite(root):
    """A NaN in episode 2."""
    row = sum(LENGTHS[:2]) + 3
    edit_table(root / build.DATA, "action", lambda v: [[np.nan] * 3 if i == row else a for i, a in enumerate(v)])


def missing_row(root, number):
    """An episode lacks a row in the middle."""
    table = pq.read_table(root / build.DATA)
    gone = sum(LENGTHS[:number]) + 3
    pq.write_table(table.filter(pa.array(np.arange(len(table)) != gone)), root / build.DATA)


def broken_rows(root):
    not_finite(root)
    missing_row(root, 4)


def unknown_index(root):
    """Rows name tasks that the table lacks; meta lists one per episode."""
    edit_table(root / build.DATA, "task_index", lambda v: [i + 7 for i in v])


def video_v21(root, number):
    return root / f"videos/chunk-000/{build.TOP}/episode_{number:06d}.mp4"


def late_and_removed(root):
    """A removed episode, tasks that only the rows know, and a video that begins late."""
    build.remove_episode_v21(root, 1)
    build.no_listed_tasks_v21(root)
    build.late_video_v21(root, 2, 2)


def broken_videos(root):
    """One is damaged, one is missing, one has fewer frames than there are rows."""
    cut_in_half(video_v21(root, 0))
    video_v21(root, 2).unlink()
    shutil.copy(video_v21(root, 1), video_v21(root, 3))


NEW, OLD = "new", "old"
CASES = {
    empty_and_drifting: (
        NEW,
        {1},
        [
            "Episode 1 of .* has no frames",
            "Timestamps of 4 episodes are set to frame_index / fps; they were up to 3 ms away",
            "Episodes begin up to 0.2 ms away from a frame of",
        ],
    ),
    wrong_meta: (
        NEW,
        set(),
        [
            "total_episodes = 99, but there are 5",
            "meta/stats.json was missing, damaged",
            "The episode table lists other tasks for episode 0, 1, 2 and 2 more",
            "Rows of episode 0, 1, 2 and 2 more are not in the file that meta names",
        ],
    ),
    broken_rows: (
        NEW,
        {2, 4},
        [
            "Episode 2 of .* 'action' holds numbers that are missing or not finite",
            "Episode 4 of .* frame_index does not count 0, 1, 2",
            "Episode 3 of .* is now episode 2",
        ],
    ),
    no_episode_table: (NEW, set(), ["The episode table is written again", "placed by counting the frames"]),
    unknown_index: (NEW, set(), ["they get the one of the episode table"]),
    late_and_removed: (
        OLD,
        {1},
        [
            "Episodes 2 to 4 of .* are now episodes 1 to 3",
            "The episode table lists other tasks",
            "shown from 0.1000 s to 0.8000 s; they are taken by number",
        ],
    ),
    broken_videos: (
        OLD,
        {0, 2, 3},
        ["Episode 0 of .* needs the video", "Episode 2 of .* is missing", "Episode 3 of .* has 10 rows but 9 frames"],
    ),
}


@pytest.mark.parametrize("damage", CASES)
def test_a_repaired_data_set_holds_what_is_whole_and_passes_the_check(request, pristine, tmp_path, damage):
    """The frames of both formats are the same, so every one is compared with the good data set of v3.0."""
    made, lost, said = CASES[damage]
    root = request.getfixturevalue(made)
    damage(root)
    edited = repair(root, tmp_path / "out")
    assert_sound(tmp_path / "out")
    assert_kept(pristine, tmp_path / "out", [number for number in range(len(LENGTHS)) if number not in lost])
    log = (tmp_path / "out" / CHANGES).read_text()
    assert log.splitlines() == list(edited.changes)
    for words in said:
        assert re.search(words, log), log


def assert_kept(before, after, kept):
    """The second data set holds these episodes of the first one."""
    one, other = Dataset.open(before), Dataset.open(after)
    assert len(other.episodes) == len(kept)
    for place, number in enumerate(kept):
        assert np.array_equal(one.frames(number, "corner"), other.frames(place, "corner"))
        assert np.array_equal(
            one.columns().action[one.episode_slice(number)], other.columns().action[other.episode_slice(place)]
        )
        assert one.episode(number).task == other.episode(place).task


@pytest.mark.parametrize("change", [lambda t: t + 1 / FPS, lambda _: 0.0], ids=["a frame late", "all 0"])
def test_offsets_that_the_video_contradicts_are_counted_from_its_frames(new, change):
    """They are right in the file, whose frames are as many as the rows; no frame needs to be decoded to see it."""
    offsets(new, change)
    found = survey(new)
    assert [clip.first for clip in (one.clips[build.TOP] for one in found.episodes)] == [0, 12, 21, 36, 46]
    assert found.problems == {}
    assert "placed by counting the frames" in "".join(found.changes)


def test_frames_that_no_row_belongs_to_are_left_out(old, tmp_path):
    """Rows belong to the first frames, as every reader takes it."""
    shutil.copy(video_v21(old, 0), video_v21(old, 3))
    assert "has 12 frames for 10 rows; the last 2 are left out" in "".join(repair(old, tmp_path / "out").changes)
    assert_sound(tmp_path / "out")
    after = Dataset.open(tmp_path / "out")
    assert np.array_equal(after.frames(3, "corner"), after.frames(0, "corner")[:10])


def test_offsets_that_the_frames_cannot_correct_are_not_guessed(new):
    """With an episode's rows gone the counts leave open which frames are whose."""
    build.empty_episode(new, 1)
    offsets(new, lambda t: t + 1 / FPS if t else t)
    found = survey(new)
    assert [one.number for one in found.episodes] == [0]
    assert "the number of frames there does not say where it is" in found.problems[2]


def test_an_episode_in_two_files_is_the_one_that_meta_names_or_none(new):
    """A file that was left behind holds it once more; rows that only together are an episode are not taken for one."""
    table = pq.read_table(new / build.DATA)
    first = table.filter(pa.array(np.asarray(table["episode_index"]) == 0))
    pq.write_table(first, new / "data/chunk-000/file-001.parquet")
    pq.write_table(table.slice(0, 0), new / "data/chunk-000/file-002.parquet")
    found = survey(new)
    assert [len(one.places) for one in found.episodes] == list(LENGTHS)
    assert found.episodes[0].path == new / build.DATA
    assert "Episode 0 is in data/chunk-000/file-000.parquet and data/chunk-000/file-001.parquet" in found.changes[0]
    pq.write_table(pa.concat_tables([table.slice(0, 5), table.slice(LENGTHS[0])]), new / build.DATA)
    pq.write_table(first.slice(5), new / "data/chunk-000/file-001.parquet")
    assert "has rows in several files" in survey(new).problems[0]


@pytest.mark.parametrize("camera", [False, True])
def test_nothing_whole_is_refused_with_the_reason_and_leaves_nothing(new, tmp_path, camera):
    if camera:
        (new / VIDEO).unlink()
    else:
        edit_table(new / build.DATA, "action", lambda v: [[np.nan] * 3 for _ in v])
    with pytest.raises(DataError, match=r"no episode.* is whole\. Episode 0 of"):
        repair(new, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


# -- videos ------------------------------------------------------------------------------------------------------------


def encode(path, images, **options):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={**ENCODER, **options})
        stream.height, stream.width, stream.pix_fmt = images.shape[1], images.shape[2], "yuv420p"
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))


def test_frames_with_b_frames_are_copied_and_not_encoded_again(old, tmp_path):
    """Such packets are not in the order in which they are shown."""
    for i in range(len(LENGTHS)):
        encode(path := video_v21(old, i), episode(i)[0]["corner"], bf="3", g="250", tune="film", b_adapt="0")
    assert not np.array_equal(read_timeline(path).decoded, np.arange(LENGTHS[-1]))
    repair(old, tmp_path / "out")
    assert_sound(tmp_path / "out")
    drop(tmp_path / "out", [0, 2], tmp_path / "fewer")
    assert_sound(tmp_path / "fewer")
    before, after, fewer = (Dataset.open(root) for root in (old, tmp_path / "out", tmp_path / "fewer"))
    for number in range(len(LENGTHS)):
        assert np.array_equal(before.frames(number, "corner"), after.frames(number, "corner"))
    for place, number in enumerate((1, 3, 4)):
        assert np.array_equal(before.frames(number, "corner"), fewer.frames(place, "corner"))


def test_an_episode_that_begins_between_key_frames_is_encoded_again(new, tmp_path):
    """One encoding over all episodes has a single key frame, so only the first can be copied; the others are close."""
    encode(new / VIDEO, np.concatenate([episode(i)[0]["corner"] for i in range(len(LENGTHS))]), g="250")
    drop(new, [1], tmp_path / "out")
    assert_sound(tmp_path / "out")
    before, after = Dataset.open(new), Dataset.open(tmp_path / "out")
    assert np.array_equal(before.frames(0, "corner"), after.frames(0, "corner"))
    for place, number in ((1, 2), (3, 4)):
        off = before.frames(number, "corner").astype(int) - after.frames(place, "corner")
        assert np.abs(off).mean() < 4  # crf 12 once more


def test_images_in_the_rows_are_kept_and_counted(new, tmp_path):
    build.stored_images(new)
    drop(new, [1], tmp_path / "out")
    assert_sound(tmp_path / "out")
    before, after = Dataset.open(new), Dataset.open(tmp_path / "out")
    assert np.array_equal(before.frames(2, "corner"), after.frames(1, "corner"))
    stats = json.loads((tmp_path / "out/meta/stats.json").read_text())[build.TOP]
    pixels = np.concatenate([before.frames(n, "corner") for n in (0, 2, 3, 4)]) / 255
    assert np.allclose(np.ravel(stats["mean"]), pixels.mean((0, 1, 2)))


def test_other_columns_may_have_gaps_which_statistics_skip(new, tmp_path):
    values = [float("nan") if i % 2 else float(i) for i in range(build.ROWS)]
    build.column(new, "next.reward", values, pa.float32(), dtype="float32", shape=[], names=None)
    drop(new, [0], tmp_path / "out")
    after = [value for value in rows(tmp_path / "out")["next.reward"] if value == value]
    assert after == [value for value in values[LENGTHS[0] :] if value == value]
    stats = json.loads((tmp_path / "out/meta/stats.json").read_text())["next.reward"]
    assert stats["mean"] == [np.mean(after)]
    assert stats["count"] == [len(after)]
    assert build.features(tmp_path / "out")["next.reward"]["shape"] == [1]  # LeRobot refuses []


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_a_full_disk_is_one_sentence_and_leaves_nothing(pristine, tmp_path):
    with full_disk(), pytest.raises(DataError, match=r"^The data set could not be written to .*; nothing of it was kept"):
        repair(pristine, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_while_encoding_leaves_no_episode_out(new, tmp_path):
    encode(new / VIDEO, np.concatenate([episode(i)[0]["corner"] for i in range(len(LENGTHS))]), g="250")
    with full_disk(), pytest.raises(DataError, match="could not be written"):
        repair(new, tmp_path / "out")


def test_editing_refuses_what_it_cannot_do(pristine, pristine_v21, new, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(SpecError, match="has no episode 9; it has 5, from 0 to 4"):
        drop(pristine, [1, 9], out)
    with pytest.raises(SpecError, match="All 5 episodes"):
        drop(pristine, range(5), out)
    with pytest.raises(SpecError, match="at least two"):
        merge([pristine], out)
    with pytest.raises(SpecError, match="has no camera 'cornr'; did you mean 'corner'"):
        rename(pristine, out, {}, {"cornr": "front"})
    with pytest.raises(SpecError, match=r"Two columns of .* would be named 'observation\.images\.corner'"):
        rename(pristine, out, {}, {"image": "corner"})
    with pytest.raises(SpecError, match="'task_index' cannot be renamed"):
        rename(pristine, out, {"task_index": "task"}, {})
    with pytest.raises(SpecError, match="would have no column 'action'"):
        rename(pristine, out, {"action": "actions"}, {})
    with pytest.raises(ConfigError, match="lies within"):
        repair(new, new / "inner")
    with pytest.raises(DataError, match="exists already and is not empty"):
        repair(pristine, new)
    edit_info(new, fps=2 * FPS)
    edit_table(new / build.DATA, "timestamp", lambda times: [t / 2 for t in times])
    with pytest.raises(SpecError, match=r"cannot be merged: fps is 20\.0 in one and 40\.0 in the other"):
        merge([pristine, new], out)
    edit_info(new, fps=FPS, x_vlaflow={})
    with pytest.raises(SpecError, match="their action specs differ"):
        merge([pristine, new], out)
    rename(pristine, tmp_path / "named", {}, {"corner": "front"})
    with pytest.raises(SpecError, match=r"only .* has 'observation\.images\.corner'"):
        merge([pristine, tmp_path / "named"], out)
    assert not out.exists()


def test_a_broken_episode_is_in_the_way_unless_it_is_dropped(new, tmp_path):
    not_finite(new)
    missing_row(new, 2)
    with pytest.raises(DataError, match=r"Episode 2 of .*Repair the data set first: vlaflow data repair"):
        drop(new, [0], tmp_path / "out")
    drop(new, [2], tmp_path / "out")
    assert_sound(tmp_path / "out")


def test_the_commands_print_what_they_changed(pristine, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(pristine, "toy")

    def said(*arguments):
        status = main(["data", *arguments])
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    assert "Nothing had to be repaired.\nWritten: same (5 episodes, 54 frames)" in said("repair", "toy", "--out", "same")[1]
    status, words = said("drop", "toy", "--episodes", "0", "2-3", "--out", "fewer")
    assert status == 0
    assert "Episode 0 of toy is left out.\nEpisodes 2 to 3 of toy are left out.\nEpisode 1 of toy is now episode 0.\n" in words
    assert "Written: more (7 episodes" in said("merge", "toy", "fewer", "--out", "more")[1]
    named = said("rename", "toy", "--camera", "corner=front", "--out", "named")[1]
    assert "'observation.images.corner' is now 'observation.images.front'." in named
    assert said("drop", "toy", "--episodes", "3-1", "--out", "x")[0] == 2
    assert "takes OLD=NEW" in said("rename", "toy", "--column", "action", "--out", "x")[1]
