"""The robots of a policy that was trained on several: what their actions mean, and how their numbers are normalised.

    CKPT/action_spec.json, stats.json                    of one robot
    CKPT/robots.json, robots/NAME/robot.json, ...        of several: their names in order, and a folder for each

A robot's folder is a checkpoint as well: the networks are those of the checkpoint that it lies in, and its calibrations are its
own. So whatever takes a checkpoint takes ``CKPT/robots/NAME``.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from vlaflow.config import from_json, to_json
from vlaflow.data.stats import FeatureStats
from vlaflow.data.transforms import Normalizer
from vlaflow.errors import CheckpointError, ConfigError, nearest
from vlaflow.io import read_json
from vlaflow.outputs import write_json
from vlaflow.policies.checkpoint import ROBOT, local_folder
from vlaflow.policies.policy_config import Normalisation, PolicyConfig
from vlaflow.spec import ActionSpec
from vlaflow.strict import require_form
from vlaflow.text import shown

FILE, FOLDER = "robots.json", "robots"
_AGAIN = "They belong to different checkpoints; copy the whole folder again."


@dataclass(frozen=True)
class RobotNames:
    """The content of ``robots.json``."""

    robots: tuple[str, ...]


@dataclass(frozen=True)
class Robot:
    """One robot of a policy.

    Args:
        action_spec: what its actions mean, with the length of its chunks.
        stats: statistics of "state" and "action" in its training data, for normalisation.
        views: the views that its training data have, of those that the policy looks at. An observation must have them; the
            policy's other views are hidden.
        image_size: side in pixels that images had in training, where the backbone takes any; None for those of the data.
        normalisation: of its numbers, where it differs from other robots'.
    """

    action_spec: ActionSpec
    stats: dict[str, FeatureStats]
    views: tuple[str, ...]
    image_size: int | None = None
    normalisation: Normalisation = field(default_factory=Normalisation)

    def normalizers(self, config: PolicyConfig) -> tuple[Normalizer, Normalizer]:
        """Of its state and its actions, in a policy of this config."""
        own = config.normalised_as(self.normalisation)
        return own.state_normalizer(self.stats), own.action_normalizer(self.stats, self.action_spec)


def chosen_robot(robots: Mapping[str, Robot], name: str | None, where: str) -> str | None:
    """The name of the robot that a policy is to act for; None where the policy has only one.

    Args:
        robots: by name; empty for a policy of one robot.
        name: as the user gave it: its name, or the robot in its action spec. None when nothing was given.
        where: the checkpoint, for messages.

    Raises:
        ConfigError: a policy of several robots without a choice, or of none of this name.
    """
    if not robots:
        if name is not None:
            raise ConfigError(f"{where} was trained for one robot, so there is none to choose; leave --robot {name} out.")
        return None
    if name is None and len(robots) == 1:
        return next(iter(robots))
    known = ", ".join(f"'{each}' ({robot.action_spec.robot})" for each, robot in robots.items())
    if name is None:
        raise ConfigError(
            f"{where} was trained for several robots; choose one with --robot: {known}. Commands without this option take the "
            f"robot's folder, such as {where}/{FOLDER}/{next(iter(robots))}."
        )
    found = [each for each, robot in robots.items() if name in (each, robot.action_spec.robot)]
    if not found:
        raise ConfigError(
            f"{where} was not trained for a robot '{name}'; {nearest(name, robots).removesuffix('?')}. It knows {known}."
        )
    return found[0]


def robot_folder(path: Path | str, robot: str | None) -> Path:
    """The folder of a checkpoint or, where it was trained for several robots, of the chosen one.

    Args:
        path: as ``checkpoint.local_folder`` takes it; the folder of a robot needs no choice.
        robot: as the user chose it; None for no choice.

    Raises:
        CheckpointError: there is none.
        ConfigError: see ``chosen_robot``.
    """
    folder = local_folder(path)
    if not (folder / FILE).exists() and robot is None:
        return folder
    several = read_robots(folder)[2] if (folder / FILE).exists() else {}
    name = chosen_robot(several, robot, str(path))
    return folder if name is None else folder / FOLDER / name


def write_robots(folder: Path, action_spec: ActionSpec, stats: Mapping[str, FeatureStats], robots: Mapping[str, Robot]) -> None:
    """Write the files of the only robot or, where there are several, of all of them."""
    if not robots:
        write_json(folder / "action_spec.json", to_json(action_spec))
        write_json(folder / "stats.json", {name: to_json(s) for name, s in stats.items()})
        return
    for name, robot in robots.items():
        (folder / FOLDER / name).mkdir(parents=True, exist_ok=True)
        write_json(folder / FOLDER / name / ROBOT, to_json(robot))
    write_json(folder / FILE, {"robots": list(robots)})


def keep_robot(folder: Path, name: str) -> None:
    """Remove the files of all other robots from a checkpoint, which then acts for this one without a choice."""
    for other in read_json(folder / FILE)["robots"]:
        if other != name:
            shutil.rmtree(folder / FOLDER / other)
    write_json(folder / FILE, {"robots": [name]})


def read_robots(
    folder: Path, config: PolicyConfig | None = None
) -> tuple[ActionSpec, Mapping[str, FeatureStats], dict[str, Robot]]:
    """What ``write_robots`` wrote: the first robot's action spec and statistics, and all robots where there are several.

    Args:
        folder: of the checkpoint.
        config: of the checkpoint, to compare them with.

    Raises:
        CheckpointError: a missing file, or statistics that cannot be used or belong to another config.
    """
    if (folder / FILE).exists():
        robots = {}
        listed = read_json(folder / FILE)
        require_form(RobotNames, listed, str(folder / FILE), CheckpointError)
        for name in listed["robots"]:
            if not name or "/" in name or name in (".", ".."):
                raise CheckpointError(f"{folder / FILE} names a robot {shown(name)}, which no folder can have as its name.")
            file = folder / FOLDER / name / ROBOT
            robots[name] = from_json(Robot, read_json(file), str(file))
            _require_sound(robots[name].stats, file)
        if not robots:
            raise CheckpointError(f"{folder / FILE} names no robot; the file is damaged.")
        if config is not None:
            _require_matching(robots, config, folder)
        first = next(iter(robots.values()))
        return first.action_spec, first.stats, robots
    spec_file, file = folder / "action_spec.json", folder / "stats.json"
    action_spec = from_json(ActionSpec, read_json(spec_file), str(spec_file))
    stats = {name: from_json(FeatureStats, data, str(file)) for name, data in read_json(file).items()}
    _require_sound(stats, file)
    if config is not None:
        _require_matching({"": Robot(action_spec, stats, ())}, config, folder)
    return action_spec, stats, {}


def _require_matching(robots: Mapping[str, Robot], config: PolicyConfig, folder: Path) -> None:
    """Refuse action specs and statistics that are not those of a checkpoint's config, as of a file copied from elsewhere.

    Args:
        robots: by name; the only one has none.
        config: of the checkpoint.
        folder: of the checkpoint.

    Raises:
        CheckpointError: naming the file.
    """
    steps, width = config.decoder.chunk_size, config.backbone.state_dim
    for name, robot in robots.items():
        where = folder / FOLDER / name / ROBOT if name else folder / "stats.json"
        spec, state, action = robot.action_spec, robot.stats["state"].dim, robot.stats["action"].dim
        if (spec.chunk_size or steps) > steps:
            where = where if name else folder / "action_spec.json"
            raise CheckpointError(f"{where} names chunks of {spec.chunk_size} actions, but config.json of {steps}. {_AGAIN}")
        if action != spec.dim:
            raise CheckpointError(f"{where} holds statistics of {action} action dimensions; the robot has {spec.dim}. {_AGAIN}")
        if state > width or (state < width and not name):
            raise CheckpointError(
                f"{where} holds statistics of a state of {state} numbers, but config.json says {width}. {_AGAIN}"
            )


def _require_sound(stats: Mapping[str, FeatureStats], file: Path) -> None:
    for feature in {"state", "action"} - stats.keys():
        raise CheckpointError(f"{file} holds no statistics of '{feature}'; the file is damaged. Copy it again.")
    for feature, measured in stats.items():
        measured.require_sound(f"'{feature}' in {file}")
