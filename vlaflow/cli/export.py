"""``vlaflow export``: a checkpoint in the layout of another library."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from vlaflow.cli.arguments import ONLINE, HubGroup, parse_arguments


@dataclass(frozen=True)
class Export:
    """Write a checkpoint in LeRobot's layout; its commands open that with lerobot_policy_vlaflow installed.

    Example: vlaflow export lerobot runs/demo/policy --out runs/demo/for-lerobot

    vlaflow opens the new folder too.
    """

    layout: Annotated[Literal["lerobot"], tyro.conf.Positional]
    """Whose layout."""
    checkpoint: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CKPT")]
    """Folder, or Hugging Face repository id."""
    out: Path
    """The new folder; must not exist."""
    robot: str | None = None
    """Robot to act for, if the checkpoint was trained for several."""
    hub: HubGroup = ONLINE


def main(argv: list[str]) -> int:
    """Run ``vlaflow export ...``; returns the exit status."""
    given = parse_arguments(Export, "vlaflow export", argv)

    from vlaflow.policies.lerobot import export

    kind = export(given.checkpoint, given.out, given.robot)
    sys.stdout.write(f"Written: {given.out}, a LeRobot policy of type {kind}. lerobot-eval --policy.path={given.out}\n")
    return 0
