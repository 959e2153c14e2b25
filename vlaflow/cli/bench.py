"""``vlaflow bench latency``: the latency of each part of a chunk on this machine, for budgets in milliseconds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from vlaflow.cli.arguments import ONLINE, HubGroup, parse_arguments
from vlaflow.ranges import Count

if TYPE_CHECKING:
    from vlaflow.compute.budget import Profile


@dataclass(frozen=True)
class BenchArguments:
    """Time a checkpoint on this machine, part by part, and fit what its chunks cost; --compute budget:MS reads the result.

    It is written to CKPT/latency.json, and to CKPT/latency-ENGINE.json for programs that vlaflow deploy built.

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
    engine: Literal["auto", "eager", "aoti", "openvino", "graphs", "graphs-fp8"] = "auto"
    """What computes them; auto times the networks (eager) and every engine whose programs are there."""
    hub: HubGroup = ONLINE


def main(argv: list[str]) -> int:
    """Run ``vlaflow bench ...``; returns the exit status."""
    given = parse_arguments(BenchArguments, "vlaflow bench", argv)

    from vlaflow.compute.budget import profile_file, save
    from vlaflow.evaluation.profile import profile
    from vlaflow.outputs import require_writable
    from vlaflow.policies.base import Policy
    from vlaflow.policies.engines import timed, with_engine
    from vlaflow.policies.provenance import fingerprint
    from vlaflow.policies.robots import robot_folder

    folder = robot_folder(given.checkpoint, given.robot)
    eager = Policy.from_pretrained(folder, given.device, given.dtype)
    for engine in timed(given.engine, eager):
        file = folder / profile_file(engine)
        require_writable(file, cure="Make it writable, or time a copy of the checkpoint.")
        found = profile(with_engine(eager, engine), fingerprint(folder), given.rounds, given.threads, eager)
        save(found, file)
        show(found, file)
    return 0


def show(found: Profile, file: Path) -> None:
    """Print what was measured."""
    from rich.console import Console
    from rich.table import Table

    title = f"{found.engine}: {found.machine}, {found.threads} thread(s)"
    table = Table("depth", "prefix ms", "start ms", "step ms", title=title, title_justify="left")
    starts = found.start or (0.0,) * len(found.step)
    for depth, (prefix, start, step) in enumerate(zip(found.prefix, starts, found.step, strict=True), 1):
        answers = (f"{start:.2f}", f"{step:.2f}") if step else ("", "no exit")
        table.add_row(str(depth), f"{prefix:.2f}", *answers)
    console, cost = Console(), found.cost
    console.print(table)
    console.print(
        f"Everything else {found.base:.2f} ms; p99 is {found.jitter:.2f} times the median. A chunk costs {cost.chunk:.2f} ms, "
        f"{cost.layer_pass:.3f} ms per layer pass, {cost.gflop:.1f} ms per 10⁹ operations and {cost.gigabyte:.0f} ms per 10⁹ "
        f"bytes of weights; chunks left out of the fit are predicted within {cost.error:.0%} on average. Written: {file}"
    )
