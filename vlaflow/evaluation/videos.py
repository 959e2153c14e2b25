"""Videos of single episodes, with some of the policy's chunks, for the report.

The episode is run again in its block, with bit for bit the same outcome, so that the evaluation itself need not keep images. A
second environment with the same seed executes the same actions and is recorded at its own size; the policy's images are not
affected.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vlaflow.config import from_json, to_json
from vlaflow.data.video import REPRODUCIBLE
from vlaflow.errors import DataError
from vlaflow.evaluation.rollout import EpisodeBlock, EpisodeJob, EpisodeResult, RolloutConfig, blocks, one_thread, play_block
from vlaflow.outputs import whole_file, write_json
from vlaflow.policies.base import Policy
from vlaflow.policies.checkpoint import local_folder
from vlaflow.simulators.base import cached
from vlaflow.simulators.workers import run_jobs
from vlaflow.spec import Chunk, Observation
from vlaflow.strict import read_json

FILE = "videos.json"
FRAMES_PER_SECOND = 15
MOST_FRAMES = 75

Numbers = tuple[float, ...]


@dataclass(frozen=True)
class VideoChunk:
    """One chunk of an episode.

    Args:
        step: number of steps executed before it.
        image: file of the policy's image, next to the video.
        actions: (L, D), robot units.
        draft: actions of the first round, if any were regenerated.
        confidence: (L,), the rater's confidence in the draft; None without a rater.
        regenerated: (L,), which actions were regenerated.
        executed: number of executed actions.
    """

    step: int
    image: str
    actions: tuple[Numbers, ...]
    draft: tuple[Numbers, ...] | None
    confidence: Numbers | None
    regenerated: tuple[bool, ...] | None
    executed: int


@dataclass(frozen=True)
class EpisodeVideo:
    """A recorded episode: the file (next to ``videos.json``), steps per video frame, and some of its chunks."""

    episode: EpisodeResult
    file: str
    frame_every: int
    dimensions: tuple[str, ...]
    chunks: tuple[VideoChunk, ...]


def choose(episodes: Sequence[EpisodeResult]) -> list[EpisodeResult]:
    """A success and a failure per environment, if there are any.

    Refinement is preferred, because its chunks show regenerated actions; of several episodes, the one of median length is
    chosen.
    """
    chosen = []
    for env in dict.fromkeys(e.env for e in episodes):
        mine = [e for e in episodes if e.env == env]
        names = sorted({e.compute for e in mine}, key=lambda name: (name != "refine", name))
        for success in (True, False):
            for name in names:
                some = sorted((e for e in mine if e.success == success and e.compute == name), key=lambda e: e.steps)
                if some:
                    chosen.append(some[len(some) // 2])
                    break
    return chosen


def record_videos(
    checkpoint: Path | str,
    played: Mapping[EpisodeJob, EpisodeResult],
    folder: Path,
    config: RolloutConfig,
    *,
    workers: int = 1,
    size: int = 240,
) -> list[EpisodeVideo]:
    """Run and record a success and a failure per environment; write ``videos.json``, videos and images into ``folder``.

    Args:
        checkpoint: folder or Hub repository.
        played: all episodes of the evaluation, because those of a block are played together. ``choose`` says which are
            recorded; they must be reproduced.
        folder: of the videos.
        config: settings of the evaluation.
        workers: number of processes.
        size: side of the image in pixels.
    """
    source, jobs, chosen = local_folder(checkpoint), list(played), choose(list(played.values()))
    tasks = []
    for places in blocks(jobs, config.batch):
        block = EpisodeBlock(tuple(jobs[place] for place in places))
        tasks += [(block, n, played[job]) for n, job in enumerate(block.jobs) if played[job] in chosen]
    tasks.sort(key=lambda task: chosen.index(task[2]))
    run = functools.partial(_record_one, folder=str(folder), config=config, size=size)
    with one_thread():
        setup = functools.partial(Policy.from_pretrained, str(source), config.device, config.dtype, engine=config.engine)
        videos = run_jobs(run, tasks, min(workers, len(tasks)), setup=setup)
    write_json(folder / FILE, [to_json(f) for f in videos], indent=1)
    return videos


def discard(folder: Path) -> None:
    """Forget the videos of an earlier evaluation in this folder, if there are any."""
    (folder / FILE).unlink(missing_ok=True)


def read_videos(folder: Path) -> list[EpisodeVideo]:
    """The videos of a folder, or an empty list without ``videos.json``."""
    file = folder / FILE
    if not file.exists():
        return []
    cure = "delete it and run the evaluation again."
    entries = read_json(file, DataError, cure, finite=True)
    if not isinstance(entries, list):
        raise DataError(f"{file} contains a {type(entries).__name__} instead of a list; {cure}")
    return [from_json(EpisodeVideo, entry, str(file)) for entry in entries]


def _record_one(
    task: tuple[EpisodeBlock, int, EpisodeResult], policy: Policy, *, folder: str, config: RolloutConfig, size: int
) -> EpisodeVideo:
    block, place, expected = task
    job = block.jobs[place]
    every = max(2, -(-expected.steps // MOST_FRAMES))
    recorder = cached(job.env, render=config.render, size=size)
    recorder.restart(job.seed)
    frames, shown, taken = [np.array(recorder.render())], list[tuple[int, np.ndarray, Chunk, int]](), 0

    def follow(steps: int, observation: Observation, chunk: Chunk) -> None:
        nonlocal taken
        image = next(iter(observation.images.values()))
        shown.append((taken, image, chunk, steps - taken))
        for action in chunk.actions[: steps - taken]:
            recorder.advance(action)
            taken += 1
            if taken % every == 0 or taken == expected.steps:
                frames.append(np.array(recorder.render()))

    episode = play_block(policy, block, config, after={place: follow})[place]
    if episode != expected:
        raise DataError(
            f"{job.name} had another outcome when it was repeated, so results here are not reproducible. Please report this."
        )
    stem = re.sub(r"[^\w.-]+", "-", f"{job.env.partition('/')[2]}-{job.compute.name}-{job.seed}-{job.noise_seed}")
    steps_shown = [min(i * every, episode.steps) for i in range(len(frames))]
    outcome = f"success at step {episode.first_success_step}" if episode.success else f"no success in {episode.steps} steps"
    lines = (job.env.partition("/")[2], f"{job.compute.name}, {episode.seed_label}")
    captioned = [caption(f, *lines, f"step {s}: {outcome}") for f, s in zip(frames, steps_shown, strict=True)]
    write_mp4(captioned + [captioned[-1]] * (FRAMES_PER_SECOND // 2), Path(folder) / f"{stem}.mp4")
    chosen = sorted({0, len(shown) // 2})
    chunks = tuple(_video_chunk(shown[i], f"{stem}-{shown[i][0]}.png", Path(folder)) for i in chosen)
    return EpisodeVideo(episode, f"{stem}.mp4", every, tuple(d.name for d in policy.action_spec.dimensions), chunks)


def _video_chunk(shown: tuple[int, np.ndarray, Chunk, int], name: str, folder: Path) -> VideoChunk:
    from PIL import Image

    step, image, chunk, executed = shown
    with whole_file(folder / name) as part:
        Image.fromarray(image).save(part)

    def rows(array: np.ndarray) -> tuple[Numbers, ...]:
        return tuple(tuple(round(float(v), 5) for v in row) for row in array)

    return VideoChunk(
        step=step,
        image=name,
        actions=rows(chunk.actions),
        draft=None if chunk.draft is None else rows(chunk.draft),
        confidence=None if chunk.confidence is None else tuple(round(float(v), 5) for v in chunk.confidence),
        regenerated=None if chunk.regenerated is None else tuple(bool(v) for v in chunk.regenerated),
        executed=executed,
    )


def caption(frame: np.ndarray, *lines: str) -> np.ndarray:
    """Add lines of text on a strip above the frame, where the controls of a player do not hide them."""
    from PIL import Image, ImageDraw, ImageFont

    height, width, _ = frame.shape
    strip = 16 * len(lines) + 6
    strip += (height + strip) % 2  # H.264 needs even sides
    page = Image.new("RGB", (width + width % 2, height + strip), (16, 18, 22))
    page.paste(Image.fromarray(frame), (0, strip))
    font, draw = ImageFont.load_default(12), ImageDraw.Draw(page)
    for number, line in enumerate(lines):
        draw.text((6, 3 + 16 * number), line, fill=(235, 235, 235), font=font)
    return np.asarray(page)


def write_mp4(frames: Sequence[np.ndarray], file: Path, rate: int = FRAMES_PER_SECOND) -> None:
    """Write H.264 in 4:2:0, which every browser plays; the same frames give the same bytes."""
    import av

    height, width, _ = frames[0].shape
    with whole_file(file) as part, av.open(str(part), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "28", "preset": "veryfast", **REPRODUCIBLE})
        stream.width, stream.height, stream.pix_fmt, stream.thread_count = width, height, "yuv420p", 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())
