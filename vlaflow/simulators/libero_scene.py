"""What LIBERO's scripted experts see: the privileged state of the simulator in plain arrays.

`LiberoScene` reads poses, collision boxes, contacts and goal predicates from a `LiberoEnv`. Where things are gripped is in
``libero_grasps``, what is done with them in ``libero_picking`` and ``libero_fixtures``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from vlaflow.simulators.libero_geometry import box_points

FINE, COARSE = 0.004, 0.03
"""Spacing in metres of the points on an object's boxes: for planning, and for looking ahead at every step."""

HAND = np.array([(u, v, w) for u in (-1, 1) for v in (-1, 1) for w in (-1, 1)])
HAND = np.concatenate([HAND * (0.104, 0.032, 0.046) - (0, 0, 0.077), HAND * (0.065, 0.0105, 0.027) - (0, 0, 0.018)])
"""Corners of the palm and of the open fingers in the frame of the grip site, (16, 3)."""


@dataclass(frozen=True)
class MovingPart:
    """A moving part of a fixture.

    Args:
        body: its MuJoCo name.
        value: position of its joint, in metres or radians.
        low: the joint's lower limit.
        high: the joint's upper limit.
        axis: (3,) direction of the joint in the world.
        anchor: (3,) point on that axis.
    """

    body: str
    value: float
    low: float
    high: float
    axis: np.ndarray
    anchor: np.ndarray


ARM, FLANGE, WRIST = 0.69, 0.088, 0.21
"""Largest distance from shoulder to wrist, and how far the wrist is behind and above the grip site if the hand points down."""


class LiberoScene:
    """The state of one LIBERO environment.

    Args:
        env: a `LiberoEnv`; read at every access, so one scene serves a whole episode.
    """

    def __init__(self, env: Any) -> None:
        self.env = env
        self.error = np.zeros(3)
        self._raw = raw = env.raw
        self._model, self._data = raw.sim.model._model, raw.sim.data._data
        self._roots = {name: int(self._model.body_rootid[body]) for name, body in raw.obj_body_id.items()}
        root_of = self._model.body_rootid[self._model.geom_bodyid]
        solid = (self._model.geom_contype != 0) | (self._model.geom_conaffinity != 0)
        self._solid = solid
        self._geoms = {name: np.flatnonzero(solid & (root_of == root)) for name, root in self._roots.items()}
        self._parts = {name: sorted({int(b) for b in self._model.geom_bodyid[geoms]}) for name, geoms in self._geoms.items()}
        self._shoulder = self._data.xpos[self._model.body("robot0_link2").id].copy()
        self._wrist = self._model.body("robot0_link6").id
        self._clouds: dict[tuple[int, float], np.ndarray] = {}
        names = [self._model.geom(i).name for i in range(self._model.ngeom)]
        self._fingers = tuple(np.array([names.index(f"gripper0_finger{k}{p}_collision") for p in ("", "_pad")]) for k in (1, 2))
        self._robot = np.array([i for i, n in enumerate(names) if n.startswith(("gripper0", "robot0")) and solid[i]])
        joints = [self._model.joint(f"gripper0_finger_joint{k}") for k in (1, 2)]
        self._finger_positions, self._finger_speeds = [j.qposadr[0] for j in joints], [j.dofadr[0] for j in joints]
        self._grip = self._model.site("gripper0_grip_site").id
        bottoms = [float(self.points(name, COARSE)[:, 2].min()) for name in raw.objects_dict]
        self._floor = min((z for z in bottoms if z > self._shoulder[2] - 0.6), default=0.0)  # one may have fallen off

    @property
    def hand(self) -> np.ndarray:
        """Position of the grip site between the fingertips, (3,), including the assumed error."""
        return self._data.site_xpos[self._grip] + self.error

    @property
    def misjudged(self) -> bool:
        """Whether an error is assumed."""
        return bool(self.error.any())

    @property
    def rotation(self) -> np.ndarray:
        """Rotation of the grip site, (3, 3): its columns are the opening, the side and the approach."""
        return self._data.site_xmat[self._grip].reshape(3, 3).copy()

    @property
    def below(self) -> float:
        """How far the open hand reaches below the grip site: 1 cm when it points down, 10 cm when it is level."""
        return float(-(HAND @ self.rotation[2]).min()) + 0.004

    @property
    def opening(self) -> float:
        """Distance between the fingers, 0 to 0.08."""
        first, second = self._data.qpos[self._finger_positions]
        return float(first - second)

    @property
    def closing(self) -> float:
        """How far the gripper's command has moved from open (0) to closed (1); it takes 8 steps from one to the other."""
        return float((1 - self._raw.robots[0].gripper.current_action[0]) / 2)

    @property
    def still(self) -> bool:
        """Whether the fingers have stopped, open, closed or on something."""
        return float(np.abs(self._data.qvel[self._finger_speeds]).max()) < 0.01

    @property
    def floor(self) -> float:
        """Height of the table (or floor) on which everything stands: of the lowest object at the beginning."""
        return self._floor

    def pose(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Position (3,) and rotation (3, 3) of an object, a fixture or a region."""
        body = self._raw.obj_body_id.get(name)
        if body is not None:
            return self._data.xpos[body].copy(), self._data.xmat[body].reshape(3, 3).copy()
        site = self._model.site(name).id
        return self._data.site_xpos[site].copy(), self._data.site_xmat[site].reshape(3, 3).copy()

    def points(self, name: str, spacing: float = FINE, body: str | None = None) -> np.ndarray:
        """Points on the collision boxes of an object, (N, 3).

        Args:
            name: an object or fixture.
            spacing: distance between neighbours.
            body: only this part, by its MuJoCo name.
        """
        parts = self._parts[name] if body is None else [self._model.body(body).id]
        return np.concatenate(
            [self._local(p, spacing) @ self._data.xmat[p].reshape(3, 3).T + self._data.xpos[p] for p in parts]
        )

    def others(self, *names: str, spacing: float = FINE) -> np.ndarray:
        """Points of all objects and fixtures but these, (N, 3)."""
        return np.concatenate([self.points(n, spacing) for n in self._roots if n not in names] or [np.zeros((0, 3))])

    def stretch(self, positions: np.ndarray) -> np.ndarray:
        """Cost of positions (N, 3) of a hand that points down, for how far the arm must stretch, (N,)."""
        away = positions - self._shoulder
        radius = np.linalg.norm(away[:, :2], axis=1) - FLANGE
        return np.maximum(0, np.hypot(radius, away[:, 2] + WRIST) - 0.64) / 0.02

    @property
    def extension(self) -> float:
        """Distance from the shoulder to the wrist in metres; the elbow is straight at 0.71."""
        return float(np.linalg.norm(self._data.xpos[self._wrist] - self._shoulder))

    @property
    def inward(self) -> np.ndarray:
        """Horizontal direction from the hand to the shoulder, (3,)."""
        way = (self._shoulder - self.hand) * (1.0, 1.0, 0.0)
        return np.asarray(way / np.linalg.norm(way))

    def within_reach(self, position: np.ndarray) -> np.ndarray:
        """The position (3,), moved towards the shoulder as far as the arm needs it.

        Beyond 0.71 m, the elbow would flip to its other side, from where the controller cannot return.
        """
        away = position - self._shoulder
        radius = float(np.linalg.norm(away[:2]))
        longest = FLANGE + np.sqrt(max(0.0, ARM**2 - (away[2] + WRIST) ** 2))
        return position if radius <= longest else self._shoulder + away * [longest / radius, longest / radius, 1.0]

    def holds(self, goal: list[str]) -> bool:
        """Whether a goal predicate is true."""
        return bool(self._raw._eval_predicate(goal))

    def spots(self, region: str, number: int = 0, of: int = 1) -> np.ndarray:
        """Positions of an object's origin that would be in, or on, a region or an object: (K, 2), the best first.

        Args:
            region: its name.
            number: which of several objects that go to the same region this is; each has its own corner.
            of: how many there are.
        """
        center, rotation = self.pose(region)
        site = self._raw.object_sites_dict.get(region)
        half = np.abs(rotation @ site.size)[:2] if site is not None else np.zeros(2)
        steps = np.arange(-8, 9) * 0.01
        grid = np.stack(np.meshgrid(steps, steps, indexing="ij"), -1).reshape(-1, 2)
        grid = grid[(np.abs(grid) <= np.maximum(half - 0.02, 0.005)).all(1)]
        angle = np.pi / 4 + 2 * np.pi * number / of
        best = 0.8 * half * (np.cos(angle), np.sin(angle)) if of > 1 else np.zeros(2)
        return np.asarray(center[:2] + grid[np.argsort(((grid - best) ** 2).sum(1), kind="stable")])

    def part(self, region: str) -> MovingPart:
        """The drawer or door to which a region belongs, or the first moving part of a fixture."""
        site = self._raw.object_sites_dict.get(region)
        bodies = [int(self._model.site_bodyid[self._model.site(region).id])] if site is not None else self._parts[region]
        body = next(b for b in bodies if self._model.body_jntnum[b])
        joint = int(self._model.body_jntadr[body])
        return MovingPart(
            body=self._model.body(body).name,
            value=float(self._data.qpos[self._model.jnt_qposadr[joint]]),
            low=float(self._model.jnt_range[joint, 0]),
            high=float(self._model.jnt_range[joint, 1]),
            axis=self._data.xaxis[joint].copy(),
            anchor=self._data.xanchor[joint].copy(),
        )

    def is_drawer(self, region: str) -> bool:
        """Whether a region is inside something that slides."""
        if region not in self._raw.object_sites_dict:
            return False
        body = int(self._model.site_bodyid[self._model.site(region).id])
        return bool(self._model.body_jntnum[body]) and bool(self._model.jnt_type[self._model.body_jntadr[body]] == 2)

    def boxes(self, body: str) -> tuple[np.ndarray, np.ndarray]:
        """Centers (K, 3) and half extents along the world's axes (K, 3) of the collision boxes of a body."""
        geoms = np.flatnonzero(self._solid & (self._model.geom_bodyid == self._model.body(body).id))
        turned = np.abs(self._data.geom_xmat[geoms].reshape(-1, 3, 3)) @ self._model.geom_aabb[geoms, 3:, None]
        return self._data.geom_xpos[geoms].copy(), turned[..., 0]

    def touching_part(self, body: str) -> tuple[bool, bool]:
        """Whether each finger touches one body."""
        return self._touched(np.flatnonzero(self._model.geom_bodyid == self._model.body(body).id))

    def touching(self, name: str) -> tuple[bool, bool]:
        """Whether each finger touches an object."""
        return self._touched(self._geoms[name])

    def _touched(self, geoms: np.ndarray) -> tuple[bool, bool]:
        pairs = self._data.contact.geom[: self._data.ncon]
        of_object = np.isin(pairs, geoms)
        return tuple(bool((of_object[:, ::-1] & np.isin(pairs, finger)).any()) for finger in self._fingers)  # type: ignore[return-value]

    def supported(self, name: str) -> bool:
        """Whether an object touches anything but the robot."""
        pairs = self._data.contact.geom[: self._data.ncon]
        of_object = np.isin(pairs, self._geoms[name])
        return bool((of_object.any(1) & ~np.isin(pairs, self._robot).any(1)).any())

    def _local(self, body: int, spacing: float) -> np.ndarray:
        """Points on the collision boxes of one body, in its frame, (N, 3); other shapes count as their bounding boxes."""
        key = (body, spacing)
        if key not in self._clouds:
            clouds = []
            for geom in np.flatnonzero(self._solid & (self._model.geom_bodyid == body)):
                box = self._model.geom_aabb[geom]
                points = (box_points(box[3:], spacing) + box[:3]) @ self._data.geom_xmat[geom].reshape(3, 3).T
                points += self._data.geom_xpos[geom] - self._data.xpos[body]
                clouds.append(points @ self._data.xmat[body].reshape(3, 3))
            self._clouds[key] = np.concatenate(clouds)
        return self._clouds[key]
