"""``vlaflow plan``: what a recipe needs, before it runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from vlaflow.cli.arguments import ONLINE, HubGroup, parse_arguments
from vlaflow.cli.reading import LEROBOT, ReadingGroup
from vlaflow.ranges import Count, Positive
from vlaflow.training.recipes import find_recipe

if TYPE_CHECKING:
    from rich.console import RenderableType

    from vlaflow.policies.recipe import TrainConfig
    from vlaflow.training.estimate import Estimate


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
    from vlaflow.training.planning import shape_of, stages
    from vlaflow.training.run import entries

    given_data = given.how.of_entries(entries(given.dataset)) if given.dataset else []
    data = shape_of(given_data)
    machine, console = Machine(given.gpus, given.memory, given.tflops), Console()
    fits = True
    overrides = dict(pair(text) for text in given.set)
    if given.chunk_seconds is not None:
        overrides["chunk_s"] = str(given.chunk_seconds)
    for stage in stages(recipe, data, given_data, checkpoint=given.policy, overrides=overrides):
        found = estimate(stage.config, machine, stage.data, stage.policy)
        fits = fits and found.fitting() is not None
        console.print(shown(stage.recipe.name, found, given.hours))
        for entry in given_data if stage.config.frames != "stream" else ():
            command = cache_command(entry.root, stage.config) + (entry.reading.options if entry.reading else "")
            console.print(f"To decode the frames beforehand: {command}", soft_wrap=True)
    return 0 if fits else 1


def cache_command(dataset: str, config: TrainConfig) -> str:
    """The command that builds the frame cache of a training stage."""
    size = config.objective.input_size
    options: dict[str, int | str | None] = {"--size": size.side, "--area": None if size.side else size.area}
    if config.frames == "jpeg":
        options["--frames"] = "jpeg"
    return f"vlaflow data cache {dataset}" + "".join(f" {name} {value}" for name, value in options.items() if value)


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
