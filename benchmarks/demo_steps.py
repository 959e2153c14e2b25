"""Wall time of a demo by step, from the results.json it left behind.

    make demo && python -m benchmarks.demo_steps

Nothing is measured here; the table says which step there is something to gain in. A step's ratio is its share of the whole.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from benchmarks._timing import Case, report

STEPS = ("install", "record", "train", "rater", "calibrate", "evaluate")


@dataclass(frozen=True)
class Options:
    """Which demo.

    Args:
        results: the file.
        json: file for the table.
    """

    results: Path = Path("runs/demo/results.json")
    json: Path | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Read and report."""
    options = tyro.cli(Options, description=__doc__, args=argv)
    if not options.results.exists():
        raise SystemExit(f"There is no {options.results}. Make it: make demo, or vlaflow demo --out {options.results.parent}")
    found = json.loads(options.results.read_text())
    spent = {step: [float(m)] for step in STEPS if (m := (found.get("minutes") or {}).get(step))}
    if not spent:
        raise SystemExit(f"{options.results} holds no minutes by step: it comes from an evaluation, not from a demo.")
    whole = {"the whole demo": [sum(minutes for (minutes,) in spent.values())]}
    notes = {"machine of the demo": found.get("machine", "not recorded")}
    return report("demo_steps", options, [Case("wall time", "minutes", whole | spent, notes)], options.json)


if __name__ == "__main__":
    raise SystemExit(main())
