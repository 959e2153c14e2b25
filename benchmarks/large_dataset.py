"""Seconds and memory of a large data set, from opening to the first training step, and whether they grow with the data alone.

    python -m benchmarks.large_dataset                 # 200,000 frames, 2000 episodes, 16,000 tasks, and a quarter of it
    python -m benchmarks.large_dataset --episodes 400 --tasks 3200

Both data sets are synthetic: tiny pictures, so that what is counted is the number of frames, episodes and tasks, and several
instructions in every episode. Each size is measured in a process of its own. A step that takes more than four times as long on
the larger one grows faster than the data.
"""

from __future__ import annotations

import gc
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tyro

from benchmarks._timing import machine, machine_line, say
from vlaflow.data.check import check
from vlaflow.data.frames import FrameCache
from vlaflow.data.lerobot import Dataset
from vlaflow.data.stats import compute
from vlaflow.data.video import encode_video, read_segment
from vlaflow.data.writer import Writer
from vlaflow.spec import ActionSpec, Dimension
from vlaflow.training.options import Options as TrainOptions
from vlaflow.training.run import train

FPS, SIDE, PARTS = 10, 32, 4
QUICK, REPEATS = ("open", "read and check the rows", "statistics"), 5
"""Steps of a fraction of a second, of which the median of so many is taken."""
SMALL = {"policy.backbone.image_size": str(SIDE), "policy.backbone.width": "32", "max_excluded": "1", "steps": "1"}


@dataclass(frozen=True)
class Options:
    """What to measure.

    Args:
        episodes: of the large data set; the small one has a quarter of them.
        frames: per episode.
        tasks: instructions of the large data set, spread over its episodes.
        json: file for the results.
        only: measure this data set in this process, print JSON, and make nothing; for the script itself.
    """

    episodes: int = 2000
    frames: int = 100
    tasks: int = 16_000
    json: Path | None = None
    only: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None


def make(root: Path, options: Options) -> Path:
    """A data set of that shape; every episode goes through the same number of instructions."""
    rng = np.random.default_rng(0)
    spec = ActionSpec("benchmark arm", tuple(Dimension(f"d{i}", "m", "world", -1, 1, "up", "delta") for i in range(4)),
                      "none", "none", FPS)  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        clip = Path(scratch) / "clip.mp4"
        encode_video(rng.integers(0, 256, (options.frames, SIDE, SIDE, 3), np.uint8), clip, FPS)
        segment, views = read_segment(clip), {"front": (SIDE, SIDE)}
        with Writer(root, fps=FPS, action_spec=spec, state_names="abcd", views=views, robot_type="none", provenance={}) as out:
            for _ in range(options.episodes):
                numbers = rng.uniform(-1, 1, (2, options.frames, 4)).astype(np.float32)
                out.add(None, numbers[0], numbers[1], "task 0", videos={"front": segment})
    each = options.tasks // options.episodes
    words = [f"task {number}" for number in range(each * options.episodes)]
    pq.write_table(pa.table({"task_index": np.arange(len(words)), "task": words}), root / "meta/tasks.parquet")
    for path in sorted(root.glob("data/*/*.parquet")):
        rows = pq.read_table(path)
        part = rows["frame_index"].to_numpy() * each // options.frames
        _replace(path, rows, "task_index", pa.array(rows["episode_index"].to_numpy() * each + part))
    for path in sorted(root.glob("meta/episodes/*/*.parquet")):
        rows = pq.read_table(path)
        listed = [words[number * each : (number + 1) * each] for number in rows["episode_index"].to_pylist()]
        _replace(path, rows, "tasks", pa.array(listed))
    return root


def _replace(path: Path, rows: pa.Table, name: str, values: pa.Array) -> None:
    pq.write_table(rows.set_column(rows.column_names.index(name), name, values), path)


def measure(root: Path) -> dict[str, dict[str, float]]:
    """Seconds of processor time and wall time of every step, and the most memory used until its end."""
    steps: dict[str, Callable[[], object]] = {
        "open": lambda: Dataset.open(root),
        "read and check the rows": lambda: Dataset.open(root).columns(),
        "statistics": lambda: compute(Dataset.open(root)),
        "decode and check every frame": lambda: check(Dataset.open(root), workers=1),
        "frame cache": lambda: FrameCache.open(Dataset.open(root), SIDE),
        "to the first training step": lambda: train(
            "baselines.flow", root, root.with_suffix(".policy"), options=TrainOptions(SMALL, tracker="none", threads=1)
        ),
    }
    found = {}
    for name, step in steps.items():
        times = []
        for _ in range(REPEATS if name in QUICK else 1):
            gc.collect()  # or a collection of what other steps left is counted in one of them
            began, used = time.perf_counter(), time.process_time()
            step()
            times.append((time.process_time() - used, time.perf_counter() - began))
        cpu_s, wall_s = sorted(times)[len(times) // 2]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        found[name] = {"s": wall_s, "cpu_s": cpu_s, "peak": peak}
        say(f"{name}: {found[name]['s']:.2f} s, {found[name]['cpu_s']:.2f} s of processor time, {peak / 2**30:.2f} GiB")
    return found


def main(options: Options) -> int:
    """Make both data sets, measure each in a process of its own, and print one table."""
    if options.only is not None:
        sys.stdout.write(json.dumps(measure(options.only)) + "\n")
        return 0
    small = replace(options, episodes=options.episodes // PARTS, tasks=options.tasks // PARTS)
    results = []
    for size in (small, options):
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            root = make(Path(folder) / "data", size)
            say(f"{size.episodes} episodes written in {time.perf_counter() - began:.0f} s")
            command = [sys.executable, "-m", "benchmarks.large_dataset", "--only", str(root)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            results.append(json.loads(done.stdout.splitlines()[-1]))
    _print(small, options, *results)
    if options.json is not None:
        options.json.write_text(json.dumps({"machine": machine(), "small": results[0], "large": results[1]}, indent=1) + "\n")
    return 0


def _print(small: Options, large: Options, before: dict[str, dict[str, float]], after: dict[str, dict[str, float]]) -> None:
    titles = [f"{o.episodes * o.frames:,} frames, {o.episodes:,} episodes, {o.tasks:,} tasks" for o in (small, large)]
    lines = [f"| | {titles[0]} | {titles[1]} | times as long | peak memory |", "|---|---|---|---|---|"]
    for name, one in before.items():
        two = after[name]
        lines.append(
            f"| {name} | {one['cpu_s']:.2f} s | {two['cpu_s']:.2f} s | {two['cpu_s'] / one['cpu_s']:.1f} | "
            f"{one['peak'] / 2**30:.2f} GiB; {two['peak'] / 2**30:.2f} GiB |"
        )
    sys.stdout.write("\n".join(lines) + "\n" + machine_line(machine()) + "\n")


if __name__ == "__main__":
    raise SystemExit(main(tyro.cli(Options)))
