"""Frames in blocks: files that are written whole or not at all, in any order, by any number of processes and machines.

    store = BlockStore(folder, starts=[0, 1200, 2500], views=("front", "wrist"), about={"data": fingerprint})
    store.write(1, frames)                   # (view, row, bytes) of rows 1200 .. 2499
    store.read("front", np.array([1300]))    # [uint8 (bytes,)]

A block is a safetensors file with the bytes of its frames one after the other ("data"), where each begins and ends ("place",
int64 (V, n, 2)) and its CRC-32 ("checksum", uint32 (V, n)). A frame is compared with its checksum when a process first reads
it, so a block that was zeroed or overwritten is an error and never a black image. What the bytes mean is ``codecs``' business,
which rows belong together ``frames``'.
"""

from __future__ import annotations

import json
import math
import mmap
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlaflow.errors import DataError
from vlaflow.outputs import whole_file

SMALLEST, LARGEST, MANY = 4 * 2**20, 256 * 2**20, 64
"""Bytes that a block has at least and at most, as far as whole episodes allow; in between, a store has so many blocks. So small
data sets are built in parallel, and large ones have thousands of files rather than millions."""

SUFFIX = ".safetensors"

_HEADER = 1024
_PARTS = {"data": ("U8", 1), "place": ("I64", 8), "checksum": ("U32", 4)}
_ALIGNMENT = 8

Frame = tuple[int, int, memoryview | bytes]
"""View and row as numbers within the block, and the frame's bytes."""


class BlockStore:
    """The blocks of one cache.

    Args:
        folder: where they are; it need not exist yet.
        starts: the first row of each block, and the number of rows; ascending.
        views: names of the views; every row has a frame of each.
        about: a few words that are stored in every block.
    """

    def __init__(self, folder: Path, starts: Sequence[int], views: Sequence[str], about: Mapping[str, str]) -> None:
        self.folder, self.views, self.about = folder, tuple(views), dict(about)
        self._starts = np.asarray(starts, np.int64)
        self._open: dict[int, BlockFile] = {}

    def __len__(self) -> int:
        """Number of blocks, whether they exist or not."""
        return len(self._starts) - 1

    def file(self, number: int) -> Path:
        """The file of a block."""
        return self.folder / f"{number:06d}{SUFFIX}"

    def missing(self) -> list[int]:
        """Numbers of the blocks that do not exist."""
        there = set(self.folder.iterdir()) if self.folder.is_dir() else set()
        return [number for number in range(len(self)) if self.file(number) not in there]

    @property
    def nbytes(self) -> int:
        """Size of all blocks on disk in bytes."""
        return sum(self.file(number).stat().st_size for number in range(len(self)))

    def write(self, number: int, frames: Iterable[Frame]) -> None:
        """Write one block; two processes that write the same one at once do no harm.

        Args:
            number: of the block.
            frames: every view of every row exactly once, in any order; the order of the bytes in the file.

        Raises:
            StorageError: the disk is full or not writable.
        """
        rows = int(self._starts[number + 1] - self._starts[number])
        place_VN2 = np.zeros((len(self.views), rows, 2), np.int64)
        checksum_VN = np.zeros((len(self.views), rows), np.uint32)
        with whole_file(self.file(number), "The frame cache") as part, part.open("wb") as out:
            out.seek(_HEADER)  # the header states sizes that are known at the end
            end = 0
            for view, row, content in frames:
                out.write(content)
                place_VN2[view, row] = end, end + len(content)
                checksum_VN[view, row] = zlib.crc32(content)
                end += len(content)
            out.write(bytes(-end % _ALIGNMENT))
            end += -end % _ALIGNMENT
            out.write(place_VN2.tobytes() + checksum_VN.tobytes())
            out.seek(0)
            out.write(_header(self.about, [end], place_VN2.shape, checksum_VN.shape))

    def read(self, view: str, rows: np.ndarray) -> list[np.ndarray]:
        """The bytes of a view's frames at these rows: uint8 (bytes,) each, not to be changed.

        Raises:
            DataError: a block is missing or damaged; it says how to have it built again.
        """
        number, found = self.views.index(view), []
        block_B = np.searchsorted(self._starts, rows, side="right") - 1
        row_B = rows - self._starts[block_B]
        for block, row in zip(block_B.tolist(), row_B.tolist(), strict=True):
            opened = self._open.get(block) or self._opened(block)
            found.append(opened.frame(number, row))
        return found

    def _opened(self, number: int) -> BlockFile:
        block = BlockFile(self.file(number))
        wanted = (len(self.views), int(self._starts[number + 1] - self._starts[number]))
        if block.shape != wanted:
            raise block.damaged(f"it holds views and rows {block.shape} instead of {wanted}")
        self._open[number] = block
        return block


def _header(about: Mapping[str, str], *shapes: Sequence[int]) -> bytes:
    """The header of a safetensors file with the parts of a block, padded with spaces."""
    header: dict[str, Any] = {"__metadata__": dict(about)}
    end = 0
    for (name, (kind, width)), shape in zip(_PARTS.items(), shapes, strict=True):
        start, end = end, end + width * math.prod(shape)
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [start, end]}
    return (_HEADER - 8).to_bytes(8, "little") + json.dumps(header).encode().ljust(_HEADER - 8)


class BlockFile:
    """One open file.

    Attributes:
        shape: number of views and of rows.
        about: the text that was stored with it.

    Raises:
        DataError: it is missing or damaged.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        try:
            with file.open("rb") as opened:
                self._bytes = np.frombuffer(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
            header = self._header()
            self.shape: tuple[int, int] = tuple(header["checksum"]["shape"])
            self.about: dict[str, str] = header["__metadata__"]
            self._data, place, checksum = (self._part(header, name) for name in _PARTS)
            self._place_VN2 = place.view(np.int64).reshape(*self.shape, 2)
            self._checksum_VN = checksum.view(np.uint32).reshape(self.shape)
            if self._place_VN2.min() < 0 or self._place_VN2.max() > len(self._data):
                raise ValueError("frames lie outside it")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise self.damaged(str(error)) from error
        self._checked = [bytearray(self.shape[1]) for _ in range(self.shape[0])]

    def frame(self, view: int, row: int) -> np.ndarray:
        """A frame's bytes, compared with their checksum if this is the first time.

        Raises:
            DataError: the checksum is wrong.
        """
        start, end = self._place_VN2[view, row].tolist()
        content = self._data[start:end]
        if not self._checked[view][row]:
            if not len(content) or zlib.crc32(content.data) != self._checksum_VN[view, row]:
                raise self.damaged(f"the checksum of frame {row} is wrong")
            self._checked[view][row] = 1
        return content

    def check(self) -> None:
        """Compare all checksums.

        Raises:
            DataError: one is wrong.
        """
        for view in range(self.shape[0]):
            for row in range(self.shape[1]):
                self.frame(view, row)

    def damaged(self, reason: str) -> DataError:
        """The error about this block."""
        return DataError(
            f"The block {self._file} of a frame cache is damaged ({reason}). Delete it, and it is built again: rm {self._file}"
        )

    def _header(self) -> dict[str, Any]:
        if int.from_bytes(self._bytes[:8].tobytes(), "little") != _HEADER - 8:
            raise ValueError("it has no header")
        found: dict[str, Any] = json.loads(self._bytes[8:_HEADER].tobytes())
        if len(self._bytes) != _HEADER + found["checksum"]["data_offsets"][1]:
            raise ValueError("it is cut off")
        return found

    def _part(self, header: Mapping[str, Any], name: str) -> np.ndarray:
        start, end = header[name]["data_offsets"]
        return self._bytes[_HEADER + start : _HEADER + end]


def cut(sizes: Sequence[int]) -> list[slice]:
    """Divide episodes into blocks: slices of their list.

    Args:
        sizes: bytes of each episode.
    """
    most = min(LARGEST, max(SMALLEST, sum(sizes) // MANY))
    found, first, filled = [], 0, 0
    for number, size in enumerate(sizes):
        if filled and filled + size > most:
            found.append(slice(first, number))
            first, filled = number, 0
        filled += size
    return [*found, slice(first, len(sizes))] if sizes else []
