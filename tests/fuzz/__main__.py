"""Many damaged inputs: ``make fuzz``, or python -m tests.fuzz --kinds dataset checkpoint --inputs 10000 --out runs/fuzz

Runs in parts of 500 inputs, each in a process of its own, with a seed of its own; a part that is finished is kept in a file and
not run again, so an interrupted run continues. Prints a row per kind; exit status 1 if anything was lost. What was lost is in
``lost.jsonl`` of the folder, as damages that ``tests/fuzz/seeds.py`` takes.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from tests.fuzz.judge import LOST, judge
from tests.fuzz.kinds import KINDS, Site, for_damages

PART = 500
"""Inputs of a part."""
PART_S = 3600
"""Seconds after which a part is killed, which counts as a hang of its current input."""


def run_part(kind, number, out, inputs=PART):
    """Run one part; its counts as JSON, with what was lost."""
    counts, lost = Counter(), []
    with tempfile.TemporaryDirectory() as folder:
        site = Site(KINDS[kind], Path(folder) / kind)
        current = out / f"{kind}-{number:04d}.current"

        @for_damages(site, inputs, number)
        def every(hurt):
            current.write_text(repr(hurt))
            outcome = judge(site, hurt)
            counts[outcome.name] += 1
            if outcome.name in LOST:
                lost.append({"kind": kind, "outcome": outcome.name, "damage": repr(hurt), "said": outcome.said})

        every()
        current.unlink(missing_ok=True)
    return {"counts": counts, "lost": lost}


def main():
    """Run what is left, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("--kinds", nargs="*", default=list(KINDS))
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--out", type=Path, default=Path("runs/fuzz"))
    parser.add_argument("--part", type=int)
    given_ = parser.parse_args()
    given_.out.mkdir(parents=True, exist_ok=True)
    if given_.part is not None:
        found = run_part(given_.kinds[0], given_.part, given_.out)
        (given_.out / f"{given_.kinds[0]}-{given_.part:04d}.json").write_text(json.dumps(found, indent=1))
        return 0
    for part in range(-(-given_.inputs // PART)):
        for kind in given_.kinds:
            whole(kind, part, given_.out)
    return table(given_.kinds, given_.out)


def whole(kind, part, out):
    """Run a part in a process of its own, unless it was run before; one that dies or does not end lost its current input."""
    file = out / f"{kind}-{part:04d}.json"
    if file.exists():
        return
    command = [sys.executable, "-m", "tests.fuzz", "--kinds", kind, "--part", str(part), "--out", str(out)]
    try:
        status = subprocess.run(command, timeout=PART_S, check=False).returncode
        outcome = "traceback"
    except subprocess.TimeoutExpired:
        status, outcome = -1, "hang"
    if status:
        current = out / f"{kind}-{part:04d}.current"
        hurt = current.read_text() if current.exists() else ""
        lost = [{"kind": kind, "outcome": outcome, "damage": hurt, "said": f"the process ended with status {status}"}]
        file.write_text(json.dumps({"counts": {outcome: 1}, "lost": lost}))


def table(kinds, out):
    """Print the counts of all finished parts; the exit status."""
    lost = []
    names = ("refused", "unchanged", "another", *LOST)
    print("| kind | inputs | " + " | ".join(names) + " |\n|" + "---|" * (len(names) + 2))  # noqa: T201
    for kind in kinds:
        counts = Counter()
        for file in sorted(out.glob(f"{kind}-*.json")):
            found = json.loads(file.read_text())
            counts.update(found["counts"])
            lost += found["lost"]
        print(f"| {kind} | {counts.total()} | " + " | ".join(str(counts[name]) for name in names) + " |")  # noqa: T201
    (out / "lost.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lost))
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
