"""A data set on one page: thumbnails and one curve per dimension, as a self-contained HTML file or as a PNG.

matplotlib is imported inside, for it takes a second and not every machine that trains has it.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlaflow.data.frames import resize
from vlaflow.data.lerobot import Dataset
from vlaflow.errors import ConfigError

THUMBNAILS = 6
SIDE = 128


def chosen_episodes(dataset: Dataset, limit: int) -> list[int]:
    """Up to ``limit`` episodes, the first of each task before the second of any."""
    by_task: dict[str, list[int]] = {}
    for episode in dataset.episodes:
        by_task.setdefault(episode.task, []).append(episode.index)
    rounds = [members[i] for i in range(max(map(len, by_task.values()))) for members in by_task.values() if i < len(members)]
    return sorted(rounds[:limit])


def write_page(dataset: Dataset, path: Path, limit: int = 12) -> Path:
    """Write ``path`` (.html or .png) with up to ``limit`` episodes.

    Raises:
        ConfigError: another ending.
        DataError: a damaged video or table.
    """
    episodes = chosen_episodes(dataset, limit)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".png":
        path.write_bytes(_figure(dataset, episodes))
    elif path.suffix in (".html", ".htm"):
        path.write_text(_html(dataset, episodes), encoding="utf-8")
    else:
        raise ConfigError(f"--out must end in .html or .png, got '{path}'.")
    return path


def _html(dataset: Dataset, episodes: Sequence[int]) -> str:
    title = html.escape(dataset.root.resolve().name)
    parts = [
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{title}</title>",
        "<style>body{font:15px system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em}img{max-width:100%}"
        "h2{margin:1.5em 0 .2em}p{color:#555;margin:.2em 0}</style>",
        f"<h1>{title}</h1><p>LeRobot {dataset.version} · {len(dataset.episodes)} episodes · {len(dataset)} frames at "
        f"{dataset.fps:g} fps · {len(dataset.tasks)} tasks · content {dataset.fingerprint}</p>",
    ]
    for index in episodes:
        episode = dataset.episodes[index]
        picture = base64.b64encode(_figure(dataset, [index])).decode()
        parts.append(
            f"<h2>Episode {index}</h2><p>{html.escape(episode.task)} · {episode.length} frames · "
            f"{episode.length / dataset.fps:.1f} s</p><img alt='episode {index}' src='data:image/png;base64,{picture}'>"
        )
    return "\n".join(parts) + "\n</html>\n"


def _figure(dataset: Dataset, episodes: Sequence[int]) -> bytes:
    """One row per episode: thumbnails of every view above, state and action over time below."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    heights = [1.2 * max(1, len(dataset.views)), 2.2] * len(episodes)
    figure = Figure(figsize=(10, sum(heights) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2 * len(episodes), 2, height_ratios=heights)
    for row, index in enumerate(episodes):
        strip = figure.add_subplot(grid[2 * row, :])
        strip.set_axis_off()
        strip.set_title(f"episode {index}: {dataset.episodes[index].task}", fontsize=9)
        if dataset.views:
            strip.imshow(np.concatenate([_strip(dataset, index, view) for view in dataset.views]))
        _curves(figure.add_subplot(grid[2 * row + 1, 0]), dataset, index, "state")
        _curves(figure.add_subplot(grid[2 * row + 1, 1]), dataset, index, "action")
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=90, metadata={"Software": None})
    return stream.getvalue()


def _strip(dataset: Dataset, episode: int, view: str) -> np.ndarray:
    length = dataset.episodes[episode].length
    wanted = {int(i) for i in np.linspace(0, length - 1, THUMBNAILS)}
    kept = [resize(image, SIDE) for i, image in enumerate(dataset.iter_frames(episode, view)) if i in wanted]
    kept += [np.full((SIDE, SIDE, 3), 255, np.uint8)] * (THUMBNAILS - len(kept))
    return np.concatenate(kept, axis=1)


def _curves(axes: Any, dataset: Dataset, episode: int, name: str) -> None:
    rows = dataset.episode_slice(episode)
    values = getattr(dataset.columns(), name)[rows]
    labels = dataset.dimension_names(name)
    units = {d.name: d.unit for d in dataset.action_spec.dimensions} if dataset.action_spec and name == "action" else {}
    seconds = np.arange(len(values)) / dataset.fps
    styles = ("-", "--", ":", "-.")  # so that curves can be told apart in greyscale too
    for d in range(values.shape[1]):
        label = f"{labels[d]} [{units[labels[d]]}]" if labels[d] in units else labels[d]
        axes.plot(seconds, values[:, d], styles[d % len(styles)], linewidth=1, label=label)
    axes.set_xlabel("time [s]", fontsize=8)
    axes.set_ylabel(name, fontsize=8)
    axes.tick_params(labelsize=7)
    if 0 < values.shape[1] <= 10:
        axes.legend(fontsize=6, ncols=2, loc="upper right")
