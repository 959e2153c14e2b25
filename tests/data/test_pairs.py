"""Frame pairs against a loop over episodes; what is too short or has no video is said, not padded."""

import json

import numpy as np
import pytest
import torch

from tests.data.toyset import FPS, LENGTHS, TASKS, edit_info, without_actions
from vlaflow.data.frames import FrameCache
from vlaflow.data.lerobot import Dataset
from vlaflow.data.pairs import EARLIER, LATER, FramePairs, chosen_view, gap_in_frames, pair_table
from vlaflow.data.reading import Reading
from vlaflow.errors import ConfigError, DataError


@pytest.fixture
def cached(pristine, tmp_path, monkeypatch):
    monkeypatch.setenv("VLAFLOW_CACHE", str(tmp_path / "cache"))
    dataset = Dataset.open(pristine)
    return dataset, FrameCache.open(dataset, 16, ["image"])


@pytest.mark.parametrize("gap", [1, 4, 9])
def test_pairs_equal_a_loop_over_episodes(cached, gap):
    """Every frame that has another one so much later in its own episode, and no other."""
    dataset, cache = cached
    pairs = FramePairs(dataset, cache, "image", gap / FPS)
    batch = pairs.batch(np.arange(len(pairs)))
    images, columns, sample = cache.gather(np.arange(len(dataset)))["image"], dataset.columns(), 0
    for episode, length in enumerate(LENGTHS):
        first = dataset.episodes[episode].start
        for frame in range(length - gap):
            row = first + frame
            assert torch.equal(batch.observation.images[EARLIER][sample], images[row])
            assert torch.equal(batch.observation.images[LATER][sample], images[row + gap])
            assert np.array_equal(batch.action_BLD[sample].numpy(), columns.action[row : row + gap])
            assert (int(batch.episode_B[sample]), int(batch.frame_B[sample])) == (episode, frame)
            assert batch.observation.instructions[sample] == TASKS[episode]
            sample += 1
    assert sample == len(pairs)
    assert batch.valid_BL.all()


def test_episodes_that_are_too_short_are_named_and_counted(cached):
    pairs = FramePairs(*cached, "image", 9 / FPS)  # the lengths are 12, 9, 15, 10, 8
    assert pairs.short == (1, 4)
    assert pairs.left_out().startswith("2 of 5 episodes are not longer than the gap of 0.45 s (9 frames)")
    assert f"give {len(pairs)} pairs" in pairs.left_out()
    assert FramePairs(*cached, "image", 1 / FPS).left_out() == ""


def test_a_gap_longer_than_every_episode_is_refused(cached):
    with pytest.raises(DataError, match=r"No episode of .* longer than the gap of 1 s \(20 frames .*longest has 15 frames"):
        FramePairs(*cached, "image", 1.0)
    with pytest.raises(DataError, match="the longest has 9 frames"):
        FramePairs(*cached, "image", 0.5, episodes=[1, 4])


def test_a_data_set_without_video_or_without_the_view_is_refused(copy):
    features = json.loads((copy / "meta/info.json").read_text())["features"]
    with pytest.raises(DataError, match="no view 'imagge'; did you mean 'image'"):
        chosen_view(Dataset.open(copy), "imagge")
    assert chosen_view(Dataset.open(copy), None) == "image"
    edit_info(copy, features={key: f for key, f in features.items() if f["dtype"] != "video"})
    with pytest.raises(DataError, match="has no camera, but frame pairs need video"):
        chosen_view(Dataset.open(copy), None)


@pytest.mark.parametrize(("gap_s", "rate", "frames"), [(1.0, 80, 80), (0.2, 80, 16), (1.0, 29.97, 30), (0.1, 15, 2)])
def test_seconds_become_the_nearest_number_of_frames(gap_s, rate, frames):
    assert gap_in_frames(gap_s, rate) == frames


def test_a_gap_of_less_than_a_frame_is_refused():
    with pytest.raises(ConfigError, match=r"A gap of 0\.01 s is less than one frame at 20 frames per second"):
        gap_in_frames(0.01, 20)


def test_video_alone_is_enough(copy, tmp_path, monkeypatch):
    without_actions(copy)
    monkeypatch.setenv("VLAFLOW_CACHE", str(tmp_path / "cache"))
    dataset = Dataset.open(copy, video=True)
    pairs = FramePairs(dataset, FrameCache.open(dataset, 16, ["image"]), "image", 0.1)
    batch = pairs.batch(np.arange(3))
    assert batch.action_BLD.shape == (3, 2, 0)
    assert batch.observation.state_BS.shape == (3, 0)
    assert dataset.dimension_names("action") == ()


def test_who_wants_actions_is_still_told_that_there_are_none(copy):
    without_actions(copy)
    with pytest.raises(DataError, match="has no feature 'action'"):
        Dataset.open(copy)


def brightness(calls):
    def encode(earlier, later):
        calls.append(len(earlier))
        return torch.stack((earlier.float().mean((1, 2, 3)), later.float().mean((1, 2, 3))), 1).long()

    return encode


def test_a_table_holds_every_pair_once_and_is_computed_once(cached):
    pairs, calls = FramePairs(*cached, "image", 9 / FPS), []
    value_NK = pair_table(pairs, brightness(calls), "mean", batch_size=4)
    wanted_NK = np.full((sum(LENGTHS), 2), -1)
    wanted_NK[pairs.rows] = brightness([])(*pairs.frames(np.arange(len(pairs)))).numpy()
    assert np.array_equal(value_NK, wanted_NK)
    assert value_NK.dtype == np.int64
    assert sum(calls) == len(pairs)
    assert np.array_equal(pair_table(pairs, brightness(calls), "mean"), wanted_NK)
    assert sum(calls) == len(pairs)
    pair_table(pairs, brightness(calls), "another model")
    pair_table(FramePairs(*cached, "image", 1 / FPS), brightness(calls), "mean")
    assert sum(calls) > 3 * len(pairs)
    part = FramePairs(*cached, "image", 9 / FPS, episodes=[0])
    assert (pair_table(part, brightness(calls), "mean")[:, 0] >= 0).sum() == len(part) < len(pairs)


def test_a_view_that_is_now_another_camera_has_a_table_of_its_own(pristine, cached):
    """It was a camera's name before, and names the other one now: the table of the first would be the second's."""
    tables = []
    for key in ("observation.image", "observation.images.corner"):
        dataset = Dataset.open(pristine, reading=Reading.of(views=(f"front={key}",)))
        pairs = FramePairs(dataset, FrameCache.open(dataset, 16), "front", 9 / FPS)
        tables.append(pair_table(pairs, brightness([]), "mean"))
    assert not np.array_equal(*tables)


def test_a_damaged_table_is_one_sentence(cached, tmp_path):
    pairs = FramePairs(*cached, "image", 9 / FPS)
    pair_table(pairs, brightness([]), "mean")
    (file,) = (tmp_path / "cache").glob("codes-*.safetensors")
    file.write_bytes(b"half")
    with pytest.raises(DataError, match=f"The table {file} cannot be read or written .*Delete it"):
        pair_table(pairs, brightness([]), "mean")


def test_a_table_that_fails_half_way_leaves_nothing(cached, tmp_path):
    def broken(earlier, later):
        raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        pair_table(FramePairs(*cached, "image", 9 / FPS), broken, "mean")
    assert not list((tmp_path / "cache").glob("codes-*"))
