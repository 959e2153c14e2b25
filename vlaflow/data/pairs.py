"""Frame pairs: two frames of one view, a fixed time apart. Only video is needed, no actions.

    pairs = FramePairs(dataset, FrameCache.open(dataset, 64, ["image"]), "image", gap_s=1.0)
    batch = pairs.batch(np.array([0, 5, 9]))          # batch.observation.images: {"earlier": ..., "later": ...}

**Ends of episodes.** Both frames of a pair lie in the same episode, exactly ``gap`` frames apart. So the last ``gap`` frames
of an episode do not start a pair, and an episode of ``gap`` frames or fewer gives none; ``short`` lists such episodes. Nothing
is padded.

Shape letters: N rows of the data set, M pairs, B batch, H height, W width, K codes per pair.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save
from torch import Tensor

from vlaflow.data.batch import Batch, ObservationBatch
from vlaflow.data.frame_source import FrameSource
from vlaflow.data.frames import cache_home, locked
from vlaflow.data.lerobot import Dataset
from vlaflow.data.nearby import Nearby
from vlaflow.errors import ConfigError, DataError, nearest
from vlaflow.outputs import whole_file

EARLIER, LATER = "earlier", "later"
"""Names of the two images of a pair in a batch."""
TABLE_LAYOUT = 2
"""Version of the table format; increment it when its content changes."""


def gap_in_frames(gap_s: float, rate_hz: float) -> int:
    """Convert a gap from seconds to frames, rounded to the nearest.

    Raises:
        ConfigError: less than one frame.
    """
    gap = round(gap_s * rate_hz)
    if gap < 1:
        raise ConfigError(f"A gap of {gap_s:g} s is less than one frame at {rate_hz:g} frames per second. Choose a longer one.")
    return gap


def chosen_view(dataset: Dataset, view: str | None) -> str:
    """The view of this name, or the first one if None.

    Raises:
        DataError: a data set without video, or without this view.
    """
    if not dataset.views:
        raise DataError(f"{dataset.root} has no camera, but frame pairs need video. Choose a data set with a view.")
    if view is not None and view not in dataset.views:
        raise DataError(f"{dataset.root} has no view '{view}'; {nearest(view, dataset.views)}")
    return view if view is not None else next(iter(dataset.views))


class FramePairs:
    """All frame pairs of the chosen episodes.

    Args:
        dataset: a data set with video.
        cache: its frames, of ``view`` at least.
        view: the view to use.
        gap_s: time between the frames in seconds.
        episodes: indices of the chosen episodes; all by default.

    Attributes:
        gap: time between the frames in frames.
        rows: int64 (M,), the row of each pair's earlier frame in ``Dataset.columns``.
        short: the chosen episodes that are too short for a pair.

    Raises:
        ConfigError: a gap of less than one frame.
        DataError: no such view, or no episode longer than the gap.
    """

    def __init__(
        self, dataset: Dataset, cache: FrameSource, view: str, gap_s: float, *, episodes: Sequence[int] | None = None
    ) -> None:
        self.dataset, self.cache, self.view, self.gap_s = dataset, cache, chosen_view(dataset, view), gap_s
        self.gap = gap_in_frames(gap_s, dataset.fps)
        self.episodes = tuple(dataset.numbers if episodes is None else episodes)
        slices = {episode: dataset.episode_slice(episode) for episode in self.episodes}
        self.short = tuple(e for e, s in slices.items() if s.stop - s.start <= self.gap)
        if len(self.short) == len(self.episodes):
            longest = max((s.stop - s.start for s in slices.values()), default=0)
            which = "No episode" if len(slices) == len(dataset.episodes) else f"None of the {len(slices)} chosen episodes"
            raise DataError(
                f"{which} of {dataset.root} is longer than the gap of {gap_s:g} s ({self.gap} frames at {dataset.fps:g} per "
                f"second); the longest has {longest} frames. Choose a shorter gap: --set gap_s=..."
            )
        self.rows = np.concatenate([np.arange(s.start, s.stop - self.gap) for e, s in slices.items() if e not in self.short])

    def __len__(self) -> int:
        """Number of pairs, M."""
        return len(self.rows)

    def nearby(self) -> Nearby | None:
        """The order in which they are to be read; None if any order is as good."""
        return self.cache.nearby(self.rows, (0, self.gap))

    def left_out(self) -> str:
        """A sentence about the episodes without a pair; empty if there are none."""
        if not self.short:
            return ""
        return (
            f"{len(self.short)} of {len(self.episodes)} episodes are not longer than the gap of {self.gap_s:g} s ({self.gap} "
            f"frames) and give no pairs; the others give {len(self)} pairs."
        )

    def frames(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """The earlier and the later frames of the pairs at ``indices`` (B,): uint8 (B, H, W, 3) each."""
        rows = self.rows[indices]
        both = self.cache.gather(np.concatenate((rows, rows + self.gap)))[self.view]
        return both[: len(rows)], both[len(rows) :]

    def in_turn(self, indices: np.ndarray, batch_size: int) -> Iterator[tuple[np.ndarray, Tensor, Tensor]]:
        """Go through the pairs at ``indices``, ascending: (indices, earlier frames, later frames) of every batch.

        Each batch is announced while the one before it is used, so that a stream decodes every run of frames once.
        """
        batches = [indices[start : start + batch_size] for start in range(0, len(indices), batch_size)]
        nearby = self.nearby()
        for place, batch in enumerate(batches):
            if nearby is not None:
                for soon in batches[place + (place > 0) : place + 2]:
                    nearby.expect(soon)
            yield batch, *self.frames(batch)

    def batch(self, indices: np.ndarray) -> Batch:
        """The pairs at ``indices`` (B,) as a training batch.

        Its images are named "earlier" and "later"; its chunk consists of the ``gap`` executed actions between the two frames
        (D is 0 if the data set has none), all of them valid; everything else is taken from the earlier frame.
        """
        first_B, columns = self.rows[indices], self.dataset.columns()
        earlier, later = self.frames(indices)
        observation = ObservationBatch(
            {EARLIER: earlier, LATER: later},
            torch.from_numpy(columns.state[first_B]),
            [self.dataset.tasks[task] for task in columns.task[first_B]],
        )
        return Batch(
            observation,
            torch.from_numpy(columns.executed[first_B[:, None] + np.arange(self.gap)]),
            torch.ones(len(first_B), self.gap, dtype=torch.bool),
            torch.from_numpy(columns.episode[first_B]),
            torch.from_numpy(columns.frame[first_B]),
        )


def pair_table(
    pairs: FramePairs,
    encode: Callable[[Tensor, Tensor], Tensor],
    key: str,
    progress: Callable[[int, int], None] | None = None,
    batch_size: int = 256,
) -> np.ndarray:
    """Codes of every pair, computed once and stored next to the frame cache.

    Args:
        pairs: usually those of all episodes.
        encode: earlier and later frames, uint8 (B, H, W, 3), to int64 (B, K), each in [0, 32767].
        key: identifies ``encode`` (the fingerprint of a model); the table is stored under a hash of it and of data set, view,
            frame size, codec and pairs.
        progress: called with (pairs done, total pairs) while computing.
        batch_size: pairs encoded together.

    Returns:
        int64 (N, K), by row of ``Dataset.columns``; −1 in rows that do not start a pair.

    Raises:
        DataError: a damaged table, or no permission to write one.
    """
    dataset = pairs.dataset
    shape, codec = pairs.cache.shapes[pairs.view], pairs.cache.codec.key
    what = [TABLE_LAYOUT, dataset.fingerprint, pairs.view, pairs.gap, shape, codec, key]
    if columns := dataset.chosen_views([pairs.view]):
        what.append(columns)
    home = cache_home(dataset.root)
    name = f"codes-{hashlib.blake2b(json.dumps(what).encode() + pairs.rows.tobytes(), digest_size=8).hexdigest()}"
    file = home / f"{name}.safetensors"
    try:
        home.mkdir(parents=True, exist_ok=True)
        with locked(home / f".{name}.lock"):
            if not file.exists():
                _write(file, _encode_all(pairs, encode, progress, batch_size))
        return load_file(file)["value_NK"].astype(np.int64)
    except (OSError, SafetensorError, KeyError) as error:
        raise DataError(
            f"The table {file} cannot be read or written ({error}). Delete it to have it computed again, or set VLAFLOW_CACHE "
            f"to a writable folder."
        ) from error


def _encode_all(
    pairs: FramePairs,
    encode: Callable[[Tensor, Tensor], Tensor],
    progress: Callable[[int, int], None] | None,
    batch_size: int,
) -> np.ndarray:
    value_NK: np.ndarray | None = None
    for indices, earlier, later in pairs.in_turn(np.arange(len(pairs)), batch_size):
        value_BK = encode(earlier, later).cpu().numpy()
        if value_NK is None:
            value_NK = np.full((len(pairs.dataset), value_BK.shape[1]), -1, np.int16)
        value_NK[pairs.rows[indices]] = value_BK
        if progress:
            progress(int(indices[-1]) + 1, len(pairs))
    assert value_NK is not None
    return value_NK


def _write(file: Path, value_NK: np.ndarray) -> None:
    """Write the table so that it is complete or absent, even if the process is killed."""
    kept = "nothing of it was kept. Make room, or set VLAFLOW_CACHE to another folder"
    with whole_file(file, "The table of codes", kept) as part:
        part.write_bytes(save({"value_NK": value_NK}))  # save_file would put another file in its place, of this user alone
