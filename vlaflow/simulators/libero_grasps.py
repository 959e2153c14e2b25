"""Where to grip an object from above, and where to put it down: searches over height maps, no simulator.

Both look at every rotation of the hand and every cell nearby, drop what does not fit, and take the cheapest. The costs prefer
what is the same in every episode, so that a policy can learn the choice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from vlaflow.simulators.libero_geometry import (
    CELL,
    FINGER,
    NOTHING,
    PALM,
    REACH,
    TIP,
    hand_limit,
    raster,
    window_maximum,
    yaw_rotation,
)

YAWS = np.deg2rad([0, 15, -15, 30, -30, 45, -45, 60, -60, 75, -75, 90, -90])
"""Rotations of the hand about the vertical that are tried."""

WIDEST = 0.072
"""Largest thickness that fits between the fingers, which open to 80 mm."""

MOST_TURNED = np.deg2rad(100)
"""Largest yaw of the hand."""


@dataclass(frozen=True)
class Surroundings:
    """What the hand must take into account.

    Args:
        points: (M, 3) on everything that it must not touch.
        floor: height of the table.
        strain: cost (N,) of grip sites at (N, 3), e.g. for stretching the arm.
    """

    points: np.ndarray
    floor: float
    strain: Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Grasp:
    """A pose of the vertical hand in which closing the fingers grips something.

    Args:
        position: (3,) of the grip site.
        yaw: of the hand.
        width: thickness between the fingers.
        cost: smaller is better.
    """

    position: np.ndarray
    yaw: float
    width: float
    cost: float


SIDE = np.array([0.1, 1.0])
"""The side of a wide object (world frame) whose rim is gripped if others are as good. Where the hand happens to be must not
decide, because a policy that has seen both sides goes between them."""


def find_grasps(target: np.ndarray, around: Surroundings) -> list[Grasp]:
    """Grasps of an object from above, the best one of every yaw, best first.

    A grasp leaves room for both open fingers and the palm, and has something at most 72 mm wide between the fingers. Among
    those, small rotations, places near the middle of the object, the rim towards `SIDE`, faces parallel to the fingers, deep
    grips, thin walls and an unstrained arm are preferred.

    Args:
        target: (N, 3) points of the object.
        around: everything else.
    """
    center = (target[:, :2].min(0) + target[:, :2].max(0)) / 2
    near = around.points[(np.abs(around.points[:, :2] - center) < REACH * 1.5).all(1)]
    found: list[Grasp] = []
    for yaw in YAWS:
        own = raster(target, center, yaw)
        others = np.maximum(window_maximum(raster(near, center, yaw), CELL, CELL), around.floor)  # one cell of clearance
        top = window_maximum(own, 0.034, 0.010)
        height = np.maximum(hand_limit(np.maximum(own, others)), top - 0.022)
        cells = np.argwhere((top - height > -0.003) & (top > NOTHING))
        if not len(cells):
            continue
        z = height[cells[:, 0], cells[:, 1]]
        width, offset, slope = _between_fingers(own, cells, z)
        middle = len(own) // 2
        u, v = ((cells - middle) * CELL).T
        mean = (np.argwhere(own > NOTHING) - middle).mean(0) * CELL
        axes = yaw_rotation(yaw)[:2, :2]
        xy, gripped = (center + np.stack([along, v], 1) @ axes.T for along in (u, u + offset))
        cost = (
            2.0 * abs(yaw) / (np.pi / 2)
            + np.hypot(u - mean[0], v - mean[1]) / 0.05
            + 0.25 * slope
            + np.maximum(0, 0.018 - (top[cells[:, 0], cells[:, 1]] - z)) / 0.012
            + np.maximum(0, width - 0.06) / 0.012
            + np.abs(offset) / 0.006
            - 2.0 * (u + offset) * (axes[:, 0] @ SIDE) / 0.05
            + around.strain(np.column_stack([gripped, z]))
        )
        cost[np.isnan(cost) | (width > WIDEST) | (np.abs(offset) > 0.026) | (slope >= 6)] = np.inf
        best = int(np.argmin(cost))
        if np.isfinite(cost[best]):
            found.append(Grasp(np.append(xy[best], z[best]), float(yaw), float(width[best]), float(cost[best])))
    return sorted(found, key=lambda grasp: grasp.cost)


def _between_fingers(own: np.ndarray, cells: np.ndarray, z: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What is between the fingers at the height of their pads, for grip sites over N cells.

    Args:
        own: (n, n) height map of the object.
        cells: (N, 2).
        z: (N,) heights of the grip site.

    Returns:
        (N,) thickness, NaN if nothing is there; (N,) distance of its middle from the grip site along u; (N,) how far its two
        faces are from parallel to the fingers, in cells.
    """
    reach, size = round(0.036 / CELL), len(own)
    window = np.clip(cells[:, :1] + np.arange(-reach, reach + 1), 0, size - 1)
    first, last = [], []
    for shift in (-2, 0, 2):  # 8 mm to either side
        solid = own[window, np.clip(cells[:, 1:] + shift, 0, size - 1)] > z[:, None] - 0.004
        there = solid.any(1)
        first.append(np.where(there, solid.argmax(1), np.nan))
        last.append(np.where(there, 2 * reach - solid[:, ::-1].argmax(1), np.nan))
    left, right = np.array(first), np.array(last)
    slope = np.nan_to_num(np.abs(left[2] - left[0]) + np.abs(right[2] - right[0]), nan=6.0)
    return (right[1] - left[1] + 1) * CELL, ((right[1] + left[1]) / 2 - reach) * CELL, slope


@dataclass(frozen=True)
class Carried:
    """An object in the hand.

    Args:
        points: (N, 3) of the object.
        origin: (3,) of the object, which is what LIBERO's predicates look at.
        grip: (3,), the grip site.
        yaw: of the hand.
    """

    points: np.ndarray
    origin: np.ndarray
    grip: np.ndarray
    yaw: float


@dataclass(frozen=True)
class Placement:
    """Where an object is let go.

    Args:
        position: (3,) of its origin.
        yaw: of the hand.
        cost: smaller is better.
    """

    position: np.ndarray
    yaw: float
    cost: float


def find_place(held: Carried, around: Surroundings, spots: np.ndarray) -> Placement | None:
    """The best place for an object in the hand: low, near the first spot, with little rotation and an unstrained arm.

    The height follows from the shapes: the lowest at which neither the object nor the hand, with its fingers open, touches
    anything. What is under an overhang cannot be reached from above, so everything in a column counts.

    Args:
        held: the object.
        around: everything else.
        spots: (K, 2) positions of the origin to try, the best first.
    """
    center = spots[0]
    near = around.points[(np.abs(around.points[:, :2] - center) < REACH * 2).all(1)]
    bottoms = _bottoms(held)
    rows, columns = np.nonzero(np.isfinite(bottoms))
    rows, columns, depth = rows - len(bottoms) // 2, columns - len(bottoms) // 2, bottoms[rows, columns]
    arm = (held.origin - held.grip) @ yaw_rotation(held.yaw)
    away = np.linalg.norm(spots - center, axis=1) / 0.03
    best: list[tuple[np.ndarray, np.ndarray, float]] = []
    for turn in YAWS[np.abs(held.yaw + YAWS) < MOST_TURNED]:
        heights = np.maximum(window_maximum(raster(near, center, held.yaw + turn, 2 * REACH), CELL, CELL), around.floor)
        axes = yaw_rotation(held.yaw + turn)[:2, :2]
        grips = (spots - center) @ axes - arm[:2]  # (K, 2) in the frame of the hand
        at = np.round(grips / CELL).astype(int) + len(heights) // 2
        r, c = (np.clip(at[:, k : k + 1] + cells, 0, len(heights) - 1) for k, cells in enumerate((rows, columns)))
        z = (heights[r, c] - depth).max(1)
        strain = around.strain(np.column_stack([center + grips @ axes.T, z]))
        best.append((z, away + strain + 2.0 * abs(turn) / (np.pi / 2), held.yaw + turn))
    if not best:
        return None
    lowest = min(float(z.min()) for z, _, _ in best)
    options = [((z - lowest) / 0.015 + more, z, yaw) for z, more, yaw in best]
    cost, z, yaw = min(options, key=lambda option: float(option[0].min()))
    number = int(np.argmin(cost))
    return Placement(np.append(spots[number], z[number] + 0.004 - arm[2]), float(yaw), float(cost[number]))


def _bottoms(held: Carried) -> np.ndarray:
    """Lowest height of object and open hand over the cells of a map in the hand's frame, relative to the grip site, (n, n)."""
    local = (held.points - held.grip) @ yaw_rotation(held.yaw)  # opening, side, approach (downwards)
    size = 2 * round(REACH / CELL) + 1
    bottoms = np.full((size, size), np.inf)
    cells = np.round(local[:, :2] / CELL).astype(int) + size // 2
    inside = ((cells >= 0) & (cells < size)).all(1)
    np.minimum.at(bottoms, (cells[inside, 0], cells[inside, 1]), -local[inside, 2])
    grid = np.abs((np.arange(size) - size // 2) * CELL)
    fingers, palm = (grid < FINGER[1])[:, None] & (grid < FINGER[2]), (grid < PALM[0])[:, None] & (grid < PALM[1])
    return np.minimum(bottoms, np.where(fingers, -TIP, np.where(palm, PALM[2], np.inf)))
