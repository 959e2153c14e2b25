"""How much each of several data sets counts in training: stated weights, or a rule that balances them.

    entries = [DatasetEntry.parse("droid=data/droid:0.7"), DatasetEntry.parse("data/aloha:0.3")]

A rule divides the samples evenly among groups, those of a group among smaller groups, and so on down to frames.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from vlaflow.data.reading import Reading
from vlaflow.errors import ConfigError, nearest

Balance = Literal["frames", "datasets", "robots"]


@dataclass(frozen=True)
class DatasetEntry:
    """One data set to train on.

    Args:
        root: folder of a LeRobot data set, or what opens one.
        name: in messages, logs and the checkpoint. Entries of one name are parts of one data set, for instance by robot.
        weight: its share, relative to the others'; None leaves it to the ``Mixture``.
        reading: names of its columns and cameras; None for those of the training that is continued, else LeRobot's.
    """

    root: str
    name: str
    weight: float | None = None
    reading: Reading | None = None

    @staticmethod
    def parse(text: str) -> DatasetEntry:
        """As on a command line: ``PATH``, ``PATH:WEIGHT``, ``NAME=PATH`` or ``NAME=PATH:WEIGHT``; a path that exists wins.

        Raises:
            ConfigError: a weight that is no positive number, or an empty name or path.
        """
        name, root, weight = "", text, None
        if not Path(root).exists():
            before, equals, after = root.partition("=")
            if equals:
                name, root = before, after
            before, colon, after = root.rpartition(":")
            if colon and not after.startswith("//") and not Path(root).exists():  # else the colon of "hf://USER/NAME"
                root, weight = before, _weight(after, text)
            name = name or Path(root).name.partition("@")[0]  # a revision on the Hub is no part of the name
        name = name or Path(root).name or Path(root).resolve().name
        if not name or not root:
            raise ConfigError(f"--dataset takes DIR, DIR:WEIGHT or NAME=DIR:WEIGHT, got '{text}'.")
        return DatasetEntry(root, name, weight)


def _weight(text: str, whole: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise ConfigError(f"'{text}' in --dataset {whole} is no positive weight; write for instance DIR:0.7.")
    return weight


@dataclass(frozen=True)
class Mixture:
    """How several data sets share the samples of a step.

    Args:
        balance: "frames": every frame counts the same, so larger data sets give more samples; "datasets": every data set counts
            the same; "robots": every data set counts the same, and within one every robot does (A1's two levels). Frames
            share what their group gets.
        weights: of data sets by name, relative to each other; a data set that is not among them is refused. They go before
            ``balance``.
    """

    balance: Balance = "frames"
    weights: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if any(not 0 < weight < math.inf for weight in self.weights.values()):
            raise ConfigError(f"Every weight of a mixture must be a positive number, got {self.weights}.")


@dataclass(frozen=True)
class Member:
    """What the weight of one data set depends on.

    Args:
        entry: as given.
        robot: its robot.
        samples: how many it has.
    """

    entry: DatasetEntry
    robot: str
    samples: int


def weights_of(members: Sequence[Member], mixture: Mixture) -> list[float]:
    """The weight of every member; they add up to 1.

    Raises:
        ConfigError: some of several have a weight and others have none, or a name that the mixture lacks.
    """
    stated = [member.entry.weight for member in members if member.entry.weight is not None]
    if stated and len(stated) < len(members):
        without = next(member.entry for member in members if member.entry.weight is None)
        raise ConfigError(f"Data set {without.root} has no weight, but others have; write --dataset {without.root}:WEIGHT.")
    if stated:
        return [weight / sum(stated) for weight in stated]
    names = [member.entry.name for member in members]
    if mixture.weights:
        for name in names:
            if name not in mixture.weights:
                hint = nearest(name, mixture.weights).removesuffix("?")
                raise ConfigError(
                    f"The mixture has no weight for a data set '{name}'; {hint}. Give every data set a name that it has: "
                    "--dataset NAME=DIR"
                )
        total = sum(mixture.weights[name] for name in dict.fromkeys(names))
        within = _shared(members, names)
        return [mixture.weights[name] / total * share for name, share in zip(names, within, strict=True)]
    if mixture.balance == "frames":
        return _shared(members, [""] * len(members))
    count = len(set(names))
    if mixture.balance == "datasets":
        return [share / count for share in _shared(members, names)]
    groups = [(member.entry.name, member.robot) for member in members]
    robots = {name: len({robot for other, robot in groups if other == name}) for name in names}
    within = _shared(members, groups)
    return [share / robots[name] / count for share, name in zip(within, names, strict=True)]


def _shared(members: Sequence[Member], groups: Sequence[object]) -> list[float]:
    """Each member's share of its group, by samples."""
    totals: dict[object, int] = {}
    for member, group in zip(members, groups, strict=True):
        totals[group] = totals.get(group, 0) + member.samples
    return [member.samples / totals[group] for member, group in zip(members, groups, strict=True)]


NAMED: dict[str, Mixture] = {
    "frames": Mixture(),
    "datasets": Mixture("datasets"),
    "robots": Mixture("robots"),
    "asyncvla-oxe": Mixture(
        weights={
            "bridge": 24.14,
            "rt1": 13.80,
            "toto": 10.34,
            "viola": 10.34,
            "roboturk": 10.34,
            "jaco_play": 10.34,
            "berkeley_autolab_ur5": 10.34,
            "berkeley_fanuc_manipulation": 10.34,
        }
    ),
}
"""Mixtures by name; "robots" is A1's two levels, "asyncvla-oxe" AsyncVLA's subset of Open X-Embodiment (its Table 5)."""


def named_mixture(name: str) -> Mixture:
    """A mixture of ``NAMED``.

    Raises:
        ConfigError: there is none of this name.
    """
    if name not in NAMED:
        raise ConfigError(f"There is no mixture '{name}'; {nearest(name, NAMED)}")
    return NAMED[name]
