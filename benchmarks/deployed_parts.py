"""Where the processor time of a deployed chunk goes: program by program, and in Python between them; batch 1, one thread.

    vlaflow deploy runs/demo/rated --compute dense --compute refine --instruction "Open a drawer"
    python -m benchmarks.deployed_parts --checkpoint runs/demo/rated --compute dense --compute refine --rounds 600

All compute policies take turns on the same observation. Milliseconds are 10th percentiles, each part of its own; next to their
sum stands p99/p50 of the wall time. An eager policy has no programs, so all of it is Python and what Python calls.
"""

from __future__ import annotations

import gc
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from unittest.mock import patch

import numpy as np
import torch
import tyro
from torch import Generator, Tensor

from benchmarks._timing import machine, machine_line
from benchmarks.latency import make_observation, random_policy
from vlaflow.compute.parse import parse_all
from vlaflow.compute.spelling import Checkpoint, Knobs
from vlaflow.engine.programs import ProgramKey, Programs, Run
from vlaflow.policies.base import Policy
from vlaflow.policies.provenance import fingerprint
from vlaflow.ranges import Count

WARM_UP = 5


@dataclass(frozen=True)
class Options:
    """What to measure.

    Args:
        checkpoint: a deployed policy; by default the demo's, with random weights, which has no programs.
        compute: compute policies of the checkpoint; dense by default.
        engine: whose programs.
        rounds: chunks of every compute policy.
    """

    checkpoint: Path | None = None
    compute: tuple[str, ...] = ("dense",)
    engine: Literal["aoti", "openvino", "eager"] = "aoti"
    rounds: Count = 600


@contextmanager
def timed_programs(spent: dict[str, float]) -> Iterator[None]:
    """Add the processor time of every call of a program to its part's."""
    find = Programs.find

    def found(self: Programs, key: ProgramKey) -> Run | None:
        run = find(self, key)
        return None if run is None else _timed(run, key.part, spent)

    with patch.object(Programs, "find", found):
        yield


def _timed(run: Run, part: str, spent: dict[str, float]) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    def timed(tensors: Sequence[Tensor]) -> list[Tensor]:
        began = time.thread_time()
        made = run(list(tensors))
        spent[part] += time.thread_time() - began
        return made

    return timed


def measure(options: Options, folder: Path) -> dict[str, dict[str, float]]:
    """Milliseconds by compute policy and part, with "Python", "all" and "p99/p50"."""
    policy = Policy.from_pretrained(folder, engine=options.engine)
    seen = make_observation(policy)
    computes = {each.name: each for each in parse_all(options.compute, Knobs(10), Checkpoint(folder, fingerprint(folder)))}
    spent: dict[str, float] = defaultdict(float)
    rows: dict[str, list[tuple[float, float, dict[str, float]]]] = {name: [] for name in computes}
    gc.collect()
    gc.freeze()  # or every collection goes through all that was imported, and empties the processor's caches
    with timed_programs(spent):
        for turn in range(-WARM_UP, options.rounds):
            gc.collect()
            for name, compute in computes.items():
                spent.clear()
                wall, used = time.perf_counter(), time.thread_time()
                policy.act(seen, compute, generator=Generator().manual_seed(0))
                used, wall = time.thread_time() - used, time.perf_counter() - wall
                if turn >= 0:
                    rows[name].append((wall, used, dict(spent)))
    return {name: _summary(each) for name, each in rows.items()}


def _summary(rows: Sequence[tuple[float, float, dict[str, float]]]) -> dict[str, float]:
    def fast(seconds: Sequence[float]) -> float:
        return 1e3 * float(np.percentile(seconds, 10))

    found = {part: fast([parts.get(part, 0.0) for _, _, parts in rows]) for part in rows[0][2]}
    p50, p99 = np.percentile([wall for wall, _, _ in rows], (50, 99))
    python = fast([used - sum(parts.values()) for _, used, parts in rows])
    return found | {"Python": python, "all": fast([used for _, used, _ in rows]), "p99/p50": float(p99 / p50)}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and print a table."""
    options = tyro.cli(Options, description=__doc__, args=argv, config=(tyro.conf.UseAppendAction,))
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.checkpoint or Path(temporary)
        if options.checkpoint is None:
            random_policy(()).save_pretrained(folder)
        found = measure(options, folder)
    names = dict.fromkeys(part for parts in found.values() for part in parts if part not in ("Python", "all", "p99/p50"))
    lines = [f"| ms | {' | '.join(found)} |", f"|---|{'---:|' * len(found)}"]
    lines += [
        f"| {part} | {' | '.join(f'{parts[part]:.2f}' if part in parts else '' for parts in found.values())} |"
        for part in (*names, "Python", "all", "p99/p50")
    ]
    sys.stdout.write("\n".join(lines) + "\n" + machine_line(machine()) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
