"""A pipeline before it runs: which stage gets which options, and every mistake that can be found before hours are spent.

All configs are made in advance, each from what the ones before it will leave behind, so a misspelt key of the last stage is
answered at once. What runs a stage is ``run.train_pipeline``.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vlaflow.data.weights import DatasetEntry
from vlaflow.errors import ConfigError, nearest
from vlaflow.packages import packages_of, require
from vlaflow.policies.recipe import DataSpec, EarlierStages, Objective
from vlaflow.training import checkpoint
from vlaflow.training.options import Options, overridden
from vlaflow.training.recipes import Recipe, find_recipe
from vlaflow.training.team import meet


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
            installed, a latent action model given from outside, stages that do not fit together or questions that do not fit a
            stage, a folder that holds another recipe's run.
    """
    stages = overrides_by_stage(pipeline, options.overrides or {})
    names = list(stages)
    if options.latent is not None:
        raise ConfigError(f"'{pipeline.name}' trains a latent action model of its own; leave --latent out.")
    data, earlier, planned = DataSpec.of(*given), EarlierStages(), []
    for name in names:
        recipe, folder = find_recipe(f"{pipeline.system}.{name}"), out if name == names[-1] else out / name
        own = stages[name]
        config = recipe.config(data, earlier.policy)
        assets = config.objective.used_assets(options.assets())
        if own.get("vqa") in ("none", "null"):
            assets = replace(assets, vqa=None)
        if recipe.continues:
            assets = replace(assets, tokenizer=None)
        config = overridden(config, own, assets)
        require(*packages_of(config), what=f"The stage '{name}' of '{pipeline.name}'")
        opened = [config.objective.open(entry.root, entry.reading) for entry in given]
        afterwards = [config.objective.check_plan(config, dataset, assets, earlier, f"{name}.") for dataset in opened]
        earlier = afterwards[-1]
        mine = replace(options, overrides=own, fresh=False, vqa=assets.vqa, tokenizer=assets.tokenizer)
        planned.append(Planned(recipe, folder, mine, config.objective))
    if not options.fresh:
        for found in planned:
            checkpoint.require_run_of(found.folder, found.recipe.name)
    return planned


def overrides_by_stage(pipeline: Recipe, overrides: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Each stage's share of the overrides of a pipeline, by the stage's name, in order: {"joint": {"steps": "500"}}.

    Raises:
        ConfigError: an override that names no stage.
    """
    found: dict[str, dict[str, str]] = {stage.__name__: {} for stage in pipeline.call().stages}
    names = list(found)
    for key, value in overrides.items():
        stage, _, rest = key.partition(".")
        if stage not in found or not rest:
            hint = nearest(stage, names) if rest else f"its stages: {', '.join(names)}"
            raise ConfigError(
                f"'{key}' names no stage of '{pipeline.name}', as --set {names[-1]}.{rest or key}=... would (also in place of "
                f"--steps and --batch-size); {hint}"
            )
        found[stage][rest] = value
    return found


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
