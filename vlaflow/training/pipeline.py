"""A pipeline before it runs: which stage gets which options, and every mistake that can be found before hours are spent.

All configs are made in advance, each from what the ones before it will leave behind, so a misspelt key of the last stage is
answered at once. What runs a stage is ``run.train_pipeline``.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vlaflow.data.weights import DatasetEntry, Member, weights_of
from vlaflow.data.windows import require_tasks
from vlaflow.errors import ConfigError, nearest
from vlaflow.packages import packages_of, require
from vlaflow.policies.dry_run import unlike
from vlaflow.policies.mixing import labels
from vlaflow.policies.policy_config import PolicyConfig
from vlaflow.policies.recipe import DataSpec, EarlierStages, Objective, OpenedDataset, TrainConfig
from vlaflow.training import checkpoint
from vlaflow.training.options import Options, overridden
from vlaflow.training.recipes import Recipe, find_recipe
from vlaflow.training.team import meet

SHARED = ("chunk_s", "frames", "hold_out_tasks", "seed", "validation_fraction")
"""Keys about the data that all stages learn from: without a stage's name they are meant for every stage."""


@dataclass(frozen=True)
class StageOverrides:
    """What a command line changes in one stage.

    Args:
        own: by the stage's keys.
        shared: of all stages, by keys of ``SHARED``; the stage's own go before these.
    """

    own: Mapping[str, str]
    shared: Mapping[str, str]

    def of(self, objective: Objective) -> dict[str, str]:
        """Those that concern a stage that learns this: only policies have chunks."""
        chunks = objective.makes == "policy"
        return {**{key: value for key, value in self.shared.items() if chunks or key != "chunk_s"}, **self.own}


@dataclass(frozen=True)
class Planned:
    """One stage.

    Args:
        recipe: its own.
        folder: of its checkpoint.
        options: its share of the pipeline's; ``latent`` is filled in when there is a model.
        objective: what it learns.
    """

    recipe: Recipe
    folder: Path
    options: Options
    objective: Objective


def plan(pipeline: Recipe, given: Sequence[DatasetEntry], out: Path, options: Options) -> list[Planned]:
    """The stages of a pipeline on these data sets.

    The last one's checkpoint lies in ``out`` itself, the others' in folders of their names inside it.

    Raises:
        VlaflowError: an override without a stage or of an unknown key, a package that a stage needs and that is not
            installed, a latent action model given from outside, stages that do not fit together, data or questions that do not
            fit a stage, a folder that holds another recipe's run.
    """
    stages = overrides_by_stage(pipeline, options.overrides or {})
    names = list(stages)
    if options.latent is not None:
        raise ConfigError(f"'{pipeline.name}' trains a latent action model of its own; leave --latent out.")
    data, earlier, planned = DataSpec.of(*given), EarlierStages(), []
    duration: float | None = None  # of the policy's chunks
    for name in names:
        recipe, folder = find_recipe(f"{pipeline.system}.{name}"), out if name == names[-1] else out / name
        config = recipe.config(data, earlier.policy)
        own = stages[name].of(config.objective)
        assets = config.objective.used_assets(options.assets())
        if own.get("vqa") in ("none", "null"):
            assets = replace(assets, vqa=None)
        if recipe.continues:
            assets = replace(assets, tokenizer=None)
        config = overridden(config, own, assets, options.mixture)
        require(*packages_of(config), what=f"The stage '{name}' of '{pipeline.name}'")
        datasets = opened(config.objective, given)
        require_data(config, datasets)
        if recipe.continues and config.chunk_s not in (None, duration):
            raise ConfigError(
                f"The stage '{name}' continues a policy whose chunks keep their duration, so {name}.chunk_s={config.chunk_s:g} "
                f"has no effect. State it for all stages: --chunk-seconds {config.chunk_s:g}"
            )
        if not recipe.continues:
            config = replace(config, objective=config.objective.timed(config, datasets))
            duration = config.chunk_s
        before = earlier if recipe.continues else replace(earlier, policy=None)
        afterwards = [config.objective.check_plan(config, each.dataset, assets, before, f"{name}.") for each in datasets]
        if before.policy is not None and afterwards[-1].policy is not None:
            require_networks(afterwards[-1].policy, before.policy, name)
        earlier = replace(afterwards[-1], policy=afterwards[-1].policy or earlier.policy)
        mine = replace(options, overrides=own, fresh=False, vqa=assets.vqa, tokenizer=assets.tokenizer)
        planned.append(Planned(recipe, folder, mine, config.objective))
    if not options.fresh:
        for found in planned:
            checkpoint.require_run_of(found.folder, found.recipe.name)
    return planned


def require_networks(policy: PolicyConfig, before: PolicyConfig, stage: str) -> None:
    """Refuse a stage whose networks could not start from the weights of the stage before; none are made or read for this.

    Raises:
        ConfigError: naming a weight that differs.
    """
    same = (policy.backbone, policy.decoder, policy.exits) == (before.backbone, before.decoder, before.exits)
    if not same and (difference := unlike(policy, before)):
        raise ConfigError(
            f"The networks of '{stage}' are not those of the stage before ({difference}), so they cannot start from its "
            f"weights. Leave out the --set {stage}.policy... that changes them, or set the same in the stage before."
        )


def overrides_by_stage(pipeline: Recipe, overrides: Mapping[str, str]) -> dict[str, StageOverrides]:
    """Each stage's share of the overrides of a pipeline, by the stage's name, in order: {"joint.steps": "500", "seed": "1"}.

    Raises:
        ConfigError: an override that names no stage and is not of ``SHARED``.
    """
    found: dict[str, dict[str, str]] = {stage.__name__: {} for stage in pipeline.call().stages}
    names, shared = list(found), {}
    for key, value in overrides.items():
        stage, _, rest = key.partition(".")
        if key in SHARED:
            shared[key] = value
        elif stage in found and rest:
            found[stage][rest] = value
        else:
            hint = nearest(stage, names) if rest else f"its stages: {', '.join(names)}"
            raise ConfigError(
                f"'{key}' names no stage of '{pipeline.name}', as --set {names[-1]}.{rest or key}=... would (also in place of "
                f"--steps and --batch-size); {hint}"
            )
    return {name: StageOverrides(own, shared) for name, own in found.items()}


def opened(objective: Objective, given: Sequence[DatasetEntry]) -> list[OpenedDataset]:
    """All data sets, opened as the objective needs them."""
    names = labels([entry.name for entry in given], [entry.root for entry in given])
    return [
        OpenedDataset(entry, objective.open(entry.root, entry.reading), label)
        for entry, label in zip(given, names, strict=True)
    ]


def require_data(config: TrainConfig, datasets: Sequence[OpenedDataset]) -> None:
    """Refuse a config that data sets cannot be mixed or divided by.

    Raises:
        ConfigError: weights that are missing, a held-out instruction that none has, or nothing left to train on.
    """
    if len(datasets) > 1:
        weights_of([Member(each.entry, each.entry.name, 1) for each in datasets], config.mixture)
    require_tasks([each.dataset for each in datasets], config.hold_out_tasks)
    for each in datasets:
        config.episodes(each.dataset)


def start_over(stages: Sequence[Planned]) -> None:
    """Move the whole folder of a pipeline aside, where any of its stages has left something there.

    Together, so that no stage's folder is lost in another's; and before the first stage, when no process reads from it yet.
    """
    together = meet()
    if together.is_main_process and any(checkpoint.held(stage.folder) for stage in stages):
        for stage in stages:
            checkpoint.require_free(stage.folder)
        sys.stderr.write(f"The old checkpoints are now in {checkpoint.move_aside(stages[-1].folder)}.\n")
    together.wait_for_everyone()
