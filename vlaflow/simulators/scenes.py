"""Questions about a scene and their true answers, as pure functions of facts from the simulator.

An environment with questions has a method ``facts()`` (see ``facts_of``): the positions of things, in metres and in the image,
and their states. ``ask`` turns facts into questions. Ambiguous cases are not asked: every kind of question has a margin, and
positions are compared in shares of the image, so the same margins hold at any size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from vlaflow.errors import CapabilityError


@dataclass(frozen=True)
class Thing:
    """Position of a thing in the scene.

    Args:
        position: (3,) metres, world frame.
        pixel: (2,) position in the image as shares of its width and height, from the top left; in [0, 1] when in view.
    """

    position: np.ndarray
    pixel: np.ndarray


@dataclass(frozen=True)
class Condition:
    """A question about a state.

    Args:
        question: the question in words.
        answer: the true answer; None if the state is between the answers.
    """

    question: str
    answer: str | None


@dataclass(frozen=True)
class Facts:
    """The current facts of a scene.

    Args:
        subject: what stands on the table, in one word.
        gripper: position of the point between the fingers.
        opening: opening of the fingers: 1 open, 0 closed.
        things: positions by name, e.g. "button".
        conditions: questions about the states of the things.
    """

    subject: str
    gripper: Thing
    opening: float
    things: Mapping[str, Thing] = field(default_factory=dict)
    conditions: tuple[Condition, ...] = ()


@dataclass(frozen=True)
class Margins:
    """How clear an answer must be for its question to be asked.

    Args:
        image: smallest distance of two things along a side of the image, as a share of it (0.06 is 6 of 96 pixels).
        half: smallest distance from the middle of the image, as a share of its width, to count as in one half.
        near, far: largest and smallest distance from the gripper in metres to count as near and as far.
        nearer: largest ratio of two distances from the gripper for the question of which is nearer.
        open, closed: smallest and largest opening of the gripper to count as open and as closed.
    """

    image: float = 0.06
    half: float = 0.04
    near: float = 0.06
    far: float = 0.15
    nearer: float = 0.6
    open: float = 0.85
    closed: float = 0.45


@dataclass(frozen=True)
class VqaItem:
    """A question of a kind, and its true answer."""

    kind: str
    question: str
    answer: str


KINDS = {
    "what": "what stands on the table",
    "side": "the gripper left or right of a thing, in the image",
    "height": "the gripper above or below a thing, in the image",
    "near": "the gripper near a thing or far from it, in metres",
    "nearer": "which of two things the gripper is nearer to, in metres",
    "state": "open or closed, pressed, lifted",
    "gripper": "the gripper open or closed",
    "count": "how many of gripper and thing are in the left half of the image",
}

USUAL = tuple(kind for kind in KINDS if kind != "gripper")
"""Kinds that are clearly visible in 96 pixels. The fingers are 2 to 8 pixels apart: 74 % accuracy against 99 % elsewhere."""


def facts_of(env: Any) -> Facts:
    """The current facts of an environment's scene.

    Raises:
        CapabilityError: the environment states none.
    """
    if not callable(getattr(env, "facts", None)):
        raise CapabilityError(f"{env.name} does not state facts about its scene, so there are no questions about it.")
    return env.facts()


def ask(facts: Facts, margins: Margins | None = None) -> list[VqaItem]:
    """All questions with a clear answer."""
    margins = margins or Margins()
    found = [VqaItem("what", "What stands on the table?", facts.subject)]
    gripper = facts.gripper
    for name, thing in facts.things.items():
        if not (_in_view(gripper) and _in_view(thing)):
            continue
        right, down = gripper.pixel - thing.pixel
        if abs(right) >= margins.image:
            answer = "right" if right > 0 else "left"
            found.append(VqaItem("side", f"Is the gripper left or right of the {name} in the image?", answer))
        if abs(down) >= margins.image:
            answer = "below" if down > 0 else "above"
            found.append(VqaItem("height", f"Is the gripper above or below the {name} in the image?", answer))
        metres = _distance(gripper, thing)
        if metres <= margins.near or metres >= margins.far:
            answer = "near" if metres <= margins.near else "far"
            found.append(VqaItem("near", f"Is the gripper near the {name} or far from it?", answer))
        across = [each.pixel[0] - 0.5 for each in (gripper, thing)]
        if min(map(abs, across)) >= margins.half:
            answer = ("none", "one", "two")[sum(side < 0 for side in across)]
            found.append(VqaItem("count", f"How many of gripper and {name} are in the left half of the image?", answer))
    names = list(facts.things)
    for first, second in pairwise(names):
        metres_2 = [_distance(gripper, facts.things[name]) for name in (first, second)]
        if min(metres_2) <= margins.nearer * max(metres_2):
            answer = first if metres_2[0] < metres_2[1] else second
            found.append(VqaItem("nearer", f"Is the gripper nearer to the {first} or the {second}?", answer))
    found += [VqaItem("state", each.question, each.answer) for each in facts.conditions if each.answer is not None]
    if not margins.closed < facts.opening < margins.open:
        answer = "open" if facts.opening >= margins.open else "closed"
        found.append(VqaItem("gripper", "Is the gripper open or closed?", answer))
    return found


def _in_view(thing: Thing) -> bool:
    return bool((thing.pixel >= 0).all() and (thing.pixel <= 1).all())


def _distance(a: Thing, b: Thing) -> float:
    return float(np.linalg.norm(a.position - b.position))
