"""Bits that flip in a stored data set are noticed: in rows whenever they are read, in videos and caches by the deep check."""

import json
import shutil

import numpy as np
import pytest

from tests.data.toyset import LENGTHS
from vlaflow.data.check import check
from vlaflow.data.edit import drop
from vlaflow.data.frames import FrameCache
from vlaflow.data.hashes import HASHES, stored_hashes
from vlaflow.data.lerobot import Dataset
from vlaflow.errors import DataError

DATA = "data/chunk-000/file-000.parquet"
VIDEO = "videos/observation.images.corner/chunk-000/file-000.mp4"


def flip(file, place, mask=1):
    raw = bytearray(file.read_bytes())
    raw[place % len(raw)] ^= mask
    file.write_bytes(bytes(raw))


def test_an_undamaged_data_set_has_a_hash_of_every_episode_and_passes(pristine):
    hashes = stored_hashes(pristine)
    assert {key: len(each) for key, each in hashes.items()} == {
        "observation.image": len(LENGTHS),
        "observation.images.corner": len(LENGTHS),
    }
    found = check(Dataset.open(pristine), deep=True)
    assert not found.problems
    assert not any("hashes" in remark for remark in found.remarks)


def test_no_flipped_bit_of_a_video_changes_frames_unnoticed(copy, pristine):
    """Most of them decode: without the hashes only some are problems."""
    true = np.concatenate([Dataset.open(pristine).frames(i, "corner") for i in range(len(LENGTHS))])
    whole, silent = (copy / VIDEO).read_bytes(), 0
    for place in np.random.default_rng(0).integers(0, len(whole), 12).tolist():
        flip(copy / VIDEO, place, 1 << place % 8)
        dataset = Dataset.open(copy)
        if not check(dataset, deep=True).problems:
            assert np.array_equal(np.concatenate([dataset.frames(i, "corner") for i in range(len(LENGTHS))]), true)
        silent += not check(dataset).problems
        (copy / VIDEO).write_bytes(whole)
    assert silent


def test_the_sentence_names_episode_and_file(copy):
    hashes = json.loads((copy / HASHES).read_text())
    hashes["frames"]["observation.images.corner"][2] = "0" * 32
    (copy / HASHES).write_text(json.dumps(hashes))
    (problem,) = check(Dataset.open(copy), deep=True).problems
    assert problem.startswith(f"Episode 2 of {copy}: the frames of 'observation.images.corner' ({VIDEO}) are not those")
    (copy / HASHES).write_text("[]")
    (problem,) = check(Dataset.open(copy), deep=True).problems
    assert "hashes.json contains a list instead of an object" in problem
    assert f"vlaflow data repair {copy} --out DIR" in problem


def test_editing_keeps_the_hashes_of_the_episodes(copy, tmp_path):
    """Packets are copied, so the frames are the same."""
    before = stored_hashes(copy)
    drop(copy, [1], tmp_path / "fewer")
    after = stored_hashes(tmp_path / "fewer")
    assert after == {key: (each[0], *each[2:]) for key, each in before.items()}


def test_a_data_set_without_hashes_is_sound_and_the_check_says_what_is_missing(copy):
    (copy / HASHES).unlink()
    found = check(Dataset.open(copy), deep=True)
    assert not found.problems
    assert any("holds no hashes" in remark for remark in found.remarks)


@pytest.mark.parametrize("path", [DATA, "meta/tasks.parquet", "meta/episodes/chunk-000/file-000.parquet"])
def test_no_flipped_bit_of_a_table_changes_what_is_read(pristine, tmp_path, path):
    true = Dataset.open(pristine).columns()
    whole = (pristine / path).read_bytes()
    copy = shutil.copytree(pristine, tmp_path / "copy")
    refused = 0
    for place in np.random.default_rng(1).integers(0, len(whole), 20).tolist():
        flip(copy / path, place, 1 << place % 8)
        try:
            dataset = Dataset.open(copy)
            found = dataset.columns()
            assert all(np.array_equal(getattr(found, name), getattr(true, name)) for name in ("action", "state", "task"))
            assert dataset.tasks == Dataset.open(pristine).tasks
        except DataError:
            refused += 1
        (copy / path).write_bytes(whole)
    assert refused


def test_a_zeroed_frame_cache_is_a_problem(copy, monkeypatch):
    monkeypatch.delenv("VLAFLOW_CACHE", raising=False)
    dataset = Dataset.open(copy)
    FrameCache.open(dataset, 32, ["corner"])
    assert not check(dataset, deep=True).problems
    blocks = [file for file in (copy / ".cache").rglob("*") if file.is_file() and file.stat().st_size > 4096]
    size = blocks[0].stat().st_size
    with blocks[0].open("r+b") as file:
        file.seek(size // 2)
        file.write(bytes(size - size // 2))
    assert check(dataset, deep=True).problems
