"""Writing episodes of existing data sets as one new data set of format v3.0.

Rows are copied column by column and videos packet by packet; numbering, times and pointers are written new. All episodes are
read before the first is written, so what cannot be read is known before anything is numbered. Frames are decoded where their
statistics are not known already (``edit_stats``), and by a repair.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from vlaflow.data import writer_meta as meta
from vlaflow.data.edit_columns import common_types, embedded, fits_a_table, numbers_of, require_whole
from vlaflow.data.edit_seeds import of_kept
from vlaflow.data.edit_stats import FrameRecords, KnownFrames, combined
from vlaflow.data.edit_survey import SourceEpisode, Survey
from vlaflow.data.edit_video import Clip
from vlaflow.data.features import channels, image_size, is_image, is_numeric, marked_as_depth
from vlaflow.data.hashes import HASHES
from vlaflow.data.lerobot import EXTRA_KEY
from vlaflow.data.stored_images import DepthError, read_image
from vlaflow.data.tables import read_parquet, switches_as_numbers
from vlaflow.data.video import Segment
from vlaflow.data.writer_files import DATA_PATH, VIDEO_PATH, Limits, NewFolder
from vlaflow.errors import DataError, SpecError
from vlaflow.progress import progress

CHANGES = "changes.log"
"""File in the new data set that says what was changed."""
OLD_ENTRIES = ("total_videos", "total_chunks")
"""Entries of meta/info.json that v3.0 does not have."""


@dataclass(frozen=True)
class EditPart:
    """Episodes of one data set, in the order in which they are written.

    Args:
        source: the data set; its ``episodes`` are written.
        names: new feature key by old one; others keep theirs.
    """

    source: Survey
    names: Mapping[str, str] = field(default_factory=dict)

    def name(self, key: str) -> str:
        """The new feature key of a column or camera."""
        return self.names.get(key, key)


@dataclass(frozen=True)
class Copied:
    """What was written.

    Args:
        root: the new data set.
        episodes: (place of the part, number there) of every episode, by new number.
        frames: rows, N.
        problems: what was wrong with episodes that were left out on the way.
        changes: what became of columns.
        stats: statistics of the numbers in the rows, by feature key.
    """

    root: Path
    episodes: tuple[tuple[int, int], ...]
    frames: int
    problems: tuple[str, ...]
    changes: tuple[str, ...]
    stats: Mapping[str, Mapping[str, Any]]


@dataclass
class _Episode:
    """An episode that can be written; statistics of pictures are in ``stats``, or follow from counts of pixel values."""

    part: int
    source: SourceEpisode
    segments: dict[str, Segment]
    histograms: dict[str, np.ndarray]
    stats: dict[str, meta.Stat]


class EpisodeCopier:
    """Copies episodes into a new data set.

    Args:
        root: where it will be; must not exist, or be an empty folder.
        parts: what to write; the first one's meta/info.json is that of the new data set, with other numbers.
        info: further entries of meta/info.json.
        skip: whether an episode that cannot be read is left out; otherwise it is an error. All frames are decoded then.

    Raises:
        DataError: ``root`` is not empty.
    """

    def __init__(
        self,
        root: Path,
        parts: Sequence[EditPart],
        *,
        info: Mapping[str, Any] | None = None,
        skip: bool = False,
    ) -> None:
        self.root, self.parts, self.info, self.skip = root, tuple(parts), dict(info or {}), skip
        first = parts[0]
        stated = first.source.info["features"]
        everywhere = frozenset.intersection(*(part.source.columns for part in parts)) | meta.DEFAULT_FEATURES.keys()
        kept = {key: feature for key, feature in stated.items() if feature["dtype"] == "video" or key in everywhere}
        self.changes = [
            f"'{key}' is declared, but not in the rows of every episode; it is left out." for key in stated if key not in kept
        ]
        self.features: dict[str, dict[str, Any]] = {first.name(key): dict(feature) for key, feature in kept.items()}
        self.features |= {key: f for key, f in meta.DEFAULT_FEATURES.items() if key not in self.features}
        for name, feature in self.features.items():
            if feature.get("shape") == [] and feature["dtype"] not in ("string", "language"):
                feature["shape"] = [1]
                self.changes.append(f"The shape of '{name}' is now [1]; LeRobot does not read [].")
        self.columns = [key for key in kept if kept[key]["dtype"] != "video"]
        surplus = sorted(first.source.columns - kept.keys() - meta.DEFAULT_FEATURES.keys())
        self.changes += [f"Column '{key}' is not declared in meta/info.json; it is left out." for key in surplus]
        self.fps = first.source.fps
        self.problems: list[str] = []
        self.records = [FrameRecords(part.source.root, part.source.info) for part in parts]
        self.hashed = {part.name(key) for part, known in zip(parts, self.records, strict=True) for key in known.hashed}
        self.encoded: set[str] = set()
        self.sizes: dict[str, tuple[int, int]] = {}
        self.schema: pa.Schema | None = None
        self._table: tuple[Path, pa.Table] | None = None

    def write(self, log: Callable[[Copied], Sequence[str]]) -> Copied:
        """Write the data set.

        Args:
            log: the lines of its file ``changes.log``.

        Raises:
            DataError: an episode cannot be read and may not be left out; none is left.
        """
        folder = NewFolder(self.root, self.fps, _limits(self.parts[0].source.info))
        try:
            ready = self._read_all(folder)
            if not ready:
                raise DataError(
                    f"{self.root} was not written: no episode is whole. {self.problems[0] if self.problems else ''}".rstrip()
                )
            self.changes += [sentence for one in self.records for sentence in one.changes]
            self._describe_videos()
            tasks, rows, stats, frames = self._write_all(folder, ready)
            numbers = tuple((one.part, one.source.number) for one in ready)
            vectors = {key: stat for key, stat in stats.items() if not is_image(self.features[key])}
            written = Copied(self.root, numbers, frames, tuple(self.problems), tuple(self.changes), vectors)
            (folder.path / CHANGES).write_text("".join(f"{line}\n" for line in log(written)), encoding="utf-8")
            folder.publish(self._new_info(folder.limits, numbers, frames, len(tasks)), tasks, rows, stats)
            return written
        except BaseException:
            if not folder.published:
                folder.discard()
            raise

    # -- reading -----------------------------------------------------------------------------------------------------

    def _read_all(self, folder: NewFolder) -> list[_Episode]:
        ready: list[_Episode] = []
        total = sum(len(part.source.episodes) for part in self.parts)
        with ThreadPoolExecutor(2) as pool, progress(total, "Reading episodes") as bar:
            for at, part in enumerate(self.parts):
                for source in part.source.episodes:
                    try:
                        self._rows(at, source)
                        histograms, stats = self._stored(at, source)
                        scratch = folder.scratch / f"{at}-{source.number}"
                        known = {key: self._known(at, source, key) for key in source.clips}
                        jobs = {
                            key: pool.submit(self._segment, part.name(key), clip, known[key], Path(f"{scratch}-{n}.mp4"))
                            for n, (key, clip) in enumerate(source.clips.items())
                        }
                        segments = {part.name(key): job.result() for key, job in jobs.items()}
                        for key, one in known.items():
                            if one.stats is not None and not segments[part.name(key)].histogram.any():
                                stats[part.name(key)] = one.stats
                        self._require_sizes(part, source)
                        ready.append(_Episode(at, source, segments, histograms, stats))
                        self.encoded |= {part.name(key) for key, clip in source.clips.items() if not clip.can_be_copied}
                    except (DataError, SpecError, pa.ArrowException) as error:
                        sentence = f"Episode {source.number} of {part.source.root} cannot be copied: {str(error).rstrip('.')}."
                        if not self.skip:
                            raise DataError(
                                f"{sentence} Repair the data set first: vlaflow data repair {part.source.root} --out DIR"
                            ) from error
                        self.problems.append(sentence)
                    bar.advance()
        return ready

    def _rows(self, at: int, source: SourceEpisode) -> pa.Table:
        """The rows of an episode, by frame, under their new names and in types that hold those of the episodes before."""
        part = self.parts[at]
        if self._table is None or self._table[0] != source.path:
            self._table = (source.path, read_parquet(source.path, self._here(part)))
        table = self._table[1].take(source.places)
        for key in self._here(part):
            feature = part.source.info["features"][key]
            if is_numeric(key, feature):
                require_whole(key, feature, table[key])
                if not feature["dtype"].startswith("bool"):
                    table = self._as_numbers(table, key)
            elif is_image(feature):
                cells = embedded(part.source.root, key, source, table[key])
                table = table.set_column(table.schema.get_field_index(key), key, cells)
        table = table.rename_columns([part.name(key) for key in table.column_names]).replace_schema_metadata(None)
        self.schema = table.schema if self.schema is None else common_types(table.select(self.schema.names), self.schema)
        return table.select(self.schema.names).cast(self.schema)

    def _as_numbers(self, table: pa.Table, key: str) -> pa.Table:
        """The table with booleans of a column that declares numbers as 0 and 1."""
        column = switches_as_numbers(table[key])
        if column.type == table[key].type:
            return table
        sentence = f"'{key}' holds booleans where numbers are declared; they are written as 0 and 1."
        if sentence not in self.changes:
            self.changes.append(sentence)
        return table.set_column(table.schema.get_field_index(key), key, column)

    def _here(self, part: EditPart) -> list[str]:
        """The columns of the new data set, under their old names in a part."""
        old = {part.name(key): key for key in part.source.columns}
        return [old[self.parts[0].name(key)] for key in self.columns if self.parts[0].name(key) not in meta.DEFAULT_FEATURES]

    def _known(self, at: int, source: SourceEpisode, key: str) -> KnownFrames:
        """What is known of the frames of an episode; only their hash if they are to be decoded in any case."""
        known = self.records[at].of(key, source)
        return KnownFrames(known.digest) if self.skip else known

    def _segment(self, name: str, clip: Clip, known: KnownFrames, scratch: Path) -> Segment:
        """An episode of a camera, decoded if not enough is known of it."""
        hashed = known.digest is not None or name not in self.hashed
        if clip.can_be_copied and known.suffices and hashed:
            return clip.copied(known.histogram, known.digest)
        segment = clip.segment(scratch, self.fps)
        if clip.can_be_copied and known.digest not in (None, segment.digest):
            raise DataError(
                f"its frames of '{name}' ({clip.timeline.path.name}) are not those that were written, so bits of the file have "
                f"changed; copy it again, or delete {HASHES} to keep them as they are"
            )
        return segment

    def _stored(self, at: int, source: SourceEpisode) -> tuple[dict[str, np.ndarray], dict[str, meta.Stat]]:
        """Counts of pixel values of every camera whose images lie in the rows; of depth maps the statistics that are stated."""
        part, counts, stats = self.parts[at], dict[str, np.ndarray](), dict[str, meta.Stat]()
        for key in self._here(part):
            feature = part.source.info["features"][key]
            if not is_image(feature):
                continue
            if marked_as_depth(feature):
                if (known := self._known(at, source, key).stats) is not None:
                    stats[part.name(key)] = known
                continue
            assert self._table is not None
            histogram = np.zeros((3, 256), np.int64)
            try:
                for i, cell in enumerate(self._table[1][key].take(source.places)):
                    image = read_image(cell.as_py(), feature, part.source.root, f"image {i} of '{key}'")
                    histogram += np.stack([np.bincount(image[..., c].reshape(-1), minlength=256) for c in range(3)])
                counts[part.name(key)] = histogram
            except DepthError:
                continue
            except (OSError, TypeError, ValueError) as error:
                raise DataError(f"image {i} of '{key}' cannot be read ({error})") from error
        return counts, stats

    def _require_sizes(self, part: EditPart, source: SourceEpisode) -> None:
        """All videos of a camera have one size; the feature says which."""
        for key, clip in source.clips.items():
            name, size = part.name(key), clip.timeline.size
            if self.sizes.setdefault(name, size) != size:
                known = self.sizes[name]
                raise DataError(
                    f"its video '{key}' is {size[0]}x{size[1]}, that of the episodes before it {known[0]}x{known[1]}"
                )

    def _describe_videos(self) -> None:
        """Declare every camera as its videos are."""
        for name, size in self.sizes.items():
            feature = self.features[name]
            if image_size(feature) != size:
                stated = "x".join(map(str, image_size(feature)))
                self.changes.append(f"The shape of '{name}' is now that of its video, {size[0]}x{size[1]}; it was {stated}.")
                self.features[name] = {**feature, "shape": [*size, channels(feature)], "names": ["height", "width", "channel"]}
            if name in self.encoded:
                self.features[name] = {**self.features[name], "info": meta.video_feature(*size, self.fps)["info"]}

    # -- writing -----------------------------------------------------------------------------------------------------

    def _write_all(
        self, folder: NewFolder, ready: Sequence[_Episode]
    ) -> tuple[list[str], list[dict[str, Any]], dict[str, Any], int]:
        used = {word for one in ready for word in one.source.tasks}
        listed = dict.fromkeys(word for part in self.parts for word in part.source.tasks if word in used)
        tasks = {word: index for index, word in enumerate(listed)}
        extra = self._extra(ready)
        rows: list[dict[str, Any]] = []
        values: dict[str, list[np.ndarray]] = {}
        totals: dict[str, np.ndarray] = {}
        episode_stats: list[dict[str, meta.Stat]] = []
        frames = 0
        for one in ready:
            index, length = len(rows), len(one.source.places)
            frame = np.arange(length, dtype=np.int64)
            numbering = {
                "timestamp": (frame / self.fps).astype(np.float32),
                "frame_index": frame,
                "episode_index": np.full(length, index, np.int64),
                "index": frames + frame,
                "task_index": np.array([tasks[word] for word in one.source.tasks], np.int64),
            }
            table = self._rows(one.part, one.source)
            for key, numbers in numbering.items():
                table = table.append_column(key, pa.array(numbers))
            table = table.select([key for key in self.features if key in table.column_names])
            row: dict[str, Any] = {
                "episode_index": index,
                "tasks": list(dict.fromkeys(one.source.tasks)),
                "length": length,
                **folder.add_rows(table),
                "dataset_from_index": frames,
                "dataset_to_index": frames + length,
            }
            stats: dict[str, Any] = {}
            for key, segment in one.segments.items():
                row |= folder.add_video(key, segment, same=False)
            for key, histogram in self._counts(one).items():
                totals[key] = totals.get(key, 0) + histogram
                stats[key] = meta.image_stats(histogram, length)
            stats |= one.stats
            for key in table.column_names:
                if key in numbering or is_numeric(key, self.features[key]):
                    numbers = numbers_of(table[key])
                    numbers = numbers[np.isfinite(numbers).all(axis=1)]
                    if len(numbers):
                        values.setdefault(key, []).append(numbers)
                        stats[key] = self._vector_stats(key, numbers)
            row |= {key: one.source.extra.get(key) for key in extra}
            rows.append(row)
            episode_stats.append(stats)
            frames += length
        rows = meta.with_stats(rows, episode_stats)
        whole = {key: self._vector_stats(key, np.concatenate(parts)) for key, parts in values.items()}
        whole |= {key: meta.image_stats(histogram, frames) for key, histogram in totals.items()}
        for key in dict.fromkeys(key for one in ready for key in one.stats):
            whole[key] = combined([stats[key] for stats in episode_stats if key in stats])
        return list(tasks), rows, whole, frames

    def _extra(self, ready: Sequence[_Episode]) -> list[str]:
        """Further columns of the episode table."""
        names = dict.fromkeys(key for one in ready for key in one.source.extra)
        kept = [key for key in names if fits_a_table([one.source.extra.get(key) for one in ready])]
        self.changes += [
            f"'{key}' of the episode table holds what no column of a table can, or of two types; it is left out."
            for key in names
            if key not in kept
        ]
        return kept

    def _counts(self, one: _Episode) -> dict[str, np.ndarray]:
        videos = {key: segment.histogram for key, segment in one.segments.items() if segment.histogram.any()}
        return videos | one.histograms

    def _vector_stats(self, key: str, numbers: np.ndarray) -> dict[str, Any]:
        """Statistics of a column, as nested as its rows are."""
        shape = self.features[key].get("shape") or [1]
        stats = meta.vector_stats(numbers)
        if len(shape) < 2:
            return stats
        return {name: v if name == "count" else np.reshape(v, shape).tolist() for name, v in stats.items()}

    def _new_info(self, limits: Limits, episodes: Sequence[tuple[int, int]], frames: int, tasks: int) -> dict[str, Any]:
        before = self.parts[0].source.info
        kept = {key: value for key, value in before.items() if key not in OLD_ENTRIES}
        own = kept.get(EXTRA_KEY)
        if isinstance(own, Mapping) and "provenance" in own:
            numbers = [number for part, number in episodes if part == 0]
            kept[EXTRA_KEY] = {**own, "provenance": of_kept(own["provenance"], before.get("total_episodes"), numbers)}
        return kept | {
            "codebase_version": "v3.0",
            "features": self.features,
            "total_episodes": len(episodes),
            "total_frames": frames,
            "total_tasks": tasks,
            "chunks_size": limits.chunks_size,
            "data_files_size_in_mb": limits.data_mb,
            "video_files_size_in_mb": limits.video_mb,
            "data_path": DATA_PATH,
            "video_path": VIDEO_PATH if self.sizes else None,
            "splits": {"train": f"0:{len(episodes)}"},
            **self.info,
        }


def _limits(info: Mapping[str, Any]) -> Limits:
    """The sizes of files that a data set states, or the usual ones."""

    def stated(name: str, usual: float) -> Any:
        found = info.get(name)
        return found if isinstance(found, int | float) and found > 0 else usual

    usual = Limits()
    return Limits(
        int(stated("chunks_size", usual.chunks_size)),
        stated("data_files_size_in_mb", usual.data_mb),
        stated("video_files_size_in_mb", usual.video_mb),
    )
