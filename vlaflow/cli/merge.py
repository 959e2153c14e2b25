"""``vlaflow merge``: merge the shards of an evaluation that ran on several machines."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from vlaflow.cli.arguments import ONLINE, HubGroup, parse_arguments
from vlaflow.packages import PAGES, require
from vlaflow.ranges import Number


@dataclass(frozen=True)
class Merge:
    """Make results.json and report.html from the shards that ``vlaflow eval --shard`` left in a folder.

    Example: vlaflow merge runs/eval

    Latency is measured, and videos are recorded, on this machine. The results are those of one evaluation without --shard,
    measured times aside.

    Args:
        folder: the --out of all shards.
        checkpoint: folder or Hugging Face repository id; by default that of the first shard.
        workers: number of processes for the videos; by default that of the first shard.
        device: where the networks run, such as another GPU than that of the first shard, which is the default; the kind of
            device must be that of the shards.
    """

    folder: Annotated[Path, tyro.conf.Positional]
    checkpoint: str | None = None
    workers: Number | None = None
    device: str | None = None
    hub: HubGroup = ONLINE


def main(argv: list[str]) -> int:
    """Run ``vlaflow merge ...``; returns the exit status."""
    arguments = parse_arguments(Merge, "vlaflow merge", argv)
    require(*PAGES)  # checked first, because the report is written last

    from vlaflow.cli.eval import show
    from vlaflow.evaluation.run import merge
    from vlaflow.reports.evaluation import write_report

    a = arguments
    results = merge(a.folder, checkpoint=a.checkpoint, workers=a.workers, device=a.device, report=write_report)
    show(results, arguments.folder)
    return 0
