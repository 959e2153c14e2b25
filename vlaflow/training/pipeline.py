"""A pipeline before it runs: which stage gets which options, and every mistake that can be found before hours are spent.

All configs are made in advance, each from what the ones before it will leave behind, so a misspelt key of the last stage is
answered at once. What runs a stage is ``run.train_pipeline``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vlaflow.actions.latent import LatentConfig
from vlaflow.data.lerobot import Dataset
from vlaflow.data.vqa import VqaDataset
from vlaflow.errors import ConfigError, nearest
from vlaflow.packages import packages_of, require
from vlaflow.policies.base import PolicyConfig
from vlaflow.training import checkpoint
from vlaflow.training.latents import fit_codes, video_spec
from vlaflow.training.options import Options, data_spec, overridden, require_enough
from vlaflow.training.recipes import Recipe, find_recipe
from vlaflow.training.vqa import require_askable


@dataclass(frozen=True)
class Planned:
    """One stage.

    Args:
        recipe: its own.
        folder: of its checkpoint.
        options: its share of the pipeline's; ``latent`` is filled in when there is a model.
        names_codes: whether it learns the codes of a latent action model.
    """

    recipe: Recipe
    folder: Path
    options: Options
    names_codes: bool


def plan(pipeline: Recipe, dataset: Path | str, out: Path, options: Options) -> list[Planned]:
    """The stages of a pipeline, the last one's checkpoint in ``out`` itself, the others' in folders of their names inside it.

    Raises:
        VlaflowError: an override without a stage or of an unknown key, a package that a stage needs and that is not
            installed, a latent action model given from outside, stages that do not fit together or questions that do not fit a
            stage, a folder that holds another recipe's run.
    """
    names = [stage.__name__ for stage in pipeline.call().stages]
    for key in options.overrides or ():
        stage, _, rest = key.partition(".")
        if stage not in names or not rest:
            hint = nearest(stage, names) if rest else f"its stages: {', '.join(names)}"
            raise ConfigError(
                f"'{key}' names no stage of '{pipeline.name}', as --set {names[-1]}.{rest or key}=... would (also in place of "
                f"--steps and --batch-size); {hint}"
            )
    if options.latent is not None:
        raise ConfigError(f"'{pipeline.name}' trains a latent action model of its own; leave --latent out.")
    planned, policy, latent = [], None, None
    for name in names:
        recipe, folder = find_recipe(f"{pipeline.system}.{name}"), out if name == names[-1] else out / name
        own = {k.partition(".")[2]: v for k, v in (options.overrides or {}).items() if k.partition(".")[0] == name}
        mine = replace(options, overrides=own, fresh=False)
        if recipe.from_video or own.get("vqa") in ("none", "null"):
            mine = replace(mine, vqa=None)
        if recipe.from_video or recipe.continues:
            mine = replace(mine, tokenizer=None)
        config = overridden(recipe.call(_given(recipe, dataset, policy)), mine)
        require(*packages_of(config), what=f"The stage '{name}' of '{pipeline.name}'")
        if config.policy is not None and config.vqa is not None and mine.vqa is not None:
            require_askable(config.policy, VqaDataset.open(mine.vqa, config.vqa.turns))
        if config.policy is not None:
            require_enough(config, Dataset.open(dataset), config.policy.decoder.chunk_size, f"{name}.")
        policy, latent = config.policy or policy, config.latent.model if config.latent else latent
        wants = config.policy is not None and _wants(config.policy, latent, name)
        planned.append(Planned(recipe, folder, mine, wants))
    if not options.fresh:
        for found in planned:
            checkpoint.require_run_of(found.folder, found.recipe.name)
    return planned


def start_over(stages: Sequence[Planned]) -> None:
    """Move the whole folder of a pipeline aside, where any of its stages has left something there.

    Together, so that no stage's folder is lost in another's; and before the first stage, when no process reads from it yet.
    """
    from accelerate import Accelerator

    together = Accelerator(mixed_precision="no")
    if together.is_main_process and any(checkpoint.held(stage.folder) for stage in stages):
        for stage in stages:
            checkpoint.require_free(stage.folder)
        sys.stderr.write(f"The old checkpoints are now in {checkpoint.move_aside(stages[-1].folder)}.\n")
    together.wait_for_everyone()


def _given(recipe: Recipe, dataset: Path | str, policy: PolicyConfig | None) -> object:
    """What the recipe is a function of."""
    if recipe.continues:
        return policy
    return video_spec(Dataset.open(dataset, video=True)) if recipe.from_video else data_spec(Dataset.open(dataset))


def _wants(policy: PolicyConfig, latent: LatentConfig | None, stage: str) -> bool:
    wanted = policy.decoder.latent_codes
    if wanted is not None and latent is not None:
        fit_codes(latent, wanted, "The latent action model of this pipeline", f"{stage}.")
    return wanted is not None
