"""Geometry of grasping and placing with a vertical two-finger hand: numpy only, no simulator.

Objects are clouds of points on the surfaces of their collision boxes. A vertical hand only asks how high things are below it,
so clouds become height maps in the frame of the hand: ``u`` along the fingers' opening, ``v`` across it. With the hand's
own shape as footprint, a maximum filter then gives the lowest height at which each part of the hand touches something.
Lengths are in metres, angles in radians; ``yaw`` 0 opens the fingers along the world's y axis, as LIBERO's reset does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

CELL = 0.004
"""Side of a cell of a height map."""

FINGER = (0.036, 0.067, 0.0125)
"""An open finger reaches from u = 36 to 67 mm and over |v| < 12.5 mm (2 mm of clearance included)."""

TIP = 0.013
"""The fingertips are 9 mm below the grip site; with 4 mm of clearance."""

PALM = (0.108, 0.036, 0.026)
"""Half sides of the palm along u and v, and its height above the grip site, with 4 to 5 mm of clearance."""

REACH = 0.22
"""Half side of the square in which a grasp or a place is searched."""

NOTHING = -1e3
"""Height of a cell without points."""

YAWS = np.deg2rad(np.concatenate([[0.0], *([a, -a] for a in range(15, 91, 15))]))
"""Rotations of the hand about the vertical that are tried, the smallest first."""


def box_points(half_sizes: Sequence[float], spacing: float) -> np.ndarray:
    """Points on the surface of a box centred at 0, at most ``spacing`` apart, (N, 3).

    Args:
        half_sizes: half the lengths of its three sides.
        spacing: largest distance between neighbours along an axis.
    """
    axes = [np.linspace(-h, h, max(2, int(np.ceil(2 * h / spacing)) + 1)) for h in half_sizes]
    points = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
    return points[(np.abs(points) > np.asarray(half_sizes) - 1e-9).any(1)]


def yaw_rotation(yaw: float) -> np.ndarray:
    """Rotation matrix of a hand that points down, (3, 3): its columns are the opening, the side and the approach."""
    c, s = np.cos(yaw), np.sin(yaw)
    return np.array([[-s, c, 0.0], [c, s, 0.0], [0.0, 0.0, -1.0]])


def rotation_vector(rotation: np.ndarray) -> np.ndarray:
    """Axis times angle of a rotation matrix, (3,); the angle lies in [0, π]."""
    cosine = np.clip((np.trace(rotation) - 1) / 2, -1, 1)
    angle = np.arccos(cosine)
    axis = np.array([rotation[2, 1] - rotation[1, 2], rotation[0, 2] - rotation[2, 0], rotation[1, 0] - rotation[0, 1]])
    length = np.linalg.norm(axis)
    if length < 1e-9:
        if cosine > 0:
            return np.zeros(3)
        column = (rotation + np.eye(3))[:, np.argmax(np.diag(rotation))]  # a half turn: R + I = 2 a aᵀ
        return np.pi * column / np.linalg.norm(column)
    return axis / length * angle


def raster(points: np.ndarray, center: np.ndarray, yaw: float, half: float = REACH) -> np.ndarray:
    """Height map in the frame of a hand: the largest z of the points in every cell, (n, n) by u and v.

    Args:
        points: (N, 3).
        center: (2,), the xy position of the middle of the map.
        yaw: of the hand.
        half: half the side of the map.
    """
    size = 2 * int(round(half / CELL)) + 1
    opening, side = yaw_rotation(yaw)[:2, 0], yaw_rotation(yaw)[:2, 1]
    local = (points[:, :2] - center) @ np.stack([opening, side], 1)
    cells = np.round(local / CELL).astype(int) + size // 2
    inside = ((cells >= 0) & (cells < size)).all(1)
    heights = np.full(size * size, NOTHING)
    np.maximum.at(heights, cells[inside, 0] * size + cells[inside, 1], points[inside, 2])
    return heights.reshape(size, size)


def window_maximum(heights: np.ndarray, half_u: float, half_v: float, shift_u: float = 0.0) -> np.ndarray:
    """The largest height within a rectangle around every cell.

    Args:
        heights: (n, n) by u and v.
        half_u: half of the rectangle's side along u.
        half_v: half of the rectangle's side along v.
        shift_u: distance along u from the cell to the middle of the rectangle.
    """
    size = (2 * int(round(half_u / CELL)) + 1, 2 * int(round(half_v / CELL)) + 1)
    found = ndimage.maximum_filter(heights, size, mode="constant", cval=NOTHING)
    return ndimage.shift(found, (-round(shift_u / CELL), 0), order=0, mode="constant", cval=NOTHING)


def hand_limit(heights: np.ndarray) -> np.ndarray:
    """The lowest height of the grip site over every cell at which neither open fingers nor palm touch anything, (n, n)."""
    middle, half = (FINGER[0] + FINGER[1]) / 2, (FINGER[1] - FINGER[0]) / 2
    fingers = np.maximum(*(window_maximum(heights, half, FINGER[2], sign * middle) for sign in (1, -1)))
    palm = window_maximum(heights, PALM[0], PALM[1])
    return np.maximum(fingers + TIP, palm - PALM[2])


@dataclass(frozen=True)
class Grasp:
    """A pose of the vertical hand in which closing the fingers grips something.

    Args:
        position: (3,) of the grip site.
        yaw: of the hand.
        width: thickness between the fingers.
        cost: smaller is better; see ``find_grasps``.
    """

    position: np.ndarray
    yaw: float
    width: float
    cost: float


def find_grasps(
    target: np.ndarray,
    others: np.ndarray,
    floor: float,
    hand: np.ndarray,
    extra: Callable[[np.ndarray], np.ndarray],
    yaws: Sequence[float] | np.ndarray = YAWS,
    keep: int = 8,
) -> list[Grasp]:
    """Grasps of an object from above, the best of every yaw, best first.

    A grasp must leave room for both open fingers and the palm, contain something at most 72 mm wide in its middle, and hold at
    least 6 mm of it. Among those, small rotations, places near the middle of the object, faces that are parallel to the
    fingers, deep grips, thin walls and short ways of the hand are preferred: the same in every episode, so that a policy can
    learn the choice.

    Args:
        target: (N, 3) points of the object.
        others: (M, 3) points of everything else that the hand must not touch.
        floor: height of the table below.
        hand: (3,) current position of the grip site.
        extra: further cost (N,) of grips at positions (N, 3).
        yaws: rotations to try.
        keep: number of grasps returned at most.
    """
    center = (target[:, :2].min(0) + target[:, :2].max(0)) / 2
    near = others[(np.abs(others[:, :2] - center) < REACH * 1.5).all(1)]
    found: list[Grasp] = []
    for yaw in yaws:
        best = _best_at(raster(target, center, yaw), raster(near, center, yaw), floor, center, yaw, hand, extra)
        if best is not None:
            found.append(best)
    return sorted(found, key=lambda g: g.cost)[:keep]


def _best_at(
    target: np.ndarray,
    others: np.ndarray,
    floor: float,
    center: np.ndarray,
    yaw: float,
    hand: np.ndarray,
    extra: Callable[[np.ndarray], np.ndarray],
) -> Grasp | None:
    """The cheapest grasp with one yaw, from height maps of the object and of everything else."""
    others = np.maximum(ndimage.maximum_filter(others, 3), floor)  # one cell of clearance
    top = window_maximum(target, 0.034, 0.010)
    grip = np.maximum(hand_limit(np.maximum(target, others)), top - 0.022)
    depth = top - grip
    size, middle = len(target), len(target) // 2
    rows, columns = np.nonzero((depth > -0.003) & (top > NOTHING))
    if not len(rows):
        return None
    z = grip[rows, columns]
    # What is between the fingers, at the height of the pads: (candidates, 19 cells along u) for three cells along v.
    reach = int(round(0.036 / CELL))
    window = np.clip(rows[:, None] + np.arange(-reach, reach + 1), 0, size - 1)
    first, last = [], []
    for shift in (-2, 0, 2):
        solid = target[window, np.clip(columns + shift, 0, size - 1)[:, None]] > z[:, None] - 0.004
        full = solid.any(1)
        first.append(np.where(full, solid.argmax(1), np.nan))
        last.append(np.where(full, 2 * reach - solid[:, ::-1].argmax(1), np.nan))
    left, right = np.array(first), np.array(last)
    width = (right[1] - left[1] + 1) * CELL
    offset = ((right[1] + left[1]) / 2 - reach) * CELL
    slope = np.abs(left[2] - left[0]) + np.abs(right[2] - right[0])
    slope = np.where(np.isnan(slope), 6.0, slope)
    u, v = (rows - middle) * CELL, (columns - middle) * CELL
    solid_cells = np.argwhere(target > NOTHING) - middle
    mean = solid_cells.mean(0) * CELL
    away = np.hypot(u - mean[0], v - mean[1])
    axes = yaw_rotation(yaw)[:2, :2]
    xy, gripped = center + np.stack([u, v], 1) @ axes.T, center + np.stack([u + offset, v], 1) @ axes.T
    cost = (
        2.0 * abs(yaw) / (np.pi / 2)
        + away / 0.05
        + 0.25 * slope
        + np.maximum(0, 0.018 - depth[rows, columns]) / 0.012
        + np.maximum(0, width - 0.06) / 0.012
        + np.abs(offset) / 0.006
        + 0.3 * np.linalg.norm(xy - hand[:2], axis=1) / 0.2
        + extra(np.column_stack([gripped, z]))
    )
    cost = np.where(np.isnan(width) | (width > 0.072) | (np.abs(offset) > 0.026), np.inf, cost)
    best = int(np.argmin(cost))
    if not np.isfinite(cost[best]):
        return None
    return Grasp(np.append(xy[best], z[best]), float(yaw), float(width[best]), float(cost[best]))


@dataclass(frozen=True)
class Place:
    """Where a vertical hand that holds an object lets it go.

    Args:
        position: (3,) of the object's origin.
        yaw: of the hand.
        cost: smaller is better; see ``find_place``.
    """

    position: np.ndarray
    yaw: float
    cost: float


def find_place(
    held: np.ndarray,
    origin: np.ndarray,
    grip: np.ndarray,
    yaw: float,
    others: np.ndarray,
    floor: float,
    spots: np.ndarray,
    extra: Callable[[np.ndarray], np.ndarray],
    turns: Sequence[float] | np.ndarray = YAWS,
) -> Place | None:
    """The best place for an object in the hand: low, near the first spot, with little rotation.

    The height follows from the shapes: the lowest at which neither the object nor the hand, with its fingers open, touches
    anything. What lies under an overhang is out of reach from above, so everything in a column counts.

    Args:
        held: (N, 3) points of the object, now.
        origin: (3,) its origin, now.
        grip: (3,) the grip site, now.
        yaw: of the hand, now.
        others: (M, 3) points of everything else.
        floor: height of the table below.
        spots: (K, 2) positions of the origin to try, the best first.
        extra: further cost (K,) of grip sites at (K, 3).
        turns: rotations of the hand to try, relative to ``yaw``.
    """
    center = spots[0]
    near = others[(np.abs(others[:, :2] - center) < REACH * 2).all(1)]
    local = (held - grip) @ yaw_rotation(yaw)  # opening, side, approach (downwards)
    arm = (origin - grip) @ yaw_rotation(yaw)
    size = 2 * int(round(REACH / CELL)) + 1
    bottoms = np.full((size, size), np.inf)
    cells = np.round(local[:, :2] / CELL).astype(int) + size // 2
    inside = ((cells >= 0) & (cells < size)).all(1)
    np.minimum.at(bottoms, (cells[inside, 0], cells[inside, 1]), -local[inside, 2])
    grid = np.abs((np.arange(size) - size // 2) * CELL)
    fingers, palm = (grid < FINGER[1])[:, None] & (grid < FINGER[2]), (grid < PALM[0])[:, None] & (grid < PALM[1])
    bottoms = np.minimum(bottoms, np.where(fingers, -TIP, np.where(palm, PALM[2], np.inf)))
    rows, columns = np.nonzero(np.isfinite(bottoms))
    options: list[tuple[float, float, np.ndarray, float]] = []
    for number, turn in enumerate(turns):
        heights = np.maximum(ndimage.maximum_filter(raster(near, center, yaw + turn, 2 * REACH), 3), floor)
        axes = yaw_rotation(yaw + turn)[:2, :2]
        grips = (spots - center) @ axes - arm[:2]  # (K, 2) in the frame of the hand
        at = np.round(grips / CELL).astype(int) + len(heights) // 2
        r, c = at[:, :1] + rows - size // 2, at[:, 1:] + columns - size // 2
        valid = (r >= 0) & (r < len(heights)) & (c >= 0) & (c < len(heights))
        column = heights[np.clip(r, 0, len(heights) - 1), np.clip(c, 0, len(heights) - 1)]
        needed = np.where(valid, column - bottoms[rows, columns], floor - bottoms[rows, columns]).max(1)
        away = np.linalg.norm(spots - center, axis=1)
        far = extra(np.column_stack([center + grips @ axes.T, needed]))
        options += [
            (float(z), float(d / 0.03 + e + 2 * abs(turn) / (np.pi / 2) + 1e-6 * number), spot, float(yaw + turn))
            for z, d, e, spot in zip(needed, away, far, spots, strict=True)
            if abs(yaw + turn) < np.deg2rad(100)
        ]
    if not options:
        return None
    lowest = min(z for z, *_ in options)
    cost, z, spot, angle = min(
        (((z - lowest) / 0.015 + more, z, spot, angle) for z, more, spot, angle in options), key=lambda o: o[0]
    )
    return Place(np.append(spot, z + 0.004 - arm[2]), angle, cost)


def corridor_top(points: np.ndarray, start: np.ndarray, goal: np.ndarray, width: float) -> float:
    """The largest z among points (N, 3) ahead and within ``width`` of the way from ``start`` to ``goal``, seen from above.

    What lies behind the start is no obstacle, however near.
    """
    along = goal[:2] - start[:2]
    share = ((points[:, :2] - start[:2]) @ along) / max(float(along @ along), 1e-9)
    away = np.linalg.norm(points[:, :2] - start[:2] - np.clip(share, 0, 1)[:, None] * along, axis=1)
    return float(points[(share > 0) & (away < width), 2].max(initial=NOTHING))
