"""The geometry of LIBERO's experts, without the simulator: shapes whose best grasp or place is known."""

from types import SimpleNamespace

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from vlaflow.simulators.libero_geometry import (
    CELL,
    NOTHING,
    TIP,
    box_points,
    corridor_top,
    hand_limit,
    nearest_yaw,
    raster,
    rotation_vector,
    window_maximum,
    yaw_of,
    yaw_rotation,
)
from vlaflow.simulators.libero_grasps import Carried, Surroundings, find_grasps, find_place
from vlaflow.simulators.libero_picking import Hold, PickPlace, clear_of_overhang
from vlaflow.simulators.libero_skills import CLOSED, Aim, action, glide

NOWHERE = np.zeros((0, 3))
HAND = np.array([0.0, 0.0, 0.3])


def free(points=NOWHERE):
    """Surroundings with a floor at 0 and an arm that never strains."""
    return Surroundings(points, 0.0, lambda grips: np.zeros(len(grips)))


def box(x, y, z, center=(0, 0), turned=0.0):
    """Points on a box that stands on the floor, with its full sides."""
    points = box_points((x / 2, y / 2, z / 2), 0.004)
    c, s = np.cos(turned), np.sin(turned)
    return points @ np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]).T + np.array([*center, z / 2])


def bowl(radius=0.05, height=0.05, center=(0, 0)):
    """Points on the wall of a bowl, 4 mm thick, and on its bottom."""
    angles = np.linspace(0, 2 * np.pi, 120, endpoint=False)
    wall = [
        (r * np.cos(a), r * np.sin(a), z)
        for a in angles
        for r in (radius - 0.004, radius)
        for z in np.arange(0, height + 1e-9, 0.004)
    ]
    bottom = [(r * np.cos(a), r * np.sin(a), 0.002) for a in angles for r in np.arange(0, radius, 0.004)]
    return np.array(wall + bottom) + np.array([*center, 0])


def test_window_maximum_is_the_largest_height_in_the_rectangle():
    """Cell by cell; beyond the map there is nothing."""
    heights = np.random.default_rng(0).standard_normal((9, 9)) - 2.0
    found = window_maximum(heights, 2 * CELL, CELL, shift_u=-3 * CELL)
    for u in range(9):
        for v in range(9):
            inside = heights[max(0, u - 5) : max(0, u), max(0, v - 1) : v + 2]
            assert found[u, v] == inside.max(initial=NOTHING)


def test_a_rotation_is_its_vector_again():
    """Against scipy, including half turns and no turn at all."""
    generator = np.random.default_rng(0)
    vectors = [*(generator.standard_normal((50, 3))), np.zeros(3), np.array([0, 0, np.pi]), np.array([np.pi, 0, 0])]
    for vector in vectors:
        rotation = Rotation.from_rotvec(vector)
        found = rotation_vector(rotation.as_matrix())
        assert Rotation.from_rotvec(found).inv().__mul__(rotation).magnitude() < 1e-6
        assert np.linalg.norm(found) <= np.pi + 1e-9


@pytest.mark.parametrize("yaw", np.deg2rad([-90, -30, 0, 45, 90]))
def test_a_hand_that_points_down_has_its_yaw(yaw):
    rotation = yaw_rotation(yaw)
    assert np.isclose(np.linalg.det(rotation), 1)
    assert np.allclose(rotation[:, 2], (0, 0, -1))
    assert np.isclose(yaw_of(rotation), yaw)


def test_half_turns_of_the_hand_are_the_same_grasp():
    for yaw in np.linspace(-4, 4, 81):
        near = nearest_yaw(yaw)
        assert -np.pi / 2 <= near <= np.pi / 2
        assert np.isclose(np.sin(near - yaw), 0, atol=1e-9)


def test_a_height_map_shows_the_top_of_what_is_there():
    heights = raster(box(0.04, 0.08, 0.03), np.zeros(2), 0.0)
    middle = len(heights) // 2
    assert heights[middle, middle] == pytest.approx(0.03)
    along_u = np.flatnonzero(heights[:, middle] > 0)  # u is the world's y
    assert abs(len(along_u) * CELL - 0.08) <= 2 * CELL


def test_the_hand_stops_above_what_its_fingers_would_hit():
    """A wall under one finger; between the fingers there is room for it."""
    wall = box(0.2, 0.004, 0.05)
    limit = hand_limit(np.maximum(raster(wall, np.zeros(2), 0.0), 0))
    middle = len(limit) // 2
    assert limit[middle, middle] == pytest.approx(TIP, abs=0.02)
    assert limit[middle + round(0.05 / CELL), middle] == pytest.approx(0.05 + TIP)


@pytest.mark.parametrize("turned", [0.0, 0.5, -1.0])
def test_a_long_box_is_gripped_across_its_short_side(turned):
    """Its long side does not fit between the fingers."""
    best = find_grasps(box(0.12, 0.04, 0.06, turned=turned), free())[0]
    assert best.width == pytest.approx(0.04, abs=0.012)
    assert abs(np.sin(best.yaw - turned)) < np.sin(np.deg2rad(8)) + 1e-9
    assert np.linalg.norm(best.position[:2]) < 0.01
    assert 0.03 < best.position[2] < 0.06


def test_a_bowl_wider_than_the_hand_is_gripped_at_its_rim():
    best = find_grasps(bowl(), free())[0]
    assert best.width < 0.02
    assert np.linalg.norm(best.position[:2]) == pytest.approx(0.048, abs=0.006)
    assert best.position[1] > 0.03  # always the same part of it


def test_a_neighbour_decides_which_side_of_the_rim():
    """A tall box leaves room on the other side only."""
    for side in (1, -1):
        best = find_grasps(bowl(), free(box(0.1, 0.04, 0.2, (0, side * 0.09))))[0]
        assert side * best.position[1] < 0.02


def test_closed_fingers_are_taken_for_a_grasp_only_where_one_was_planned():
    """By who misjudges: closed around the handle of a drawer, they are not yet."""
    skill = PickPlace(["in", "bowl", "drawer"])
    closed = {"closing": 1.0, "opening": 0.0, "still": True, "touching": lambda _: (False, False), "holds": lambda _: False}
    wrong, right = SimpleNamespace(misjudged=True, **closed), SimpleNamespace(misjudged=False, **closed)
    assert not skill.busy(wrong)
    skill._hold = Hold(np.zeros(3), np.eye(3), np.array([0.0, 0.0, 1.0]))
    assert skill.busy(wrong)
    assert not skill.busy(right)


def test_nothing_fits_around_what_is_too_wide():
    assert find_grasps(box(0.2, 0.2, 0.05), free()) == []


def held(points, origin):
    grip = np.array([*origin[:2], points[:, 2].max() - 0.02])
    return Carried(points, np.asarray(origin, float), grip, 0.0)


def test_an_object_is_put_down_just_above_the_floor():
    place = find_place(held(box(0.04, 0.04, 0.06) + np.array([0, 0, 0.3]), (0, 0, 0.3)), free(), np.array([[0.3, 0.1]]))
    assert np.allclose(place.position[:2], (0.3, 0.1))
    assert 0 < place.position[2] < 0.02
    assert place.yaw == 0


def test_an_object_is_put_down_on_top_of_what_is_there():
    below = box(0.1, 0.1, 0.05, (0.3, 0.1))
    place = find_place(held(box(0.04, 0.04, 0.06) + np.array([0, 0, 0.3]), (0, 0, 0.3)), free(below), np.array([[0.3, 0.1]]))
    assert 0.05 < place.position[2] < 0.07


def test_a_free_spot_is_preferred_to_an_occupied_one():
    below = box(0.03, 0.03, 0.05, (0.3, 0.1))
    spots = np.array([[0.3, 0.1], [0.3, 0.16]])
    place = find_place(held(box(0.04, 0.04, 0.06) + np.array([0, 0, 0.3]), (0, 0, 0.3)), free(below), spots)
    assert np.allclose(place.position[:2], spots[1])


def test_what_lies_behind_the_start_is_no_obstacle():
    points = np.array([[-0.05, 0, 0.5], [0.1, 0.0, 0.2], [0.1, 0.3, 0.9], [0.5, 0, 0.7]])
    assert corridor_top(points, np.zeros(3), np.array([0.2, 0, 0]), 0.08) == pytest.approx(0.2)


def test_what_is_under_an_overhang_moves_out_before_it_rises():
    below = box(0.1, 0.1, 0.05)
    shelf = box(0.1, 0.1, 0.02, (0.06, 0)) + np.array([0, 0, 0.15])
    way = clear_of_overhang(below, shelf)
    assert way[0] < 0
    assert abs(way[1]) < 0.01
    assert clear_of_overhang(below, shelf + np.array([0.5, 0, 0])) is None


def test_a_low_hand_rises_before_it_travels_and_comes_down_at_its_goal():
    goal = np.array([0.3, 0.0, 0.1])
    low = glide(np.array([0.0, 0.0, 0.1]), goal, cruise=0.3)
    assert np.allclose(low[:2], 0)
    assert low[2] == pytest.approx(0.3)
    high = glide(np.array([0.0, 0.0, 0.3]), goal, cruise=0.3)
    assert np.allclose(high[:2], goal[:2])
    assert high[2] == pytest.approx(0.3)
    assert np.allclose(glide(np.array([0.3, 0.005, 0.2]), goal, cruise=0.3), goal)
    assert glide(np.array([0.3, 0.005, 0.2]), goal, cruise=0.3, turn=1.0)[2] > 0.2


def test_following_glide_with_the_action_arrives():
    """With the controller replaced by a hand that moves a tenth of what the action asks for."""
    hand, goal, lowest = np.array([0.0, 0.0, 0.1]), np.array([0.25, -0.1, 0.1]), 1.0
    for _ in range(200):
        aim = Aim(glide(hand, goal, cruise=0.25), yaw_rotation(0.0), CLOSED)
        hand = hand + 0.25 * 0.05 * action(hand, yaw_rotation(0.0), aim)[:3]
        if 0.05 < hand[0] < 0.2:
            lowest = min(lowest, hand[2])
    assert np.linalg.norm(hand - goal) < 0.005
    assert lowest > 0.2


def test_actions_stay_in_range_and_keep_their_direction():
    generator = np.random.default_rng(1)
    for _ in range(100):
        hand, goal = generator.standard_normal((2, 3))
        rotation = Rotation.random(random_state=generator).as_matrix()
        found = action(hand, rotation, Aim(goal, yaw_rotation(0.3), CLOSED))
        assert np.abs(found).max() <= 1
        assert found.dtype == np.float32
        assert found.shape == (7,)
        way = (goal - hand)[:2]
        assert abs(way[0] * found[1] - way[1] * found[0]) < 1e-5
