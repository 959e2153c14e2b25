"""Picking an object up and putting it where a goal predicate wants it: the skill that most of LIBERO needs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vlaflow.simulators.libero_geometry import corridor_top, yaw_of, yaw_rotation
from vlaflow.simulators.libero_grasps import Carried, Grasp, Placement, Surroundings, find_grasps, find_place
from vlaflow.simulators.libero_scene import COARSE, LiberoScene
from vlaflow.simulators.libero_skills import CLOSED, OPEN, Aim, glide, turn_to

CLEARANCE = 0.02
"""Metres above obstacles at which the hand, or what it holds, travels."""

CHOICE = 6
"""Number of grasps of which the place is planned before one is chosen, where an object goes into something."""

TRIES = 2
"""How often a grasp is tried before the next best one: noise makes good grasps fail, too."""

PAD = 0.016
"""How far to the side of the fingers, in metres, an object may be while they close on it; from further away they miss it."""

THINNEST = 0.003
"""Opening of the fingers, in metres, above which there is something between them."""


@dataclass(frozen=True)
class Hold:
    """A grasp in the frame of its object, so that it follows the object.

    Args:
        offset: (3,) of the hand.
        turn: (3, 3) rotation of the hand.
        upright: (3,) the vertical when the grasp was planned; a fallen object needs another one.
    """

    offset: np.ndarray
    turn: np.ndarray
    upright: np.ndarray


class PickPlace:
    """Bring an object to a region or onto another object.

    Args:
        goal: the predicate, e.g. ["on", "akita_black_bowl_1", "plate_1"].
        number: which of several objects for the same region this is.
        of: how many there are.
    """

    def __init__(self, goal: list[str], number: int = 0, of: int = 1) -> None:
        self.goal, self._slot = goal, (number, of)
        self._relation, self._object, self._target = goal
        self._hold: Hold | None = None
        self._place: Placement | None = None
        self._failures = 0
        self._empty = False

    def done(self, scene: LiberoScene) -> bool:
        """Whether the object is where it belongs and the hand has let go."""
        return scene.holds(self.goal) and (scene.opening < THINNEST or not any(scene.touching(self._object)))

    def busy(self, scene: LiberoScene) -> bool:
        """Whether the object is in the hand and not yet where it belongs."""
        return self._gripped(scene) and not self.done(scene)

    def aim(self, scene: LiberoScene) -> Aim:
        """What to do next."""
        position, _ = scene.pose(self._object)
        if self._arrived(scene, position):
            return self._release(scene)
        if self._gripped(scene):
            return self._carry(scene, position)
        return self._pick(scene)

    def _gripped(self, scene: LiberoScene) -> bool:
        """Whether the object is between the closed fingers; one of them may lose touch for a moment.

        While the position of the hand is misjudged, closed fingers count as a grasp, as for a policy that has only seen grasps
        that succeed. So recordings show fingers that moved on without the object, and the label that opens them.
        """
        if scene.misjudged and self._hold is not None and scene.closing > 0.95:
            return True
        touching = scene.touching(self._object)
        return scene.closing > 0.95 and (all(touching) or (any(touching) and scene.opening > THINNEST and scene.still))

    def _arrived(self, scene: LiberoScene, position: np.ndarray) -> bool:
        """Whether the object is where it is to be let go: at the planned height, or resting on something a little higher."""
        if self._place is None:
            return False
        offset = position - self._place.position
        slack = 1.0 if scene.closing > 0.95 else 2.0
        low = 0.05 if scene.supported(self._object) else 0.010 * slack
        return float(np.linalg.norm(offset[:2])) < 0.012 * slack and offset[2] < low

    def _carry(self, scene: LiberoScene, position: np.ndarray) -> Aim:
        """Take the object over what is in the way to its place; the hand corrects for how it hangs."""
        if self._place is None:
            self._place = self._plan_place(scene, position, scene.hand, yaw_of(scene.rotation))
        hand, place = scene.hand, self._place
        goal = hand + place.position - position
        cloud = scene.points(self._object, COARSE)
        below = max(scene.below, hand[2] - float(cloud[:, 2].min()))
        radius = float(np.linalg.norm(cloud[:, :2] - hand[:2], axis=1).max()) + 0.01
        others = scene.others(self._object, spacing=COARSE)
        way_out = clear_of_overhang(cloud, others)
        if way_out is not None:
            return Aim(hand + way_out, scene.rotation, CLOSED)
        top = corridor_top(others, hand, goal, max(0.05, radius))
        cruise = max(top, scene.floor + 0.03) + below + CLEARANCE
        way = glide(hand, goal, cruise, turn_to(place.yaw, scene.rotation))
        low = way[2] - hand[2] > 0.03  # there may be no room to turn yet
        return Aim(way, scene.rotation if low else yaw_rotation(place.yaw), CLOSED)

    def _release(self, scene: LiberoScene) -> Aim:
        """Open, and rise when open."""
        self._hold = None
        rise = 0.05 if scene.opening > 0.07 else 0.0
        if rise and scene.hand[2] - scene.points(self._object, COARSE)[:, 2].max() > 0.05:
            self._place = None  # it is not where it should be: once more
        return Aim(scene.hand + np.array([0.0, 0.0, rise]), scene.rotation, OPEN)

    def _pick(self, scene: LiberoScene) -> Aim:
        """Go to the grasp from above and close the fingers; if they close on nothing, open them on the way up and try again."""
        position, rotation = scene.pose(self._object)
        if scene.closing > 0.99 and scene.still and scene.opening < THINNEST:
            self._empty = True
        if self._empty and scene.closing > 0.05:
            return Aim(scene.hand + np.array([0.0, 0.0, 0.03]), scene.rotation, OPEN)
        if self._empty:
            self._failures, self._empty, self._hold = self._failures + 1, False, None
        if self._hold is None or self._hold.upright @ rotation[2] < 0.95:
            self._hold = self._plan_grasp(scene, position, rotation)
            self._place = None
        goal, wanted = position + rotation @ self._hold.offset, rotation @ self._hold.turn
        yaw = yaw_of(wanted)
        hand, turn = scene.hand, turn_to(yaw, scene.rotation)
        if scene.rotation[2, 2] > -0.8:  # level, as after opening a drawer: there must be room to turn the hand
            room = scene.extension < 0.67
            return Aim(hand + 0.03 * scene.inward, yaw_rotation(yaw) if room else scene.rotation, OPEN)
        slack = 1.0 if scene.closing < 0.05 else 3.0
        offset = goal - hand
        there = np.linalg.norm(offset[:2]) < 0.008 * slack and abs(offset[2]) < 0.008 * slack and turn < 0.12 * slack
        if there and abs(offset @ scene.rotation[:, 1]) < PAD:
            if scene.closing > 0.99 and scene.still:
                self._failures += 1
                self._hold = None
            # Free along the opening, so that the fingers centre themselves on what does not move.
            opening = scene.rotation[:, 0]
            return Aim(goal - opening * (opening @ offset), yaw_rotation(yaw), CLOSED)
        top = corridor_top(scene.others(spacing=COARSE), hand, goal, 0.08)
        return Aim(glide(hand, goal, top + scene.below + CLEARANCE, turn), yaw_rotation(yaw), OPEN)

    def _plan_grasp(self, scene: LiberoScene, position: np.ndarray, rotation: np.ndarray) -> Hold:
        """The best grasp, or after `TRIES` failures the next best, that strains the arm neither here nor at the target."""
        away = np.append(scene.spots(self._target, *self._slot)[0] - position[:2], 0.0)

        def strain(grips: np.ndarray) -> np.ndarray:
            return scene.stretch(grips) + scene.stretch(grips + away)

        cloud, others = scene.points(self._object), scene.others(self._object)
        grasps = find_grasps(cloud, Surroundings(others, scene.floor, strain))
        if not grasps:  # nothing fits: touch something
            grasps = find_grasps(cloud, Surroundings(others[:0], scene.floor, strain))
        if not grasps:
            grasps = [Grasp(position, 0.0, 0.0, 0.0)]
        if self._relation == "in":
            grasps = self._by_place(scene, position, grasps[:CHOICE])
        best = grasps[self._failures // TRIES % len(grasps)]
        return Hold(rotation.T @ (best.position - position), rotation.T @ yaw_rotation(best.yaw), rotation[2].copy())

    def _by_place(self, scene: LiberoScene, position: np.ndarray, grasps: list[Grasp]) -> list[Grasp]:
        """Grasps in the order of their cost together with that of the place: walls leave no room for some."""
        places = [self._plan_place(scene, position, grasp.position, grasp.yaw) for grasp in grasps]
        lowest = min(place.position[2] for place in places)
        costs = [
            grasp.cost + place.cost + (place.position[2] - lowest) / 0.015 for grasp, place in zip(grasps, places, strict=True)
        ]
        return [grasps[k] for k in np.argsort(costs, kind="stable")]

    def _plan_place(self, scene: LiberoScene, position: np.ndarray, grip: np.ndarray, yaw: float) -> Placement:
        """Where the object is put down if it is gripped at ``grip`` with this yaw while it is at ``position``."""
        spots = scene.spots(self._target, *self._slot)
        held = Carried(scene.points(self._object), position, grip, yaw)
        around = Surroundings(scene.others(self._object), scene.floor, scene.stretch)
        return find_place(held, around, spots) or Placement(np.append(spots[0], position[2]), yaw, 0.0)


def clear_of_overhang(held: np.ndarray, others: np.ndarray) -> np.ndarray | None:
    """Where to move (3,) what cannot rise because something is above it; None if it can.

    Args:
        held: (N, 3) points of the object in the hand.
        others: (M, 3) points of everything else.
    """
    center, top = held[:, :2].mean(0), float(held[:, 2].max())
    radius = float(np.linalg.norm(held[:, :2] - center, axis=1).max())
    above = others[(others[:, 2] > top - 0.01) & (np.linalg.norm(others[:, :2] - center, axis=1) < radius + 0.005)]
    if not len(above):
        return None
    away = center - above[:, :2].mean(0)
    room = float(above[:, 2].min()) - top - 0.02
    return np.append(0.03 * away / max(1e-6, float(np.linalg.norm(away))), np.clip(room, -0.02, 0.02))
