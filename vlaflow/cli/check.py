"""``vlaflow check env NAME``, ``vlaflow check policy CKPT``: check an environment or a checkpoint against its contract."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from vlaflow.cli.arguments import ONLINE, HubGroup, parse_arguments
from vlaflow.errors import ConfigError, nearest
from vlaflow.ranges import Count

HELP = """usage: vlaflow check WHAT ...

  env NAME      an environment, e.g. vlaflow check env metaworld/drawer-open-v3
  policy CKPT   a checkpoint, e.g. vlaflow check policy runs/demo/rated

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
    import tyro

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
    import tyro

    arguments = parse_arguments(CheckPolicy, "vlaflow check policy", argv, config=(tyro.conf.PositionalRequiredArgs,))

    from vlaflow.evaluation.check_policy import check_policy

    findings = check_policy(arguments.checkpoint, arguments.device, arguments.observations)
    _table(arguments.checkpoint, [(f"{f.compute}: {f.promise}", f.passed, f.observed) for f in findings], "observed")
    return 0 if all(f.passed for f in findings) else 1


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


KINDS: dict[str, Callable[[list[str]], int]] = {"env": _environments, "policy": _policy}
