"""A data set on one page: thumbnails and one curve per dimension, as a self-contained HTML file or as a PNG."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlaflow.data.filters import left_out
from vlaflow.data.lerobot import Dataset
from vlaflow.data.resize import resize
from vlaflow.errors import ConfigError
from vlaflow.outputs import require_writable, whole_file
from vlaflow.reports import page
from vlaflow.text import one_line

THUMBNAILS = 6
SIDE = 128
HATCHES = ("", "//", "..", "xx", "++")
"""Hatching of the bands that show what rules leave out, so that they can be told apart in greyscale."""


def chosen_episodes(dataset: Dataset, limit: int) -> list[int]:
    """Up to ``limit`` episodes, the first of each task before the second of any."""
    by_task: dict[str, list[int]] = {}
    for episode in dataset.episodes:
        by_task.setdefault(episode.task, []).append(episode.index)
    rounds = [members[i] for i in range(max(map(len, by_task.values()))) for members in by_task.values() if i < len(members)]
    return sorted(rounds[:limit])


def require_page(path: Path) -> None:
    """Refuse a page that ``write_page`` could not write.

    Raises:
        ConfigError: another file ending, or a folder that cannot be written.
    """
    if path.suffix not in (".html", ".htm", ".png"):
        raise ConfigError(f"--out must end in .html or .png, got '{path}'.")
    require_writable(path)


def write_page(dataset: Dataset, path: Path, limit: int = 12) -> Path:
    """Write ``path`` (.html or .png) with up to ``limit`` episodes.

    Raises:
        ConfigError: see ``require_page``.
        DataError: a damaged video or table.
    """
    require_page(path)
    episodes = chosen_episodes(dataset, limit)
    if path.suffix == ".png":
        with whole_file(path) as part:
            part.write_bytes(_figure(dataset, episodes, left_out(dataset)))
    else:
        _write_html(dataset, episodes, path)
    return path


def _write_html(dataset: Dataset, episodes: Sequence[int], path: Path) -> None:
    shown, marks = [], left_out(dataset)
    for index in episodes:
        episode = dataset.episode(index)
        text = f"{episode.task} · {episode.length} frames · {episode.length / dataset.fps:.1f} s"
        image = page.data_url(_figure(dataset, [index], marks), "image/png")
        shown.append({"title": f"Episode {index}", "text": text, "image": image})
    page.write(
        path,
        "dataset.html",
        title=dataset.root.resolve().name,
        summary=f"LeRobot {dataset.version} · {len(dataset.episodes)} episodes · {len(dataset)} frames at {dataset.fps:g} fps"
        f" · {len(dataset.tasks)} tasks · content {dataset.fingerprint}",
        episodes=shown,
    )


def _figure(dataset: Dataset, episodes: Sequence[int], marks: Mapping[str, np.ndarray]) -> bytes:
    """One row per episode: thumbnails of every view above, state and action over time below, with what rules leave out."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    heights = [1.2 * max(1, len(dataset.views)), 2.2] * len(episodes)
    figure = Figure(figsize=(10, sum(heights) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2 * len(episodes), 2, height_ratios=heights)
    for row, index in enumerate(episodes):
        strip = figure.add_subplot(grid[2 * row, :])
        strip.set_axis_off()
        strip.set_title(plain(f"episode {index}: {dataset.episode(index).task}"), fontsize=9)
        if dataset.views:
            strip.imshow(np.concatenate([_strip(dataset, index, view) for view in dataset.views]))
        _curves(figure.add_subplot(grid[2 * row + 1, 0]), dataset, index, "state", marks)
        _curves(figure.add_subplot(grid[2 * row + 1, 1]), dataset, index, "action", marks)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=90, metadata={"Software": None})
    return stream.getvalue()


def plain(text: str) -> str:
    """Escape dollar signs, which would otherwise begin a formula in matplotlib, and spell out control characters."""
    return one_line(text).replace("$", r"\$")


def _strip(dataset: Dataset, episode: int, view: str) -> np.ndarray:
    length = dataset.episode(episode).length
    wanted = {int(i) for i in np.linspace(0, length - 1, THUMBNAILS)}
    kept = [resize(image, SIDE) for i, image in enumerate(dataset.iter_frames(episode, view)) if i in wanted]
    kept += [np.full((SIDE, SIDE, 3), 255, np.uint8)] * (THUMBNAILS - len(kept))
    return np.concatenate(kept, axis=1)


def _curves(axes: Any, dataset: Dataset, episode: int, name: str, marks: Mapping[str, np.ndarray]) -> None:
    rows = dataset.episode_slice(episode)
    values = getattr(dataset.columns(), name)[rows]
    labels = dataset.dimension_names(name)
    units = {d.name: d.unit for d in dataset.action_spec.dimensions} if dataset.action_spec and name == "action" else {}
    seconds = np.arange(len(values)) / dataset.fps
    styles = ("-", "--", ":", "-.")  # curves must be distinguishable in greyscale
    for d in range(values.shape[1]):
        label = f"{labels[d]} [{units[labels[d]]}]" if labels[d] in units else labels[d]
        axes.plot(seconds, values[:, d], styles[d % len(styles)], linewidth=1, label=plain(label))
    _shade(axes, dataset.fps, {rule: marked_N[rows] for rule, marked_N in marks.items()})
    axes.set_xlabel("time [s]", fontsize=8)
    axes.set_ylabel(name, fontsize=8)
    axes.tick_params(labelsize=7)
    if 0 < values.shape[1] <= 10:
        axes.legend(fontsize=6, ncols=2, loc="upper right")


def _shade(axes: Any, fps: float, marks: Mapping[str, np.ndarray]) -> None:
    """A band at the bottom of the curves for each rule, where it marks frames (T,) of the episode."""
    for place, (name, marked_T) in enumerate(marks.items()):
        if not marked_T.any():
            continue
        edges = np.flatnonzero(np.diff(np.pad(marked_T.astype(int), 1)))
        bars = [(first / fps, (end - first) / fps) for first, end in edges.reshape(-1, 2).tolist()]
        axes.broken_barh(
            bars,
            (0.03 * place, 0.03),
            transform=axes.get_xaxis_transform(),
            facecolor=str(0.2 + 0.15 * place),
            hatch=HATCHES[place],
            label=name,
        )
