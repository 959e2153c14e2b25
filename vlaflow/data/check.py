"""Check a whole data set in one pass: every row, every frame, every file.

``Dataset`` stops at the first damage it reads; the check continues with the next episode, so that one run lists everything
that has to be fixed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import av
import numpy as np

from vlaflow.data.dead_cameras import Pictured, dead_cameras
from vlaflow.data.draft import stated
from vlaflow.data.exclusions import intervened, paused
from vlaflow.data.frames import damaged_blocks
from vlaflow.data.hashes import HASHES, stored_hashes
from vlaflow.data.lerobot import Dataset
from vlaflow.data.lerobot_meta import some
from vlaflow.data.lerobot_rows import RowsError
from vlaflow.data.quality import INTERVENTIONS, PauseRule
from vlaflow.data.stats import FeatureStats, compute
from vlaflow.data.transforms import floors, nearly_constant
from vlaflow.data.video import TOLERANCE_S, FrameDigest, open_video
from vlaflow.errors import DataError
from vlaflow.strict import read_object

OUTLIER = 1000
"""Times the distance of the outer percentiles beyond which a number is called absurd."""


@dataclass(frozen=True)
class Findings:
    """The findings of a check.

    Args:
        problems: what makes the data set unfit for training, one sentence each.
        remarks: what is worth knowing but may be intended.
        frames: frames decoded, over all views.
    """

    problems: tuple[str, ...]
    remarks: tuple[str, ...]
    frames: int


def check(
    dataset: Dataset, workers: int = 2, progress: Callable[[int, int], None] | None = None, *, deep: bool = False
) -> Findings:
    """Read every row and decode every frame of every view.

    Args:
        dataset: an open data set.
        workers: decoding threads.
        progress: called with (videos done, total videos).
        deep: also compare decoded frames with the hashes that the writer stored, and frame caches with their checksums.
    """
    problems: list[str] = []
    remarks = list(dataset.notes)
    hashes: Mapping[str, Sequence[str]] = {}
    try:
        dataset.columns()
        remarks += _about_numbers(dataset)
    except DataError as error:
        problems += error.sentences if isinstance(error, RowsError) else [str(error)]
    problems += _surplus_frames(dataset)
    if deep:
        try:
            hashes = stored_hashes(dataset.root)
            remarks += _about_hashes(dataset, hashes)
        except DataError as error:
            problems.append(str(error))
        problems += damaged_blocks(dataset)
    tasks = [(episode.index, view) for view in dataset.views for episode in dataset.episodes]
    pictured: dict[tuple[int, str], Pictured] = {}
    with ThreadPoolExecutor(max(1, workers)) as pool:
        for task, (shown, problem) in zip(tasks, pool.map(partial(_decode, dataset, hashes), tasks), strict=True):
            pictured[task] = shown
            problems += [problem] if problem else []
            if progress:
                progress(len(pictured), len(tasks))
    remarks += dead_cameras(pictured, list(dataset.views), dataset.fps, dataset.root)
    return Findings(tuple(problems), tuple(remarks), sum(shown.frames for shown in pictured.values()))


def about_jitter(name: str, dimensions: Sequence[str], stats: FeatureStats) -> list[str]:
    """A sentence about every dimension that is nearly constant.

    Args:
        name: "state" or "action".
        dimensions: their names.
        stats: of the feature.
    """
    least = floors(stats)
    return [
        f"{name}: dimension '{dimensions[d]}' is nearly constant (deviation {stats.std[d]:.2g}, around {stats.mean[d]:.4g}); "
        f"it is normalised as if it deviated by {least[d]:.2g}."
        for d in nearly_constant(stats)
    ]


def _decode(dataset: Dataset, hashes: Mapping[str, Sequence[str]], which: tuple[int, str]) -> tuple[Pictured, str | None]:
    """What the frames of an episode's view show, as far as they can be decoded, and what is wrong with it."""
    (number, view), shown, digest = which, Pictured(), FrameDigest()
    try:
        for _ in shown.watch(dataset.iter_frames(number, view, digest=digest)):
            pass
    except DataError as error:
        return shown, str(error)
    key = dataset.views[view]
    stored = hashes.get(key, ())
    if number < len(stored) and stored[number] != str(digest):
        path = dataset.video_paths(number)[key].relative_to(dataset.root)
        return shown, (
            f"Episode {number} of {dataset.root}: the frames of '{key}' ({path}) are not those that were written, so bits of "
            f"the file have changed. Copy it again, or leave the episode out: "
            f"vlaflow data drop {dataset.root} --episodes {number} --out DIR"
        )
    return shown, None


def _about_hashes(dataset: Dataset, hashes: Mapping[str, Sequence[str]]) -> list[str]:
    videos = [key for key in dataset.views.values() if dataset.features[key]["dtype"] == "video"]
    lacking = sorted({n for n in dataset.numbers for key in videos if n >= len(hashes.get(key, ()))})
    if not lacking:
        return []
    which = f"of episode {some(lacking)} " if hashes else ""
    return [
        f"The data set holds no hashes {which}({HASHES}), so flipped bits in videos that can still be decoded are not noticed; "
        f"to store them: vlaflow data repair {dataset.root} --out DIR"
    ]


def _surplus_frames(dataset: Dataset) -> list[str]:
    """Find videos with more frames than their episodes have rows, which suggests that they were not recorded together."""
    expected: Counter[tuple[str, Path]] = Counter()
    for episode in dataset.episodes:
        for key, path in dataset.video_paths(episode.index).items():
            expected[key, path] += episode.length
    found = []
    for (key, video), count in expected.items():
        try:
            with open_video(video) as container:
                held = container.streams.video[0].frames if container.streams.video else 0
        except (av.FFmpegError, OSError):
            continue  # decoding reports it better, by episode
        if held > count:
            found.append(
                f"{video} holds {held} frames of '{key}', but its episodes have {count} rows in total, so frames and actions "
                f"may not belong together. Record these episodes again, or cut the video."
            )
    return found


def _about_outliers(name: str, dimensions: Sequence[str], stats: FeatureStats) -> list[str]:
    """A sentence about every dimension with a number that is absurdly far from the others."""
    found = []
    for d, label in enumerate(dimensions):
        usual, far = stats.q99[d] - stats.q01[d], max(stats.max[d] - stats.q50[d], stats.q50[d] - stats.min[d])
        if far > OUTLIER * usual > 0:
            found.append(
                f"{name}: dimension '{label}' is up to {far:.3g} away from its median, {far / usual:.3g} times the spread of "
                "98 % of its frames; a single wrong frame can spoil its normalisation."
            )
    return found


def _about_numbers(dataset: Dataset) -> list[str]:
    columns, spec, remarks = dataset.columns(), dataset.action_spec, list(dataset.row_notes)
    for name, stats in compute(dataset).items():
        still = [d for d in range(stats.dim) if stats.min[d] == stats.max[d]]
        if still:
            remarks.append(f"{name}: dimension {', '.join(map(str, still))} never changes.")
        remarks += about_jitter(name, dataset.dimension_names(name), stats)
        remarks += _about_outliers(name, dataset.dimension_names(name), stats)
    if spec is None:
        remarks.append(
            f"No action spec: training drafts one. To state what its actions mean: vlaflow data spec {dataset.root} --out FILE"
            f"{dataset.reading.options}"
        )
    else:
        outside = (columns.action < spec.low - 1e-6) | (columns.action > spec.high + 1e-6)
        for d in np.flatnonzero(outside.any(axis=0)):
            dimension = spec.dimensions[d]
            episode = columns.episode[np.argmax(outside[:, d])]
            remarks.append(
                f"action '{dimension.name}' leaves its range [{dimension.low:g}, {dimension.high:g}] in "
                f"{outside[:, d].mean():.1%} of the frames, first in episode {episode}."
            )
    share = paused(stated(dataset), PauseRule()).mean()
    if share > 0:
        remarks.append(
            f"{share:.1%} of the frames are pauses by the default rule (vlaflow.data.quality.PauseRule); recipes with a "
            "pause rule leave them out of the loss"
            + (", and refuse to train while that is more than max_excluded." if share > 0.5 else ".")
        )
    share = intervened(dataset, INTERVENTIONS).mean()
    if share > 0:
        remarks.append(
            f"In {share:.1%} of the frames the executed action differs from the recorded one "
            "(vlaflow.data.quality.InterventionRule); what follows in a chunk is left out of the loss."
        )
    if dataset.video_drift_s >= TOLERANCE_S:
        remarks.append(
            f"Episodes begin up to {dataset.video_drift_s * 1000:.2g} ms away from a frame of their video "
            "('from_timestamp' in meta/episodes); the nearest frame is used."
        )
    path = dataset.root / "meta/stats.json"
    if dataset.version == "v3.0":
        try:
            found = read_object(path, DataError, "")
            quantiles = all("q99" in found[key] for key in dataset.action_keys)
        except (DataError, KeyError, TypeError):
            quantiles = False
        if not quantiles:
            remarks.append("meta/stats.json is missing, damaged or without quantiles; LeRobot needs them, vlaflow does not.")
    return remarks
