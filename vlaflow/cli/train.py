"""``vlaflow train``: train a checkpoint by recipe; run it again to continue."""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from vlaflow.cli.arguments import ONLINE, HubGroup, parse_arguments
from vlaflow.cli.reading import LEROBOT, ReadingGroup
from vlaflow.errors import ConfigError
from vlaflow.ranges import Count, Positive
from vlaflow.training.recipes import find_recipe, list_recipes

if TYPE_CHECKING:
    from vlaflow.training.trainer import Outcome


@dataclass(frozen=True)
class TrainArguments:
    """Arguments of ``vlaflow train``."""

    recipe: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE")]
    """Which system and stage, e.g. asyncvla.demo; listed below."""
    dataset: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="[NAME=]DIR[:WEIGHT]")]
    """LeRobot data set: a folder, or USER/NAME[@REVISION] on the Hugging Face Hub; repeat it for a
    mixture."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Folder of the checkpoint; an unfinished run there is continued."""
    policy: Annotated[Path | None, tyro.conf.arg(metavar="CKPT")] = None
    """Trained policy to continue, for recipes of raters and of later stages."""
    mixture: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """How data sets without weights are mixed: frames (default), datasets, robots (A1's two levels), asyncvla-oxe."""
    chunk_seconds: Annotated[Positive | None, tyro.conf.arg(metavar="S")] = None
    """Duration of a chunk; each robot's chunk size follows by its rate. By default the recipe's chunk size at any rate."""
    frames: Literal["raw", "jpeg", "stream"] | None = None
    """Where frames come from: a cache of raw ones (default, fastest) or of JPEGs, or a stream, decoded as they are needed."""
    vqa: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    """VQA data set for co-training, for backbones with a language-model head; --set vqa.share=0.5."""
    tokenizer: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Action tokenizer for token decoders: a file of vlaflow data fit-tokenizer, or folder or Hub name of a published FAST
    tokenizer (physical-intelligence/fast); fitted by default."""
    latent: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Latent action model from iflybot.latent, for decoders that predict its codes."""
    steps: Annotated[Count | None, tyro.conf.arg(metavar="N")] = None
    """Optimiser steps, instead of the recipe's."""
    batch_size: Annotated[Count | None, tyro.conf.arg(metavar="N")] = None
    """Observations per step over all processes, instead of the recipe's global_batch_size."""
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="KEY=VALUE")] = ()
    """Change a value of the recipe, e.g. --set optim.learning_rate=3e-4; may be repeated."""
    tracker: Literal["auto", "tensorboard", "wandb", "trackio", "none"] = "auto"
    """Where to log besides training/log.jsonl; auto uses TensorBoard if it is installed."""
    shard: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Several processes share the weights, layer by layer (FSDP2), instead of each holding all."""
    compile: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Compile the loss (torch.compile) for long runs: a minute at the start, then faster steps; needs a C++ compiler."""
    calibrate: bool = True
    """Calibrate the sampler of the finished policy on held-out frames, in a minute at most; see vlaflow calibrate --sampler."""
    fresh: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Start over; an existing checkpoint in --out is moved aside."""
    hold_out_task: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="TASK")] = ()
    """Hold out all episodes of this instruction and no others, to measure new tasks; may be repeated."""
    how: ReadingGroup = LEROBOT
    hub: HubGroup = ONLINE


def main(argv: list[str]) -> int:
    """Run ``vlaflow train ...``; returns the exit status."""
    return status(run(argv))


def status(outcome: Outcome) -> int:
    """Exit status 0 when done, or when SIGTERM ended it with everything saved; 130 after Ctrl-C."""
    return 130 if outcome.signal == signal.SIGINT and not outcome.finished else 0


def run(argv: list[str]) -> Outcome:
    """Train by recipe, as the arguments say, and print the outcome."""
    given = parse_arguments(TrainArguments, "vlaflow train", argv, description=_description())
    overrides = dict(pair(text) for text in given.set)
    for key, value in (
        ("steps", given.steps),
        ("global_batch_size", given.batch_size),
        ("chunk_s", given.chunk_seconds),
        ("frames", given.frames),
    ):
        if value is not None:
            overrides[key] = str(value)

    if given.hold_out_task:
        overrides["hold_out_tasks"] = json.dumps(given.hold_out_task)

    find_recipe(given.recipe)  # a misspelt name fails before torch is imported

    from vlaflow.training.run import Options, entries, train

    datasets = given.how.of_entries(entries(given.dataset))

    options = Options(
        overrides,
        given.tracker,
        given.fresh,
        vqa=given.vqa,
        tokenizer=given.tokenizer,
        latent=given.latent,
        shard=given.shard,
        compiled=given.compile,
        mixture=given.mixture,
    )
    outcome = train(given.recipe, datasets, given.out, policy=given.policy, options=options)
    if os.environ.get("RANK", "0") == "0":  # of several processes, only the first one prints
        sys.stdout.write(_sentence(outcome, given.out) + "\n")
        if given.calibrate and outcome.finished and outcome.policy is not None:
            from vlaflow.evaluation.calibrate_sampler import after_training

            for sentence in after_training(outcome.policy, [entry.root for entry in datasets]):
                sys.stdout.write(f"{sentence}\n")
    return outcome


def _sentence(outcome: Outcome, out: Path) -> str:
    from vlaflow.progress import duration

    if outcome.signal is not None and not outcome.finished:
        return (
            f"Stopped by {signal.Signals(outcome.signal).name} after step {outcome.step} of {outcome.steps}; "
            f"everything is saved in {out}. Run the same command again to continue."
        )
    losses = [f"{name} {value:.4f}" for name, value in (("loss", outcome.loss), ("held out", outcome.validation)) if value]
    early = "" if outcome.best is None else f", no longer improving since step {outcome.best}, whose weights are kept"
    return f"Trained {outcome.step} steps in {duration(outcome.seconds)} ({', '.join(losses)}){early}: {out}"


def pair(text: str) -> tuple[str, str]:
    """Key and value of a ``--set``, with a ``ConfigError`` where there are not both."""
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise ConfigError(f"--set takes KEY=VALUE, e.g. optim.learning_rate=3e-4; got '{text}'.")
    return key, value


def _description() -> str:
    recipes = list_recipes().values()
    width = max((len(recipe.name) for recipe in recipes), default=0)
    listed = "\n\n".join(f"{recipe.name:<{width}}  {recipe.summary}" for recipe in recipes)
    return (
        "Train a policy, or a later stage of one, by recipe. Run the same command again to continue after an interruption.\n\n"
        "Example: vlaflow train asyncvla.demo --dataset runs/demo/dataset --out runs/demo/policy --set optim.learning_rate=5e-4"
        f"\n\nRecipes:\n\n{listed}"
    )
