"""Seconds until ``vlaflow --help`` has answered, and until a policy can be opened, against what Python and torch take alone.

    python -m benchmarks.startup

Every measurement is a new process with a warm disk cache.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from benchmarks._timing import Case, report, seconds_in_turns

ROOT = Path(__file__).parents[1]
CASES = {
    "vlaflow --help": {"vlaflow --help": ["-m", "vlaflow", "--help"], "an empty Python program": ["-c", "pass"]},
    "import vlaflow.policies.base": {
        "import vlaflow.policies.base": ["-c", "import vlaflow.policies.base"],
        "import torch": ["-c", "import torch"],
    },
}


@dataclass(frozen=True)
class Options:
    """What to measure.

    Args:
        rounds: processes per way.
        json: file for the results.
    """

    rounds: int = 10
    json: Path | None = None


def _start(arguments: Sequence[str]) -> Callable[[], object]:
    command = [sys.executable, *arguments]
    return lambda: subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report."""
    options = tyro.cli(Options, description=__doc__, args=argv)
    cases = []
    for name, ways in CASES.items():
        seconds = seconds_in_turns({way: _start(arguments) for way, arguments in ways.items()}, options.rounds)
        cases.append(Case(name, "s", seconds))
    return report("startup", options, cases, options.json)


if __name__ == "__main__":
    raise SystemExit(main())
