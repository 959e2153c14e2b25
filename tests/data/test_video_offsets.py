"""Where episodes lie in the videos of a v3.0 data set: wrong places are refused, rounding is not."""

import shutil

import av
import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.data.test_dataset_damage import EPISODES, VIDEO, refused
from tests.data.toyset import FPS, LENGTHS, edit_info, edit_table
from vlaflow.data.check import check
from vlaflow.data.lerobot import Dataset

KEY = "videos/observation.images.corner"
FRAME = 1 / FPS


def move(root, change, *ends):
    for end in ends:
        edit_table(root / EPISODES, f"{KEY}/{end}", change)


def only(place, value):
    """Change one episode's time."""
    return lambda times: [value if i == place else t for i, t in enumerate(times)]


@pytest.mark.parametrize("end", ["from_timestamp", "to_timestamp"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), -1.0])
def test_a_time_that_is_none_is_refused(copy, end, value):
    move(copy, only(3, value), end)
    refused(f"Episode 3 of .*copy: '{KEY}/{end}' is {value}; .*meta/episodes", Dataset.open, copy)


@pytest.mark.parametrize("ends", [("from_timestamp",), ("from_timestamp", "to_timestamp")])
@pytest.mark.parametrize("frames", [1, -1])
def test_a_place_one_frame_off_is_refused(copy, ends, frames):
    """It would give every image of the episode to the action before or after."""
    move(copy, lambda times: [t + (i == 3) * frames * FRAME for i, t in enumerate(times)], *ends)
    refused(rf"Episodes? .*3 .*corner' \({VIDEO}\).*meta", Dataset.open, copy)


def test_the_place_of_another_episode_is_refused(copy):
    move(copy, lambda times: [*times[:3], times[0], *times[4:]], "from_timestamp")
    refused(rf"Episodes 0 and 3 of .*copy overlap in video .*\({VIDEO}\)", Dataset.open, copy)
    refused(f"write it again from rows and videos: vlaflow data repair {copy} --out DIR$", Dataset.open, copy)


def test_all_places_but_the_first_one_frame_early_are_refused(copy):
    move(copy, lambda times: [max(0.0, t - FRAME) for t in times], "from_timestamp")
    refused("Episodes 0 and 1 of .*copy overlap", Dataset.open, copy)


def test_less_room_than_frames_is_refused(copy):
    """The last episode has no neighbour to run into."""
    move(copy, lambda times: [*times[:4], times[4] + 2 * FRAME], "from_timestamp")
    refused(rf"Episode 4 of .* has 8 frames \(0.4000 s .* gives it 0.3000 s .*\({VIDEO}\)", Dataset.open, copy)


@pytest.mark.parametrize(("shift", "found"), [(0.4, "has no frame there; the next one"), (1000 * FPS, "ends at 2.7000 s")])
def test_a_place_without_a_frame_is_refused_when_it_is_decoded(copy, shift, found):
    move(copy, lambda times: [*times[:4], times[4] + shift * FRAME], "from_timestamp", "to_timestamp")
    refused(rf"Episode 4 of .*\({VIDEO}\), which {found}.*from_timestamp", Dataset.open(copy).frames, 4, "corner")
    assert len(check(Dataset.open(copy)).problems) == 1


@pytest.mark.parametrize("drift_s", [pytest.param(0.0002, id="ts_drift_0p2ms"), -0.0002, 0.009, -0.009])
def test_summed_rounding_gives_the_nearest_frames_and_a_note(pristine, copy, drift_s):
    """Recorders that sum up rounded durations are off by fractions of a millisecond per episode."""
    move(copy, lambda times: [t if i == 0 else t + i / 4 * drift_s for i, t in enumerate(times)], "from_timestamp")
    sound, drifted = Dataset.open(pristine), Dataset.open(copy)
    for i in range(len(LENGTHS)):
        assert np.array_equal(drifted.frames(i, "corner"), sound.frames(i, "corner"))
    found = check(drifted)
    assert not found.problems
    assert f"up to {abs(drift_s) * 1000:.2g} ms away from a frame" in " ".join(found.remarks)
    assert "away from a frame" not in " ".join(check(sound).remarks)


def test_room_to_spare_is_allowed(copy):
    """A video may hold more frames than its episode has rows; ``check`` reports those."""
    move(copy, lambda times: [t if i != 1 else t + 0.6 * FRAME for i, t in enumerate(times)], "to_timestamp")
    assert len(Dataset.open(copy).frames(1, "corner")) == LENGTHS[1]


def test_a_table_without_ends_is_read(copy):
    table = pq.read_table(copy / EPISODES).drop_columns([f"{KEY}/to_timestamp"])
    pq.write_table(table, copy / EPISODES)
    assert len(Dataset.open(copy).frames(4, "corner")) == LENGTHS[4]


def test_episodes_of_the_older_layout_do_not_share_a_video(pristine_v21, tmp_path):
    """A template without the episode's number would give all of them the images of one."""
    root = shutil.copytree(pristine_v21, tmp_path / "old")
    edit_info(root, video_path="videos/chunk-000/{video_key}/episode_000000.mp4")
    refused("Episodes 0 and 1 of .*overlap.*'video_path' in meta/info.json", Dataset.open, root)


def test_a_video_that_begins_late_is_refused(pristine_v21, tmp_path):
    root = shutil.copytree(pristine_v21, tmp_path / "old")
    path = root / "videos/chunk-000/observation.images.corner/episode_000001.mp4"
    with av.open(str(path)) as source, av.open(str(tmp_path / "late.mp4"), "w") as late:
        own = source.streams.video[0]
        stream = late.add_stream_from_template(own)
        for packet in source.demux(own):
            if packet.pts is not None:
                packet.pts, packet.dts, packet.stream = packet.pts + 2 * 512, packet.dts + 2 * 512, stream
                late.mux(packet)
    shutil.move(tmp_path / "late.mp4", path)
    refused("Episode 1 of .*begins late", Dataset.open(root).frames, 1, "corner")
