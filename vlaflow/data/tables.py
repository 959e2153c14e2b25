"""Files of tables, parquet and jsonl, read with errors that name the file; numbers of any nesting as flat arrays."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vlaflow.errors import DataError
from vlaflow.strict import read_lines, require_form
from vlaflow.text import one_line, shown

MOST_ROWS_PER_BYTE = 64
"""Rows that a file can hold per byte: numbers that count up take an eighth of a bit each in parquet's densest encoding."""


def read_parquet(
    path: Path, columns: Sequence[str] | None = None, without: str | None = None, optional: Sequence[str] = ()
) -> pa.Table:
    """Read a parquet file.

    Args:
        path: the file.
        columns: the columns to read, all of them when None.
        without: skip columns whose name starts with this.
        optional: columns to read as well if it has them.

    Raises:
        DataError: when the file is missing, cut off or lacks a column.
    """
    try:
        file = open_parquet(path)
        names = file.schema_arrow.names
        absent = [name for name in columns or () if name not in names]
        if absent:
            raise DataError(f"{path} has no column '{absent[0]}'. Copy or record the file again.")
        if columns is not None:
            columns = [*columns, *(name for name in optional if name in names and name not in columns)]
        if without is not None:
            columns = [name for name in columns or names if not name.startswith(without)]
        table = file.read(columns=columns)
        table.validate(full=True)  # texts are UTF-8, lists begin and end within their column
        return _plain(table)
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing. Copy the data set again.") from error
    except (pa.ArrowException, OSError, ValueError) as error:
        raise damaged(path, error) from error


def read_schema(path: Path) -> pa.Schema:
    """The columns of a parquet file and their types.

    Raises:
        DataError: when the file is missing or damaged.
    """
    try:
        return open_parquet(path).schema_arrow
    except (pa.ArrowException, OSError, ValueError) as error:
        raise damaged(path, error) from error


def _plain(table: pa.Table) -> pa.Table:
    """The table without dictionaries, as pandas writes its categories."""
    for place, field in enumerate(table.schema):
        if pa.types.is_dictionary(field.type):
            table = table.set_column(place, field.name, table.column(place).cast(field.type.value_type))
    return table


def open_parquet(path: Path, buffer_size: int = 0) -> pq.ParquetFile:
    """Open a parquet file; checksums of its pages are compared wherever it has some, as every file of ``writer`` does.

    Raises:
        DataError: a column twice, or more rows than so many bytes can hold.
        pyarrow.ArrowException, OSError, ValueError: it is missing or damaged.
    """
    file = pq.ParquetFile(path, buffer_size=buffer_size, page_checksum_verification=True)
    names = file.schema_arrow.names
    twice = next((name for name, count in Counter(names).items() if count > 1), None)
    if twice is not None:
        raise DataError(f"{path} has the column {shown(twice)} twice. Record the file again.")
    if file.metadata.num_rows > MOST_ROWS_PER_BYTE * path.stat().st_size:
        raise DataError(f"{path} claims {file.metadata.num_rows} rows, more than its size can hold. Copy or record it again.")
    return file


def damaged(path: Path, error: Exception) -> DataError:
    """The error about a file that cannot be read."""
    if is_pointer(path):
        return DataError(f"{path} {POINTER}")
    reason = one_line((str(error).splitlines() or [type(error).__name__])[0])
    return DataError(f"{path} is damaged or cut off ({reason:.300}). Copy or record it again.")


POINTER = "is only a pointer of Git LFS to the file. Fetch the files themselves: git lfs pull"


def is_pointer(path: Path) -> bool:
    """Whether a file was cloned without Git LFS, which leaves a few lines of text in place of its content."""
    try:
        with path.open("rb") as file:
            return file.read(27) == b"version https://git-lfs.git"
    except OSError:
        return False


def is_filled(table: pa.Table, name: str) -> bool:
    """Whether a table has a column, and it is not empty throughout."""
    return name in table.column_names and table[name].null_count < max(len(table), 1)


def whole_numbers(table: pa.Table, name: str, path: Path) -> np.ndarray:
    """A column of whole numbers, one per row, int64 (rows,); some recorders wrap each in a list of one, or store it as a float.

    Raises:
        DataError: it holds something else, or empty cells.
    """
    cells = _one_per_row(table, name, path)
    if pa.types.is_floating(cells.type) and pc.all(pc.equal(cells, pc.round(cells))).as_py():
        with contextlib.suppress(pa.ArrowException):  # beyond int64: not whole numbers
            cells = cells.cast(pa.int64())
    if not pa.types.is_integer(cells.type):
        raise DataError(f"'{name}' in {path} holds {cells.type} instead of whole numbers. Copy or record the file again.")
    try:
        return cells.cast(pa.int64()).to_numpy(zero_copy_only=False)
    except pa.ArrowException as error:  # an unsigned number beyond int64
        raise damaged(path, error) from error


def plain_numbers(table: pa.Table, name: str, path: Path) -> np.ndarray:
    """A column of numbers, one per row, as they are stored, (rows,); raises as ``whole_numbers``."""
    cells = _one_per_row(table, name, path)
    if not _is_number(cells.type):
        raise DataError(f"'{name}' in {path} holds {cells.type} instead of numbers. Copy or record the file again.")
    return cells.to_numpy(zero_copy_only=False)


def _one_per_row(table: pa.Table, name: str, path: Path) -> pa.Array:
    if name not in table.schema.names:
        raise DataError(f"{path} has no column '{name}'. Copy or record the file again.")
    cells = _combined(table[name])
    while is_list(cells.type):
        cells = cells.flatten()
    if cells.null_count or len(cells) != len(table):
        what = "has empty cells" if len(cells) == len(table) else "must hold one number per row"
        raise DataError(f"'{name}' in {path} {what}. Copy or record the file again.")
    return cells


def _combined(column: pa.ChunkedArray) -> pa.Array:
    cells = column.combine_chunks()
    return cells if isinstance(cells, pa.Array) else pa.concat_arrays(cells.chunks)


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def read_jsonl(path: Path, form: type) -> list[dict[str, Any]]:
    """Read a file with one JSON object per line, each of a form (``strict.require_form``).

    Raises:
        DataError: the file is missing, a line is not JSON, or not of this form.
    """
    rows = []
    for where, row in read_lines(path, DataError, "copy the file again.", finite=True):
        require_form(form, row, where, DataError)
        rows.append(row)
    return rows


def is_text(kind: pa.DataType) -> bool:
    """Whether a column holds words, in any of parquet's types for them."""
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def flat_numbers(column: pa.ChunkedArray, *, switches: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of a column, row after row, and how many each row holds; lists may be nested.

    Args:
        column: of a table.
        switches: whether booleans count as numbers, 0 and 1.

    Returns:
        float32 (all numbers,), NaN for missing ones; int64 (rows,).

    Raises:
        pyarrow.ArrowException: when it holds something else than numbers.
    """
    cells = column.combine_chunks()
    rows = np.arange(len(cells))
    counts = np.ones(len(cells), np.int64)
    while is_list(cells.type):
        lengths = pc.list_value_length(cells).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
        owner = np.repeat(rows, counts)
        counts = np.bincount(owner, lengths, minlength=len(rows)).astype(np.int64)
        cells = cells.flatten()
    if not (_is_number(cells.type) or (switches and pa.types.is_boolean(cells.type))):
        raise pa.ArrowInvalid(f"it holds {cells.type} instead of numbers")
    numbers = pc.cast(cells, pa.float32(), safe=False).to_numpy(zero_copy_only=False)
    return np.ascontiguousarray(numbers, np.float32), counts


def switches_as_numbers(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column of booleans, in lists of any nesting, as the numbers 0 and 1, float32; any other column as it is."""

    def as_numbers(kind: pa.DataType) -> pa.DataType:
        if pa.types.is_fixed_size_list(kind):
            return pa.list_(as_numbers(kind.value_type), kind.list_size)
        if is_list(kind):
            return pa.list_(as_numbers(kind.value_type))
        return pa.float32() if pa.types.is_boolean(kind) else kind

    wanted = as_numbers(column.type)
    return column if wanted == column.type else column.cast(wanted)


def is_list(kind: pa.DataType) -> bool:
    """Whether the cells of a column are lists."""
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def read_cells(path: Path, key: str, rows: np.ndarray) -> list[Any]:
    """The cells of one column at these rows of a file, in their order; one row group is in memory at a time.

    Raises:
        DataError: the file is damaged or lacks the column.
    """
    cells: list[Any] = [None] * len(rows)
    try:
        file = open_parquet(path)
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
    except (pa.ArrowException, OSError, ValueError) as error:
        raise damaged(path, error) from error
    return cells


def first_cell(path: Path, key: str) -> Any:
    """The first cell of a column that is not empty, reading no more of the file than its beginning; None if there is none."""
    try:
        file = open_parquet(path, buffer_size=1 << 16)
        return next(_cells(file, key), None) if key in file.schema_arrow.names else None
    except (DataError, pa.ArrowException, OSError, ValueError):
        return None  # whatever reads the file as a whole reports it better


def _cells(file: pq.ParquetFile, key: str) -> Iterator[Any]:
    for batch in file.iter_batches(batch_size=1, columns=[key]):
        cell = batch.column(0)[0].as_py()
        if cell is not None:
            yield cell
