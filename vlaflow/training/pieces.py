"""The tensors of a training state on disk, whole or in rows, so that any number of processes reads what any other number wrote.

    weights.safetensors                          written by one process
    weights-00001-of-00002.safetensors, ...      by two: each holds its own rows of every sharded tensor

A file that holds rows says in its header which ones ("rows", JSON: first row, and number of rows in all, by name). Reading
opens every file of a group, checks that the rows cover each tensor without a gap, and takes only those that are asked for.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vlaflow.errors import CheckpointError
from vlaflow.io import first_not_finite, require_undamaged, save_tensors
from vlaflow.training.sharding import is_sharded, own_rows

ROWS = "rows"


def piece(folder: Path, group: str, rank: int, writers: int) -> Path:
    """The file of one of the processes that write a group."""
    return folder / (f"{group}.safetensors" if writers == 1 else f"{group}-{rank + 1:05d}-of-{writers:05d}.safetensors")


def write_piece(folder: Path, group: str, tensors: Mapping[str, Tensor], rank: int, writers: int) -> None:
    """Write this process's rows of sharded tensors; the first process also writes what is not sharded."""
    own: dict[str, Tensor] = {}
    rows: dict[str, tuple[int, int]] = {}
    for name, tensor in tensors.items():
        mine, first = own_rows(tensor)
        if is_sharded(tensor) and len(mine):
            own[name], rows[name] = mine, (first, tensor.shape[0])
        elif rank == 0:
            own[name] = mine
    save_tensors(piece(folder, group, rank, writers), own, about={ROWS: json.dumps(rows)} if rows else None)


@dataclass(frozen=True)
class Rows:
    """Some rows of a tensor in one file.

    Args:
        first: number of the first of them.
        count: how many; 1 for a scalar.
        file: where.
        handle: the open file.
    """

    first: int
    count: int
    file: Path
    handle: Any

    def read(self, name: str, first: int, last: int) -> Tensor:
        """Those from ``first`` up to ``last``, numbered as in the whole tensor."""
        try:
            if (first, last) == (self.first, self.first + self.count):
                return self.handle.get_tensor(name)
            return self.handle.get_slice(name)[max(first - self.first, 0) : min(last - self.first, self.count)]
        except (OSError, SafetensorError) as error:
            raise unreadable(self.file, error) from error


class Pieces(Mapping[str, Tensor]):
    """A group of tensors by name; each is read when it is asked for.

    Args:
        folder: of the training state.
        group: "weights", "average" or "optimizer".
        writers: number of processes that wrote it.

    Raises:
        CheckpointError: a file that is missing or damaged, or rows that are missing.
    """

    def __init__(self, folder: Path, group: str, writers: int) -> None:
        self.folder, self.group = folder, group
        self._rows: dict[str, list[Rows]] = {}
        self._undamaged: set[Path] = set()
        totals: dict[str, int] = {}
        with ExitStack() as opened:
            for file in (piece(folder, group, rank, writers) for rank in range(writers)):
                try:
                    handle = opened.enter_context(safe_open(file, framework="pt"))
                except (OSError, SafetensorError) as error:
                    raise unreadable(file, error) from error
                stated = json.loads((handle.metadata() or {}).get(ROWS, "{}"))
                for name in handle.keys():  # noqa: SIM118 — it is no mapping
                    count = (handle.get_slice(name).get_shape() or [1])[0]
                    first, totals[name] = stated.get(name, (0, count))
                    self._rows.setdefault(name, []).append(Rows(first, count, file, handle))
            for name, rows in self._rows.items():
                rows.sort(key=lambda each: each.first)
                self._require_complete(name, rows, totals[name])
            self._opened = opened.pop_all()

    def __enter__(self) -> Pieces:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __contains__(self, name: object) -> bool:
        return name in self._rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, name: str) -> Tensor:
        """The whole tensor."""
        rows = self._rows[name]
        return self.rows(name, 0, rows[-1].first + rows[-1].count)

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """The rows from ``first`` up to ``last``; a scalar has one."""
        if first == last:
            return self._rows[name][0].read(name, 0, 1)[:0]
        overlapping = [each for each in self._rows[name] if max(first, each.first) < min(last, each.first + each.count)]
        for file in {each.file for each in overlapping} - self._undamaged:  # other processes read the others
            require_undamaged(file)
            self._undamaged.add(file)
        read = [each.read(name, first, last) for each in overlapping]
        return read[0] if len(read) == 1 else torch.cat(read)

    def fill(self, name: str, target: Tensor) -> None:
        """Copy a tensor into ``target``, or this process's rows of it where that is sharded.

        Raises:
            KeyError: there is none of this name.
            RuntimeError: another shape or type; nothing is cast.
            CheckpointError: what is read is not finite.
        """
        own, first = own_rows(target)
        found = self.rows(name, first, first + (len(own) if own.ndim else 1))
        last = self._rows[name][-1]
        shape = (last.first + last.count, *found.shape[1:]) if found.ndim else ()
        if (shape, found.dtype) != (tuple(target.shape), target.dtype):
            ours = f"{tuple(target.shape)} of {str(target.dtype).removeprefix('torch.')}"
            raise RuntimeError(f"'{name}' is {shape} of {str(found.dtype).removeprefix('torch.')}, the network's is {ours}")
        if first_not_finite({name: found}):
            raise CheckpointError(f"'{name}' in {self._rows[name][0].file} holds NaN or an infinite value.")
        with torch.no_grad():
            own.copy_(found)

    def _require_complete(self, name: str, rows: list[Rows], total: int) -> None:
        reached = 0
        for each in rows:
            reached = each.first + each.count if each.first == reached else -1
        if reached != total:
            raise CheckpointError(
                f"The files of '{self.group}' in {self.folder} do not hold each of the {total} rows of '{name}' once."
            )


def unreadable(file: Path, error: Exception) -> CheckpointError:
    """The error for a file that is missing or damaged."""
    return CheckpointError(f"{file} cannot be read ({error}); the training state is damaged.")
