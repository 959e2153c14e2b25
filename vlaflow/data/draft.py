"""An action spec for a data set that states none: drafted from names, ranges, fps, robot type and well-known robots.

    drafted = draft(Dataset.open("data/theirs"))
    print(drafted.words)                    # what was taken from where, and what remains unstated
    dataset = dataset.with_spec(drafted.spec)

Nothing is guessed that would be wrong for some robots: such parts are "unstated" and match everything (``ActionSpec``).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from vlaflow.data.features import distinct
from vlaflow.data.hub import title
from vlaflow.data.known_robots import Clues, KnownRobot, recognise
from vlaflow.data.lerobot import Dataset
from vlaflow.hub import origin
from vlaflow.spec import UNNAMED, UNSTATED, ActionSpec, Dimension

MARGIN = 0.1
"""By how much a drafted range exceeds that of the data at either end, as a share of its width."""
LEAST = 1e-3
"""Smallest margin, for dimensions that hardly change."""

GRIPPER = re.compile(r"gripper|finger|claw|jaw|\bhand\b")
JOINT = re.compile(r"joint|waist|shoulder|elbow|forearm|wrist|\bhip|knee|ankle|torso|\bneck")
EULER = re.compile(r"(?:^|[\W_])(?:roll|pitch|yaw)$")
QUATERNION = re.compile(r"(?:^|[\W_])q(?:uat)?_?([wxyz])$")
AXIS_ANGLE = re.compile(r"axis_?-?angle|rotvec")
TURN = re.compile(r"(?:^|[\W_])(?:r|rot|rotation)_?[xyz]$|rotation")
DELTA = re.compile(r"(?:^|[\W_])(?:d|delta|vel|velocity)_?(?:[xyz]|roll|pitch|yaw|pos)?(?:$|[\W_])")


@dataclass(frozen=True)
class DraftedSpec:
    """A drafted spec, and a paragraph about it: what was taken from where and what remains unstated."""

    spec: ActionSpec
    words: str


def stated(dataset: Dataset) -> Dataset:
    """The data set with what its actions mean: as it states, or else by a draft."""
    return dataset.with_spec(spec_of(dataset))


def spec_of(dataset: Dataset) -> ActionSpec:
    """What a data set's actions mean: as it states, or else by a draft."""
    return dataset.action_spec or draft(dataset).spec


def draft(dataset: Dataset) -> DraftedSpec:
    """Draft what a data set's actions mean; reads its rows for their ranges.

    Raises:
        DataError: as ``Dataset.columns``.
    """
    action_ND = dataset.columns().action
    low_D, high_D = action_ND.min(0), action_ND.max(0)
    names = dataset.dimension_names("action")
    words = f"{dataset.robot_type} {title(dataset.root)}".lower()
    known = recognise(Clues(words, names, low_D, high_D), dataset.fps)
    spec = known.spec if known else _from_names(names, dataset.robot_type, dataset.fps)
    if known is None or not known.ranges:
        spec = _measured(spec, low_D, high_D)
    return DraftedSpec(spec, _words(dataset, spec, known))


def with_spec(dataset: Dataset) -> Dataset:
    """The data set as it is if it states a spec, else with a drafted one and a note about it."""
    if dataset.action_spec is not None:
        return dataset
    drafted = draft(dataset)
    where = origin(dataset.root) or dataset.root
    cure = f"To complete it: vlaflow data spec {where} --out FILE{dataset.reading.options}"
    return dataset.with_spec(drafted.spec, f"{drafted.words} {cure}")


def _measured(spec: ActionSpec, low_D: np.ndarray, high_D: np.ndarray) -> ActionSpec:
    """The spec with the data's ranges and a margin."""
    dimensions = []
    for each, low, high in zip(spec.dimensions, low_D.tolist(), high_D.tolist(), strict=True):
        margin = max(MARGIN * (high - low), LEAST * max(1.0, abs(low)))
        dimensions.append(replace(each, low=low - margin, high=high + margin, measured=True))
    return replace(spec, dimensions=tuple(dimensions))


def _from_names(names: Sequence[str], robot_type: str, rate_hz: float) -> ActionSpec:
    """What names and robot type tell about a robot that is not known."""
    unnamed = all(name.isdigit() for name in names)
    shown = [f"{UNNAMED}{name}" for name in names] if unnamed else distinct(names)
    parts = [_dimension(name) for name in shown]
    recognised = not any(part.frame == UNSTATED for part in parts)
    gripper = UNSTATED if not recognised or any(GRIPPER.search(name.lower()) for name in names) else "none"
    return ActionSpec(robot_type or UNSTATED, tuple(parts), _rotation(names, recognised), gripper, rate_hz)


def _dimension(name: str) -> Dimension:
    lower = name.lower()
    mode: Literal["delta", "absolute", "unstated"] = UNSTATED
    frame = unit = UNSTATED
    if GRIPPER.search(lower):
        frame, mode = "gripper", "absolute"
    elif JOINT.search(lower):
        frame = "joint"
    if "rad" in re.split(r"[\W_]", lower):
        unit = "rad"
    elif "deg" in re.split(r"[\W_]", lower):
        unit = "degrees"
    if mode == UNSTATED and DELTA.search(lower):
        mode = "delta"
    return Dimension(name, unit, frame, 0.0, 1.0, UNSTATED, mode=mode)


def _rotation(names: Sequence[str], recognised: bool) -> str:
    lower = [name.lower() for name in names]
    if any(AXIS_ANGLE.search(name) for name in lower):
        return "axis-angle"
    order = "".join(found[1] for name in lower if (found := QUATERNION.search(name)))
    if len(order) >= 4 and set(order[:4]) == set("wxyz"):
        return f"quaternion {order[:4]}"
    if any(TURN.search(name) or EULER.search(name) for name in lower if not JOINT.search(name)):
        return UNSTATED  # "roll" may be an Euler angle or a component of a rotation vector
    return "none" if recognised else UNSTATED


def _words(dataset: Dataset, spec: ActionSpec, known: KnownRobot | None) -> str:
    sources = [f"{spec.dim} dimensions", f"{spec.rate_hz:g} actions per second"]
    if known is not None:
        about = f"its robot was recognised as {known.title} ({spec.robot})"
    else:
        about = f"the robot is '{spec.robot}' by meta/info.json" if spec.robot != UNSTATED else "the robot is not stated"
        unnamed = spec.dimensions[0].name.startswith(UNNAMED)
        about += ", and its dimensions have no names" if unnamed else f", its dimensions are {_some(spec)}"
    ranges = "ranges are those of LIBERO or Meta-World" if known and known.ranges else "ranges are the data's with a margin"
    return (
        f"{title(dataset.root)} does not say what its actions mean, so a spec was drafted ({', '.join(sources)}): {about}; "
        f"{ranges}. {_open(spec)}"
    )


def _some(spec: ActionSpec, most: int = 4) -> str:
    names = [dimension.name for dimension in spec.dimensions]
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def _open(spec: ActionSpec) -> str:
    """What is unstated, in a sentence."""
    left = [part for part in ("robot", "rotation", "gripper") if getattr(spec, part) == UNSTATED]
    for part, text in (("unit", "unit"), ("frame", "frame"), ("positive", "positive direction"), ("mode", "delta or absolute")):
        lacking = [d.name for d in spec.dimensions if getattr(d, part) == UNSTATED]
        if len(lacking) == spec.dim:
            left.append(f"{text} of all dimensions")
        elif lacking:
            left.append(f"{text} of {', '.join(lacking[:4])}" + (", ..." if len(lacking) > 4 else ""))
    return f"Unstated, and therefore never checked: {'; '.join(left)}." if left else "Nothing is left unstated."
