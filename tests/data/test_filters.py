"""What filters take away, on episodes whose movement is known."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.toyset import edit_info
from vlaflow.data.draft import stated
from vlaflow.data.exclusions import paused
from vlaflow.data.filters import Filters, _outliers, _prefix, _segments, _still, filtered, left_out
from vlaflow.data.frames import FrameCache
from vlaflow.data.lerobot import Dataset
from vlaflow.data.quality import PauseRule
from vlaflow.data.windows import Windows
from vlaflow.errors import ConfigError

LIMIT = np.array([0.1])


def path(*moves):
    """Positions (T, 1) after these moves, from 0."""
    return np.cumsum([0.0, *moves])[:, None]


def test_a_static_frame_moves_neither_from_the_one_before_nor_to_the_next():
    assert _still(path(0, 1, 0, 0, 1), LIMIT).tolist() == [True, False, False, True, False, False]
    assert _still(path(), LIMIT).tolist() == [False]


def test_a_segment_is_slow_on_average():
    """Moves of 0.4 every fourth frame are 0.1 per frame, though none of them is small."""
    slow = path(*[0.4, 0, 0, 0] * 3)
    assert _segments(slow, 4, 1.01 * LIMIT).all()
    assert not _segments(slow, 4, LIMIT / 2).any()
    fast_then_slow = path(*[1] * 5, *[0.05] * 6)
    assert _segments(fast_then_slow, 4, LIMIT).tolist() == [False] * 5 + [True] * 7
    assert not _segments(path(0, 0), 4, LIMIT).any()


def test_an_idle_prefix_ends_where_the_robot_leaves_its_place():
    """Jitter does not end it; the last frames before the end are kept."""
    jitter = path(0.05, -0.05, 0.05, -0.05, 0.05, 3, 3)
    assert _prefix(jitter, 2, LIMIT).tolist() == [True] * 4 + [False] * 4
    assert not _prefix(path(1, 1, 1), 1, LIMIT).any()
    assert _prefix(path(0, 0, 0), 1, LIMIT).tolist() == [True] * 3 + [False]


@given(scale=st.floats(1e-3, 1e3), shift=st.floats(-10, 10))
@settings(max_examples=20)
def test_outliers_do_not_depend_on_units(scale, shift):
    values = np.linspace(0, 1, 500)[:, None].repeat(2, 1)
    values[7, 1], values[9, 0] = 9.0, -2.0
    found = np.flatnonzero(_outliers(values * scale + shift, 3.0)).tolist()
    assert found == [7]
    assert not _outliers(np.zeros((5, 2)), 3.0).any()


@pytest.fixture
def windows(pristine, tmp_path, monkeypatch):
    monkeypatch.setenv("VLAFLOW_CACHE", str(tmp_path))
    dataset = Dataset.open(pristine)
    cache = FrameCache.open(dataset, 16)
    return dataset, lambda found: Windows(dataset, cache, 4, (0, 1), filtered=found)


def test_filtered_frames_begin_no_chunk_and_outliers_are_not_learned(windows):
    dataset, cut = windows
    assert np.array_equal(cut(filtered(dataset, None)).rows, cut(None).rows)
    found = filtered(dataset, Filters())
    for marked_N in found.by_kind.values():
        marked_N[:] = False
    found.by_kind["slow"][2:4] = found.by_kind["outliers"][5] = True
    made = cut(found)
    assert made.rows[:6].tolist() == [0, 1, 4, 6, 7, 8]
    assert made.batch(np.array([1, 2])).valid_BL.tolist() == [[True] * 4, [True, False, True, True]]
    executed = made.batch(np.array([1, 2])).executed
    assert executed.valid_after(1).tolist() == [[True] * 4, [True, False, True, True]]
    assert executed.repeat(2).to("cpu").outlier_BL.tolist() == [[False] * 4] * 2 + [[False, True, False, False]] * 2
    assert found.words((0, 1), dataset) == "14.3% of the frames begin no chunk (9.5% in slow segments, 4.8% outliers)"
    found.by_kind["static"][:] = True
    with pytest.raises(ConfigError, match="--set filters=none"):
        cut(found)


def test_a_data_set_that_stands_still_at_first_is_found_whatever_its_rate(pristine):
    """On random movement nothing is redundant; each rule can be switched off."""
    dataset = Dataset.open(pristine)
    assert not filtered(dataset, Filters()).no_start_N.any()
    columns = dataset.columns()
    columns.state[:8] = columns.state[0]
    found = filtered(dataset, Filters(idle_s=0.1))
    assert np.flatnonzero(found.by_kind["static"]).tolist() == list(range(7))
    assert np.flatnonzero(found.by_kind["idle"]).tolist() == list(range(6))
    off = filtered(dataset, Filters(static=None, slow=None, idle=None, outliers=None))
    assert not off.no_start_N.any()


def test_pauses_are_shown_without_an_action_spec_as_training_finds_them(copy):
    """Training drafts the spec that most data sets lack, and so does what shows its rules."""
    edit_info(copy, x_vlaflow={})
    dataset = Dataset.open(copy)
    dataset.columns().action[3:9] = 0
    wanted = paused(stated(dataset), PauseRule())
    assert wanted[4:8].all()
    assert np.array_equal(left_out(dataset)["pause"], wanted)


@pytest.mark.parametrize("wrong", [{"static": 0.0}, {"slow": 1.0}, {"outliers": -1.0}, {"idle_s": 0.0}])
def test_rules_that_cannot_be_are_refused(wrong):
    with pytest.raises(ConfigError, match=r"filters\."):
        replace(Filters(), **wrong)
