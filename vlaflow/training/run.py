"""From a recipe's name and a data set to a trained checkpoint: what ``vlaflow train`` and ``vlaflow demo`` call."""

from __future__ import annotations

import atexit
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vlaflow.data.lerobot import Dataset
from vlaflow.data.reading import Reading
from vlaflow.data.weights import DatasetEntry
from vlaflow.errors import ConfigError
from vlaflow.hub import origin
from vlaflow.nn.stored import read_here, shared_later
from vlaflow.outputs import require_makeable
from vlaflow.packages import require
from vlaflow.policies.acting import as_trained
from vlaflow.policies.mixing import combined_fingerprint, read_as
from vlaflow.policies.provenance import IMAGES, reading_of, rendered
from vlaflow.policies.recipe import Base, DataSpec, OpenedDataset, TrainConfig
from vlaflow.text import one_line
from vlaflow.training.card import training_lines
from vlaflow.training.options import Options, overridden
from vlaflow.training.outcome import Outcome
from vlaflow.training.pipeline import opened, overrides_by_stage, plan, require_data, start_over
from vlaflow.training.precision import training_threads
from vlaflow.training.recipes import Recipe, find_recipe
from vlaflow.training.team import launched
from vlaflow.training.trainer import Trainer
from vlaflow.versions import command_line

Datasets = Path | str | DatasetEntry | Sequence[Path | str | DatasetEntry]
"""One data set or several, as on a command line (``DatasetEntry.parse``)."""


def train(
    recipe: str, dataset: Datasets, out: Path | str, *, policy: Path | str | None = None, options: Options | None = None
) -> Outcome:
    """Train by recipe; continues an unfinished run of the same recipe, data and config in ``out``.

    >>> vlaflow.train("asyncvla.demo", "runs/demo/dataset", "runs/demo/policy")
    >>> vlaflow.train("asyncvla.rater", "runs/demo/dataset", "runs/demo/rated", policy="runs/demo/policy")

    Other values go into ``options``: ``vlaflow.training.options.Options({"optim.learning_rate": "3e-4"})``.

    Args:
        recipe: name, e.g. "asyncvla.demo".
        dataset: folder of a LeRobot data set; for a latent action model any with video. Several are
            mixed by weight, written as for ``--dataset``: ["data/droid:0.7", "aloha=data/two_arms:0.3"].
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
    with sharing(options):
        base = None if policy is None else Base.open(policy)
    given = as_read(entries(dataset), options, [Path(out)], base)
    config = found.config(DataSpec.of(*given), base.policy.config if base else None)
    return train_stage(config, given, out, name=recipe, base=base, options=options)


def train_pipeline(pipeline: Recipe, dataset: Datasets, out: Path, options: Options) -> Outcome:
    """Every stage of a pipeline, continued where it was left; each gets the checkpoints of the ones before it.

    Overrides name their stage first, {"joint.steps": "500"}, but for those of all stages (``pipeline.SHARED``).

    Raises:
        VlaflowError: see ``pipeline.plan``; nothing is trained then.
    """
    folders = [out, *(out / name for name in overrides_by_stage(pipeline, {}))]
    given = as_read(entries(dataset), options, folders, None)
    stages = plan(pipeline, given, out, options)
    if options.fresh:
        start_over(stages)
    made: dict[str, Path] = {}
    for number, stage in enumerate(stages, 1):
        recipe, latent = stage.recipe, made.get("latent") if stage.objective.names_codes else None
        sys.stderr.write(f"Stage {number} of {len(stages)}: {recipe.name} into {stage.folder}\n")
        policy = made.get("policy") if recipe.continues else None
        outcome = train(recipe.name, given, stage.folder, policy=policy, options=replace(stage.options, latent=latent))
        if outcome.signal is not None:
            return replace(outcome, more=number < len(stages))
        made[stage.objective.makes] = stage.folder
    return outcome


def train_stage(
    config: TrainConfig,
    dataset: Datasets,
    out: Path | str,
    *,
    name: str,
    base: Base | None = None,
    options: Options | None = None,
) -> Outcome:
    """Train one stage by its config, from scratch or from a policy.

    Args:
        config: what to learn, and how.
        dataset: folder of what to learn from, or several; see ``train``.
        out: folder of the checkpoint.
        name: of the config, for the run's identity and the model card.
        base: the policy to continue, for objectives that need or allow one.
        options: see ``Options``.

    Raises:
        VlaflowError: whatever the user can fix, in a sentence.
    """
    options = options or Options()
    given = as_read(entries(dataset), options, [Path(out)], base)
    assets = options.assets(base)
    config = overridden(config, options.overrides, assets, options.mixture)
    datasets = opened(config.objective, given)
    _print_notes(datasets, lambda each: each.notes)
    if base is not None:
        config = as_trained(config, base, combined_fingerprint(datasets), options.overrides or ())
    require_data(config, datasets)
    if base is not None and Path(out).resolve() == base.folder.resolve():
        raise ConfigError(f"--out and --policy are both {out}; give the new checkpoint a folder of its own.")
    torch.set_num_threads(options.threads or training_threads())
    atexit.unregister(leave_group)
    atexit.register(leave_group)  # once, and not before: a group that was left cannot be joined again
    by_rows = config.objective.reads_rows and config.lora is None
    if base is not None and not by_rows:
        read_here(base.policy.model)
    with sharing(options) if by_rows else nullcontext():
        if len(datasets) == 1:
            setup = config.objective.set_up(config, datasets[0].dataset, assets)
        else:
            setup = config.objective.set_up_several(config, datasets, assets)
    _print_notes(datasets, lambda each: each.row_notes)
    config = replace(config, objective=setup.objective)
    divided = [config.episodes(each.dataset) for each in datasets]
    counts = {name: sum(len(parts[place]) for parts in divided) for place, name in enumerate(("train", "held"))}
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
        validation_each=setup.held_each,
        order=setup.order,
        identity={"recipe": name, "data": combined_fingerprint(datasets), **_recorded(datasets), **setup.identity},
        card=card,
        tracker=options.tracker,
        fresh=options.fresh,
        shard=options.shard,
        compiled=options.compiled,
    )
    return replace(trainer.run(), policy=Path(out) if config.objective.makes == "policy" else None)


def sharing(options: Options) -> AbstractContextManager[None]:
    """A context for networks that processes are about to share (``nn.stored``), if they are."""
    rank, world = launched()
    return shared_later(rank == 0 if options.shard and world > 1 else None)


def entries(dataset: Datasets) -> list[DatasetEntry]:
    """The data sets of a training, one or several.

    Raises:
        ConfigError: there is none, or one that cannot be read.
    """
    given = [dataset] if isinstance(dataset, str | Path | DatasetEntry) else list(dataset)
    if not given:
        raise ConfigError("There is no data set to train on; give at least one.")
    return [each if isinstance(each, DatasetEntry) else DatasetEntry.parse(str(each)) for each in given]


def _recorded(datasets: Sequence[OpenedDataset]) -> dict[str, Any]:
    """For the run's record: repository and commit of data sets from the Hub, but no folders, which may be moved; how the only
    one was read, where it does not have LeRobot's names (of several, ``mixture_identity`` says so); and how a simulator
    rendered their images.
    """
    images = [rendered(each.dataset) for each in datasets]
    images = [each for number, each in enumerate(images) if each and each not in images[:number]]
    found = [source for each in datasets if (source := origin(each.dataset.root)) is not None]
    stated = read_as(datasets[0].dataset) if len(datasets) == 1 else {}
    stated = {**stated, IMAGES: images} if images else stated
    return {"source": ", ".join(found), **stated} if found else stated


def as_read(given: Sequence[DatasetEntry], options: Options, folders: Sequence[Path], base: Base | None) -> list[DatasetEntry]:
    """Data sets with how each is read: as given, else as by what is continued, a run in these folders or the policy."""
    continued = [] if options.fresh else [*folders]
    if base is not None:
        continued.append(base.folder)

    def known(entry: DatasetEntry) -> Reading | None:
        stated = (reading_of(folder, entry.root) for folder in continued)
        return entry.reading or options.reading or next((reading for reading in stated if reading is not None), None)

    return [replace(entry, reading=known(entry)) for entry in given]


def _print_notes(datasets: Sequence[OpenedDataset], notes: Callable[[Dataset], Iterable[str]]) -> None:
    for each in datasets:
        before = f"{each.label}: " if len(datasets) > 1 else ""
        for note in notes(each.dataset):
            sys.stderr.write(f"Note: {before}{one_line(note)}\n")


def leave_group() -> None:
    """End the communication of processes that train together; runs when the process exits.

    A process that exits while the group's threads still run is aborted now and then ("terminate called without an active
    exception"), and its launcher then takes a finished training for a failed one.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
