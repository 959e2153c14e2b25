"""Training samples per second, and bytes per frame: frame caches and streams against reading sample by sample.

    python -m benchmarks.loader
    python -m benchmarks.loader --dataset runs/demo/dataset

Every way delivers the same batch, checked before anything is timed: one frame per view as stored (close to it from JPEGs),
state, instruction and the next actions. A sample is loaded in one process, without workers, which spread its cost over cores
but do not lower it; the stream decodes in one other process, and each of its rounds is an epoch that begins with nothing
decoded.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from benchmarks._readers import PerSample, kept_open, lerobot_batch, reopened, torchcodec_frames
from benchmarks._timing import Case, report, say, seconds_in_turns
from vlaflow.data.batch import Batch
from vlaflow.data.frame_source import CODECS
from vlaflow.data.frames import FrameCache
from vlaflow.data.lerobot import Dataset
from vlaflow.data.mixture import Order
from vlaflow.data.stream import FrameStream
from vlaflow.data.windows import Windows
from vlaflow.data.writer import Writer
from vlaflow.spec import ActionSpec, Dimension
from vlaflow.training.loader import AHEAD

FPS = 20


@dataclass(frozen=True)
class Options:
    """What to measure.

    Args:
        dataset: a LeRobot data set with videos; by default small ones are made in a temporary folder.
        sizes: image sides of the data sets made.
        episodes, frames: of each data set made.
        chunk_size: actions per sample.
        batch_size: samples per batch.
        batches: batches per round.
        rounds: rounds.
        json: file for the results.
    """

    dataset: Path | None = None
    sizes: tuple[int, ...] = (96, 256)
    episodes: int = 20
    frames: int = 80
    chunk_size: int = 16
    batch_size: int = 64
    batches: int = 2
    rounds: int = 7
    json: Path | None = None


def make_dataset(root: Path, size: int, episodes: int, frames: int) -> Path:
    """Episodes of a soft background over which a square moves, and random numbers."""
    dimensions = tuple(Dimension(f"d{i}", "m", "world", -1.0, 1.0, "forward") for i in range(4))
    spec = ActionSpec("benchmark arm", dimensions, "none", "none", FPS)
    names, rng = ("a", "b", "c", "d"), np.random.default_rng(0)
    views, provenance = {"camera": (size, size)}, {"seed": 0}
    with Writer(
        root, fps=FPS, action_spec=spec, state_names=names, views=views, robot_type="none", provenance=provenance
    ) as out:
        for episode in range(episodes):
            coarse = torch.from_numpy(rng.uniform(0, 255, (1, 3, 8, 8)))
            soft = torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic").clamp(0, 255)
            images = np.repeat(soft[0].permute(1, 2, 0).numpy().astype(np.uint8)[None], frames, 0)
            for i, side in enumerate(np.linspace(0, size * 3 // 4, frames).astype(int)):
                images[i, side : side + size // 4, side : side + size // 4] = 255 - 2 * episode
            numbers = rng.uniform(-1, 1, (2, frames, 4)).astype(np.float32)
            out.add({"camera": images}, numbers[0], numbers[1], f"Task number {episode % 3}")
    return root


class Epochs:
    """Epochs of a stream, one process decoding ahead.

    Args:
        windows: its samples.
        batch_size: samples per batch.
    """

    def __init__(self, windows: Windows, batch_size: int) -> None:
        self.windows = windows
        self.steps, self.epoch = len(windows) // batch_size, 0
        self.order = Order(self.steps * batch_size, batch_size, 0, windows.nearby())

    def __call__(self) -> None:
        """Load every batch of the next epoch, each announced as the trainer does it."""
        steps = range(self.epoch * self.steps, (self.epoch + 1) * self.steps)
        for step in steps[:AHEAD]:
            self.order.expect(self.order.indices(step))
        for step in steps:
            self.windows.batch(self.order.indices(step))
            if step + AHEAD < steps.stop:
                self.order.expect(self.order.indices(step + AHEAD))
        self.epoch += 1


def require_close(ours: Batch, theirs: Batch) -> None:
    """Refuse JPEGs that are not the frames."""
    for view, image in ours.observation.images.items():
        if (image.float() - theirs.observation.images[view].float()).abs().mean() > 10:
            raise SystemExit(f"the JPEGs of view '{view}' are other frames")


def require_same(ours: Batch, theirs: dict[str, Any], name: str) -> None:
    """Refuse to compare readers that read different things."""
    same = torch.equal(ours.action_BLD, theirs["action"]) and torch.equal(ours.valid_BL, theirs["valid"])
    same &= torch.equal(ours.observation.state_BS, theirs["state"])
    same &= list(ours.observation.instructions) == theirs["instruction"]
    same &= all(torch.equal(image, theirs[view]) for view, image in ours.observation.images.items())
    if not same:
        raise SystemExit(f"'{name}' reads other samples than the frame cache")


def measure(root: Path, options: Options) -> Case:
    """All readers of one data set."""
    dataset, kinds, notes = Dataset.open(root), {}, {}
    for name, codec in CODECS.items():
        began = time.perf_counter()
        cache = FrameCache.open(dataset, codec=codec)
        built = time.perf_counter() - began
        kinds[f"{name} cache"] = Windows(dataset, cache, options.chunk_size)
        notes[f"{name} cache"] = (
            f"built (or opened) in {built:.1f} s, {cache.nbytes / len(dataset) / 1e3:.1f} GB per million frames"
        )
    videos = {path for episode in dataset.episodes for path in dataset.video_paths(episode.index).values()}
    stored = sum(path.stat().st_size for path in videos)
    notes["stream, LeRobot"] = f"the videos alone, {stored / len(dataset) / 1e3:.1f} GB per million frames"
    sizes = ", ".join(f"{h}×{w}" for h, w in cache.shapes.values())
    windows = kinds["raw cache"]
    began = time.perf_counter()
    windows.batch(np.arange(len(windows)))
    notes["first reading of the raw cache, with checksums"] = f"{len(windows) / (time.perf_counter() - began):.4g} samples/s"
    streamed = Windows(dataset, FrameStream(dataset, workers=1), options.chunk_size)
    rng, amount = np.random.default_rng(1), options.batches * options.batch_size
    with ExitStack() as stack:
        frames = {"PyAV, kept open": kept_open(stack), "PyAV, reopened": reopened, "torchcodec": torchcodec_frames()}
        readers: dict[str, Callable[[np.ndarray], Any]] = {name: kind.batch for name, kind in kinds.items()}
        for name, frame in frames.items():
            if frame is not None:
                readers[name] = PerSample(dataset, options.chunk_size, frame).batch
        few = rng.integers(0, len(windows), 8)
        require_close(windows.batch(few), kinds["jpeg cache"].batch(few))
        for name in readers.keys() - kinds.keys():
            require_same(windows.batch(few), readers[name](few), name)
        if (theirs := lerobot_batch(dataset, options.chunk_size)) is not None:
            readers["LeRobot"] = theirs
        chosen = [rng.integers(0, len(windows), options.batch_size) for _ in range(options.batches)]
        arms = {name: _all(batch, chosen) for name, batch in readers.items()}
        arms["stream"] = epochs = Epochs(streamed, min(options.batch_size, len(streamed)))
        amounts = dict.fromkeys(readers, amount) | {"stream": epochs.order.count}
        seconds = seconds_in_turns(arms, options.rounds)
        rates = {name: [amounts[name] / each for each in seconds[name]] for name in arms}
        return Case(sizes, "samples/s", rates, notes)


def _all(batch: Callable[[np.ndarray], Any], chosen: Sequence[np.ndarray]) -> Callable[[], None]:
    def run() -> None:
        for indices in chosen:
            batch(indices)

    return run


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and report."""
    options = tyro.cli(Options, description=__doc__, args=argv)
    torch.set_num_threads(1)
    if options.dataset is not None:
        return report("loader", options, [measure(options.dataset, options)], options.json)
    cases = []
    with tempfile.TemporaryDirectory() as folder:
        for size in options.sizes:
            say(f"Making a data set of {options.episodes} × {options.frames} frames, {size}×{size}")
            root = make_dataset(Path(folder) / str(size), size, options.episodes, options.frames)
            cases.append(measure(root, options))
    return report("loader", options, cases, options.json)


if __name__ == "__main__":
    raise SystemExit(main())
