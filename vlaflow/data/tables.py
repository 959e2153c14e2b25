"""Files of tables, parquet and jsonl, read with errors that name the file; numbers of any nesting as flat arrays."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vlaflow.errors import DataError


def read_parquet(path: Path, columns: Sequence[str] | None = None, without: str | None = None) -> pa.Table:
    """Read a parquet file.

    Args:
        path: the file.
        columns: the columns to read, all of them when None.
        without: skip columns whose name starts with this.

    Raises:
        DataError: when the file is missing, cut off or lacks a column.
    """
    try:
        file = pq.ParquetFile(path)
        names = file.schema_arrow.names
        absent = [name for name in columns or () if name not in names]
        if absent:
            raise DataError(f"{path} has no column '{absent[0]}'. Copy or record the file again.")
        if without is not None:
            columns = [name for name in columns or names if not name.startswith(without)]
        return file.read(columns=columns)
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing. Copy the data set again.") from error
    except (pa.ArrowException, OSError) as error:
        raise damaged(path, error) from error


def damaged(path: Path, error: Exception) -> DataError:
    """The error about a file that cannot be read."""
    return DataError(f"{path} is damaged or cut off ({str(error).splitlines()[0]}). Copy or record it again.")


def read_jsonl(path: Path, needed: Sequence[str]) -> list[dict[str, Any]]:
    """Read a file with one JSON object per line.

    Raises:
        DataError: the file is missing, a line is not JSON or lacks one of the ``needed`` keys.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing. Copy the meta folder again.") from error
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"Line {number} of {path} is not valid JSON ({error}). Copy the file again.") from error
        absent = [key for key in needed if not isinstance(row, dict) or key not in row]
        if absent:
            raise DataError(f"Line {number} of {path} does not state '{absent[0]}'. Copy the file again.")
        rows.append(row)
    return rows


def is_text(kind: pa.DataType) -> bool:
    """Whether a column holds words, in any of parquet's types for them."""
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def flat_numbers(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of a column, row after row, and how many each row holds; lists may be nested.

    Returns:
        float32 (all numbers,), NaN for missing ones; int64 (rows,).

    Raises:
        pyarrow.ArrowException: when it holds something else than numbers.
    """
    cells = column.combine_chunks()
    rows = np.arange(len(cells))
    counts = np.ones(len(cells), np.int64)
    while _is_list(cells.type):
        lengths = pc.list_value_length(cells).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
        owner = np.repeat(rows, counts)
        counts = np.bincount(owner, lengths, minlength=len(rows)).astype(np.int64)
        cells = cells.flatten()
    numbers = pc.cast(cells, pa.float32(), safe=False).to_numpy(zero_copy_only=False)
    return np.ascontiguousarray(numbers, np.float32), counts


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def read_cells(path: Path, key: str, rows: np.ndarray) -> list[Any]:
    """The cells of one column at these rows of a file, in their order; one row group is in memory at a time.

    Raises:
        DataError: the file is damaged or lacks the column.
    """
    cells: list[Any] = [None] * len(rows)
    try:
        file = pq.ParquetFile(path)
        if key not in file.schema_arrow.names:
            raise DataError(f"{path} has no column '{key}'. Copy or record the file again.")
        sizes = np.array([file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)], np.int64)
        ends = np.cumsum(sizes)
        groups = np.searchsorted(ends, rows, side="right")
        for group in np.unique(groups):
            column = file.read_row_group(int(group), columns=[key])[key]
            start = int(ends[group] - sizes[group])
            for place in np.flatnonzero(groups == group):
                cells[place] = column[int(rows[place]) - start].as_py()
    except (pa.ArrowException, OSError) as error:
        raise damaged(path, error) from error
    return cells


def first_cell(path: Path, key: str) -> Any:
    """The first cell of a column that is not empty, reading no more of the file than its beginning; None if there is none."""
    try:
        file = pq.ParquetFile(path, buffer_size=1 << 16)
        return next(_cells(file, key), None) if key in file.schema_arrow.names else None
    except (pa.ArrowException, OSError):
        return None  # whatever reads the file as a whole reports it better


def _cells(file: pq.ParquetFile, key: str) -> Iterator[Any]:
    for batch in file.iter_batches(batch_size=1, columns=[key]):
        cell = batch.column(0)[0].as_py()
        if cell is not None:
            yield cell
