"""The task table of a LeRobot data set: meta/tasks.parquet from v3.0 on, meta/tasks.jsonl before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vlaflow.data.tables import is_text, read_jsonl, read_parquet, whole_numbers
from vlaflow.errors import DataError
from vlaflow.ranges import Number
from vlaflow.text import shown


@dataclass(frozen=True)
class TaskForm:
    """A line of meta/tasks.jsonl."""

    task_index: Number
    task: str


@dataclass(frozen=True)
class Tasks:
    """The task table.

    Args:
        words: the instructions, in the order of their numbers.
        numbers: int64 (tasks,), the number that rows name each by, ascending; there may be gaps, where tasks were removed.
        path: the file.
    """

    words: tuple[str, ...]
    numbers: np.ndarray
    path: Path

    def places(self, numbers: np.ndarray) -> np.ndarray:
        """The places in ``words`` of the tasks that rows name: int64, as ``numbers``; -1 where there is no such task."""
        places = np.searchsorted(self.numbers, numbers)
        found = np.append(self.numbers, -1)[places] == numbers
        return np.where(found & (numbers >= 0), places, -1)

    @property
    def notes(self) -> tuple[str, ...]:
        """A sentence if their numbers have gaps."""
        count = len(self.words)
        if not count or self.numbers[-1] == count - 1:
            return ()
        first, last = int(np.argmax(self.numbers != np.arange(count))), int(self.numbers[-1])
        gaps = f"with gaps ({last + 1 - count} missing, the first is {first})"
        return (f"meta/{self.path.name} numbers its tasks up to {last} {gaps}; rows are read by these numbers.",)


def read_tasks(root: Path, modern: bool) -> Tasks:
    """Read the task table.

    Args:
        root: the data set's folder.
        modern: whether it is of format v3.0.

    Raises:
        DataError: the file is damaged, a task has no words, or a number is negative or of two tasks.
    """
    path = root / ("meta/tasks.parquet" if modern else "meta/tasks.jsonl")
    if not path.is_file():
        raise DataError(
            f"{path} is missing. Copy the file again, or have it written from the tasks of each episode: vlaflow data repair "
            f"{root} --out DIR"
        )
    numbers, words = (_parquet if modern else _jsonl)(path)
    table = dict(zip(numbers, words, strict=True))
    wrong = next((n for n, word in zip(numbers, words, strict=True) if n < 0 or table[n] != word), None)
    if wrong is not None:
        what = "is no number that a task can have" if wrong < 0 else "is the number of two tasks"
        raise DataError(
            f"{path}: task_index = {shown(wrong)} {what}. Copy the file again, or have it written from the rows and the tasks "
            f"of each episode: vlaflow data repair {root} --out DIR"
        )
    return Tasks(tuple(table[n] for n in sorted(table)), np.array(sorted(table), np.int64), path)


def _parquet(path: Path) -> tuple[Sequence[int], Sequence[str]]:
    table = read_parquet(path)
    text = [name for name in table.schema.names if is_text(table.schema.field(name).type)]
    if "task_index" not in table.schema.names or not text:
        raise DataError(f"{path} needs a column 'task_index' and one with the task in words. Copy the file again.")
    # Converted data sets leave the pandas index unnamed, so the words may be in '__index_level_0__'.
    words = table["task" if "task" in text else text[0]].to_pylist()
    if None in words:
        raise DataError(f"{path} has a task without words. Write its instruction there, or copy the file again.")
    return whole_numbers(table, "task_index", path).tolist(), words


def _jsonl(path: Path) -> tuple[Sequence[int], Sequence[str]]:
    rows = read_jsonl(path, TaskForm)
    return [row["task_index"] for row in rows], [row["task"] for row in rows]
