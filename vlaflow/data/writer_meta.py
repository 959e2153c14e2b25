"""The tables of a LeRobot v3.0 meta folder, as ``writer`` fills them: info, tasks, episodes, statistics.

The shapes follow files written by LeRobot 0.6.1. Video encoding and the order of writing are ``writer``'s.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vlaflow.data.stats import QUANTILES, FeatureStats

DEFAULT_FEATURES: dict[str, dict[str, Any]] = {
    "timestamp": {"dtype": "float32", "shape": [1], "names": None},
    "frame_index": {"dtype": "int64", "shape": [1], "names": None},
    "episode_index": {"dtype": "int64", "shape": [1], "names": None},
    "index": {"dtype": "int64", "shape": [1], "names": None},
    "task_index": {"dtype": "int64", "shape": [1], "names": None},
}
"""Present in every LeRobot data set."""

EPISODES_PER_FILE = 5000
"""Rows of one meta/episodes file: with the statistics about 10 KB each, so well under LeRobot's 100 MB."""

Stat = dict[str, Any]


def video_feature(height: int, width: int, fps: float) -> dict[str, Any]:
    """The info.json entry of one camera; LeRobot infers from ``names[2]`` that the channel comes last."""
    info = {
        "video.height": height,
        "video.width": width,
        "video.codec": "h264",
        "video.pix_fmt": "yuv420p",
        "video.fps": int(fps) if float(fps).is_integer() else fps,
        "video.channels": 3,
        "has_audio": False,
        "is_depth_map": False,
    }
    return {"dtype": "video", "shape": [height, width, 3], "names": ["height", "width", "channel"], "info": info}


def vector_stats(values: np.ndarray) -> Stat:
    """LeRobot's statistics of an array (N,) or (N, D), as lists of D numbers; ``count`` is [N]."""
    stats = FeatureStats.of(values.reshape(len(values), -1))
    fields = {name: list(getattr(stats, name)) for name in ("min", "max", "mean", "std")}
    return fields | {"count": [stats.count]} | {name: list(getattr(stats, name)) for name in QUANTILES}


def image_stats(histogram: np.ndarray, frames: int) -> Stat:
    """LeRobot's statistics of images in [0, 1], shaped (3, 1, 1), computed exactly from counts of pixel values (3, 256)."""
    levels = np.arange(256) / 255.0
    total = histogram.sum(1)
    mean = histogram @ levels / total
    std = np.sqrt(np.maximum(histogram @ levels**2 / total - mean**2, 0))
    reached = np.cumsum(histogram, axis=1)

    def at(fraction: float) -> np.ndarray:
        return levels[[int(np.searchsorted(reached[c], fraction * total[c])) for c in range(3)]]

    present = [np.flatnonzero(row) for row in histogram]
    values = {
        "min": levels[[p[0] for p in present]],
        "max": levels[[p[-1] for p in present]],
        "mean": mean,
        "std": std,
        **{name: at(fraction) for name, fraction in QUANTILES.items()},
    }
    return {name: [[[float(v)]] for v in row] for name, row in values.items()} | {"count": [frames]}


def write_tasks(path: Path, tasks: Sequence[str]) -> None:
    """meta/tasks.parquet: LeRobot loads it with pandas and looks tasks up by the index, so the file must declare it."""
    text = {"pandas_type": "unicode", "numpy_type": "object", "metadata": None}
    pandas = {
        "index_columns": ["task"],
        "column_indexes": [{"name": None, "field_name": None, **text, "metadata": {"encoding": "UTF-8"}}],
        "columns": [
            {"name": "task_index", "field_name": "task_index", "pandas_type": "int64", "numpy_type": "int64", "metadata": None},
            {"name": "task", "field_name": "task", **text},
        ],
        "attributes": {},
        "creator": {"library": "pyarrow", "version": pa.__version__},
        "pandas_version": "2.3.3",
    }
    schema = pa.schema([("task_index", pa.int64()), ("task", pa.string())], metadata={"pandas": json.dumps(pandas)})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table([list(range(len(tasks))), list(tasks)], schema=schema), path, write_page_checksum=True)


def with_stats(rows: Sequence[Mapping[str, Any]], stats: Sequence[Mapping[str, Stat]]) -> list[dict[str, Any]]:
    """Rows of meta/episodes with the statistics of each episode; those that an episode does not have are empty there.

    Quantiles that some episode lacks are left out of all, because LeRobot's tools read a number in every row.
    """
    having: dict[str, list[Stat]] = {}
    for each in stats:
        for key, stat in each.items():
            having.setdefault(key, []).append(stat)
    columns = [(key, name) for key, found in having.items() for name in found[0] if all(name in one for one in found)]
    return [
        {**row, **{f"stats/{key}/{name}": each[key][name] if key in each else None for key, name in columns}}
        for row, each in zip(rows, stats, strict=True)
    ]


def write_episodes(folder: Path, rows: Sequence[Mapping[str, Any]], chunks_size: int) -> None:
    """meta/episodes: one row per episode with pointers and statistics, and with the location of the row itself."""
    whole = pa.Table.from_pylist(rows)  # so that every file has the same columns and types
    for number, first in enumerate(range(0, len(rows), EPISODES_PER_FILE)):
        chunk, file = divmod(number, chunks_size)
        part = whole.slice(first, EPISODES_PER_FILE)
        for name, index in (("chunk_index", chunk), ("file_index", file)):
            part = part.append_column(f"meta/episodes/{name}", pa.array([index] * len(part), pa.int64()))
        path = folder / f"chunk-{chunk:03d}" / f"file-{file:03d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(part, path, write_page_checksum=True)
