"""Streams give the frames of a raw cache, whatever is announced; their order is a shuffle that needs few runs at a time."""

import os
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.cases.build import stored_images
from tests.data.toyset import LENGTHS, VIEWS
from vlaflow.backbones.qwen2_5_vl import QwenConfig
from vlaflow.data import stream
from vlaflow.data.batch import ObservationBatch
from vlaflow.data.frame_source import open_few_frames, open_frames
from vlaflow.data.frames import FrameCache
from vlaflow.data.lerobot import Dataset
from vlaflow.data.mixture import MixedOrder, Order
from vlaflow.data.nearby import LANES, Nearby
from vlaflow.data.pairs import FramePairs
from vlaflow.data.stream import SPARE, FrameStream
from vlaflow.data.windows import Windows
from vlaflow.errors import DataError
from vlaflow.policies.processor import PolicyProcessor

ALL = np.arange(sum(LENGTHS))
lengths = st.lists(st.integers(1, 30), min_size=1, max_size=40)


def same(one, other):
    return list(one) == list(other) and all(np.array_equal(one[view], other[view]) for view in one)


@pytest.fixture(autouse=True)
def short_runs(monkeypatch):
    monkeypatch.setattr(stream, "RUN_BYTES", 1)  # so runs have eight frames, and episodes one or two


@pytest.fixture(scope="module")
def opened(pristine, tmp_path_factory):
    return Dataset.open(shutil.copytree(pristine, tmp_path_factory.mktemp("streamed") / "toy"))


@settings(max_examples=40)
@given(runs=lengths, seed=st.integers(0, 5), epoch=st.integers(0, 3))
def test_an_epoch_has_every_sample_once_and_each_lane_finishes_a_run_before_the_next(runs, seed, epoch):
    bounds = np.cumsum([0, *runs])
    nearby = Nearby(bounds, lambda _: None)
    order = nearby.permutation(seed, epoch)
    assert sorted(order) == list(range(bounds[-1]))
    run_M = np.searchsorted(bounds, order, side="right") - 1
    lane_M = nearby.lane(np.arange(len(order)))
    for lane in range(LANES):
        visited = run_M[lane_M == lane]
        assert len(set(visited)) == 1 + np.count_nonzero(np.diff(visited)) or not len(visited)


@settings(max_examples=40)
@given(runs=lengths, seed=st.integers(0, 5), batch_size=st.integers(1, 20), step=st.integers(0, 9))
def test_a_step_is_a_function_of_seed_and_number_sorted_by_lanes(runs, seed, batch_size, step):
    """The same samples as at the step's positions, so that shares of a step read few lanes each."""
    first, again = (Order(sum(runs), batch_size, seed, Nearby(np.cumsum([0, *runs]), lambda _: None)) for _ in range(2))
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    assert np.array_equal(first.indices(step), again.indices(step))
    assert sorted(first.indices(step)) == sorted(again.at(positions))
    lane_of = dict(zip(first.at(positions).tolist(), first.lane(positions).tolist(), strict=True))
    if positions[0] // sum(runs) == positions[-1] // sum(runs):
        assert [lane_of[i] for i in first.indices(step).tolist()] == sorted(lane_of.values())


def test_streams_of_a_mixture_keep_its_shares_and_hear_of_their_own_samples():
    heard = [[], []]
    counts, bounds = (40, 24), (np.arange(0, 41, 8), np.arange(0, 25, 4))
    each = [Nearby(bounds[part], heard[part].append) for part in range(2)]
    mixed, plain = MixedOrder(counts, (3, 1), 16, 0, each), MixedOrder(counts, (3, 1), 16, 0)
    for step in range(20):
        indices = mixed.indices(step)
        assert (indices < 40).sum() == (plain.indices(step) < 40).sum()
        mixed.expect(indices)
    for count, part in zip(counts, heard, strict=True):
        often = np.bincount(np.concatenate(part), minlength=count)
        assert len(often) == count
        assert np.ptp(often) <= 1


@pytest.mark.parametrize("stored", [False, True], ids=["video", "images"])
def test_a_part_of_an_episode_is_what_the_whole_has_there(copy, stored):
    if stored:
        stored_images(copy)
    dataset = Dataset.open(copy)
    for view in dataset.views:
        whole = dataset.frames(2, view)
        for first, count in ((0, 3), (1, 1), (4, 11), (14, 1)):
            found = list(dataset.iter_frames(2, view, first, count))
            assert np.array_equal(found, whole[first : first + count])


@pytest.mark.parametrize("how", [{}, {"size": 16}, {"area": 500}], ids=["stored", "square", "area"])
def test_frames_that_nobody_announced_are_those_of_the_cache(opened, how):
    rows = np.array([53, 0, 17, 17, 30, 8])
    kept = FrameStream(opened, **how).for_few()
    wanted = FrameCache.open(opened, **how).gather(rows)
    assert kept.shapes == FrameCache.open(opened, **how).shapes
    for _ in range(2):
        assert same(kept.gather(rows), wanted)
    with pytest.raises(IndexError, match=r"0 \.\. 53"):
        kept.gather(np.array([54]))


def test_few_frames_are_decoded_alone_unless_there_is_a_cache(dataset):
    before = open_few_frames(dataset, 16).gather(ALL[:5])
    assert not list((dataset.root / ".cache").glob("frames-*"))
    FrameCache.open(dataset, 16)
    after = open_few_frames(dataset, 16)
    assert isinstance(after, FrameCache)
    assert same(before, after.gather(ALL[:5]))


def test_announced_frames_come_from_another_process_and_are_those_of_the_cache(opened):
    """Three epochs of chunks and of pairs, announced two steps ahead; at the end, nothing but spare runs is kept. A process
    that was killed is one sentence."""
    frames, cache = FrameStream(opened, 16, workers=1), open_frames("raw", opened, 16)
    for cut in (lambda source: Windows(opened, source, 4), lambda source: FramePairs(opened, source, "image", 0.1)):
        streamed, cached = cut(frames), cut(cache)
        assert cached.nearby() is None
        order, steps = Order(len(streamed), 16, 0, streamed.nearby()), 3 * len(streamed) // 16
        for step in range(2):
            order.expect(order.indices(step))
        for step in range(steps):
            if step + 2 < steps:
                order.expect(order.indices(step + 2))
            one, other = (source.batch(order.indices(step)) for source in (streamed, cached))
            assert same(one.observation.images, other.observation.images)
            assert one.action_BLD.equal(other.action_BLD)
        assert len(frames._decoded) <= SPARE
        assert not any(frames._due.values())
    (worker,) = frames._executor._processes
    os.kill(worker, signal.SIGKILL)

    def go_on():
        for _ in range(SPARE + 1):
            frames.expect(ALL)
            frames.gather(ALL)

    with pytest.raises(DataError, match=r"has died.*--frames jpeg"):
        go_on()


def test_views_have_their_own_shapes(opened):
    assert FrameStream(opened).shapes == VIEWS
    assert FrameStream(opened, area=500).shapes == {"image": (22, 22), "corner": (18, 27)}


def test_a_policy_reads_a_camera_as_training_read_its_frames(opened):
    """Of a backbone that takes any size up to an area: the cache shrinks frames, and the processor does the same to images."""
    rows, seen = ALL[:4], []
    states = SimpleNamespace(dim=2, forward=lambda state_BS, _: state_BS)
    processor = PolicyProcessor(dict.fromkeys(VIEWS), states, seen.append, area=500)
    cameras = FrameCache.open(opened).gather(rows)
    processor(ObservationBatch(cameras, torch.zeros(4, 2), ["push"] * 4))
    assert same(seen[0].images, FrameCache.open(opened, area=500).gather(rows))
    assert QwenConfig(2, ("image",), source="there").input_size.area == 128 * 28 * 28
