"""What ``vlaflow plan`` estimates: the stages of a recipe with the config, policy and data that ``train`` would give them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vlaflow.config import from_versioned, override
from vlaflow.data.filters import filtered
from vlaflow.data.lerobot import Dataset
from vlaflow.data.weights import DatasetEntry
from vlaflow.data.windows import require_tasks
from vlaflow.errors import ConfigError
from vlaflow.io import read_json
from vlaflow.policies.base import PolicyConfig
from vlaflow.policies.checkpoint import home_of, local_folder
from vlaflow.policies.mixing import longest_chunk
from vlaflow.policies.objectives import PolicyObjective
from vlaflow.policies.recipe import DataSpec, TrainConfig
from vlaflow.training.estimate import TrainingData
from vlaflow.training.pipeline import StageOverrides, opened, overrides_by_stage
from vlaflow.training.recipes import Recipe, find_recipe


def shape_of(given: Sequence[DatasetEntry]) -> TrainingData:
    """What data sets on disk have together, or LIBERO's shape."""
    if not given:
        return TrainingData()
    found = opened_data(given)
    spec = DataSpec.of(*given)  # refuses a data set without a camera
    side = max(max(each.image_size(view)) for each in found for view in each.views)
    return TrainingData(spec, sum(map(len, found)), side)


def opened_data(given: Sequence[DatasetEntry]) -> list[Dataset]:
    """Data sets, whether or not they hold actions."""
    return [Dataset.open(entry.root, video=True, reading=entry.reading) for entry in given]


@dataclass(frozen=True)
class PlannedStage:
    """A stage to estimate.

    Args:
        recipe: its own.
        config: with all changes.
        policy: the one that it continues.
        data: that it learns from.
    """

    recipe: Recipe
    config: TrainConfig
    policy: PolicyConfig | None
    data: TrainingData


def stages(
    recipe: Recipe,
    data: TrainingData,
    given: Sequence[DatasetEntry],
    *,
    checkpoint: Path | None,
    overrides: Mapping[str, str],
) -> list[PlannedStage]:
    """A recipe's stages, each with the policy that the ones before it make.

    Args:
        recipe: of one stage or several.
        data: their shape.
        given: the data sets; none for those that are only a shape.
        checkpoint: a policy to continue.
        overrides: as in ``vlaflow train``; see ``pipeline.overrides_by_stage``.

    Raises:
        ConfigError: it continues a policy, and none is named; or as ``train`` refuses overrides.
    """
    policy = None if checkpoint is None else read_config(checkpoint)
    if recipe.continues and policy is None:
        raise ConfigError(f"'{recipe.name}' continues a trained policy; name its checkpoint with --policy.")
    if recipe.several:
        own = {find_recipe(f"{recipe.system}.{name}"): each for name, each in overrides_by_stage(recipe, overrides).items()}
    else:
        own = {recipe: StageOverrides(overrides, {})}
    found: list[PlannedStage] = []
    for stage, changes in own.items():
        config = configured(stage, data, given, policy=policy, changes=changes)
        found.append(PlannedStage(stage, config, policy, learned_of(data, given, config)))
        policy = config.objective.policy if isinstance(config.objective, PolicyObjective) else policy
    return found


def configured(
    stage: Recipe,
    data: TrainingData,
    given: Sequence[DatasetEntry],
    *,
    policy: PolicyConfig | None,
    changes: StageOverrides,
) -> TrainConfig:
    """A stage's config with all changes, and chunks of the duration that they state; arguments as in ``stages``."""
    config = stage.config(data.spec, policy)
    config = override(config, changes.of(config.objective))
    if config.chunk_s is None:
        return config
    if not given:
        raise ConfigError(
            "How many actions a chunk of so many seconds has follows from the rate of a data set; name one with --dataset, or "
            "leave --chunk-seconds (chunk_s) out."
        )
    datasets = opened(config.objective, given)
    if policy is None:
        return replace(config, objective=config.objective.timed(config, datasets))
    longest, own = longest_chunk(config.chunk_s, datasets), policy.decoder.chunk_size
    if longest != own:
        raise ConfigError(
            f"The chunks of a policy that is continued keep their {own} actions, and {config.chunk_s:g} s are {longest}. Leave "
            "--chunk-seconds (chunk_s) out."
        )
    return config


def learned_of(data: TrainingData, given: Sequence[DatasetEntry], config: TrainConfig) -> TrainingData:
    """The data with the number of frames that a config learns from."""
    found = opened_data(given)
    if config.hold_out_tasks and not found:
        raise ConfigError("Which episodes hold_out_tasks holds out follows from a data set; name one with --dataset.")
    require_tasks(found, config.hold_out_tasks)
    return replace(data, learned=sum(_beginnings(each, config) for each in found)) if found else data


def _beginnings(dataset: Dataset, config: TrainConfig) -> int:
    """How many frames of the training episodes begin a chunk."""
    slices = [dataset.episode_slice(number) for number in config.episodes(dataset)[0]]
    if config.filters is None:
        return sum(rows.stop - rows.start for rows in slices)
    begins_N = ~filtered(dataset, config.filters).no_start_N
    return sum(int(begins_N[rows].sum()) for rows in slices)


def read_config(checkpoint: Path) -> PolicyConfig:
    """The config of a checkpoint; its weights are not read."""
    file = home_of(local_folder(checkpoint)) / "config.json"
    return from_versioned(PolicyConfig, read_json(file), str(file))
