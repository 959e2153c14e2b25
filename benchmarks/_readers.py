"""The readers that the frame cache is compared with: one sample at a time, each read from the files when it is asked for."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow.parquet as pq
import torch

from benchmarks._timing import say
from vlaflow.data.lerobot import Dataset
from vlaflow.data.lerobot_meta import read_meta


class PerSample:
    """The straightforward reader: per sample, rows of the parquet table, a seek in the video, frames up to the one wanted.

    Args:
        dataset: an open data set with videos.
        chunk_size: actions per sample.
        frame: (path, seconds) to uint8 (H, W, 3).
    """

    def __init__(self, dataset: Dataset, chunk_size: int, frame: Callable[[Path, float], np.ndarray]) -> None:
        self.dataset, self.chunk_size, self.frame = dataset, chunk_size, frame
        self.files = read_meta(dataset.root).files
        paths = dict.fromkeys(f.data for f in self.files)
        self.tables = {path: pq.read_table(path, columns=["observation.state", "action", "task_index"]) for path in paths}
        self.first = {f.data: e.start for e, f in reversed(list(zip(dataset.episodes, self.files, strict=True)))}
        self.episode = np.repeat(np.arange(len(dataset.episodes)), [e.length for e in dataset.episodes])

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One sample as tensors."""
        episode = self.dataset.episodes[self.episode[index]]
        files = self.files[episode.index]
        row, end = index - self.first[files.data], episode.start + episode.length
        rows = self.tables[files.data].slice(row, min(self.chunk_size, end - index)).to_pydict()
        action, missing = rows["action"], self.chunk_size - len(rows["action"])
        sample: dict[str, Any] = {
            "state": torch.tensor(rows["observation.state"][0], dtype=torch.float32),
            "action": torch.tensor(action + [action[-1]] * missing, dtype=torch.float32),
            "valid": torch.arange(self.chunk_size) < len(action),
            "instruction": self.dataset.tasks[rows["task_index"][0]],
        }
        for view, key in self.dataset.views.items():
            path, start_s = files.videos[key]
            sample[view] = torch.from_numpy(self.frame(path, start_s + (index - episode.start) / self.dataset.fps))
        return sample

    def batch(self, indices: np.ndarray) -> dict[str, Any]:
        """Samples stacked as ``torch.utils.data.DataLoader`` does."""
        return torch.utils.data.default_collate([self[int(i)] for i in indices])


def decode(container: Any, at_s: float) -> np.ndarray:
    """The frame shown at ``at_s``: seek to the key frame before it and decode forward."""
    stream = container.streams.video[0]
    container.seek(int((at_s + 1e-4) / stream.time_base), stream=stream, backward=True)
    for frame in container.decode(stream):
        if frame.pts * stream.time_base >= at_s - 1e-4:
            return frame.to_ndarray(format="rgb24")
    raise SystemExit(f"no frame at {at_s} s")


def reopened(path: Path, at_s: float) -> np.ndarray:
    """The file is opened for every sample, as simple readers do."""
    with av.open(str(path)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        return decode(container, at_s)


def kept_open(stack: ExitStack) -> Callable[[Path, float], np.ndarray]:
    """Files stay open between samples."""
    files: dict[Path, Any] = {}

    def frame(path: Path, at_s: float) -> np.ndarray:
        if path not in files:
            files[path] = stack.enter_context(closing(av.open(str(path))))
            files[path].streams.video[0].codec_context.thread_count = 1
        return decode(files[path], at_s)

    return frame


def torchcodec_frames() -> Callable[[Path, float], np.ndarray] | None:
    """Through torchcodec with its decoders kept, where it is installed and finds its FFmpeg."""
    try:
        from torchcodec.decoders import VideoDecoder
    except (ImportError, OSError, RuntimeError) as error:
        say(f"torchcodec is left out: {str(error).splitlines()[0][:100]}")
        return None
    decoders: dict[Path, Any] = {}

    def frame(path: Path, at_s: float) -> np.ndarray:
        if path not in decoders:
            decoders[path] = VideoDecoder(str(path), dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="approximate")
        return decoders[path].get_frame_played_at(at_s + 1e-4).data.numpy()

    return frame


def lerobot_batch(dataset: Dataset, chunk_size: int) -> Callable[[np.ndarray], Any] | None:
    """LeRobot's own loader, where it is installed. It answers floats in (3, H, W); that conversion is part of its sample."""
    try:
        from lerobot.datasets.lerobot_dataset import LeRobotDataset
    except (ImportError, OSError, RuntimeError) as error:
        say(f"LeRobot's loader is left out: {str(error).splitlines()[0][:100]}")
        return None
    deltas = {"action": [i / dataset.fps for i in range(chunk_size)]}
    backend = "pyav" if torchcodec_frames() is None else "torchcodec"
    theirs = LeRobotDataset("local/benchmark", root=dataset.root, delta_timestamps=deltas, video_backend=backend)
    return lambda indices: torch.utils.data.default_collate([theirs[int(i)] for i in indices])
