"""From a recipe's name and a data set to a trained checkpoint: what ``vlaflow train`` and ``vlaflow demo`` call."""

from __future__ import annotations

import atexit
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vlaflow.config import to_json
from vlaflow.data.hub import origin
from vlaflow.data.lerobot import Dataset
from vlaflow.data.reading import Reading
from vlaflow.errors import ConfigError
from vlaflow.io import require_makeable
from vlaflow.packages import require
from vlaflow.policies.provenance import READING, reading_of
from vlaflow.policies.recipe import Base, DataSpec, TrainConfig
from vlaflow.training.card import training_lines
from vlaflow.training.options import Options, overridden
from vlaflow.training.pipeline import plan, start_over
from vlaflow.training.precision import training_threads
from vlaflow.training.recipes import Recipe, find_recipe
from vlaflow.training.trainer import Outcome, Trainer
from vlaflow.versions import command_line


def train(
    recipe: str, dataset: Path | str, out: Path | str, *, policy: Path | str | None = None, options: Options | None = None
) -> Outcome:
    """Train by recipe; continues an unfinished run of the same recipe, data and config in ``out``.

    >>> vlaflow.train("asyncvla.demo", "runs/demo/dataset", "runs/demo/policy")
    >>> vlaflow.train("asyncvla.rater", "runs/demo/dataset", "runs/demo/rated", policy="runs/demo/policy")

    Other values go into ``options``: ``vlaflow.training.options.Options({"optim.learning_rate": "3e-4"})``.

    Args:
        recipe: name, e.g. "asyncvla.demo".
        dataset: folder of a LeRobot data set that states an action spec; for a latent action model any with video.
        out: folder of the checkpoint.
        policy: checkpoint to continue, for recipes that need one (raters, later stages).
        options: see ``Options``.

    Raises:
        VlaflowError: whatever the user can fix, in a sentence.
    """
    found, options = find_recipe(recipe), options or Options()
    require("accelerate", "psutil", what="Training")
    require_makeable(Path(out))
    if policy is not None and not found.continues:
        raise ConfigError(f"The recipe '{recipe}' starts from scratch; leave --policy out, or choose one that continues.")
    if policy is None and found.continues:
        raise ConfigError(f"The recipe '{recipe}' continues a trained policy; name its checkpoint with --policy.")
    if found.several:
        return train_pipeline(found, dataset, Path(out), options)
    base = None if policy is None else Base.open(policy)
    options = _with_reading(options, Path(out), base)
    config = found.config(DataSpec.of(dataset, reading=options.reading), base.policy.config if base else None)
    return train_stage(config, dataset, out, name=recipe, base=base, options=options)


def train_pipeline(pipeline: Recipe, dataset: Path | str, out: Path, options: Options) -> Outcome:
    """Every stage of a pipeline, continued where it was left; each gets the checkpoints of the ones before it.

    Overrides name their stage first: {"joint.steps": "500"}.

    Raises:
        VlaflowError: see ``pipeline.plan``; nothing is trained then.
    """
    options = _with_reading(options, out, None)
    stages = plan(pipeline, dataset, out, options)
    if options.fresh:
        start_over(stages)
    made: dict[str, Path] = {}
    for number, stage in enumerate(stages, 1):
        recipe, latent = stage.recipe, made.get("latent") if stage.objective.names_codes else None
        sys.stderr.write(f"Stage {number} of {len(stages)}: {recipe.name} into {stage.folder}\n")
        policy = made.get("policy") if recipe.continues else None
        outcome = train(recipe.name, dataset, stage.folder, policy=policy, options=replace(stage.options, latent=latent))
        if outcome.signal is not None:
            return replace(outcome, more=number < len(stages))
        made[stage.objective.makes] = stage.folder
    return outcome


def train_stage(
    config: TrainConfig,
    dataset: Path | str,
    out: Path | str,
    *,
    name: str,
    base: Base | None = None,
    options: Options | None = None,
) -> Outcome:
    """Train one stage by its config, from scratch or from a policy.

    Args:
        config: what to learn, and how.
        dataset: folder of what to learn from.
        out: folder of the checkpoint.
        name: of the config, for the run's identity and the model card.
        base: the policy to continue, for objectives that need or allow one.
        options: see ``Options``.

    Raises:
        VlaflowError: whatever the user can fix, in a sentence.
    """
    options = _with_reading(options or Options(), Path(out), base)
    assets = options.assets(base)
    config = overridden(config, options.overrides, assets)
    opened = config.objective.open(dataset, options.reading)
    _print_notes(opened.notes)
    if base is not None and Path(out).resolve() == base.folder.resolve():
        raise ConfigError(f"--out and --policy are both {out}; give the new checkpoint a folder of its own.")
    torch.set_num_threads(options.threads or training_threads())
    atexit.unregister(leave_group)
    atexit.register(leave_group)  # once, and not before: a group that was left cannot be joined again
    setup = config.objective.set_up(config, opened, assets)
    _print_notes(opened.row_notes)
    config = replace(config, objective=setup.objective)
    counts = {part: len(episodes) for part, episodes in zip(("train", "held"), config.episodes(opened), strict=True)}
    command = options.command or command_line()

    def card(outcome: Outcome) -> str:
        return setup.card(training_lines(config, outcome, recipe=name, command=command, **counts))

    trainer = Trainer(
        setup.stage,
        config,
        setup.train,
        setup.held,
        out,
        vqa=setup.vqa,
        identity={"recipe": name, "data": opened.fingerprint, **_source(opened), **_recorded(opened.reading), **setup.identity},
        card=card,
        tracker=options.tracker,
        fresh=options.fresh,
        shard=options.shard,
    )
    return replace(trainer.run(), policy=Path(out) if config.objective.makes == "policy" else None)


def _source(dataset: Dataset) -> dict[str, str]:
    """Repository and commit of a data set from the Hub, for the run's record; nothing for a folder, which may be moved."""
    found = origin(dataset.root)
    return {} if found is None else {"source": found}


def _with_reading(options: Options, out: Path, base: Base | None) -> Options:
    """The options with how the data set is read: as given, else as by the run that is continued, else as by the policy."""
    known = options.reading or (None if options.fresh else reading_of(out)) or (reading_of(base.folder) if base else None)
    return replace(options, reading=known)


def _recorded(reading: Reading) -> dict[str, Any]:
    """How the data set was read, for the run's record; nothing where it has LeRobot's names."""
    return {} if reading == Reading() else {READING: to_json(reading)}


def _print_notes(notes: Sequence[str]) -> None:
    for note in notes:
        sys.stderr.write(f"Note: {note}\n")


def leave_group() -> None:
    """End the communication of processes that train together; runs when the process exits.

    A process that exits while the group's threads still run is aborted now and then ("terminate called without an active
    exception"), and its launcher then takes a finished training for a failed one.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
