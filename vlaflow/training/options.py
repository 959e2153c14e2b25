"""What every kind of training run is told and asks: options, overrides, episodes, and how a run begins."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from vlaflow.config import override
from vlaflow.data.exclusions import Exclusions, exclusions
from vlaflow.data.lerobot import Dataset
from vlaflow.data.windows import fewer_episodes, split_episodes
from vlaflow.errors import ConfigError, SpecError
from vlaflow.policies.recipe import DataSpec, TrainConfig, VqaTraining
from vlaflow.spec import ActionSpec
from vlaflow.training.metrics_log import Tracker
from vlaflow.training.trainer import Outcome, Trainer


@dataclass(frozen=True)
class Options:
    """What a run may be told besides recipe, data and place.

    Args:
        overrides: values by dotted key of the ``TrainConfig``, as text: {"optim.learning_rate": "3e-4"}.
        tracker: where the log goes besides ``training/log.jsonl``.
        fresh: start over; an old checkpoint is moved aside.
        command: for the model card; the process's own command line by default.
        vqa: file or folder of a VQA data set for co-training (docs/vqa.md).
        tokenizer: file of a fitted action tokenizer, for decoders of tokens; by default one is fitted.
        latent: folder of a latent action model, for decoders that learn to name its codes.
        threads: CPU threads; by default OMP_NUM_THREADS, or the physical cores.
    """

    overrides: Mapping[str, str] | None = None
    tracker: Tracker = "auto"
    fresh: bool = False
    command: str | None = None
    vqa: Path | str | None = None
    tokenizer: Path | str | None = None
    latent: Path | str | None = None
    threads: int | None = None


def overridden(config: TrainConfig, options: Options | None) -> TrainConfig:
    """The config with the run's own values; a question set brings ``VqaTraining`` along, which they may change."""
    options = options or Options()
    if options.vqa is not None and config.vqa is None and config.policy is not None:
        config = replace(config, vqa=VqaTraining())
    config = override(config, options.overrides) if options.overrides else config
    if config.vqa is not None and options.vqa is None:
        raise ConfigError("This recipe also learns from questions; name a set of them with --vqa, or --set vqa=none.")
    if config.vqa is None and options.vqa is not None and config.policy is not None:
        raise ConfigError(f"vqa is none, so {options.vqa} would not be looked at; leave --vqa out.")
    return config


def data_spec(dataset: Dataset) -> DataSpec:
    """The shape of a data set, as recipes take it.

    Raises:
        SpecError: the data set does not say what its actions mean.
    """
    spec, columns = stated_spec(dataset), dataset.columns()
    return DataSpec(columns.state.shape[1], spec.dim, tuple(dataset.views))


def stated_spec(dataset: Dataset) -> ActionSpec:
    """The data set's action spec.

    Raises:
        SpecError: it states none.
    """
    if dataset.action_spec is None:
        raise SpecError(
            f"{dataset.root} does not say what its actions mean, and a policy must know. "
            f"Add an action spec to its meta/info.json (docs/datasets.md), or open it with Dataset.open(root, action_spec=...)."
        )
    return dataset.action_spec


def episodes_of(dataset: Dataset, config: TrainConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """For training and held out."""
    train_episodes, held_episodes = split_episodes(dataset, config.validation_fraction, config.seed)
    return fewer_episodes(dataset, train_episodes, config.demonstrations, config.seed), held_episodes


def require_enough(config: TrainConfig, dataset: Dataset, chunk_size: int, stage: str = "") -> Exclusions:
    """How much of the training episodes the config's rules leave out of the loss.

    Args:
        config: the rules, and the largest share they may leave out.
        dataset: what to learn from.
        chunk_size: actions per chunk.
        stage: of a pipeline and a dot, before the keys that the error suggests.

    Raises:
        ConfigError: they leave out more.
    """
    found = exclusions(dataset, episodes_of(dataset, config)[0], chunk_size, config.pauses, config.interventions)
    if found.total > config.max_excluded:
        keys = {"pauses": found.paused, "interventions": found.intervened}
        largest = max(keys, key=lambda key: keys[key] or 0.0)
        raise ConfigError(
            f"The rules for pauses and interventions leave {found.total:.1%} of the actions of {dataset.root} out of the loss "
            f"({found.shares}), more than max_excluded = {config.max_excluded:g} allows. Keep these actions with --set "
            f"{stage}{largest}=none, or train on the rest with --set {stage}max_excluded=1."
        )
    return found


def finish(trainer: Trainer) -> Outcome:
    """Run it, saying first what it finds in its folder."""
    if trainer.aside is not None:
        sys.stderr.write(f"The old checkpoint is now {trainer.aside}.\n")
    if 0 < trainer.step < trainer.config.steps:
        sys.stderr.write(f"Continuing after step {trainer.step} of {trainer.config.steps}.\n")
    return trainer.run()
