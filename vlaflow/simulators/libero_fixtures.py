"""Skills for fixtures: drawers are opened by their handles and pushed shut, knobs are turned, flat things are pushed."""

from __future__ import annotations

import numpy as np

from vlaflow.simulators.libero_geometry import (
    TIP,
    corridor_top,
    nearest_yaw,
    rotation_vector,
    turned_about_z,
    yaw_of,
    yaw_rotation,
)
from vlaflow.simulators.libero_grasps import Surroundings, find_grasps
from vlaflow.simulators.libero_scene import COARSE, LiberoScene, MovingPart
from vlaflow.simulators.libero_skills import CLOSED, OPEN, Aim, glide, turn_to


def outward(part: MovingPart) -> np.ndarray:
    """The horizontal direction in which a drawer opens, (3,): towards its lower limit, as in LIBERO's cabinets."""
    return -part.axis if part.low < -part.high else part.axis


def lean(towards: np.ndarray, angle: float, rotation: np.ndarray) -> np.ndarray:
    """Rotation (3, 3) of a hand whose fingers point down and, by an angle, towards a horizontal direction.

    The fingers open across that direction, the way round that is nearer to the current ``rotation``.
    """
    opening = np.array([-towards[1], towards[0], 0.0])
    opening *= 1.0 if opening @ rotation[:, 0] > 0 else -1.0
    approach = np.sin(angle) * towards - np.array([0.0, 0.0, np.cos(angle)])
    return np.stack([opening, np.cross(approach, opening), approach], 1)


def handle(scene: LiberoScene, part: MovingPart) -> tuple[np.ndarray, np.ndarray]:
    """Center (3,) and half extents (3,) of a drawer's handle: its outermost box."""
    centers, halves = scene.boxes(part.body)
    number = int(np.argmax(centers @ outward(part)))
    return centers[number], halves[number]


class OpenDrawer:
    """Grip the handle from the front, with the hand level and one finger above and one below, and pull.

    Args:
        region: the region inside the drawer, e.g. "wooden_cabinet_1_top_region".
        inside: the predicate for which it must be open, if that is not a goal itself; then two thirds are enough.
    """

    STANDOFF = 0.09

    def __init__(self, region: str, inside: list[str] | None = None) -> None:
        self._region, self._inside = region, inside

    def done(self, scene: LiberoScene) -> bool:
        """Whether the drawer is open, or need not be any more, and the hand is away from its handle."""
        if self._inside and scene.holds(self._inside):
            return True
        part = scene.part(self._region)
        return self._opened(scene, part) and not self._engaged(scene, part)

    def busy(self, scene: LiberoScene) -> bool:
        """Never: it can be taken up again."""
        return False

    def aim(self, scene: LiberoScene) -> Aim:
        """What to do next."""
        part = scene.part(self._region)
        out, (grip, _), hand = outward(part), handle(scene, part), scene.hand
        level = np.stack([[0.0, 0.0, -1.0], np.cross(-out, [0.0, 0.0, -1.0]), -out], 1)
        offset = hand - grip
        along = float(offset @ out)
        lateral = float(np.linalg.norm(offset - along * out))
        if self._opened(scene, part):
            back = 0.05 if scene.opening > 0.06 else 0.0
            return Aim(hand + back * out, level, OPEN)
        if scene.closing > 0.95 and scene.opening > 0.008 and max(abs(along), lateral) < 0.02:
            return Aim(grip + 0.05 * out, level, CLOSED)
        slack = 1.0 if scene.closing < 0.05 else 2.0
        turn = float(np.linalg.norm(rotation_vector(level @ scene.rotation.T)))
        if along < 0.008 * slack and lateral < 0.010 * slack and turn < 0.15 * slack:
            return Aim(grip, level, CLOSED)
        gap = float(np.clip(3 * (lateral - 0.006) + 0.3 * max(0.0, turn - 0.1), 0, self.STANDOFF))
        goal = grip + gap * out
        top = corridor_top(scene.others(spacing=COARSE), hand, goal, 0.06)
        return Aim(glide(hand, goal, top + scene.below + 0.02, near=0.05), level, OPEN)

    def _opened(self, scene: LiberoScene, part: MovingPart) -> bool:
        if not self._inside:
            return scene.holds(["open", self._region])
        share = abs(part.value) / max(abs(part.low), abs(part.high))
        return share > (0.65 if scene.closing > 0.5 else 0.5)  # what bumps into it may move it a little

    def _engaged(self, scene: LiberoScene, part: MovingPart) -> bool:
        """Whether the hand, still level, is around the handle."""
        offset, out = scene.hand - handle(scene, part)[0], outward(part)
        along = float(offset @ out)
        near = float(np.linalg.norm(offset - along * out)) < 0.06 and along < 0.045
        return near and float(scene.rotation[:, 2] @ out) < -0.7


class CloseDrawer:
    """Push the handle of a drawer with closed fingers, the hand leaning back so that only the fingertips get near.

    Args:
        region: the region inside the drawer.
    """

    LEAN = np.deg2rad(40)

    def __init__(self, region: str) -> None:
        self._region = region

    def done(self, scene: LiberoScene) -> bool:
        """Whether the drawer is shut."""
        return scene.holds(["close", self._region])

    def busy(self, scene: LiberoScene) -> bool:
        """Never: it can be taken up again."""
        return False

    def aim(self, scene: LiberoScene) -> Aim:
        """What to do next."""
        part = scene.part(self._region)
        out, (center, half), hand = outward(part), handle(scene, part), scene.hand
        leaning = lean(-out, self.LEAN, scene.rotation)
        contact = center + (float(half @ np.abs(out)) + 0.015) * out
        contact[2] = max(center[2], scene.floor + TIP)
        offset = hand - contact
        lateral = float(np.linalg.norm(offset[:2] - (offset @ out) * out[:2]))
        turn = float(np.linalg.norm(rotation_vector(leaning @ scene.rotation.T)))
        if lateral < 0.03 and abs(offset[2]) < 0.025 and offset @ out < 0.06 and turn < 0.5:
            return Aim(contact - 0.07 * out, leaning, CLOSED)
        goal = contact + 0.035 * out
        top = corridor_top(scene.others(spacing=COARSE), hand, goal, 0.08)
        return Aim(glide(hand, goal, top + scene.below + 0.02, turn), leaning, CLOSED)


class Settle:
    """Press what leans on the wall of a drawer down with closed fingers, so that the drawer can be shut.

    Args:
        goal: the predicate that brought the object there, e.g. ["in", "akita_black_bowl_1", "white_cabinet_1_bottom_region"].
        upright: (3,) the vertical in the frame of the object when it stands.
    """

    FLAT = np.cos(np.deg2rad(6))

    def __init__(self, goal: list[str], upright: np.ndarray) -> None:
        self._goal, self._upright = goal, upright

    def done(self, scene: LiberoScene) -> bool:
        """Whether the object stands level."""
        return bool(self._upright @ scene.pose(self._goal[1])[1][2] > self.FLAT)

    def busy(self, scene: LiberoScene) -> bool:
        """Never: it can be taken up again."""
        return False

    def aim(self, scene: LiberoScene) -> Aim:
        """What to do next."""
        cloud, hand = scene.points(self._goal[1], COARSE), scene.hand
        top, middle = cloud[np.argmax(cloud[:, 2])], cloud.mean(0)
        inward = (middle - top) * (1, 1, 0)
        inward /= max(1e-6, float(np.linalg.norm(inward)))
        goal = top + 0.005 * inward + np.array([0.0, 0.0, TIP])
        yaw = nearest_yaw(float(np.arctan2(inward[1], inward[0])))
        near = float(np.linalg.norm((goal - hand)[:2])) < 0.02 and hand[2] < goal[2] + 0.02
        if near:
            return Aim(goal + 0.03 * inward - np.array([0.0, 0.0, 0.06]), yaw_rotation(yaw), CLOSED)
        highest = corridor_top(scene.others(spacing=COARSE), hand, goal, 0.06)
        way = glide(hand, goal, highest + scene.below + 0.01, turn_to(yaw, scene.rotation))
        return Aim(way, yaw_rotation(yaw), CLOSED)


class TurnKnob:
    """Grip a knob from above and turn it.

    Args:
        goal: the predicate, e.g. ["turnon", "flat_stove_1"].
    """

    LEAD = 0.5

    def __init__(self, goal: list[str]) -> None:
        self._goal, self._fixture = goal, goal[1]
        self._hold: tuple[np.ndarray, float] | None = None

    def done(self, scene: LiberoScene) -> bool:
        """Whether the predicate holds and the hand has let go."""
        return scene.holds(self._goal) and not any(scene.touching_part(scene.part(self._fixture).body))

    def busy(self, scene: LiberoScene) -> bool:
        """Never: it can be taken up again."""
        return False

    def aim(self, scene: LiberoScene) -> Aim:
        """What to do next."""
        part, hand = scene.part(self._fixture), scene.hand
        if scene.holds(self._goal):
            rise = 0.05 if scene.opening > 0.06 else 0.0
            return Aim(hand + np.array([0.0, 0.0, rise]), scene.rotation, OPEN)
        if self._hold is None:
            self._hold = self._plan(scene, part)
        sign = 1.0 if self._goal[0] == "turnon" else -1.0
        goal, turned = _pose(self._hold, part, part.value)
        error, turn = goal - hand, turn_to(yaw_of(turned), scene.rotation)
        if scene.closing > 0.95 and scene.opening > 0.01 and np.linalg.norm(error) < 0.03:
            goal, turned = _pose(self._hold, part, part.value + sign * self.LEAD)
            return Aim(goal, turned, CLOSED)
        slack = 1.0 if scene.closing < 0.05 else 3.0
        if np.linalg.norm(error[:2]) < 0.008 * slack and abs(error[2]) < 0.008 * slack and turn < 0.12 * slack:
            return Aim(goal, turned, CLOSED)
        top = corridor_top(scene.others(spacing=COARSE), hand, goal, 0.08)
        return Aim(glide(hand, goal, top + scene.below + 0.02, turn), turned, OPEN)

    def _plan(self, scene: LiberoScene, part: MovingPart) -> tuple[np.ndarray, float]:
        """Offset of the hand from the axis and its yaw, with the knob at 0."""
        knob = scene.points(self._fixture, body=part.body)
        around = Surroundings(scene.others(self._fixture), scene.floor, scene.stretch)
        grasps = find_grasps(knob, around)
        return turned_about_z(grasps[0].position - part.anchor, -part.value), grasps[0].yaw - part.value


class Push:
    """Push an object over the table to a region: both open fingers behind it, the hand leaning over it.

    Between two fingers a dish cannot turn away, and leaning fingers hold its rim down. Leaning also keeps the hand clear of
    what stands behind the object.

    Args:
        goal: the predicate, e.g. ["on", "plate_1", "main_table_stove_front_region"].
    """

    LEAN = np.deg2rad(40)
    SLANTS = tuple(np.deg2rad([-20, -10, 0, 10, -30, 20, 30]))
    """Angles between the way and the hand's side; a dish stays between the fingers up to about 35°. The first that leaves room
    is taken, not the one with most: choices that differ between episodes are hard to learn."""

    ROOM = 0.008
    """Metres that both fingers should be away from everything when they come down."""

    BEHIND = 0.018
    """Metres between the place where the fingers come down and the one where they touch the object."""

    def __init__(self, goal: list[str]) -> None:
        self._goal = goal
        _, self._object, self._target = goal
        self._slant: float | None = None

    def done(self, scene: LiberoScene) -> bool:
        """Whether the object is in the region."""
        return scene.holds(self._goal)

    def busy(self, scene: LiberoScene) -> bool:
        """Never: it can be taken up again."""
        return False

    def aim(self, scene: LiberoScene) -> Aim:
        """What to do next."""
        position, hand = scene.pose(self._object)[0], scene.hand
        cloud = scene.points(self._object, COARSE)
        way = scene.pose(self._target)[0][:2] - position[:2]
        ahead = np.append(way / max(1e-6, float(np.linalg.norm(way))), 0.0)
        radius = float(np.linalg.norm(cloud[:, :2] - position[:2], axis=1).max())
        back = np.sqrt(max(0.0, radius**2 - 0.045**2)) + 0.012
        height = scene.floor + TIP
        if self._slant is None:
            self._slant = self._plan(scene, position, ahead, back + self.BEHIND)
        side = turned_about_z(ahead, self._slant)
        leaning = lean(-side, self.LEAN, scene.rotation)
        opening, offset = leaning[:, 0], position - hand
        aside = float(offset @ opening)
        turn = float(np.linalg.norm(rotation_vector(leaning @ scene.rotation.T)))
        distance = float(offset @ side)
        down = hand[2] < height + (0.012 if distance > back else 0.02)  # first down, or the fingers land on the rim of a dish
        if abs(aside) < 0.03 and 0.7 * back < distance < back + 0.04 and down and turn < 0.5:
            return Aim(np.append((hand + 0.04 * ahead + aside * opening)[:2], height - 0.01), leaning, OPEN)
        goal = np.append((position - (back + self.BEHIND) * side)[:2], height)
        top = corridor_top(scene.others(spacing=COARSE), hand, goal, 0.08)
        return Aim(glide(hand, goal, top + scene.below + 0.02, turn), leaning, OPEN)

    def _plan(self, scene: LiberoScene, position: np.ndarray, ahead: np.ndarray, back: float) -> float:
        """The first slant with which both fingers have room to come down, or that with the most room."""
        others = scene.others(self._object)[:, :2]
        room = []
        for slant in self.SLANTS:
            side = turned_about_z(ahead, slant)
            opening = np.array([-side[1], side[0]])
            fingers = (position - back * side)[:2] + np.array([[0.052], [-0.052]]) * opening
            room.append(min(self.ROOM, float(np.linalg.norm(others[:, None] - fingers, axis=2).min(initial=1.0))))
        return float(self.SLANTS[int(np.argmax(room))])


def _pose(hold: tuple[np.ndarray, float], part: MovingPart, angle: float) -> tuple[np.ndarray, np.ndarray]:
    """Position (3,) and rotation (3, 3) of the hand that grips a knob at an angle, given its offset and yaw at 0."""
    offset, yaw = hold
    return part.anchor + turned_about_z(offset, angle), yaw_rotation(yaw + angle)
