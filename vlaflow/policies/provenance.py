"""Where a checkpoint comes from: its fingerprint, and what it and those before it learned from, so what is new to it.

    trained = trained_on(Path("runs/demo/rated"))       # of the policy first, then of the rater
    new_episodes(Dataset.open("runs/demo/dataset"), trained)    # those that none of them learned from

Training writes it (``training.checkpoint``), evaluation and later stages read it. Where a checkpoint is fetched from is in
``checkpoint``.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from vlaflow.config import from_json, to_json
from vlaflow.data.lerobot import Dataset
from vlaflow.data.quality import INTERVENTIONS, InterventionRule, PauseRule
from vlaflow.data.reading import Reading
from vlaflow.data.vqa import Turns, VqaDataset
from vlaflow.data.windows import split_episodes
from vlaflow.errors import CheckpointError, ConfigError
from vlaflow.io import read_json
from vlaflow.outputs import write_json
from vlaflow.policies.checkpoint import ROBOT, home_of

STATE = "state.json"
RUN = "run.json"
"""The record of the run in a checkpoint that has none of its training states, such as an export."""
READING = "reading"
"""Key of how the data set was read in a run's record."""
IMAGES = "images"
"""Key of how a simulator rendered the data sets' images, there too."""


def fingerprint(folder: Path) -> str:
    """Content hash of a checkpoint's config and weights, with what is kept of its robots, or of the one whose folder it is.

    Raises:
        CheckpointError: a file is missing or cannot be read.
    """
    digest, home = hashlib.sha256(), home_of(folder)
    robots = sorted(folder.glob(ROBOT)) or sorted(folder.glob(f"robots/*/{ROBOT}"))
    for file in (
        home / "config.json",
        *(robots or [home / "action_spec.json", home / "stats.json"]),
        home / "model.safetensors",
    ):
        try:
            digest.update(file.read_bytes())
        except FileNotFoundError as error:
            raise CheckpointError(f"{file} is missing; {file.parent} is not a complete checkpoint.") from error
        except OSError as error:
            raise CheckpointError(
                f"{file} cannot be read ({error.strerror}). Make it readable, or copy the checkpoint."
            ) from error
    return digest.hexdigest()[:16]


def state_folder(folder: Path, step: int) -> Path:
    """Where the training state after so many steps belongs."""
    return folder / "training" / f"step-{step:06d}"


def training_states(folder: Path) -> list[tuple[int, Path]]:
    """Steps and folders of the training states in a checkpoint folder, by step: 9, 10, 100 000, 1 000 000."""
    pattern = re.compile(r"step-(\d+)")
    return sorted((int(m[1]), each) for each in folder.glob("training/step-*") if (m := pattern.fullmatch(each.name)))


def newest_state(folder: Path) -> tuple[int, Path] | None:
    """Step and folder of the newest training state, if there is any."""
    return next(reversed(training_states(folder)), None)


def run_of(folder: Path) -> dict[str, Any]:
    """Recipe, data, config, ... of the run in a checkpoint folder; empty where there is no record of it."""
    home = home_of(folder)
    if found := newest_state(home):
        return read_json(found[1] / STATE).get("run", {})
    return read_json(home / RUN) if (home / RUN).exists() else {}


def keep_run(folder: Path, copy: Path) -> None:
    """Give a copy of a checkpoint without its training states the record of its run, where there is one."""
    if run := run_of(folder):
        write_json(copy / RUN, run, indent=1)


def reading_of(folder: Path, root: Path | str) -> Reading | None:
    """How a data set was read in a checkpoint's training; None where it has LeRobot's names, or nothing is known.

    Args:
        folder: of the checkpoint, or of one of its robots.
        root: the data set; a new one is read like that of the training or, of several, like the first one of the robot.
    """
    run = run_of(folder)
    members = run.get("mixture") or [run]
    stated = [None if READING not in each else from_json(Reading, each[READING], str(folder)) for each in members]
    if all(each == stated[0] for each in stated):
        return stated[0]
    content = Dataset.open(root, video=True).fingerprint
    robot = folder.name if folder != home_of(folder) else None
    ranked = sorted(zip(members, stated, strict=True), key=lambda pair: (pair[0]["data"] != content, pair[0]["robot"] != robot))
    return ranked[0][1]


@dataclass(frozen=True)
class LeftOut:
    """What a training left out of its loss.

    Args:
        pauses, interventions: its rules; see ``recipe.TrainConfig``.
    """

    pauses: PauseRule | None = None
    interventions: InterventionRule | None = INTERVENTIONS


def left_out_by(folder: Path | None) -> LeftOut | None:
    """The rules of a checkpoint's training; None where there is no record of it, as in a copy without ``training/``.

    Args:
        folder: of the checkpoint, or of one of its robots; None for a policy that was never saved.
    """
    config = {} if folder is None else run_of(folder).get("config", {})
    names = [each.name for each in fields(LeftOut)]
    if not all(name in config for name in names):
        return None
    return from_json(LeftOut, {name: config[name] for name in names}, f"the training's record in {folder}")


def mixed_robots(folder: Path) -> list[str]:
    """The robot of each data set of a checkpoint's training, in their order; empty for a policy of one robot."""
    return [each["robot"] for each in run_of(folder).get("mixture", ()) if each["robot"]]


def rendered(dataset: Dataset) -> dict[str, str]:
    """How a simulator rendered a data set's images: {"render": "fast", "metaworld rendering": "fast 2"}; empty for others."""
    found = dataset.provenance
    versions = {key: str(value) for key, value in found.get("versions", {}).items() if key.endswith(" rendering")}
    return {"render": str(found["render"]), **versions} if "render" in found else {}


def images_of(folder: Path) -> list[dict[str, str]]:
    """How the images were rendered that a checkpoint's training learned from; empty where nothing is known."""
    return list(run_of(folder).get(IMAGES, ()))


@dataclass(frozen=True)
class TrainedVqa:
    """The questions of one training.

    Args:
        fingerprint: of the set.
        turns: how its conversations were read.
        held_out: share that was never trained on.
        size: side in pixels at which images were shown to a backbone that looks at any size.
    """

    fingerprint: str
    turns: Turns
    held_out: float
    size: int


@dataclass(frozen=True)
class TrainedOn:
    """What one training learned from.

    Args:
        data: fingerprint of the data set.
        validation_fraction, seed, hold_out_tasks: which of its episodes were held out; see ``split_episodes``.
        vqa: None for none.
    """

    data: str
    validation_fraction: float
    seed: int
    vqa: TrainedVqa | None = None
    hold_out_tasks: tuple[str, ...] = ()


def trained_on(folder: Path) -> tuple[TrainedOn, ...]:
    """What a checkpoint's training and those of the checkpoints that it continues learned from, its own last.

    Empty where the folder does not say, as one that was copied without ``training/``.
    """
    run = run_of(folder)
    return _trained_on(run, f"the training's record in {folder}") if run else ()


def ancestry(folder: Path) -> dict[str, Any]:
    """What a run that continues a checkpoint records about it, so that ``trained_on`` finds it there; JSON data."""
    before = trained_on(folder)
    return {"ancestors": [to_json(each) for each in before]} if before else {}


def new_episodes(dataset: Dataset, trained: Sequence[TrainedOn]) -> tuple[int, ...]:
    """The episodes that no training learned from: those that all trainings on this data set held out."""
    new = set(dataset.numbers)
    for each in trained:
        if each.data == dataset.fingerprint:
            new &= set(split_episodes(dataset, each.validation_fraction, each.seed, each.hold_out_tasks)[1])
    return tuple(sorted(new))


def new_questions(vqa: VqaDataset, turns: Turns, trained: Sequence[TrainedOn], folder: Path) -> tuple[int, ...]:
    """The questions that no training learned from: those that all trainings on this set held out.

    Args:
        vqa: the set.
        turns: how it was opened.
        trained: what was learned from.
        folder: of the checkpoint, for the error.

    Raises:
        ConfigError: a training read the conversations of this set in another way.
    """
    new = set(range(len(vqa)))
    for learned in (each.vqa for each in trained if each.vqa is not None):
        if learned.fingerprint == vqa.fingerprint:
            new &= set(vqa.split(learned.held_out)[1])
        elif learned.turns != turns and learned.fingerprint == VqaDataset.open(vqa.file, learned.turns).fingerprint:
            raise ConfigError(
                f"{folder} learned from {vqa.file} with turns={learned.turns}, so it is unknown which questions are new "
                f"with turns={turns}. Give --turns {learned.turns}, or ask everything with --part all."
            )
    return tuple(sorted(new))


def _trained_on(run: Mapping[str, Any], where: str) -> tuple[TrainedOn, ...]:
    before = tuple(from_json(TrainedOn, each, where) for each in run.get("ancestors", ()))
    learned = from_json(TrainedVqa, run["vqa"], where) if "vqa" in run else None
    data = [each["data"] for each in run["mixture"]] if "mixture" in run else [run["data"]]
    config = run["config"]
    split = config["validation_fraction"], config["seed"], learned, tuple(config.get("hold_out_tasks", ()))
    return (*before, *(TrainedOn(each, *split) for each in data))
