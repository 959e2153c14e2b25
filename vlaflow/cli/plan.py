"""``vlaflow plan``: what a recipe needs, before it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import tyro

from vlaflow.cli.arguments import ONLINE, HubGroup, parse_arguments
from vlaflow.cli.reading import LEROBOT, ReadingGroup
from vlaflow.errors import ConfigError
from vlaflow.ranges import Count, Positive
from vlaflow.training.recipes import Recipe, find_recipe

if TYPE_CHECKING:
    from rich.console import RenderableType

    from vlaflow.data.lerobot import Dataset
    from vlaflow.data.weights import DatasetEntry
    from vlaflow.policies.base import PolicyConfig
    from vlaflow.policies.recipe import TrainConfig
    from vlaflow.training.estimate import Estimate, TrainingData


@dataclass(frozen=True)
class PlanArguments:
    """Say what a recipe needs: parameters, memory per GPU by part, steps and epochs, cache and hours; and what would fit.

    Example: vlaflow plan asyncvla.libero --gpus 8 --memory 80

    No weights are read or allocated. Nothing is trained.

    Args:
        recipe: which system and stage, as in vlaflow train.
        dataset: plan for this data set, or repeat it for several at once; for one of LIBERO's shape by default.
        policy: checkpoint to continue, for recipes of raters and of later stages; only its config is read.
        gpus: number of GPUs.
        memory: GiB of each GPU.
        tflops: peak of each GPU in bfloat16, dense, in 10¹² operations a second.
        hours: say how many GPUs finish within this time.
        chunk_seconds: duration of a chunk, as in vlaflow train; needs a data set, whose rate decides how many actions that is.
        set: change a value of the recipe, e.g. --set accumulate=32; may be repeated. In a pipeline name the stage: joint.steps.
    """

    recipe: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE")]
    dataset: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="[NAME=]DIR[:WEIGHT]")] = ()
    policy: Annotated[Path | None, tyro.conf.arg(metavar="CKPT")] = None
    gpus: Count = 8
    memory: Positive = 80.0
    tflops: Positive = 989.0
    hours: Positive | None = None
    chunk_seconds: Annotated[Positive | None, tyro.conf.arg(metavar="S")] = None
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="KEY=VALUE")] = ()
    how: ReadingGroup = LEROBOT
    hub: HubGroup = ONLINE


def main(argv: list[str]) -> int:
    """Run ``vlaflow plan ...``; returns the exit status: 1 where nothing that was tried fits."""
    given = parse_arguments(PlanArguments, "vlaflow plan", argv)
    recipe = find_recipe(given.recipe)

    from rich.console import Console

    from vlaflow.cli.train import pair
    from vlaflow.training.estimate import Machine, estimate
    from vlaflow.training.run import entries

    given_data = given.how.of_entries(entries(given.dataset)) if given.dataset else []
    data = shape_of(given_data)
    machine, console = Machine(given.gpus, given.memory, given.tflops), Console()
    fits = True
    overrides = dict(pair(text) for text in given.set)
    seconds = given.chunk_seconds
    for stage in stages(recipe, data, given_data, checkpoint=given.policy, overrides=overrides, chunk_seconds=seconds):
        found = estimate(stage.config, machine, stage.data, stage.policy)
        fits = fits and found.fitting() is not None
        console.print(shown(stage.recipe.name, found, given.hours))
        for entry in given_data:
            console.print(f"To decode the frames beforehand: {cache_command(entry.root, stage.config)}", soft_wrap=True)
    return 0 if fits else 1


def shape_of(given: Sequence[DatasetEntry]) -> TrainingData:
    """What data sets on disk have together, or LIBERO's shape."""
    from vlaflow.policies.recipe import DataSpec
    from vlaflow.training.estimate import TrainingData

    if not given:
        return TrainingData()
    found = opened_data(given)
    spec = DataSpec.of(*given)  # refuses a data set without a camera
    side = max(max(each.image_size(view)) for each in found for view in each.views)
    return TrainingData(spec, sum(map(len, found)), side)


def opened_data(given: Sequence[DatasetEntry]) -> list[Dataset]:
    """Data sets, whether or not they hold actions."""
    from vlaflow.data.lerobot import Dataset

    return [Dataset.open(entry.root, video=True, reading=entry.reading) for entry in given]


class PlannedStage(NamedTuple):
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
    chunk_seconds: float | None,
) -> list[PlannedStage]:
    """A recipe's stages, each with the policy that the ones before it make.

    Args:
        recipe: of one stage or several.
        data: their shape.
        given: the data sets; none for those that are only a shape.
        checkpoint: a policy to continue.
        overrides: as in ``vlaflow train``; of a pipeline each names its stage.
        chunk_seconds: duration of a chunk, for all stages.

    Raises:
        ConfigError: it continues a policy, and none is named; or as ``train`` refuses overrides.
    """
    from vlaflow.policies.objectives import PolicyObjective
    from vlaflow.training.pipeline import overrides_by_stage

    policy = None if checkpoint is None else read_config(checkpoint)
    if recipe.continues and policy is None:
        raise ConfigError(f"'{recipe.name}' continues a trained policy; name its checkpoint with --policy.")
    if recipe.several:
        own = {find_recipe(f"{recipe.system}.{name}"): each for name, each in overrides_by_stage(recipe, overrides).items()}
    else:
        own = {recipe: dict(overrides)}
    found: list[PlannedStage] = []
    for stage, changes in own.items():
        config = configured(stage, data, given, policy=policy, changes=changes, chunk_seconds=chunk_seconds)
        found.append(PlannedStage(stage, config, policy, learned_of(data, given, config)))
        policy = config.objective.policy if isinstance(config.objective, PolicyObjective) else policy
    return found


def configured(
    stage: Recipe,
    data: TrainingData,
    given: Sequence[DatasetEntry],
    *,
    policy: PolicyConfig | None,
    changes: Mapping[str, str],
    chunk_seconds: float | None,
) -> TrainConfig:
    """A stage's config with all changes, and chunks of the duration that they state; arguments as in ``stages``."""
    from vlaflow.config import override
    from vlaflow.training.run import opened

    config = override(stage.config(data.spec, policy), dict(changes))
    if chunk_seconds is not None:
        config = replace(config, chunk_s=chunk_seconds)
    if config.chunk_s is None or policy is not None:
        return config
    if not given:
        raise ConfigError(
            "How many actions a chunk of so many seconds has follows from the rate of a data set; name one with --dataset, or "
            "leave --chunk-seconds (chunk_s) out."
        )
    return replace(config, objective=config.objective.timed(config, opened(config.objective, given)))


def learned_of(data: TrainingData, given: Sequence[DatasetEntry], config: TrainConfig) -> TrainingData:
    """The data with the number of frames that a config learns from."""
    from vlaflow.data.windows import require_tasks

    found = opened_data(given)
    if config.hold_out_tasks and not found:
        raise ConfigError("Which episodes hold_out_tasks holds out follows from a data set; name one with --dataset.")
    require_tasks(found, config.hold_out_tasks)
    slices = [each.episode_slice(number) for each in found for number in config.episodes(each)[0]]
    return replace(data, learned=sum(rows.stop - rows.start for rows in slices)) if found else data


def cache_command(dataset: str, config: TrainConfig) -> str:
    """The command that builds the frame cache of a training stage."""
    size = config.objective.input_size
    options: dict[str, int | str | None] = {"--size": size.side, "--area": None if size.side else size.area}
    if config.frames == "jpeg":
        options["--frames"] = "jpeg"
    return f"vlaflow data cache {dataset}" + "".join(f" {name} {value}" for name, value in options.items() if value)


def read_config(checkpoint: Path) -> PolicyConfig:
    """The config of a checkpoint; its weights are not read."""
    from vlaflow.config import from_json
    from vlaflow.io import read_json
    from vlaflow.policies.base import PolicyConfig
    from vlaflow.policies.checkpoint import local_folder

    file = local_folder(checkpoint) / "config.json"
    data = read_json(file)
    data.pop("vlaflow", None)
    return from_json(PolicyConfig, data, str(file))


def shown(name: str, found: Estimate, hours: float | None) -> RenderableType:
    """Everything in words and one table."""
    from rich import box
    from rich.console import Group
    from rich.table import Table

    from vlaflow.training.estimate import GIB, OVERHEAD, UTILISATION

    c, machine = found.config, found.machine
    grid = Table(
        "GiB per GPU", *(_named(each.shard) for each in found.layouts), box=box.SIMPLE, padding=0, title_justify="left"
    )
    for kind in ("weights", "gradients", "optimizer", "average", "buckets", "activations", "total"):
        values = [getattr(each.memory, kind) for each in found.layouts]
        if any(values):
            grid.add_row(kind, *(f"{value / GIB:.1f}" for value in values))
    grid.add_row("fits?", *("yes" if each.fits(machine.memory) else "no" for each in found.layouts))
    counts, part = found.counts, found.part
    split = f"{machine.gpus} GPU(s) x {c.global_batch_size // machine.gpus // part} part(s) x {part}"
    lines = [
        f"{name}: {counts.parameters:,} parameters, {counts.trained:,} trained.",
        f"{c.steps:,} steps of {c.global_batch_size} observations ({split}), {found.epochs:.1f} epochs of "
        f"{found.learned:,} frames; frame cache up to {found.cache / GIB:.1f} GiB.",
    ]
    speed = f"{100 * UTILISATION:.0f} % of {machine.tflops:g} TFLOP/s per GPU"
    after = [f"About {found.hours:.1f} hours at {speed}."]
    if hours is not None:
        after[0] += f" For {hours:g} hours: {max(-(-found.hours * machine.gpus // hours), 1):.0f} GPUs."
    after.append(answer(found, f"{OVERHEAD / GIB:.0f} GiB of {machine.memory:g} are left for the CUDA context."))
    return Group(*lines, grid, *after)


def _named(shard: bool) -> str:
    return "shared (--shard)" if shard else "copies (DDP)"


def answer(found: Estimate, kept: str) -> str:
    """What fits, in a sentence, followed by another."""
    layout = found.fitting()
    if layout is None:
        return f"Nothing that was tried fits; take a smaller network, freeze parts of it, or take larger GPUs. {kept}"
    parts = found.config.global_batch_size // layout.part
    changed = [
        f"{layout.gpus} GPUs" if layout.gpus > 1 else "1 GPU",
        *(["--shard"] if layout.shard else []),
        *([f"--set accumulate={parts}"] if parts != found.config.parts(layout.gpus) else []),
    ]
    return f"Fits: {', '.join(changed)} ({layout.memory.total / 2**30:.1f} GiB). {kept}"
