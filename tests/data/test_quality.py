from dataclasses import replace

import numpy as np
import pytest

from tests.data.toyset import SPEC
from vlaflow.data.quality import PauseRule, pauses
from vlaflow.errors import ConfigError, SpecError

RULE = PauseRule(threshold=0.02, minimum_length=3)


def actions(length=12, speed=0.5):
    """Moving forward with the gripper open."""
    return np.tile(np.array([speed, 0.0, -1.0], np.float32), (length, 1))


def marked(action, spec=SPEC, rule=RULE):
    return np.flatnonzero(pauses(action, spec, rule)).tolist()


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
    assert marked(action, rule=PauseRule(0.02, 1)) == [4, 5, 7, 8]


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


def test_threshold_is_a_share_of_half_the_range():
    """With a range of ±0.05 m the threshold 0.02 means 1 mm."""
    small = tuple(replace(d, low=-0.05, high=0.05) for d in SPEC.dimensions[:2])
    spec = replace(SPEC, dimensions=(*small, SPEC.dimensions[2]))
    assert marked(actions(speed=0.0011), spec) == []
    assert marked(actions(speed=0.0009), spec) == list(range(1, 12))


def test_first_step_is_never_a_pause():
    assert 0 not in marked(actions(speed=0.0), rule=PauseRule(0.02, 1))


def test_empty_and_wrong_input():
    assert pauses(np.zeros((0, 3)), SPEC, RULE).shape == (0,)
    with pytest.raises(SpecError, match=r"\(N, 3\).*\(4, 2\)"):
        pauses(np.zeros((4, 2)), SPEC, RULE)
    with pytest.raises(ConfigError, match="between 0 and 1"):
        PauseRule(threshold=0)
    with pytest.raises(ConfigError, match="at least one step"):
        PauseRule(minimum_length=0)
