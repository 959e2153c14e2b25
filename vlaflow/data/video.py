"""Video files: decode by timestamp, encode one episode, join episodes without re-encoding.

Writing is always H.264 in mp4; reading accepts whatever FFmpeg decodes. Both use PyAV. ``lerobot_meta`` knows which episode
lies where in which file; ``lerobot`` writes the error messages about a damaged episode.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import av
import numpy as np

from vlaflow.errors import DataError, SpecError

TOLERANCE_S = 1e-4
"""Largest distance in seconds between a frame and the time stated in its row; the same bound as LeRobot's."""

START_TOLERANCE = 0.25
"""Largest distance between an episode's first frame and its stated start, in frames. Recorders that sum rounded durations
drift by fractions of a millisecond per episode; at half a frame it would be unclear which frame is meant."""

REPRODUCIBLE = {
    # x264's macroblock tree reads uninitialised memory (version 165 with AVX-512), so the same frames occasionally gave
    # different output. It is also the only user of the lookahead.
    "mbtree": "0",
    "rc-lookahead": "0",
    # x264's slices, and so the bytes, depend on the number of threads.
    "threads": "1",
}
"""x264 settings for reproducible output: the same frames give the same bytes in every run."""

ENCODER = {
    # Every second frame is a key frame and there are no B-frames: one random frame costs at most two decodes (0.4 ms at 256x256
    # against 3.2 ms with a key frame every 30).
    "crf": "12",
    "preset": "medium",
    "tune": "fastdecode",
    "g": "2",
    "bf": "0",
    "sc_threshold": "0",
    **REPRODUCIBLE,
}
"""x264 settings of every episode that this package writes."""


@dataclass(frozen=True)
class Segment:
    """One episode of one view in an mp4 file, ready to be joined to others; can be sent between processes.

    Args:
        path: the mp4 file.
        count: number of frames, T.
        histogram: int64 (3, 256), how often each value occurs per RGB channel of the decoded frames; all 0 if they were
            not counted.
        digest: hash of the decoded frames, see ``FrameDigest``; empty if there is none.
        start: when its first frame, a key frame, is shown, in the time base of the file; None for the beginning of the file.
        bytes: size of its packets; None if the file holds nothing else.
    """

    path: Path
    count: int
    histogram: np.ndarray
    digest: str
    start: int | None = None
    bytes: int | None = None

    @property
    def size(self) -> int:
        """Bytes that it will take in a file with others, about."""
        return self.path.stat().st_size if self.bytes is None else self.bytes


def exact_rate(fps: float) -> Fraction:
    """The frame rate as a ratio of small integers (29.97 becomes 30000/1001)."""
    if not fps > 0:
        raise SpecError(f"fps must be positive, got {fps}.")
    if float(fps).is_integer():
        return Fraction(int(fps))
    broadcast = Fraction(round(fps) * 1000, 1001)
    return broadcast if abs(float(broadcast) - fps) < 1e-2 else Fraction(fps).limit_denominator(1001)


def encode_video(frames: Iterable[np.ndarray], path: Path, fps: float) -> Segment:
    """Encode one episode; the same frames give the same bytes in any process.

    Args:
        frames: T images uint8 (H, W, 3), RGB; H and W even, because chroma is stored at half resolution.
        path: the mp4 file to write.
        fps: frames per second; frame i is at exactly i / fps seconds.

    Raises:
        SpecError: for an odd size, another dtype, images that differ in size, or no frames.
    """
    rate = exact_rate(fps)
    stream: Any = None
    with av.open(str(path), "w", format="mp4") as container:
        for i, image in enumerate(frames):
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
                raise SpecError(f"Frame {i} must be uint8 (height, width, 3), got {image.dtype} {image.shape}.")
            height, width = image.shape[:2]
            if stream is None:
                require_even(height, width, path.name)
                stream = container.add_stream("libx264", rate=rate, options=dict(ENCODER))
                stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
                stream.codec_context.time_base = 1 / rate
                stream.codec_context.thread_count = 1
            if (stream.height, stream.width) != (height, width):
                raise SpecError(f"Frame {i} is {height}x{width}, the first was {stream.height}x{stream.width}.")
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame.pts, frame.time_base = i, 1 / rate
            container.mux(stream.encode(frame))
        if stream is None:
            raise SpecError(f"An episode without frames cannot be encoded ({path.name}).")
        container.mux(stream.encode(None))
    return read_segment(path)


def require_even(height: int, width: int, name: str) -> None:
    """Refuse a size that yuv420p cannot hold."""
    if height % 2 or width % 2:
        raise SpecError(f"'{name}' is {height}x{width}; video needs an even height and width. Crop or resize by one pixel.")


def read_segment(path: Path) -> Segment:
    """Decode an encoded episode to count its frames and pixel values.

    Raises:
        DataError: when the file is missing or cannot be decoded.
    """
    try:
        with open_video(path) as container:
            count, histogram, digest = pixel_counts(container.decode(video=0))
    except (av.FFmpegError, OSError) as error:
        raise DataError(f"The video {path} cannot be decoded ({_reason(error)}). Encode it again.") from error
    return Segment(path, count, histogram, digest)


class FrameDigest:
    """A hash of decoded frames, in their order and in the format in which they are stored.

    Formats such as H.264 and AV1 state the result of decoding to the bit, so it is the same with every decoder, and after the
    packets were joined to others. A conversion to RGB would not be.
    """

    def __init__(self) -> None:
        self._digest = hashlib.blake2b(digest_size=16)

    def add(self, frame: Any) -> None:
        """Count in one of PyAV's frames."""
        try:
            content = frame.to_ndarray()
        except (ValueError, AssertionError):  # a format, or an odd size, that PyAV cannot lay out
            content = frame.to_ndarray(format="rgb24")
        self._digest.update(f"{frame.format.name} {content.shape}".encode())
        self._digest.update(np.ascontiguousarray(content).data)

    def __str__(self) -> str:
        """32 hex digits."""
        return self._digest.hexdigest()


def pixel_counts(frames: Iterable[Any]) -> tuple[int, np.ndarray, str]:
    """Number of PyAV's frames, how often each value occurs per RGB channel, int64 (3, 256), and their ``FrameDigest``."""
    histogram, count, digest = np.zeros((3, 256), np.int64), 0, FrameDigest()
    for frame in frames:
        digest.add(frame)
        pixels = frame.to_ndarray(format="rgb24").reshape(-1, 3)
        for channel in range(3):
            histogram[channel] += np.bincount(pixels[:, channel], minlength=256)
        count += 1
    return count, histogram, str(digest)


class Joiner:
    """Appends encoded episodes to one mp4 file, packet by packet, without decoding; frame n is shown at exactly n / fps."""

    def __init__(self, path: Path, fps: float) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.rate = path, exact_rate(fps)
        self.frames, self.bytes = 0, 0
        self._out: Any = av.open(str(path), "w", format="mp4")
        self._source: Any = None
        self._stream: Any = None
        self._parameters: tuple[Any, ...] = ()

    def fits(self, segment: Segment) -> bool:
        """Whether a segment has the size and the encoder's settings of those before it."""
        stream = self._open(segment)
        return self._stream is None or _parameters(stream, _packets(self._source, stream, segment)) == self._parameters

    def append(self, segment: Segment) -> tuple[float, float]:
        """Append one episode and return its position, (from, to) in seconds.

        Raises:
            SpecError: when the segment was encoded with other settings or at another size than the first.
        """
        start, stream = self.frames, self._open(segment)
        packets = _packets(self._source, stream, segment)
        parameters = _parameters(stream, packets)
        if self._stream is None:
            # opaque: no encoder of that codec is needed
            self._stream = self._out.add_stream_from_template(stream, opaque=True)
            self._stream.time_base = 1 / self.rate
            self._parameters = parameters
        elif parameters != self._parameters:
            raise SpecError(
                f"The video {segment.path} was encoded at another size or with other settings than the episodes before "
                f"it, so the two cannot be joined. Encode every episode with vlaflow.data.video.encode_video."
            )
        ranks = _ranks(packets)
        delay = _delay(ranks)
        for number, (packet, rank) in enumerate(zip(packets, ranks, strict=True)):
            packet.time_base = 1 / self.rate
            packet.pts, packet.dts, packet.duration = start + rank, start + number - delay, 1
            packet.stream = self._stream
            self.bytes += packet.size
            self._out.mux(packet)
        self.frames += segment.count
        return float(start / self.rate), float(self.frames / self.rate)

    def close(self) -> None:
        """Write the index, without which the file cannot be read."""
        if self._source is not None:
            self._source.close()
        self._out.close()

    def _open(self, segment: Segment) -> Any:
        """The video stream of a segment; a file with many episodes is opened once, since reading its index takes a while."""
        if self._source is None or segment.start is None or self._source.name != str(segment.path):
            if self._source is not None:
                self._source.close()
            self._source = open_video(segment.path)
        return self._source.streams.video[0]


def _packets(source: Any, stream: Any, segment: Segment) -> list[Any]:
    """The packets of a segment, in the order in which they are decoded."""
    if segment.start is not None:
        source.seek(segment.start, stream=stream, backward=True)
    packets: list[Any] = []
    for packet in source.demux(stream):
        if packet.dts is None or packet.pts is None:  # the empty packet at the end of a file
            continue
        if packets or segment.start is None or packet.pts == segment.start:
            packets.append(packet)
            if len(packets) == segment.count:
                break
    if len(packets) != segment.count:
        raise SpecError(f"The video {segment.path} holds {len(packets)} packets for {segment.count} frames. Encode it again.")
    return packets


def _ranks(packets: list[Any]) -> list[int]:
    """The place of every packet in the order in which the frames are shown."""
    shown = sorted(range(len(packets)), key=lambda number: packets[number].pts)
    return [rank for _, rank in sorted(zip(shown, range(len(packets)), strict=True))]


def _delay(ranks: list[int]) -> int:
    """By how many frames decoding must be ahead of showing; more than zero with B-frames."""
    return max((number - rank for number, rank in enumerate(ranks)), default=0)


def _parameters(stream: Any, packets: list[Any]) -> tuple[Any, ...]:
    """What must be the same for packets that share a file."""
    context = stream.codec_context
    return context.name, context.width, context.height, context.extradata, _delay(_ranks(packets))


def open_video(path: Path) -> Any:
    """Open a video for reading; what is not UTF-8 in its tags, which nothing reads, is replaced."""
    return av.open(str(path), metadata_errors="replace")


def decodable(container: Any) -> list[Any]:
    """The video streams of an open file that a decoder was found for; damaged files may hold others."""
    return [stream for stream in container.streams.video if stream.codec_context is not None]


class VideoError(Exception):
    """A video does not match the table; ``lerobot`` turns this into a ``DataError`` that names the episode.

    Args:
        kind: "unreadable", "rate", "start", "short" or "time".
        detail: what was found instead.
        found: number of good frames before the error.
    """

    def __init__(self, kind: str, detail: str, found: int) -> None:
        super().__init__(kind, detail, found)
        self.kind, self.detail, self.found = kind, detail, found


def decode_frames(
    path: Path,
    start_s: float,
    count: int,
    fps: float,
    tolerance_s: float | None = None,
    *,
    first: int = 0,
    digest: FrameDigest | None = None,
) -> Iterator[np.ndarray]:
    """Yield ``count`` frames, each uint8 (H, W, 3), decoding forward from one seek.

    The first one is the frame nearest to ``start_s``, at most ``START_TOLERANCE`` away; the others follow at intervals of
    1 / fps, each at most ``tolerance_s`` (by default ``START_TOLERANCE`` too) from its place, so none is a neighbour's. Every
    frame is counted into ``digest``, if there is one.

    With ``first`` it is the frames from that number on, the same as after skipping so many. They are looked for up to half a
    frame from their places, because the first one may be off by ``START_TOLERANCE`` and they from it by as much.

    Raises:
        VideoError: when the file is unreadable, runs at another rate, has no frame at ``start_s``, ends early or lacks a
            frame.
    """
    slack_s = START_TOLERANCE / fps
    if first and tolerance_s is not None and tolerance_s > slack_s:  # then only counting tells which frame is which
        yield from islice(decode_frames(path, start_s, first + count, fps, tolerance_s), first, None)
        return
    found, most_s = 0, slack_s if tolerance_s is None else tolerance_s
    if first:
        start_s, slack_s, most_s = start_s + first / fps, 0.5 / fps, 0.5 / fps
    try:
        with _opened(path, again=start_s <= TOLERANCE_S) as container:
            streams = decodable(container)
            if not streams:
                raise VideoError("unreadable", "no video stream that can be decoded", 0)
            stream = streams[0]
            rate = stream.average_rate
            time_base = float(stream.time_base or 0)
            end_s = ((container.start_time or 0) + container.duration) / av.time_base if container.duration else float("inf")
            if start_s >= end_s:
                raise VideoError("short" if first else "start", f"which ends at {end_s:.4f} s", first)
            if start_s > TOLERANCE_S:
                container.seek(max(0, int((start_s - slack_s) / time_base)), stream=stream, backward=True)
            begin = start_s
            for frame in container.decode(stream):
                at = (frame.pts or 0) * time_base
                if found == 0:
                    if at <= start_s - slack_s:
                        continue
                    if at >= start_s + slack_s and not first:
                        raise VideoError("start", f"which has no frame there; the next one is at {at:.4f} s", 0)
                    begin = start_s if first else at
                wanted = begin + found / fps
                if abs(at - wanted) >= most_s:
                    # A wrong rate shows at the second frame; later it is a gap, whatever the average rate is.
                    if found <= 1 and rate is not None and abs(float(rate) / fps - 1) > 0.01:
                        raise VideoError("rate", f"{float(rate):g} fps", found)
                    detail = f"frame {first + found} is at {at:.4f} s instead of {wanted:.4f} s"
                    raise VideoError("time", detail, first + found)
                if digest is not None:
                    digest.add(frame)
                yield frame.to_ndarray(format="rgb24")
                found += 1
                if found == count:
                    return
    except (av.FFmpegError, OSError) as error:
        raise VideoError("unreadable", _reason(error), first + found) from error
    raise VideoError("short", f"{first + found} frames", first + found)


class _Kept(threading.local):
    """The file that a thread decoded last, still open: opening one reads the index of all its episodes, so opening it for every
    one of 2000 episodes takes ten times as long as decoding them.
    """

    key: tuple[object, ...] = ()
    container: Any = None


_KEPT = _Kept()


@contextmanager
def _opened(path: Path, *, again: bool) -> Iterator[Any]:
    """An open video file, the one of the call before if it is the same; ``again`` to open it in any case.

    It is not in ``_KEPT`` while it is in use, so that two episodes can be decoded in turns. A process that was forked opens its
    own, because it would share the place in the file with its parent.
    """
    found = path.stat()
    key = (os.getpid(), path, found.st_ino, found.st_size, found.st_mtime_ns)
    container, _KEPT.container = _KEPT.container, None
    if container is not None and (again or _KEPT.key != key):
        container.close()
        container = None
    if container is None:
        container = open_video(path)
        for stream in decodable(container):
            stream.codec_context.thread_count = 1  # callers decode several episodes in parallel
    try:
        yield container
    except BaseException:
        container.close()
        raise
    if _KEPT.container is not None:
        _KEPT.container.close()
    _KEPT.key, _KEPT.container = key, container


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)
