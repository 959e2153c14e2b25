"""Interleaved timing, summaries, tables and JSON for every script of this folder.

A machine's speed drifts: with temperature, with its other tenants, with what the disk cache holds. So two things are never
timed one after the other but in turns, A B B A A B ..., and a ratio is the median over rounds of the ratio *within* a round.
"""

from __future__ import annotations

import datetime
import gc
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table

from vlaflow.training.precision import has_amx
from vlaflow.versions import versions


def seconds_in_turns(arms: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Wall time of every arm in every round; each round runs every arm once, in the order of the round before reversed.

    Args:
        arms: what to time, by name; one call is one round's work.
        rounds: rounds that count.
        warmup: rounds before them that do not.
    """
    if rounds < 1:
        raise SystemExit("--rounds must be at least 1")
    names = list(arms)
    taken: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.collect()
    gc.freeze()  # what there is already need not be looked at again in every round
    try:
        for number in range(-warmup, rounds):
            gc.enable()
            gc.collect()
            gc.disable()  # as timeit does: a collection would be charged to the function that runs when it is due
            for name in names if number % 2 == 0 else reversed(names):
                began = time.perf_counter()
                arms[name]()
                seconds = time.perf_counter() - began
                if number >= 0:
                    taken[name].append(seconds)
    finally:
        gc.unfreeze()
        (gc.enable if collecting else gc.disable)()
    return taken


@dataclass(frozen=True)
class Summary:
    """Distribution of a list of numbers."""

    min: float
    median: float
    p99: float
    max: float
    count: int

    @staticmethod
    def of(values: Sequence[float]) -> Summary:
        """Percentiles interpolate linearly."""
        array = np.asarray(values, np.float64)
        return Summary(
            float(array.min()), float(np.median(array)), float(np.percentile(array, 99)), float(array.max()), len(array)
        )


@dataclass(frozen=True)
class Case:
    """Several ways of doing one thing; the first one is the library's.

    Args:
        name: what is done, e.g. "256×256".
        unit: of the values. A unit that ends in "/s" is a rate, of which more is better; of any other less is better.
        values: per way, one number a round. Entry r of every list comes from the same round.
        notes: what else was found.
    """

    name: str
    unit: str
    values: Mapping[str, Sequence[float]]
    notes: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def of_rates(
        name: str, unit: str, amount: float, seconds: Mapping[str, Sequence[float]], notes: Mapping[str, Any] | None = None
    ) -> Case:
        """From wall times of rounds that each do ``amount`` of work."""
        return Case(name, unit, {arm: [amount / s for s in each] for arm, each in seconds.items()}, notes or {})

    @property
    def is_rate(self) -> bool:
        """More is better."""
        return self.unit.endswith("/s")

    @property
    def ratios(self) -> dict[str, Summary]:
        """How many times as long as the first way each other one takes, for the same work."""
        first, *others = self.values
        pairs = {arm: list(zip(self.values[first], self.values[arm], strict=True)) for arm in others}
        return {arm: Summary.of([a / b if self.is_rate else b / a for a, b in pair]) for arm, pair in pairs.items()}

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "name": self.name,
            "unit": self.unit,
            "arms": {arm: asdict(Summary.of(each)) for arm, each in self.values.items()},
            "times_as_long_as_first": {arm: asdict(ratio) for arm, ratio in self.ratios.items()},
            "notes": dict(self.notes),
        }


def report(benchmark: str, settings: object, cases: Sequence[Case], file: Path | None) -> int:
    """Print a table per case, write the JSON where one is wanted; returns an exit status.

    Args:
        benchmark: the script's name.
        settings: its options, a dataclass.
        cases: what was measured.
        file: where to write, or None.
    """
    options = {k: str(v) if isinstance(v, Path) else v for k, v in vars(settings).items() if k != "json"}
    data = {
        "benchmark": benchmark,
        "settings": options,
        "machine": machine(),
        "cases": [case.to_json() for case in cases],
    }
    console = Console()
    console = console if console.is_terminal else Console(width=128)
    for case in data["cases"]:
        columns, rows = table_of(case)
        table = Table(title=f"{benchmark}: {case['name']}", title_justify="left", box=box.SIMPLE_HEAD)
        for column in columns:
            table.add_column(column, justify="left" if column == "way" else "right")
        for row in rows:
            table.add_row(*row)
        console.print(table)
        for key, value in case["notes"].items():
            console.print(f"  {key}: {value}", highlight=False)
    console.print(machine_line(data["machine"]), highlight=False, soft_wrap=True)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(data, indent=1, allow_nan=False, default=os.fspath) + "\n")
    return 0


def table_of(case: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Column titles and cells of one case as JSON holds it."""
    unit = case["unit"]
    shown = ("min", "median", "max") if unit.endswith("/s") else ("median", "p99", "max")
    columns = ["way", *(f"{name}, {unit}" for name in shown), "× the first's time", "min to max"]
    rows = []
    for arm, summary in case["arms"].items():
        ratio = case["times_as_long_as_first"].get(arm)
        versus = [f"{ratio['median']:.2f}×", f"{ratio['min']:.2f} to {ratio['max']:.2f}"] if ratio else ["", ""]
        rows.append([arm, *(f"{summary[name]:.4g}" for name in shown), *versus])
    return columns, rows


def machine() -> dict[str, Any]:
    """What the numbers depend on besides the code; read after the measurement."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "cpu": cpu_model(),
        "cores": cores,
        "simd": torch.backends.cpu.get_cpu_capability(),
        "amx": has_amx(),
        "features": features(),
        "date": datetime.date.today().isoformat(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "system": platform.platform(terse=True),
        "versions": versions(),
    }


def machine_line(found: Mapping[str, Any]) -> str:
    """The machine in a sentence or two."""
    can = ", ".join([*found["features"], "with AMX" if found["amx"] else "no AMX"])
    packages = ", ".join(f"{name} {found['versions'][name]}" for name in ("vlaflow", "python", "torch"))
    threads = f"{found['threads']} thread{'s' if found['threads'] > 1 else ''}"
    busy = found["load"] > found["threads"] + 0.5
    warning = f" Load {found['load']} at the end: the machine was not quiet; read the ratios only." if busy else ""
    processor = f"{found['cpu']}, {found['cores']} cores (torch uses {found['simd']}; {can})"
    return f"{processor}, {threads}; {packages}; {found['date']}.{warning}"


FEATURES = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8", "amx_fp16")


def features() -> list[str]:
    """Which of the instruction sets that decide the speed of matrix products the processor has; empty where none says."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(errors="replace").splitlines() if info.exists() else []
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])
    return [name for name in FEATURES if name in flags]


def cpu_model() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def say(text: str) -> None:
    """A line about what is under way; standard output stays for results."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
