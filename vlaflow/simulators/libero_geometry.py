"""Rotations, height maps and the shape of the hand, for LIBERO's scripted experts: arrays only, no simulator.

Objects are clouds of points on the surfaces of their collision boxes. A vertical hand only asks how high things are below it,
so clouds become height maps in the frame of the hand: ``u`` along the fingers' opening, ``v`` across it. With the hand's
own shape as footprint, a maximum filter then gives the lowest height at which each part of the hand touches something. What is
made of that is in ``libero_grasps``.

Lengths are in metres, angles in radians; ``yaw`` 0 opens the fingers along the world's y axis, as LIBERO's reset does.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

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


def yaw_of(rotation: np.ndarray) -> float:
    """The yaw of a hand that points down, from its rotation matrix (3, 3)."""
    return float(np.arctan2(-rotation[0, 0], rotation[1, 0]))


def turned_about_z(vector: np.ndarray, angle: float) -> np.ndarray:
    """A vector (3,) rotated about the vertical."""
    c, s = np.cos(angle), np.sin(angle)
    return np.array([c * vector[0] - s * vector[1], s * vector[0] + c * vector[1], vector[2]])


def nearest_yaw(yaw: float) -> float:
    """The same yaw, up to half turns, after which the hand looks the same, within ±90°."""
    return float((yaw + np.pi / 2) % np.pi - np.pi / 2)


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
    size = 2 * round(half / CELL) + 1
    opening, side = yaw_rotation(yaw)[:2, 0], yaw_rotation(yaw)[:2, 1]
    local = (points[:, :2] - center) @ np.stack([opening, side], 1)
    row, column = np.round(local.T / CELL).astype(int) + size // 2
    inside = (row >= 0) & (row < size) & (column >= 0) & (column < size)
    heights = np.full(size * size, NOTHING)
    np.maximum.at(heights, row[inside] * size + column[inside], points[inside, 2])
    return heights.reshape(size, size)


def window_maximum(heights: np.ndarray, half_u: float, half_v: float, shift_u: float = 0.0) -> np.ndarray:
    """The largest height within a rectangle around every cell.

    Args:
        heights: (n, n) by u and v.
        half_u: half of the rectangle's side along u.
        half_v: half of the rectangle's side along v.
        shift_u: distance along u from the cell to the middle of the rectangle.
    """
    from scipy.ndimage import maximum_filter

    shift, sides = round(shift_u / CELL), [2 * round(half / CELL) + 1 for half in (half_u, half_v)]
    wider = np.pad(heights, ((max(0, -shift), max(0, shift)), (0, 0)), constant_values=NOTHING)
    return maximum_filter(wider, sides, mode="constant", cval=NOTHING)[max(0, shift) :][: len(heights)]


def hand_limit(heights: np.ndarray) -> np.ndarray:
    """The lowest height of the grip site over every cell at which neither open fingers nor palm touch anything, (n, n)."""
    middle, half = (FINGER[0] + FINGER[1]) / 2, (FINGER[1] - FINGER[0]) / 2
    fingers = np.maximum(*(window_maximum(heights, half, FINGER[2], sign * middle) for sign in (1, -1)))
    palm = window_maximum(heights, PALM[0], PALM[1])
    return np.maximum(fingers + TIP, palm - PALM[2])


def corridor_top(points: np.ndarray, start: np.ndarray, goal: np.ndarray, width: float) -> float:
    """The largest z among points (N, 3) ahead and within ``width`` of the way from ``start`` to ``goal``, seen from above.

    What lies behind the start is no obstacle, however near.
    """
    along = goal[:2] - start[:2]
    share = ((points[:, :2] - start[:2]) @ along) / max(float(along @ along), 1e-9)
    away = np.linalg.norm(points[:, :2] - start[:2] - np.clip(share, 0, 1)[:, None] * along, axis=1)
    return float(points[(share > 0) & (away < width), 2].max(initial=NOTHING))
