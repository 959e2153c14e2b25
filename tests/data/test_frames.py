import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from tests.data.toyset import LENGTHS, VIEWS, cut_in_half, edit_info
from vlaflow.data.frames import FrameCache, building
from vlaflow.data.lerobot import Dataset
from vlaflow.data.reading import Reading
from vlaflow.data.resize import resize
from vlaflow.errors import DataError, SpecError

ROWS = sum(LENGTHS)


def total(cache):
    """Sum of all values of one view."""
    return int(cache.gather(np.arange(len(cache)))["corner"].sum())


def decoded(dataset, view):
    return np.concatenate([dataset.frames(i, view) for i in range(5)])


def test_cache_at_native_size_holds_the_decoded_frames(dataset):
    cache = FrameCache.open(dataset)
    assert (len(cache), cache.shapes) == (ROWS, VIEWS)
    assert cache.nbytes >= ROWS * (32 * 32 + 32 * 48) * 3
    for view in VIEWS:
        assert np.array_equal(cache.gather(np.arange(ROWS))[view].numpy(), decoded(dataset, view))


def test_a_view_that_is_now_another_camera_has_a_cache_of_its_own(copy):
    """Also at the same size. `--view NAME=COLUMN` says which camera a name means, and may say another one the next time."""
    for key in ("observation.image", "observation.images.corner"):
        opened = Dataset.open(copy, reading=Reading.of(views=(f"front={key}",)))
        first = FrameCache.open(opened, 16).gather(np.array([0]))["front"][0].numpy()
        assert np.array_equal(first, resize(opened.frames(0, "front")[0], 16))


def test_gather_picks_any_rows_in_any_order(dataset):
    rows = np.array([53, 0, 17, 17, 30])
    images = FrameCache.open(dataset).gather(rows)
    assert list(images) == list(VIEWS)
    for view, batch in images.items():
        assert batch.dtype == torch.uint8
        assert np.array_equal(batch.numpy(), decoded(dataset, view)[rows])


def test_gather_hands_out_copies(dataset):
    cache = FrameCache.open(dataset)
    cache.gather(np.array([3]))["image"].zero_()
    assert cache.gather(np.array([3]))["image"].any()


@pytest.mark.parametrize("rows", [[-1], [ROWS]])
def test_rows_outside_are_refused(dataset, rows):
    with pytest.raises(IndexError, match=r"0 \.\. 53"):
        FrameCache.open(dataset).gather(np.array(rows))


def test_resizing_averages_areas():
    """Whole factors have a closed form: the mean of each block, rounded once along each direction, so at most 0.5 twice."""
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    blocks = image.reshape(8, 4, 8, 4, 3).astype(float).mean((1, 3))
    error = np.abs(resize(image, 8) - blocks)
    assert error.max() <= 1
    assert error.mean() < 0.4


def test_resizing_to_the_same_size_is_the_same_image():
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    assert resize(image, 32) is image


def test_resizing_keeps_the_shape_of_things():
    """32x48 in 24x24 is 16x24 between bars of four rows."""
    small = resize(np.full((32, 48, 3), 200, np.uint8), 24)
    assert (small[4:20] == 200).all()
    assert not small[:4].any()
    assert not small[20:].any()


def test_cache_at_another_size_holds_resized_frames(dataset):
    cache = FrameCache.open(dataset, size=16, views=["corner"])
    wanted = np.stack([resize(image, 16) for image in decoded(dataset, "corner")])
    assert cache.shapes == {"corner": (16, 16)}
    assert np.array_equal(cache.gather(np.arange(ROWS))["corner"].numpy(), wanted)


def test_cache_is_built_once(dataset):
    """Told from the calls of ``progress``: five episodes the first time, none the second."""
    calls = []
    FrameCache.open(dataset, size=16, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(i, 5) for i in range(1, 6)]
    FrameCache.open(dataset, size=16, progress=lambda done, total: calls.append((done, total)))
    FrameCache.open(Dataset.open(dataset.root), size=16, progress=lambda done, total: calls.append((done, total)))
    assert len(calls) == 5


def test_changed_data_gets_a_new_cache(dataset):
    first = FrameCache.open(dataset, size=16)
    info = json.loads((dataset.root / "meta/info.json").read_text())
    edit_info(dataset.root, robot_type=info["robot_type"] + " two")
    assert FrameCache.open(Dataset.open(dataset.root), size=16).folder != first.folder


def test_size_and_views_get_their_own_cache(dataset):
    folders = {FrameCache.open(dataset, size, views).folder for size in (16, 24) for views in (None, ["image"], ["corner"])}
    assert len(folders) == 6


def test_cache_may_live_elsewhere(dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("VLAFLOW_CACHE", str(tmp_path / "elsewhere"))
    assert FrameCache.open(dataset, 16).folder.parent == tmp_path / "elsewhere"
    assert not (dataset.root / ".cache").exists()


def test_damaged_video_leaves_no_cache(copy):
    cut_in_half(next(copy.glob("videos/*corner/*/*.mp4")))
    with pytest.raises(DataError, match=r"Episode \d of .*corner.* cannot be decoded"):
        FrameCache.open(Dataset.open(copy))
    assert [p.name for p in (copy / ".cache").iterdir() if not p.name.endswith(".lock")] == []


def test_unknown_view_and_size_are_refused(dataset):
    with pytest.raises(SpecError, match="did you mean 'corner'"):
        FrameCache.open(dataset, views=["corne"])
    with pytest.raises(SpecError, match="at least one pixel"):
        FrameCache.open(dataset, size=0)


def test_full_disk_is_said_beforehand(dataset, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("usage", (), {"free": 1000}))
    with pytest.raises(DataError, match=r"needs 0\.0 GB.*VLAFLOW_CACHE"):
        FrameCache.open(dataset)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up_meanwhile_is_the_same_sentence(dataset, monkeypatch, number):
    def full(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match=r"needs 0\.0 GB.*VLAFLOW_CACHE"):
        FrameCache.open(dataset)
    assert not list((dataset.root / ".cache").glob("*frames*/*"))


def test_a_cache_folder_that_is_a_file_is_one_sentence(dataset, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for place in ("file", "file/deeper"):
        monkeypatch.setenv("VLAFLOW_CACHE", str(tmp_path / place))
        with pytest.raises(DataError, match=r"cannot be written to .*file.*\. Set VLAFLOW_CACHE to a writable folder"):
            FrameCache.open(dataset)


def test_a_read_only_disk_is_one_sentence(dataset, monkeypatch):
    def refused(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(type(dataset.root), "mkdir", refused)
    with pytest.raises(DataError, match=r"cannot be written to .*Read-only file system.*VLAFLOW_CACHE"):
        FrameCache.open(dataset)


def test_a_lock_that_cannot_be_opened_is_one_sentence(tmp_path):
    (tmp_path / ".cache.lock").mkdir()
    refused = pytest.raises(DataError, match=r"The frame cache cannot be written to .* \(Is a directory\)")
    with refused, building(tmp_path, tmp_path / "cache"):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS])
def test_a_disk_without_locks_is_a_warning(dataset, monkeypatch, caplog, number):
    def refused(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refused)
    assert len(FrameCache.open(dataset, size=16)) == ROWS
    assert "cannot be locked" in caplog.text


BUILDER = """
import sys, time, os, signal
from pathlib import Path
from tests.data.test_frames import total
from vlaflow.data.lerobot import Dataset
from vlaflow.data.reading import Reading
from vlaflow.data.frames import FrameCache

root, ready, go, fate = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
calls = []

def progress(done, total):
    calls.append(done)
    if fate == "die" and done == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.1)

dataset = Dataset.open(root)
ready.touch()
while not go.exists():
    time.sleep(0.005)
cache = FrameCache.open(dataset, size=16, workers=1, progress=progress)
print(len(calls), total(cache))
"""


def start(root, tmp_path, name, fate):
    arguments = [sys.executable, "-c", BUILDER, str(root), str(tmp_path / name), str(tmp_path / "go"), fate]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def release(tmp_path, *names):
    deadline = time.monotonic() + 60
    while not all((tmp_path / name).exists() for name in names):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    (tmp_path / "go").touch()


def test_two_processes_build_one_cache(copy, tmp_path):
    """Both start at the same moment; one decodes all five episodes, the other none, and both see the same bytes."""
    builders = [start(copy, tmp_path, name, "live") for name in "ab"]
    release(tmp_path, "a", "b")
    answers = [builder.communicate(timeout=60)[0].split() for builder in builders]
    assert sorted(calls for calls, _ in answers) == ["0", "5"]
    assert {int(found) for _, found in answers} == {total(FrameCache.open(Dataset.open(copy), size=16))}


def test_killed_builder_leaves_nothing_to_be_mistaken(copy, tmp_path):
    """SIGKILL after two of five episodes: the next process rebuilds everything and cleans up."""
    builder = start(copy, tmp_path, "a", "die")
    release(tmp_path, "a")
    builder.communicate(timeout=60)
    assert builder.returncode == -signal.SIGKILL
    left = [p.name for p in (copy / ".cache").glob("frames-*/*")]
    assert any(name.startswith(".part-") for name in left)  # it was killed in the middle, not before or after
    assert not any(name[0].isdigit() for name in left)
    calls = []
    dataset = Dataset.open(copy)
    cache = FrameCache.open(dataset, size=16, progress=lambda done, total: calls.append(done))
    assert len(calls) == 5
    wanted = np.stack([resize(image, 16) for image in decoded(dataset, "image")])
    assert np.array_equal(cache.gather(np.arange(ROWS))["image"].numpy(), wanted)
    assert all(file.name[0].isdigit() for file in cache.folder.iterdir())


def test_macos_fallocate_and_locks_are_not_needed_for_a_cache(dataset, monkeypatch, caplog):
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    monkeypatch.setitem(sys.modules, "fcntl", None)
    assert len(FrameCache.open(dataset, 16)) == ROWS
    assert "cannot be locked" in caplog.text
