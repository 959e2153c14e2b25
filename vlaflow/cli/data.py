"""``vlaflow data ...``: check and show data sets, fit and compare action tokenizers, report on latent actions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from vlaflow.cli.arguments import ONLINE, HubGroup, parse_arguments
from vlaflow.cli.console import plain_console
from vlaflow.cli.reading import LEROBOT, ReadingGroup
from vlaflow.cli.tokenizers import CHUNKS, ChunkGroup, fit_tokenizer, tokenizer_report
from vlaflow.ranges import Count, Positive

if TYPE_CHECKING:
    from vlaflow.data.lerobot import Dataset


MOST_TASKS = 50
"""How many tasks ``show`` lists."""


@dataclass(frozen=True)
class Check:
    """Read every row and decode every frame; list all problems.

    Example: vlaflow data check runs/demo/dataset

    Exit status: 0 if there are no problems, 1 if something must be fixed, 2 if it is not a data set.

    Args:
        directory: a LeRobot data set, v2.0 to v3.0: the folder that holds meta/, or USER/NAME[@REVISION] on the Hub.
        workers: number of decoding threads.
        deep: also compare the decoded frames with the hashes that were stored when the data set was written, and frame caches
            with their checksums, so that flipped bits are found.
    """

    directory: Path
    workers: Count = 2
    deep: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    how: ReadingGroup = LEROBOT
    hub: HubGroup = ONLINE


@dataclass(frozen=True)
class Show:
    """Print tasks, episodes and statistics; with --out also write a page with thumbnails and a curve per dimension.

    Example: vlaflow data show runs/demo/dataset --out runs/demo/dataset.html

    Args:
        directory: a LeRobot data set, v2.0 to v3.0: the folder that holds meta/, or USER/NAME[@REVISION] on the Hub.
        out: write a page here, .html (self-contained) or .png.
        episodes: number of episodes on the page.
    """

    directory: Path
    out: Path | None = None
    episodes: Count = 12
    how: ReadingGroup = LEROBOT
    hub: HubGroup = ONLINE


@dataclass(frozen=True)
class FitTokenizer:
    """Fit an action tokenizer to the training episodes of a data set and write it to a file.

    Example: vlaflow data fit-tokenizer runs/demo/dataset --out runs/fast.json --scale 10 --vocabulary 256

    Training fits a tokenizer by default; a file is for inspecting it first (tokenizer-report), or for using one tokenizer in
    several trainings (vlaflow train ... --tokenizer FILE).

    Args:
        directory: a LeRobot data set.
        out: the file, .json.
        kind: "fast" (cosine transform and byte-pair encoding), "bins", or "published" (FAST with merges that exist already).
        scale: for fast: rounding units per unit of the normalised actions.
        vocabulary: for fast: number of coefficients and merges; none for no merges.
        bins: for bins: number of intervals per dimension.
        spacing: for bins: "uniform" or "quantile".
        source: for published: folder or Hub name of the tokenizer.
    """

    directory: Annotated[Path, tyro.conf.Positional]
    out: Path
    kind: Literal["fast", "bins", "published"] = "fast"
    scale: Positive = 10.0
    vocabulary: Count | None = 256
    bins: Count = 64
    spacing: Literal["uniform", "quantile"] = "uniform"
    source: str = "physical-intelligence/fast"
    chunks: ChunkGroup = CHUNKS
    how: ReadingGroup = LEROBOT
    hub: HubGroup = ONLINE


@dataclass(frozen=True)
class TokenizerReport:
    """Compare tokenizers by reconstruction error, length and compression on held-out episodes; write a page with plots.

    Example: vlaflow data tokenizer-report runs/demo/dataset --out runs/tokenizers.html

    Args:
        directory: a LeRobot data set.
        out: the page, .html.
        tokenizer: files to compare; repeat for more; by default several sizes of both kinds are fitted.
        policy: a checkpoint with a discrete flow: also report how well its own metric orders its tokens.
    """

    directory: Annotated[Path, tyro.conf.Positional]
    out: Path
    tokenizer: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction] = ()
    policy: Path | None = None
    chunks: ChunkGroup = CHUNKS
    how: ReadingGroup = LEROBOT
    hub: HubGroup = ONLINE


@dataclass(frozen=True)
class LatentReport:
    """Report how a latent action model uses its codes, and how well they reconstruct frames and predict actions.

    Example: vlaflow data latent-report runs/iflybot/latent --dataset runs/demo/dataset --out runs/latent.html

    Args:
        model: folder of a latent action model (vlaflow train iflybot.latent).
        dataset: a LeRobot data set with video; for the data set of the training, its held-out episodes are used.
        out: the page, .html.
        device: where the networks run.
        frames: where frames come from, as in training.
    """

    model: Annotated[Path, tyro.conf.Positional]
    dataset: Path
    out: Path
    device: str = "cpu"
    frames: Literal["raw", "jpeg", "stream"] = "raw"
    how: ReadingGroup = LEROBOT
    hub: HubGroup = ONLINE


@dataclass(frozen=True)
class Spec:
    """Print what a data set's actions mean, or a draft of it; with --out write it to a file, to complete by hand.

    Example: vlaflow data spec data/theirs --out spec.json

    Then: vlaflow train asyncvla.demo --dataset data/theirs --action-spec spec.json --out runs/policy

    A draft takes what names, ranges, fps and the robot type tell; the rest is "unstated" and is never checked.

    Args:
        directory: a LeRobot data set: the folder that holds meta/, or USER/NAME[@REVISION] on the Hub.
        out: the file, .json; must not exist.
    """

    directory: Path
    out: Path | None = None
    how: ReadingGroup = LEROBOT
    hub: HubGroup = ONLINE


@dataclass(frozen=True)
class BuildCache:
    """Decode the frames of a data set into the cache that training reads.

    Example: vlaflow data cache data/theirs --size 224 --shard 3/16

    Training builds what is missing by itself; this is for building it beforehand, or on several machines that share a disk.
    Each block appears whole, so any of them can be interrupted and repeated. vlaflow plan RECIPE --dataset DIR prints the
    command that fits a recipe.

    Args:
        directory: a LeRobot data set: the folder that holds meta/, or USER/NAME[@REVISION] on the Hub.
        size: side in pixels of the squares that the policy reads; by default the views keep their shape.
        area: without --size, most pixels of a view.
        frames: as they are, or as JPEGs.
        shard: I/N, the I-th of N shares, counted from 1.
        workers: number of decoding threads; by default one per core, at most eight.
    """

    directory: Annotated[Path, tyro.conf.Positional]
    size: Count | None = None
    area: Count | None = None
    frames: Literal["raw", "jpeg"] = "raw"
    shard: Annotated[str, tyro.conf.arg(metavar="I/N")] = "1/1"
    workers: Count | None = None
    how: ReadingGroup = LEROBOT
    hub: HubGroup = ONLINE


@dataclass(frozen=True)
class PushToHub:
    """Upload a data set to the Hugging Face Hub, under the tag of its format version, where LeRobot looks for it.

    Example: vlaflow data push runs/peg USER/peg --private

    Derived files (.cache) stay here. Log in first: hf auth login.

    Args:
        directory: a LeRobot data set.
        repository: USER/NAME; created if it does not exist.
        private: make a repository that is created private.
        message: message of the commit.
    """

    directory: Path
    repository: str
    private: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    message: str = "Upload with vlaflow"


@dataclass(frozen=True)
class RepairDataSet:
    """Write the intact episodes of a data set; everything derived from rows and frames is recomputed.

    Example: vlaflow data repair runs/peg --out runs/peg-whole

    Every change is printed, and kept in changes.log of the new data set.

    Args:
        directory: a LeRobot data set, v2.0 to v3.0; it is not changed.
        out: the new data set, v3.0.
    """

    directory: Annotated[Path, tyro.conf.Positional]
    out: Path
    hub: HubGroup = ONLINE


@dataclass(frozen=True)
class DropEpisodes:
    """Write a data set without some of its episodes.

    Example: vlaflow data drop runs/peg --episodes 3 10-12 --out runs/peg-fewer

    Args:
        directory: a LeRobot data set, v2.0 to v3.0; it is not changed.
        episodes: numbers of the episodes to leave out, and ranges of numbers such as 10-12.
        out: the new data set, v3.0.
    """

    directory: Annotated[Path, tyro.conf.Positional]
    episodes: tuple[str, ...]
    out: Path
    hub: HubGroup = ONLINE


@dataclass(frozen=True)
class MergeDataSets:
    """Write the episodes of several data sets of one robot as one data set.

    Example: vlaflow data merge runs/monday runs/tuesday --out runs/week

    Args:
        directories: LeRobot data sets, v2.0 to v3.0, in the order of their episodes; they are not changed.
        out: the new data set, v3.0.
    """

    directories: Annotated[tuple[Path, ...], tyro.conf.Positional]
    out: Path
    hub: HubGroup = ONLINE


@dataclass(frozen=True)
class RenameColumns:
    """Write a data set with other names of columns and cameras.

    Example: vlaflow data rename runs/peg --camera top=front --column actions=action --out runs/peg-renamed

    Args:
        directory: a LeRobot data set, v2.0 to v3.0; it is not changed.
        out: the new data set, v3.0.
        column: OLD=NEW, feature keys; repeat for more.
        camera: OLD=NEW, names of views; repeat for more.
    """

    directory: Annotated[Path, tyro.conf.Positional]
    out: Path
    column: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    camera: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    hub: HubGroup = ONLINE


def main(argv: list[str]) -> int:
    """Run ``vlaflow data ...``; returns the exit status."""
    from vlaflow.cli.data_cache import build_cache
    from vlaflow.cli.data_edit import drop, merge, push, rename, repair
    from vlaflow.cli.data_spec import spec
    from vlaflow.cli.latents import latent_report

    positional = tyro.conf.configure(tyro.conf.PositionalRequiredArgs)
    commands: Any = (
        Annotated[positional(Check), tyro.conf.subcommand("check")]
        | Annotated[positional(Show), tyro.conf.subcommand("show")]
        | Annotated[positional(Spec), tyro.conf.subcommand("spec")]
        | Annotated[BuildCache, tyro.conf.subcommand("cache")]
        | Annotated[FitTokenizer, tyro.conf.subcommand("fit-tokenizer")]
        | Annotated[TokenizerReport, tyro.conf.subcommand("tokenizer-report")]
        | Annotated[LatentReport, tyro.conf.subcommand("latent-report")]
        | Annotated[positional(PushToHub), tyro.conf.subcommand("push")]
        | Annotated[RepairDataSet, tyro.conf.subcommand("repair")]
        | Annotated[DropEpisodes, tyro.conf.subcommand("drop")]
        | Annotated[MergeDataSets, tyro.conf.subcommand("merge")]
        | Annotated[RenameColumns, tyro.conf.subcommand("rename")]
    )
    description = "Check, show, cache, edit or push a data set; fit and compare action tokenizers; report on latent actions."
    chosen: Any = parse_arguments(commands, "vlaflow data", argv, description=description)
    actions: dict[type, Any] = {
        Check: _check,
        Show: _show,
        Spec: spec,
        BuildCache: build_cache,
        FitTokenizer: fit_tokenizer,
        TokenizerReport: tokenizer_report,
        LatentReport: latent_report,
        PushToHub: push,
        RepairDataSet: repair,
        DropEpisodes: drop,
        MergeDataSets: merge,
        RenameColumns: rename,
    }
    status: int = actions[type(chosen)](chosen)
    return status


def _check(arguments: Check) -> int:
    from rich.progress import Progress

    from vlaflow.data.check import check
    from vlaflow.data.lerobot import Dataset

    console = plain_console()
    dataset = Dataset.open(arguments.directory, reading=arguments.how.reading())
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("decoding")
        findings = check(
            dataset,
            arguments.workers,
            lambda done, total: progress.update(bar, completed=done, total=total),
            deep=arguments.deep,
        )
    _print_summary(console, dataset)
    for sentence in findings.remarks:
        console.print(f"note: {sentence}", soft_wrap=True)
    for sentence in findings.problems:
        console.print(f"PROBLEM: {sentence}", soft_wrap=True, style="bold red")
    if findings.problems:
        console.print(f"{len(findings.problems)} problem(s) found.", style="bold red")
        console.print(f"To keep the intact episodes: vlaflow data repair {arguments.directory} --out DIR", soft_wrap=True)
        return 1
    console.print(f"No problems: {len(dataset)} rows read, {findings.frames} frames decoded.", style="green")
    return 0


def _show(arguments: Show) -> int:
    from rich import box
    from rich.table import Table

    from vlaflow.data.lerobot import Dataset
    from vlaflow.data.stats import compute

    console = plain_console()
    dataset = Dataset.open(arguments.directory, reading=arguments.how.reading())
    if arguments.out is not None:
        from vlaflow.reports.dataset import require_page, write_page

        require_page(arguments.out)
    _print_summary(console, dataset)
    by_task: dict[str, list[int]] = {}
    for episode in dataset.episodes:
        by_task.setdefault(episode.task, []).append(episode.length)
    tasks = Table(box=box.SIMPLE, padding=0)
    _add_columns(tasks, words=("task",), numbers=("episodes", "frames", "shortest", "longest"))
    for task, lengths in sorted(by_task.items(), key=lambda item: -len(item[1]))[:MOST_TASKS]:
        tasks.add_row(task, *(str(n) for n in (len(lengths), sum(lengths), min(lengths), max(lengths))))
    console.print(tasks)
    if len(by_task) > MOST_TASKS:
        console.print(f"and {len(by_task) - MOST_TASKS} more tasks with as many episodes or fewer")
    numbers = Table(box=box.SIMPLE, padding=0)
    _add_columns(numbers, words=("feature", "dimension"), numbers=("min", "q01", "mean", "q99", "max", "std"))
    for name, stats in compute(dataset).items():
        for d, label in enumerate(dataset.dimension_names(name)):
            values = (stats.min, stats.q01, stats.mean, stats.q99, stats.max, stats.std)
            numbers.add_row(name, label, *(f"{v[d]:.4g}" for v in values))
    console.print(numbers)
    console.print(_left_out(dataset))
    if arguments.out is not None:
        console.print(f"Written: {write_page(dataset, arguments.out, arguments.episodes)}", soft_wrap=True)
    return 0


def _add_columns(table: Any, words: Sequence[str], numbers: Sequence[str]) -> None:
    """Columns of which none is abbreviated where the terminal is narrow: words are folded, numbers keep their line."""
    for name in words:
        table.add_column(name, overflow="fold")
    for name in numbers:
        table.add_column(name, no_wrap=True)


def _left_out(dataset: Dataset) -> Any:
    from rich.table import Table

    from vlaflow.data.filters import left_out

    table = Table("rule (default)", "frames", "share", title="What rules would leave out of training", title_justify="left")
    for name, marked_N in left_out(dataset).items():
        table.add_row(name, str(int(marked_N.sum())), f"{marked_N.mean():.1%}")
    return table


def _print_summary(console: Any, dataset: Dataset) -> None:
    from rich.table import Table

    from vlaflow.hub import origin

    views = ", ".join(f"{view} {'x'.join(map(str, dataset.image_size(view)))}" for view in dataset.views)
    rows = {
        "data set": f"{origin(dataset.root) or dataset.root} (LeRobot {dataset.version})",
        "robot": dataset.action_spec.robot
        if dataset.action_spec
        else f"{dataset.robot_type or 'unknown'} (no action spec; vlaflow data spec drafts one)",
        "episodes": f"{len(dataset.episodes)}, {len(dataset)} frames at {dataset.fps:g} fps",
        "tasks": str(len(dataset.tasks)),
        "views": views or "none",
        "state": ", ".join(dataset.dimension_names("state")) or "none",
        "action": ", ".join(dataset.dimension_names("action")),
    }
    table = Table(show_header=False, box=None)
    _add_columns(table, words=("", ""), numbers=())
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)
