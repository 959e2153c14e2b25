from dataclasses import replace

import numpy as np
import pytest

from tests.data.toyset import SPEC
from vlaflow.data.quality import PauseRule, pauses
from vlaflow.errors import ConfigError, SpecError
from vlaflow.spec import ActionSpec, Dimension

RULE = PauseRule(threshold=0.02, minimum_s=0.15)  # three steps of SPEC's 20 Hz
ONE_STEP = PauseRule(threshold=0.02, minimum_s=0.05)


def actions(length=12, speed=0.5):
    """Moving forward with the gripper open."""
    return np.tile(np.array([speed, 0.0, -1.0], np.float32), (length, 1))


def marked(action, spec=SPEC, rule=RULE):
    """Pauses in one episode of a data set that holds another one, in which everything moves."""
    moving = np.tile(np.array([[1.0, 1.0, -1.0], [1.0, 1.0, 1.0]], np.float32), (100, 1))
    if all(d.mode == "absolute" for d in spec.dimensions):
        moving[:, :2] = np.arange(200)[:, None]
    return np.flatnonzero(pauses([action, moving], spec, rule)[0]).tolist()


def joints(rate_hz, limit=np.pi):
    """A robot of two joints, whose limits are far wider than what it uses, and a gripper, in absolute positions."""
    joint = Dimension("joint_0", "rad", "joint", -limit, limit, "counter-clockwise", mode="absolute")
    gripper = Dimension("gripper", "none", "gripper", 0.0, 1.0, "open", mode="absolute")
    return ActionSpec(
        robot="two joints",
        dimensions=(joint, replace(joint, name="joint_1"), gripper),
        rotation="none",
        gripper="0 closed, 1 open",
        rate_hz=rate_hz,
    )


MOVING = ((0.0, 4.0), (6.0, 9.0))
"""Seconds in which ``reach`` moves; from 4 s to 6 s it stands still, and from 9 s to 10 s but for its gripper at 9.5 s."""


def reach(rate_hz):
    """Ten seconds of a slow robot (0.3 rad/s at most) as positions at this rate."""
    time_N = np.arange(round(10 * rate_hz)) / rate_hz
    worked_N = sum(np.clip(time_N, start, end) - start for start, end in MOVING)
    joint_N2 = np.stack([0.2 * np.sin(1.5 * worked_N), 0.3 * np.cos(worked_N + 0.4)], axis=1)
    return np.concatenate([joint_N2, (time_N[:, None] >= 9.5)], axis=1).astype(np.float32)


def paused_seconds(rate_hz, action=None):
    found = pauses([reach(rate_hz) if action is None else action], joints(rate_hz), PauseRule())[0]
    return np.flatnonzero(found) / rate_hz


@pytest.mark.parametrize("rate_hz", [10, 30, 50])
def test_a_joint_position_robot_keeps_what_moves_and_its_pauses_are_found(rate_hz):
    """One step at 30 Hz covers 0.01 rad, far less than a share of the joints' limits; that must not make it a pause."""
    time = np.arange(round(10 * rate_hz)) / rate_hz
    still = ((time > 4.05) & (time < 5.95)) | ((time > 9.05) & (time < 9.45)) | (time > 9.55)
    moving = ((time > 0) & (time < 3.8)) | ((time > 6.2) & (time < 8.8))
    found = pauses([reach(rate_hz)], joints(rate_hz), PauseRule())[0]
    assert found[still].mean() > 0.9
    assert not found[moving].any()
    assert not found[np.isclose(time, 9.5)].any()


@pytest.mark.parametrize("rate_hz", [10, 15, 25])
def test_the_same_motion_at_twice_the_rate_loses_the_same_share(rate_hz):
    shares = [pauses([reach(r)], joints(r), PauseRule())[0].mean() for r in (rate_hz, 2 * rate_hz)]
    assert shares[0] == pytest.approx(shares[1], abs=4.5 / (10 * rate_hz))  # rounding at each of three pauses


@pytest.mark.parametrize("rate_hz", [10, 25])
def test_delta_actions_at_twice_the_rate_are_half_as_large_and_lose_the_same_share(rate_hz):
    shares = []
    for rate in (rate_hz, 2 * rate_hz):
        spec = joints(rate)
        spec = replace(spec, dimensions=tuple(replace(d, mode="delta") for d in spec.dimensions))
        action = reach(rate)
        action[:, :2] = np.diff(action[:, :2], axis=0, prepend=action[:1, :2])
        shares.append(pauses([action], spec, PauseRule())[0].mean())
    assert shares[0] == pytest.approx(shares[1], abs=4.5 / (10 * rate_hz))


def test_neither_units_nor_limits_matter():
    """In degrees, or with limits ten times as wide, the same steps are pauses."""
    action, spec = reach(30), joints(30)
    found = pauses([action], spec, PauseRule())[0]
    assert np.array_equal(found, pauses([action], joints(30, limit=10 * np.pi), PauseRule())[0])
    degrees = action * np.array([180 / np.pi, 180 / np.pi, 1], np.float32)
    assert np.array_equal(found, pauses([degrees], spec, PauseRule())[0])


def test_encoder_jitter_does_not_hide_a_pause():
    """A standing joint whose encoder flickers by one of 16384 ticks, 4 % of a fast step at 30 Hz, still stands."""
    jitter = np.random.default_rng(0).integers(0, 2, (300, 2)) * (2 * np.pi / 16384)
    action = reach(30)
    action[:, :2] += jitter
    found = paused_seconds(30, action)
    assert ((found > 4.05) & (found < 5.95)).sum() > 0.9 * 1.9 * 30


def test_positions_that_update_more_slowly_than_the_recording_are_no_pauses():
    """A commander of 10 Hz recorded at 50 Hz repeats every position five times while it moves."""
    found = paused_seconds(50, np.repeat(reach(10), 5, axis=0))
    assert not ((found < 3.8) | ((found > 6.2) & (found < 8.8))).any()
    assert len(found)


def test_moving_is_no_pause():
    assert marked(actions()) == []


def test_standing_still_is_a_pause():
    action = actions()
    action[4:9, :2] = 0.019
    assert marked(action) == [4, 5, 6, 7, 8]


@pytest.mark.parametrize("dimension", [0, 1])
@pytest.mark.parametrize("sign", [1, -1])
def test_one_moving_dimension_is_enough(dimension, sign):
    action = actions()
    action[4:9, :2] = 0
    action[6, dimension] = 0.021 * sign
    assert marked(action, rule=ONE_STEP) == [4, 5, 7, 8]


def test_gripper_command_ends_a_pause_when_it_changes_and_not_while_it_holds():
    action = actions()
    action[2:, :2] = 0
    action[7:, 2] = 1.0  # closes at step 7, stays closed
    assert marked(action) == [2, 3, 4, 5, 6, 8, 9, 10, 11]


def test_gripper_given_as_a_delta_dimension_is_compared_too():
    """A command that stays at +1 is no movement, whatever the mode says."""
    spec = replace(SPEC, dimensions=(*SPEC.dimensions[:2], replace(SPEC.dimensions[2], mode="delta")))
    action = actions(speed=0.0)
    assert marked(action, spec) == list(range(1, 12))


def test_short_stops_are_kept():
    action = actions()
    action[2:4, :2] = 0
    action[6:9, :2] = 0
    assert marked(action) == [6, 7, 8]


def test_absolute_dimensions_pause_where_they_do_not_change():
    """An absolute target far from 0 is held, not moving."""
    spec = replace(SPEC, dimensions=tuple(replace(d, mode="absolute") for d in SPEC.dimensions))
    action = actions(speed=0.7)
    action[:5, 0] = [0.1, 0.2, 0.3, 0.4, 0.5]
    assert marked(action, spec) == [6, 7, 8, 9, 10, 11]


def test_threshold_is_a_share_of_the_fast_movement_in_the_data_set():
    """Where the fast steps cover 1 m, the threshold 0.02 means 20 mm a step."""
    assert marked(actions(speed=0.021)) == []
    assert marked(actions(speed=0.019)) == list(range(1, 12))


def test_first_step_is_never_a_pause():
    assert 0 not in marked(actions(speed=0.0), rule=ONE_STEP)


def test_episodes_shorter_than_a_pause_have_none():
    assert [p.tolist() for p in pauses([actions(3, speed=0.0), actions(1)], SPEC, RULE)] == [[False] * 3, [False]]


def test_empty_and_wrong_input():
    assert pauses([], SPEC, RULE) == []
    assert pauses([np.zeros((0, 3))], SPEC, RULE)[0].shape == (0,)
    with pytest.raises(SpecError, match=r"\(N, 3\).*\(4, 2\)"):
        pauses([np.zeros((4, 2))], SPEC, RULE)
    with pytest.raises(ConfigError, match="between 0 and 1"):
        PauseRule(threshold=0)
    for duration in (0.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="positive, finite duration"):
            PauseRule(minimum_s=duration)


def test_where_the_mode_is_unstated_only_what_rests_in_either_sense_is_a_pause():
    """A constant displacement moves; a constant position does too if it is added. Zero is rest."""
    unstated = replace(SPEC, dimensions=tuple(replace(d, mode="unstated") for d in SPEC.dimensions[:2]) + SPEC.dimensions[2:])
    assert marked(actions(speed=0.5), unstated) == []
    rests = actions(speed=0.5)
    rests[4:10, 0] = 0.0
    assert marked(rests, unstated) == [5, 6, 7, 8, 9]
