"""``vlaflow bench latency``: the latency of each part of a chunk on this machine, for budgets in milliseconds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from vlaflow.cli.arguments import ONLINE, HubGroup, parse_arguments
from vlaflow.ranges import Count


@dataclass(frozen=True)
class BenchArguments:
    """Time a checkpoint on this machine, part by part, and write CKPT/latency.json, which --compute budget:MS reads.

    Example: vlaflow bench latency runs/a1/policy

    Nothing else should run at the same time.
    """

    what: Annotated[Literal["latency"], tyro.conf.Positional]
    """What to measure."""
    checkpoint: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CKPT")]
    """Folder of a checkpoint."""
    robot: str | None = None
    """Robot to act for, if the checkpoint was trained for several."""
    rounds: Count = 100
    """Number of measurements of each part."""
    threads: Count = 1
    """Number of torch threads; evaluation and serving use one."""
    device: str = "cpu"
    """Where the networks run."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """What they compute in."""
    hub: HubGroup = ONLINE


def main(argv: list[str]) -> int:
    """Run ``vlaflow bench ...``; returns the exit status."""
    given = parse_arguments(BenchArguments, "vlaflow bench", argv)

    from rich.console import Console
    from rich.table import Table

    from vlaflow.compute.budget import PROFILE, save
    from vlaflow.evaluation.profile import profile
    from vlaflow.outputs import require_writable
    from vlaflow.policies.base import Policy
    from vlaflow.policies.provenance import fingerprint
    from vlaflow.policies.robots import robot_folder

    folder = robot_folder(given.checkpoint, given.robot)
    require_writable(folder / PROFILE, cure="Make it writable, or time a copy of the checkpoint.")
    found = profile(Policy.from_pretrained(folder, given.device, given.dtype), fingerprint(folder), given.rounds, given.threads)
    save(found, folder / PROFILE)
    table = Table("depth", "prefix ms", "step ms", title=f"{found.machine}, {found.threads} thread(s)", title_justify="left")
    for depth, (prefix, step) in enumerate(zip(found.prefix, found.step, strict=True), 1):
        table.add_row(str(depth), f"{prefix:.2f}", f"{step:.2f}" if step else "no exit")
    console = Console()
    console.print(table)
    console.print(
        f"Everything else {found.base:.2f} ms; p99 is {found.jitter:.2f} times the median. Written: {folder / PROFILE}"
    )
    return 0
