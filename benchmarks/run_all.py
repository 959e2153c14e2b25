"""Run every script of this folder with its default sizes, one after the other, each in a process of its own.

    make bench
    python -m benchmarks.run_all --only loader evaluation > table.md

Results lie in runs/bench/NAME.json; standard output is a markdown text ready for docs/performance.md, the scripts' own tables
go to standard error. Take a quiet machine: every script says so when it was not.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import tyro

from benchmarks._timing import machine_line, say, table_of

Name = Literal[
    "loader",
    "operations",
    "training",
    "evaluation",
    "latency",
    "deployed",
    "predicted",
    "decoders",
    "serving",
    "startup",
    "demo_steps",
]
NAMES: tuple[Name, ...] = get_args(Name)
ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Options:
    """What to run.

    Args:
        only: these scripts, all by default.
        out: folder for the results.
        demo: results of a demo; its steps are left out where there is none.
        compile: compile in the latency benchmark too; the one of deployed chunks always does.
    """

    only: tuple[Name, ...] = NAMES
    out: Path = Path("runs/bench")
    demo: Path = Path("runs/demo/results.json")
    compile: bool = False


def extras(name: Name, options: Options) -> list[str]:
    """Arguments besides the defaults."""
    if name == "training":
        return ["--ladder"]
    if name == "latency" and options.compile:
        return ["--compile"]
    return ["--results", str(options.demo.resolve())] if name == "demo_steps" else []


def markdown(data: Mapping[str, Any]) -> str:
    """One script's results as a section."""
    lines = [f"### {data['benchmark']}", "", machine_line(data["machine"]), ""]
    for case in data["cases"]:
        columns, rows = table_of(case)
        lines += [f"**{case['name']}**", "", f"| {' | '.join(columns)} |", f"|---|{'---:|' * (len(columns) - 1)}"]
        lines += [f"| {' | '.join(row)} |" for row in rows]
        lines += ["", *(f"- {key}: {value}" for key, value in case["notes"].items()), *([""] if case["notes"] else [])]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run, write and print; the exit status is 1 when a script failed."""
    options, failed = tyro.cli(Options, description=__doc__, args=argv), []
    for name in options.only:
        if name == "demo_steps" and not options.demo.exists():
            say(f"== demo_steps is left out: there is no {options.demo} (make demo)")
            continue
        file = (options.out / f"{name}.json").resolve()
        file.unlink(missing_ok=True)
        command = [sys.executable, "-m", f"benchmarks.{name}", "--json", str(file), *extras(name, options)]
        say(f"== {name}")
        done = subprocess.run(command, cwd=ROOT, stdout=sys.stderr, check=False)
        if done.returncode or not file.exists():
            failed.append(name)
            continue
        print(markdown(json.loads(file.read_text())), flush=True)
    if failed:
        say(f"These failed: {', '.join(failed)}")
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())
