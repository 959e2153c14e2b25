"""``vlaflow check``: an environment or a checkpoint against its contract, and which inputs a policy's actions follow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from vlaflow.cli.arguments import ONLINE, HubGroup, parse_arguments
from vlaflow.cli.reading import LEROBOT, ReadingGroup
from vlaflow.errors import ConfigError, nearest
from vlaflow.ranges import Count

if TYPE_CHECKING:
    from vlaflow.evaluation.inputs import InputReport

HELP = """usage: vlaflow check WHAT ...

  env NAME      an environment, e.g. vlaflow check env metaworld/drawer-open-v3
  policy CKPT   a checkpoint, e.g. vlaflow check policy runs/demo/rated
  inputs CKPT   which inputs its actions follow, e.g. vlaflow check inputs runs/demo/policy --dataset runs/demo/dataset

Exit status: 0 if every promise is kept, 1 if one is broken, 2 for a mistake in the command."""


@dataclass(frozen=True)
class CheckEnvironments:
    """Run all conformance checks on environments and print a table.

    Example: vlaflow check env metaworld/drawer-open-v3

    Args:
        names: suite/task, or groups such as metaworld/hard.
        render: rendering quality to check with.
        size: side of the image in pixels; the suite's default if omitted.
    """

    names: tuple[str, ...]
    render: Literal["fast", "exact"] = "fast"
    size: Count | None = None


@dataclass(frozen=True)
class CheckPolicy:
    """Run made-up observations through every compute policy a checkpoint supports and print a table.

    Example: vlaflow check policy runs/demo/rated

    Args:
        checkpoint: folder, or Hugging Face repository id.
        device: where to run it.
        observations: number of made-up observations.
    """

    checkpoint: str
    device: str = "cpu"
    observations: Count = 4
    hub: HubGroup = ONLINE


@dataclass(frozen=True)
class CheckInputs:
    """Measure which inputs the actions of a checkpoint follow, by taking one input at a time from another episode.

    Example: vlaflow check inputs runs/demo/policy --dataset runs/demo/dataset

    Frames are paired with those of another episode of the same task that have the nearest state. The share says how far the
    actions go towards the other frame's if this input alone comes from there.
    """

    checkpoint: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CKPT")]
    """Folder of a checkpoint."""
    dataset: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """LeRobot data set (folder, or name on the Hub); for that of the training, its held-out episodes are used."""
    robot: str | None = None
    """Robot to act for, if the checkpoint was trained for several."""
    compute: str = "auto"
    """Compute policy, as in vlaflow eval."""
    frames: Count = 256
    """Largest number of frames."""
    episodes: Literal["held-out", "all"] = "held-out"
    """Which episodes to measure on; all only for data on which the checkpoint was not trained."""
    json: Path | None = None
    """File for the numbers."""
    device: str = "cpu"
    """Where the networks run."""

    how: ReadingGroup = LEROBOT
    hub: HubGroup = ONLINE


def main(argv: list[str]) -> int:
    """Run ``vlaflow check ...``; returns the exit status."""
    if not argv or argv[0] in ("-h", "--help"):
        _print(HELP)
        return 0
    kind, *rest = argv
    if kind not in KINDS:
        raise ConfigError(f"vlaflow check has no '{kind}'; {nearest(kind, KINDS)}")
    return KINDS[kind](rest)


def _environments(argv: list[str]) -> int:
    arguments = parse_arguments(CheckEnvironments, "vlaflow check env", argv, config=(tyro.conf.PositionalRequiredArgs,))

    from vlaflow.simulators import expand_env_names, make
    from vlaflow.simulators.checker import check_environment

    if not arguments.names:
        raise ConfigError("Name an environment, e.g. vlaflow check env metaworld/drawer-open-v3")
    broken = 0
    for name in expand_env_names(arguments.names):
        env = make(name, render=arguments.render, size=arguments.size)
        findings = check_environment(env)
        env.close()
        _table(name, [(f.promise, f.passed, f.observed) for f in findings])
        broken += sum(not f.passed for f in findings)
    return 1 if broken else 0


def _policy(argv: list[str]) -> int:
    arguments = parse_arguments(CheckPolicy, "vlaflow check policy", argv, config=(tyro.conf.PositionalRequiredArgs,))

    from vlaflow.evaluation.check_policy import check_policy

    findings = check_policy(arguments.checkpoint, arguments.device, arguments.observations)
    _table(arguments.checkpoint, [(f"{f.compute}: {f.promise}", f.passed, f.observed) for f in findings], "observed")
    return 0 if all(f.passed for f in findings) else 1


def _inputs(argv: list[str]) -> int:
    given = parse_arguments(CheckInputs, "vlaflow check inputs", argv)

    from vlaflow.config import to_json
    from vlaflow.evaluation.inputs import run
    from vlaflow.outputs import require_writable, write_json
    from vlaflow.policies.robots import robot_folder

    if given.json is not None:
        require_writable(given.json)

    report = run(
        robot_folder(given.checkpoint, given.robot),
        given.dataset,
        compute=given.compute,
        frames=given.frames,
        new_data=given.episodes == "all",
        reading=given.how.reading(),
        device=given.device,
    )
    _show(report)
    if given.json is not None:
        write_json(given.json, to_json(report))
    return 0


def _show(report: InputReport) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table("input from another episode", "share that follows it", "95 % interval", "change", "error", box=box.SIMPLE)
    for use in report.uses:
        table.add_row(
            use.name,
            "" if use.share is None else f"{use.share:.0%}",
            "" if use.interval is None else f"{100 * use.interval[0]:.0f} to {100 * use.interval[1]:.0f} %",
            f"{use.change:.3f}",
            f"{use.error:.3f}",
        )
    console = Console()
    console.print(table)
    console.print(
        f"{report.frames} frames of {report.episodes} episodes, {report.compute}: the actions of two paired frames differ by "
        f"{report.apart:.3f}, and with a frame's own inputs the error is {report.error:.3f} (root mean squares of the executed "
        "actions, normalised).",
        soft_wrap=True,
    )


def _table(title: str, rows: list[tuple[str, bool, str]], column: str = "observed instead") -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("", "promise", column, title=title, title_justify="left", show_lines=False)
    for promise, passed, observed in rows:
        mark = Text("kept", "green") if passed else Text("BROKEN", "bold red")
        table.add_row(mark, Text(promise), Text(observed, "" if passed else "red"))
    console = Console()
    console.print(table)
    failed = sum(not passed for _, passed, _ in rows)
    console.print(f"{title}: {len(rows)} promises, {failed} broken.", style="bold red" if failed else "green")


def _print(text: str) -> None:
    import sys

    sys.stdout.write(text + "\n")


KINDS: dict[str, Callable[[list[str]], int]] = {"env": _environments, "policy": _policy, "inputs": _inputs}
