"""Videos of single episodes, and the chunks a policy made on the way, for the report.

An episode is run again: it is the same to the bit, so results stay unburdened by images. A second environment of the
same seed takes the same actions next to the first and is recorded at its own size; the policy's own pixels are not touched.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vlaflow.config import from_json, to_json
from vlaflow.data.video import REPRODUCIBLE
from vlaflow.errors import DataError
from vlaflow.evaluation.rollout import Episode, EpisodeJob, RolloutConfig, one_thread, open_env, play
from vlaflow.policies.base import Policy
from vlaflow.policies.checkpoint import local_folder
from vlaflow.simulators.base import cached
from vlaflow.simulators.workers import run_jobs
from vlaflow.spec import Chunk, Observation

FILE = "videos.json"
FRAMES_PER_SECOND = 15
MOST_FRAMES = 75

Numbers = tuple[float, ...]


@dataclass(frozen=True)
class Moment:
    """One chunk of an episode.

    Args:
        step: steps executed before it.
        image: file of what the policy saw, next to the video.
        actions: (L, D), robot units.
        draft: first round's actions where some were regenerated.
        confidence: (L,), where a rater judged the draft.
        regenerated: (L,), which actions were regenerated.
        executed: how many of the L actions were executed.
    """

    step: int
    picture: str
    actions: tuple[Numbers, ...]
    draft: tuple[Numbers, ...] | None
    confidence: Numbers | None
    regenerated: tuple[bool, ...] | None
    executed: int


@dataclass(frozen=True)
class EpisodeVideo:
    """A recorded episode: the file (next to ``videos.json``), how long a second of it took, and some of its chunks."""

    episode: Episode
    file: str
    frame_every: int
    dimensions: tuple[str, ...]
    moments: tuple[Moment, ...]


def choose(episodes: Sequence[Episode]) -> list[Episode]:
    """A success and a failure per environment, where there are any.

    Refinement is preferred, because its chunks show what was regenerated; of the successes the one of middle length is taken.
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
    jobs: Sequence[EpisodeJob],
    expected: Sequence[Episode],
    folder: Path,
    config: RolloutConfig,
    *,
    workers: int = 1,
    size: int = 240,
) -> list[EpisodeVideo]:
    """Run and video the jobs; write ``videos.json`` and its videos and images into ``folder``.

    Args:
        expected: what the jobs gave before; decides the frame rate and must be reached again.
        size: side of the image in pixels.
    """
    source, tasks = local_folder(checkpoint), list(zip(jobs, expected, strict=True))
    folder.mkdir(parents=True, exist_ok=True)
    run = functools.partial(_record_one, folder=str(folder), config=config, size=size)
    with one_thread():
        setup = functools.partial(Policy.from_pretrained, str(source), config.device)
        videos = run_jobs(run, tasks, min(workers, len(tasks)), setup=setup)
    (folder / FILE).write_text(json.dumps([to_json(f) for f in videos], indent=1) + "\n")
    return videos


def read_videos(folder: Path) -> list[EpisodeVideo]:
    """The videos of a folder, or none where there is no ``videos.json``."""
    file = folder / FILE
    if not file.exists():
        return []
    try:
        entries = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise DataError(f"{file} is not valid JSON ({error}). Delete it and run the evaluation again.") from error
    return [from_json(EpisodeVideo, entry, str(file)) for entry in entries]


def _record_one(
    task: tuple[EpisodeJob, Episode], policy: Policy, *, folder: str, config: RolloutConfig, size: int
) -> EpisodeVideo:
    job, expected = task
    every = max(2, -(-expected.steps // MOST_FRAMES))
    twin = cached(job.env, render=config.render, size=size)
    twin.restart(job.seed)
    frames, seen, taken = [twin.render()], list[tuple[int, np.ndarray, Chunk, int]](), 0

    def follow(steps: int, observation: Observation, chunk: Chunk) -> None:
        nonlocal taken
        picture = next(iter(observation.images.values()))
        seen.append((taken, picture, chunk, steps - taken))
        for action in chunk.actions[: steps - taken]:
            twin.advance(action)
            taken += 1
            if taken % every == 0 or taken == expected.steps:
                frames.append(twin.render())

    episode = play(policy, open_env(policy, job.env, config.render), job, config, after=follow)
    if episode != expected:
        raise DataError(f"{job.name} did not repeat itself; results of this machine are not reproducible. Please report this.")
    stem = re.sub(r"[^\w.-]+", "-", f"{job.env.rpartition('/')[2]}-{job.compute.name}-{job.seed}")
    steps_shown = [min(i * every, episode.steps) for i in range(len(frames))]
    outcome = f"success at step {episode.first_success_step}" if episode.success else f"no success in {episode.steps} steps"
    lines = (job.env.rpartition("/")[2], f"{job.compute.name}, seed {job.seed}")
    captioned = [caption(f, *lines, f"step {s}: {outcome}") for f, s in zip(frames, steps_shown, strict=True)]
    write_mp4(captioned + [captioned[-1]] * (FRAMES_PER_SECOND // 2), Path(folder) / f"{stem}.mp4")
    chosen = sorted({0, len(seen) // 2})
    moments = tuple(_moment(seen[i], f"{stem}-{seen[i][0]}.png", Path(folder)) for i in chosen)
    return EpisodeVideo(episode, f"{stem}.mp4", every, tuple(d.name for d in policy.action_spec.dimensions), moments)


def _moment(seen: tuple[int, np.ndarray, Chunk, int], name: str, folder: Path) -> Moment:
    from PIL import Image

    step, picture, chunk, executed = seen
    Image.fromarray(picture).save(folder / name)

    def rows(array: np.ndarray) -> tuple[Numbers, ...]:
        return tuple(tuple(round(float(v), 5) for v in row) for row in array)

    return Moment(
        step=step,
        picture=name,
        actions=rows(chunk.actions),
        draft=None if chunk.draft is None else rows(chunk.draft),
        confidence=None if chunk.confidence is None else tuple(round(float(v), 5) for v in chunk.confidence),
        regenerated=None if chunk.regenerated is None else tuple(bool(v) for v in chunk.regenerated),
        executed=executed,
    )


def caption(frame: np.ndarray, *lines: str) -> np.ndarray:
    """The frame with lines of text on a strip above it, where a player's controls do not hide them."""
    from PIL import Image, ImageDraw, ImageFont

    height, width, _ = frame.shape
    strip = 16 * len(lines) + 6
    strip += (height + strip) % 2  # H.264 wants even sides
    page = Image.new("RGB", (width + width % 2, height + strip), (16, 18, 22))
    page.paste(Image.fromarray(frame), (0, strip))
    font, draw = ImageFont.load_default(12), ImageDraw.Draw(page)
    for number, line in enumerate(lines):
        draw.text((6, 3 + 16 * number), line, fill=(235, 235, 235), font=font)
    return np.asarray(page)


def write_mp4(frames: Sequence[np.ndarray], file: Path, rate: int = FRAMES_PER_SECOND) -> None:
    """H.264 in 4:2:0, which every browser plays; the same frames give the same bytes."""
    import av

    height, width, _ = frames[0].shape
    with av.open(str(file), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "28", "preset": "veryfast", **REPRODUCIBLE})
        stream.width, stream.height, stream.pix_fmt, stream.thread_count = width, height, "yuv420p", 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())
