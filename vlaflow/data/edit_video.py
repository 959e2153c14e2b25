"""Where episodes lie in the mp4 files of a camera, from the packets themselves: nothing is decoded.

Meta says in which file an episode is and when it begins (v3.0), or that it has a file of its own (v2.x). Where the video
contradicts this, an episode is placed by counting frames if the counts leave no doubt; otherwise it is a problem. Frames are
addressed by number, so what is placed can be written at exact times.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from vlaflow.data.video import (
    START_TOLERANCE,
    TOLERANCE_S,
    FrameDigest,
    Segment,
    decodable,
    encode_video,
    open_video,
    pixel_counts,
)
from vlaflow.errors import DataError
from vlaflow.outputs import REFUSALS


@dataclass(frozen=True)
class Timeline:
    """The frames of a video, in the order in which they are shown.

    Args:
        path: the file.
        size: height and width in pixels.
        deep: whether pixels have more than eight bits, as in depth maps.
        time_base: seconds per unit of ``shown``.
        shown: int64 (F,), when each frame is shown.
        key: bool (F,), whether it can be decoded without others.
        decoded: int64 (F,), its place in the order of decoding.
        bytes: int64 (F,), the size of its packet.
    """

    path: Path
    size: tuple[int, int]
    deep: bool
    time_base: Fraction
    shown: np.ndarray
    key: np.ndarray
    decoded: np.ndarray
    bytes: np.ndarray

    @property
    def seconds(self) -> np.ndarray:
        """When each frame is shown, float64 (F,)."""
        return self.shown * float(self.time_base)

    def near(self, start_s: float, fps: float) -> int | None:
        """The frame that is shown within a quarter of a frame of ``start_s``."""
        if not len(self.shown):
            return None
        first = int(np.argmin(np.abs(self.seconds - start_s)))
        return first if abs(self.seconds[first] - start_s) < START_TOLERANCE / fps else None

    def is_regular(self, first: int, count: int, fps: float) -> bool:
        """Whether so many frames follow each other at this rate."""
        if first + count > len(self.shown):
            return False
        seconds = self.seconds[first : first + count]
        return bool(np.all(np.abs(seconds - seconds[0] - np.arange(count) / fps) < START_TOLERANCE / fps))


def read_timeline(path: Path) -> Timeline:
    """Read the packets of a video.

    Raises:
        DataError: the file cannot be read, or holds no video.
    """
    try:
        with open_video(path) as container:
            streams = decodable(container)
            if not streams:
                raise DataError(f"{path} holds no video that can be decoded.")
            stream = streams[0]
            context = stream.codec_context
            packets = [(p.pts, p.is_keyframe, p.size) for p in container.demux(stream) if _is_whole(p)]
            pixels = context.pix_fmt or ""
            size, time_base = (context.height, context.width), Fraction(stream.time_base or 1)
    except (av.FFmpegError, OSError) as error:
        raise DataError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error}).") from error
    order = np.argsort(np.array([pts for pts, _, _ in packets], np.int64), kind="stable")
    shown, key, sizes = (np.array(column)[order] for column in zip(*packets, strict=True)) if packets else (order,) * 3
    deep = pixels.startswith("gray") and pixels not in ("gray", "gray8", "gray8a")
    return Timeline(path, size, deep, time_base, shown.astype(np.int64), key.astype(bool), order, sizes.astype(np.int64))


def _is_whole(packet: Any) -> bool:
    """Whether a packet holds a frame; those in which a file was cut off do not, nor does the empty one at its end."""
    return packet.pts is not None and bool(packet.size) and not packet.is_corrupt


@dataclass(frozen=True)
class Clip:
    """One episode of one camera.

    Args:
        timeline: the frames of its file.
        first: its first frame.
        count: number of frames, T.
    """

    timeline: Timeline
    first: int
    count: int

    @property
    def own(self) -> slice:
        """Its frames."""
        return slice(self.first, self.first + self.count)

    @property
    def can_be_copied(self) -> bool:
        """Whether its packets can be decoded without those of other episodes."""
        places = self.timeline.decoded[self.own]
        return bool(self.timeline.key[self.first] and places.min() == places[0] and places.max() - places[0] == self.count - 1)

    def copied(self, histogram: np.ndarray | None, digest: str | None) -> Segment:
        """The episode as it is, of which this is known; nothing is decoded, and its packets must be such as can be copied."""
        counts = np.zeros((3, 256), np.int64) if histogram is None else histogram
        start, size = int(self.timeline.shown[self.first]), int(self.timeline.bytes[self.own].sum())
        return Segment(self.timeline.path, self.count, counts, digest or "", start, size)

    def segment(self, scratch: Path, fps: float) -> Segment:
        """Decode every frame, and encode the episode again where its packets cannot be copied.

        Args:
            scratch: an mp4 file for an episode that is encoded again.
            fps: frames per second.

        Raises:
            DataError: a frame cannot be decoded.
            SpecError: the frames cannot be encoded (see ``encode_video``).
        """
        path = self.timeline.path
        try:
            if not self.can_be_copied and self.timeline.deep:
                raise DataError(
                    f"its depth maps in {path} do not begin at a key frame, and are not encoded again, which would cut them to "
                    "eight bits"
                )
            if not self.can_be_copied:
                scratch.parent.mkdir(exist_ok=True)
                return encode_video((frame.to_ndarray(format="rgb24") for frame in self._frames()), scratch, fps)
            if self.timeline.deep:
                count, digest = _counted(self._frames())
                histogram = np.zeros((3, 256), np.int64)
            else:
                count, histogram, digest = pixel_counts(self._frames())
        except av.FFmpegError as error:
            if error.errno in REFUSALS:  # of the disk, while encoding
                raise
            raise DataError(f"a frame of {path} cannot be decoded ({error.strerror or error})") from error
        if count != self.count:
            raise DataError(f"only {count} of {self.count} frames of {path} can be decoded")
        return self.copied(histogram, digest)

    def _frames(self) -> Iterator[Any]:
        shown = self.timeline.shown[self.own]
        wanted, last = set(shown.tolist()), int(shown[-1])
        with open_video(self.timeline.path) as container:
            stream = decodable(container)[0]
            stream.codec_context.thread_count = 1
            if self.first:
                container.seek(int(shown[0]), stream=stream, backward=True)
            for frame in container.decode(stream):
                if frame.pts in wanted:
                    yield frame
                if frame.pts is not None and frame.pts >= last:
                    return


def _counted(frames: Iterable[Any]) -> tuple[int, str]:
    """Number of PyAV's frames, and their ``FrameDigest``."""
    count, digest = 0, FrameDigest()
    for frame in frames:
        digest.add(frame)
        count += 1
    return count, str(digest)


@dataclass(frozen=True)
class Stated:
    """What the meta folder says of an episode in a camera's videos.

    Args:
        number: of the episode.
        length: its rows, T.
        path: its mp4 file; None where meta names none.
        start_s, end_s: where it begins and ends in that file, in seconds; None where meta does not say.
    """

    number: int
    length: int
    path: Path | None
    start_s: float | None = None
    end_s: float | None = None


@dataclass
class Placed:
    """Where the episodes of a camera are.

    Attributes:
        clips: by number of the episode.
        problems: why an episode has no clip, in words that follow "Episode N of DIR", by number.
        changes: what differs from what meta says, one sentence each.
    """

    clips: dict[int, Clip] = field(default_factory=dict)
    problems: dict[int, str] = field(default_factory=dict)
    changes: list[str] = field(default_factory=list)


class ClipFinder:
    """Finds the episodes of one camera.

    Args:
        root: the data set's folder, for sentences.
        key: feature key of the camera.
        fps: frames per second.
    """

    def __init__(self, root: Path, key: str, fps: float) -> None:
        self.root, self.key, self.fps = root, key, fps
        self.found = Placed()

    def alone(self, stated: Sequence[Stated]) -> Placed:
        """Episodes with a file each, as before v3.0: the first row belongs to the first frame."""
        for one in stated:
            timeline = self._timeline([one], one.path)
            if timeline is None:
                continue
            surplus = len(timeline.shown) - one.length
            name = timeline.path.relative_to(self.root)
            first = 0 if surplus == 0 else timeline.near(0.0, self.fps)
            if surplus < 0:
                self.found.problems[one.number] = f"has {one.length} rows but {len(timeline.shown)} frames ({name})"
                continue
            if first is None or (surplus and not timeline.is_regular(first, one.length, self.fps)):
                self.found.problems[one.number] = (
                    f"has {one.length} rows but {len(timeline.shown)} frames ({name}), and their times do not say which frames "
                    "belong to the rows"
                )
                continue
            self.found.clips[one.number] = Clip(timeline, first, one.length)
            if surplus:
                self.found.changes.append(
                    f"Episode {one.number}: {name} has {len(timeline.shown)} frames for {one.length} rows; the last {surplus} "
                    "are left out."
                )
            if not np.allclose(timeline.seconds[first : first + one.length], np.arange(one.length) / self.fps, 0, TOLERANCE_S):
                self.found.changes.append(
                    f"Episode {one.number}: the frames of {name} are shown from {timeline.seconds[first]:.4f} s to "
                    f"{timeline.seconds[first + one.length - 1]:.4f} s; they are taken by number, from 0 s at {self.fps:g} fps."
                )
        return self.found

    def joined(self, stated: Sequence[Stated], files: Sequence[Path]) -> Placed:
        """Episodes that share files, as from v3.0 on.

        Args:
            stated: in the order of their numbers.
            files: all mp4 files of the camera, in order.
        """
        by_file: dict[Path | None, list[Stated]] = {}
        for one in stated:
            by_file.setdefault(one.path, []).append(one)
        if None in by_file:
            if self._without_files(stated, files):
                return self.found
            for one in by_file.pop(None):
                self.found.problems[one.number] = f"has no place in the video '{self.key}' according to meta/episodes"
        for path, group in by_file.items():
            timeline = self._timeline(group, path)
            if timeline is not None:
                self._within(timeline, group)
        return self.found

    def _within(self, timeline: Timeline, group: Sequence[Stated]) -> None:
        """Place the episodes of one file: where meta says, if the video bears it out, or else by counting."""
        sound = self._sound(timeline, group)
        if len(sound) < len(group) and sum(one.length for one in group) == len(timeline.shown):
            starts_s = [one.start_s for one in group]
            ordered = None not in starts_s and len(set(starts_s)) == len(starts_s)
            self._count_off([timeline], sorted(group, key=lambda one: one.start_s or 0.0) if ordered else group)
            return
        seconds, name = timeline.seconds, timeline.path.relative_to(self.root)
        for one in group:
            if one.number in sound:
                self.found.clips[one.number] = Clip(timeline, sound[one.number], one.length)
            else:
                self.found.problems[one.number] = (
                    f"is not where meta/episodes says in the video '{self.key}' ({name}), and the number of frames there does "
                    "not say where it is"
                )
        starts = {one.number: one.start_s for one in group if one.start_s is not None}
        drift = max((abs(starts[number] - seconds[first]) for number, first in sound.items()), default=0.0)
        if drift >= TOLERANCE_S:
            self.found.changes.append(
                f"Episodes begin up to {drift * 1000:.3g} ms away from a frame of '{self.key}' ({name}); they now begin at it."
            )

    def _sound(self, timeline: Timeline, group: Sequence[Stated]) -> dict[int, int]:
        """The first frame of every episode that lies where meta says and shares no frame with another."""
        slack_s = 2 * START_TOLERANCE / self.fps
        spans = []
        for one in group:
            first = None if one.start_s is None else timeline.near(one.start_s, self.fps)
            if first is None or one.start_s is None or not timeline.is_regular(first, one.length, self.fps):
                continue
            if one.end_s is None or one.end_s - one.start_s > one.length / self.fps - slack_s:
                spans.append((first, first + one.length, one.number))
        spans.sort()
        shared, reached = set(), (-1, -1)  # the last frame so far, and whose it is
        for first, end, number in spans:
            if first < reached[0]:
                shared |= {number, reached[1]}
            reached = max(reached, (end, number))
        return {number: first for first, _, number in spans if number not in shared}

    def _without_files(self, stated: Sequence[Stated], files: Sequence[Path]) -> bool:
        """Meta does not name every file: place all episodes one after another, if that comes out even."""
        timelines = []
        for path in files:
            try:
                timelines.append(read_timeline(path))
            except DataError:  # then the frames do not add up
                continue
        return self._count_off(timelines, stated)

    def _count_off(self, timelines: Sequence[Timeline], stated: Sequence[Stated]) -> bool:
        """Place episodes one after another, if they fill the files exactly."""
        clips: dict[int, Clip] = {}
        waiting = list(stated)
        for timeline in timelines:
            at = 0
            while waiting and at + waiting[0].length <= len(timeline.shown):
                one = waiting.pop(0)
                clips[one.number] = Clip(timeline, at, one.length)
                at += one.length
            if at != len(timeline.shown):
                return False
        if waiting:
            return False
        self.found.clips |= clips
        stated_s = {one.number: -1.0 if one.start_s is None else one.start_s for one in stated}
        moved = [
            (number, clip)
            for number, clip in clips.items()
            if abs(stated_s[number] - clip.timeline.seconds[clip.first]) >= START_TOLERANCE / self.fps
        ]
        places = ", ".join(f"{number} at frame {clip.first}" for number, clip in moved)
        self.found.changes.append(
            f"Episodes of '{self.key}' are placed by counting the frames of the video itself, which meta/episodes contradicts: "
            f"{places}."
        )
        return True

    def _timeline(self, group: Sequence[Stated], path: Path | None) -> Timeline | None:
        """The frames of a file; None after stating that its episodes have none."""
        try:
            if path is not None and path.is_file():
                return read_timeline(path)
            reason = "is missing"
        except DataError as error:
            reason = str(error).removeprefix(f"{path} ").rstrip(".")
        where = path.relative_to(self.root) if path is not None else "no file"
        self.found.problems |= {one.number: f"needs the video '{self.key}' in {where}, which {reason}" for one in group}
        return None
