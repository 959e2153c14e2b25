"""Statistics of pictures when episodes are copied: those of all frames, and no frame decoded where they are known."""

import json
import shutil

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.cases import build
from tests.data.test_hashes import flip
from tests.data.toyset import LENGTHS, cut_in_half, edit_table, episode
from vlaflow.data import writer_meta as meta
from vlaflow.data.check import check
from vlaflow.data.edit import drop, merge, rename, repair
from vlaflow.data.edit_stats import EPISODES_STATS, combined, sound_stats
from vlaflow.data.edit_video import Clip, read_timeline
from vlaflow.data.hashes import HASHES, stored_hashes
from vlaflow.data.lerobot import Dataset
from vlaflow.data.pixel_counts import PIXEL_COUNTS, stored_counts
from vlaflow.data.stats import QUANTILES
from vlaflow.errors import DataError

MOMENTS = ("min", "max", "mean", "std")
ROUNDING = 1e-9
"""Sums of different order, of numbers up to 1."""
VIDEO = f"videos/{build.TOP}/chunk-000/file-000.mp4"


@pytest.fixture
def undecoded(monkeypatch):
    """Episodes whose frames are decoded are counted, and there should be none."""
    really, decoded = Clip.segment, []

    def segment(self, scratch, fps):
        decoded.append(self.first)
        return really(self, scratch, fps)

    monkeypatch.setattr(Clip, "segment", segment)
    return decoded


def by_others(root):
    """As a recorder leaves it that stores neither counts nor hashes."""
    (root / PIXEL_COUNTS).unlink()
    (root / HASHES).unlink()
    return root


def stated(root, key=build.TOP):
    return json.loads((root / "meta/stats.json").read_text())[key]


def same(one, other, names=MOMENTS):
    return all(np.allclose(one[name], other[name], rtol=0, atol=ROUNDING) for name in names) and one["count"] == other["count"]


def edit_stat(root, name, change):
    """Replace a statistic of the corner's camera by ``change(number of the episode, value)``."""
    column = f"stats/{build.TOP}/{name}"
    edit_table(root / build.EPISODES, column, lambda cells: [change(i, cell) for i, cell in enumerate(cells)])


counts = st.lists(st.integers(0, 50), min_size=6, max_size=6)


@settings(max_examples=60)
@given(st.lists(st.tuples(counts, st.integers(1, 9)), min_size=1, max_size=5))
def test_statistics_of_the_parts_are_put_together_to_those_of_the_whole(parts):
    """Any episodes, of any length: what was counted in all of them has the moments that their moments give."""
    levels = np.array([0, 1, 77, 128, 200, 255])
    histograms = []
    for numbers, frames in parts:
        histogram = np.zeros((3, 256), np.int64)
        for channel in range(3):
            histogram[channel, levels] = np.roll(numbers, channel)
            histogram[channel, 9] += 1  # an episode has pixels
        histograms.append(histogram * frames)
    # The weight of an episode is the number of its pixels, of which every frame has as many.
    pixels = [int(histogram[0].sum()) for histogram in histograms]
    each = [meta.image_stats(histogram, n) for histogram, n in zip(histograms, pixels, strict=True)]
    whole, found = meta.image_stats(sum(histograms), sum(pixels)), combined(each)
    assert same(found, whole)
    ordered = [np.ravel(found[name]) for name in ("min", *QUANTILES, "max")]
    assert (np.diff(ordered, axis=0) >= -ROUNDING).all()


@pytest.mark.parametrize("other", [False, True])
def test_no_frame_is_decoded_where_statistics_are_known(pristine, tmp_path, undecoded, other):
    """Neither of a data set with counts, whose statistics are exact, nor of one with LeRobot's statistics of each episode."""
    root = shutil.copytree(pristine, tmp_path / "root")
    if other:
        by_others(root)
    merge([root, root], tmp_path / "twice")
    drop(tmp_path / "twice", range(5, 10), tmp_path / "once")
    rename(tmp_path / "once", tmp_path / "named", {}, {"corner": "front"})
    assert undecoded == []
    assert same(
        stated(tmp_path / "named", "observation.images.front"), stated(pristine), (*MOMENTS, *(() if other else QUANTILES))
    )
    assert stated_of_episodes(tmp_path / "named", "observation.images.front") == stated_of_episodes(pristine, build.TOP)
    assert {*stored_hashes(tmp_path / "named")} == (set() if other else {"observation.image", "observation.images.front"})
    assert check(Dataset.open(tmp_path / "named"), deep=True).problems == ()


def stated_of_episodes(root, key):
    table = pq.read_table(root / build.EPISODES)
    return [table[f"stats/{key}/{name}"].to_pylist() for name in (*MOMENTS, *QUANTILES, "count")]


def test_what_a_recorder_of_v21_states_of_its_episodes_is_put_together(pristine, pristine_v21, tmp_path, undecoded):
    """An episode without statistics is decoded; quantiles that no line has are not made up."""
    root = shutil.copytree(pristine_v21, tmp_path / "old")
    table = pq.read_table(pristine / build.EPISODES).to_pylist()
    keys = ("observation.image", build.TOP)
    lines = [
        {
            "episode_index": row["episode_index"],
            "stats": {key: {name: row[f"stats/{key}/{name}"] for name in (*MOMENTS, "count")} for key in keys},
        }
        for row in table
        if row["episode_index"] != 3
    ]
    (root / EPISODES_STATS).write_text("\n".join(map(json.dumps, lines)))
    drop(root, [0], tmp_path / "out")
    assert len(undecoded) == 2  # episode 3, two cameras
    drop(pristine, [0], tmp_path / "known")
    assert same(stated(tmp_path / "out"), stated(tmp_path / "known"))
    assert {*stated(tmp_path / "out")} == {*MOMENTS, "count"}
    assert f"stats/{build.TOP}/q01" not in pq.read_table(tmp_path / "out" / build.EPISODES).column_names
    assert check(Dataset.open(tmp_path / "out"), deep=True).problems == ()


WRONG = {
    "a mean outside its range": ("mean", lambda _: [[[1.5]], [[0.5]], [[0.5]]]),
    "a deviation that the range does not allow": ("std", lambda _: [[[0.9]], [[0.1]], [[0.1]]]),
    "bytes instead of shares": ("max", lambda v: (255 * np.array(v)).tolist()),
    "not a number": ("std", lambda _: [[[float("nan")]], [[0.1]], [[0.1]]]),
    "one channel": ("min", lambda v: v[:1]),
    "more frames than there are": ("count", lambda v: [32 * 48 * v[0]]),
    "quantiles out of order": ("q10", lambda _: [[[1.0]], [[1.0]], [[1.0]]]),
}


@pytest.mark.parametrize("what", WRONG)
def test_statistics_that_cannot_be_true_are_computed_from_the_frames(pristine, tmp_path, undecoded, what):
    root = by_others(shutil.copytree(pristine, tmp_path / "root"))
    name, change = WRONG[what]
    edit_stat(root, name, lambda number, value: change(value) if number == 2 else value)
    edited = drop(root, [4], tmp_path / "out")
    drop(pristine, [4], tmp_path / "known")
    assert len(undecoded) == 1
    assert any(f"Statistics of '{build.TOP}' of episode 2 of {root} cannot be those of pictures" in s for s in edited.changes)
    assert same(stated(tmp_path / "out"), stated(tmp_path / "known"))


def test_what_others_compute_in_float32_is_taken_as_it_is():
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3, 8, 8)).astype(np.float32) / 255
    found = {name: getattr(pixels, name)((0, 2, 3)).tolist() for name in MOMENTS} | {"count": [4]}
    assert sound_stats(found, 4) is not None
    even = {name: [0.7] * 3 for name in ("min", "max", "mean")} | {"std": [3e-8] * 3, "count": [4]}
    assert sound_stats(even, 4) is not None
    assert sound_stats({**found, "count": []}, 4) is None
    assert sound_stats("none", 4) is None


def test_counts_and_hashes_that_are_damaged_are_computed_again(pristine, tmp_path):
    for number, name in enumerate((PIXEL_COUNTS, HASHES)):
        root = shutil.copytree(pristine, tmp_path / f"root{number}")
        if name == HASHES:
            cut_in_half(root / name)
        else:
            flip(root / name, (root / name).stat().st_size // 3)
            with pytest.raises(DataError, match="damaged or cut off"):
                stored_counts(root)
        edited = drop(root, [0], tmp_path / f"out{number}")
        assert f"What is stored about the frames of {root} is computed again from the frames" in " ".join(edited.changes)
        drop(pristine, [0], tmp_path / f"known{number}")
        assert stored_hashes(tmp_path / f"out{number}") == stored_hashes(tmp_path / f"known{number}")
        assert stated(tmp_path / f"out{number}") == stated(tmp_path / f"known{number}")


def test_counts_of_other_frames_are_not_used(pristine, tmp_path, undecoded):
    """As where somebody has exchanged a file of videos by that of a data set with longer episodes."""
    root = shutil.copytree(pristine, tmp_path / "root")
    table = pq.read_table(root / PIXEL_COUNTS)
    for key in table.column_names:
        cells = np.array(table[key].to_pylist(), np.int64)
        cells[1] *= 2
        kind = pa.list_(pa.int64(), 768)
        column = pa.FixedSizeListArray.from_arrays(pa.array(cells.reshape(-1)), type=kind)
        table = table.set_column(table.column_names.index(key), key, column)
    pq.write_table(table, root / PIXEL_COUNTS)
    drop(root, [0], tmp_path / "out")
    drop(pristine, [0], tmp_path / "known")
    assert same(stated(tmp_path / "out"), stated(tmp_path / "known"))
    assert undecoded == []  # the statistics of the episode are stated as well


def test_a_flipped_bit_is_still_noticed_after_an_edit_and_not_repaired_into_the_data_set(pristine, tmp_path):
    """The hash is that of the frames as they were written, not that of those which happen to be there."""
    root = shutil.copytree(pristine, tmp_path / "root")
    whole = (root / VIDEO).read_bytes()
    for place in range(len(whole) // 2, len(whole), 37):
        flip(root / VIDEO, place)
        damaged = check(Dataset.open(root), deep=True).problems
        if damaged and "are not those that were written" in damaged[0]:
            break
        (root / VIDEO).write_bytes(whole)
    number = int(damaged[0].split()[1])
    drop(root, [0], tmp_path / "fewer")
    assert "are not those that were written" in check(Dataset.open(tmp_path / "fewer"), deep=True).problems[0]
    edited = repair(root, tmp_path / "whole")
    assert f"Episode {number} of {root} cannot be copied: its frames of '{build.TOP}'" in " ".join(edited.changes)
    assert check(Dataset.open(tmp_path / "whole"), deep=True).problems == ()
    assert len(Dataset.open(tmp_path / "whole").episodes) < len(LENGTHS)
    (root / HASHES).unlink()
    assert repair(root, tmp_path / "all").episodes == len(LENGTHS)


def test_rows_that_are_fewer_than_meta_states_have_the_statistics_of_their_own_frames(pristine, tmp_path):
    """Rows count. What is stored about the frames of the episode is about others too."""
    root = shutil.copytree(pristine, tmp_path / "root")
    table = pq.read_table(root / build.DATA)
    pq.write_table(table.filter(pa.array(np.arange(len(table)) != sum(LENGTHS[:3]) - 1)), root / build.DATA)
    for edited, name in ((repair(root, tmp_path / "whole"), "whole"), (drop(root, [0], tmp_path / "fewer"), "fewer")):
        dataset = Dataset.open(tmp_path / name)
        number = 2 if name == "whole" else 1
        assert dataset.episode(number).length == LENGTHS[2] - 1, edited.changes
        pixels = dataset.frames(number, "corner") / 255
        mean = pq.read_table(tmp_path / name / build.EPISODES)[f"stats/{build.TOP}/mean"].to_pylist()[number]
        assert np.allclose(np.ravel(mean), pixels.mean((0, 1, 2)))
        assert check(dataset, deep=True).problems == ()


def test_an_episode_that_was_cut_has_the_statistics_of_what_is_left(pristine, tmp_path):
    """Its rows and its length in meta; its frames, their hash and statistics are still those of the whole."""
    root = shutil.copytree(pristine, tmp_path / "root")
    pq.write_table(pq.read_table(root / build.DATA).slice(0, build.ROWS - 2), root / build.DATA)
    edit_table(root / build.EPISODES, "length", lambda lengths: [*lengths[:-1], lengths[-1] - 2])
    edited = drop(root, [0], tmp_path / "out")
    assert not any("cannot be those of pictures" in sentence for sentence in edited.changes)
    dataset = Dataset.open(tmp_path / "out")
    assert check(dataset, deep=True).problems == ()
    pixels = np.concatenate([dataset.frames(number, "corner") for number in dataset.numbers]) / 255
    assert np.allclose(np.ravel(stated(tmp_path / "out")["mean"]), pixels.mean((0, 1, 2)))


def test_a_data_set_without_hashes_gets_them_where_the_other_one_has_some(pristine, tmp_path):
    """Nothing that could be noticed before goes unnoticed afterwards."""
    other = by_others(shutil.copytree(pristine, tmp_path / "other"))
    merge([pristine, other], tmp_path / "both")
    hashes = stored_hashes(pristine)
    assert stored_hashes(tmp_path / "both") == {key: (*each, *each) for key, each in hashes.items()}


def test_a_frame_in_which_a_file_was_cut_off_is_none(tmp_path):
    """The index of such a file lies at its beginning, so that it opens."""
    with av.open(str(tmp_path / "cut.mp4"), "w", options={"movflags": "faststart"}) as out:
        stream = out.add_stream("libx264", rate=20, options={"g": "2", "bf": "0"})
        images = episode(0)[0]["corner"]
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        for image in images:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        out.mux(stream.encode(None))
    whole = (tmp_path / "cut.mp4").read_bytes()
    assert len(read_timeline(tmp_path / "cut.mp4").shown) == len(images)
    (tmp_path / "cut.mp4").write_bytes(whole[:-10])
    assert len(read_timeline(tmp_path / "cut.mp4").shown) == len(images) - 1
