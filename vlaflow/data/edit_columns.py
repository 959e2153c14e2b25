"""Columns of an episode that is copied into a new data set: their numbers, and pictures that lie in the rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vlaflow.data.edit_survey import SourceEpisode
from vlaflow.data.features import Feature, width
from vlaflow.data.lerobot_info import inside
from vlaflow.data.tables import is_text
from vlaflow.errors import DataError


def numbers_of(column: pa.ChunkedArray) -> np.ndarray:
    """The numbers of the cells of a column that are not empty, (cells, numbers per cell), in their own type."""
    cells = column.drop_null().combine_chunks()
    count = len(cells)
    while pa.types.is_nested(cells.type):
        cells = cells.flatten()
    return cells.to_numpy(zero_copy_only=False).reshape(count, len(cells) // max(count, 1))


def common_types(table: pa.Table, known: pa.Schema) -> pa.Schema:
    """The types of columns in which a table and the ones before it can be written: theirs, or wider ones where it needs them.

    Recorders that write a file for every episode may store whole numbers in one and fractions in the next.
    """
    try:
        table.cast(known)
    except pa.ArrowException:
        try:
            return pa.unify_schemas([known, table.schema], promote_options="permissive")
        except pa.ArrowException:  # nothing holds both: the one that comes later cannot be written
            return known
    return known


def fits_a_table(values: Sequence[Any]) -> bool:
    """Whether parquet has a type that holds these values, each as it is."""
    try:
        pq.write_table(pa.table({"value": pa.array(values)}), pa.BufferOutputStream())
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        return False
    return True


def require_whole(key: str, feature: Feature, column: pa.ChunkedArray) -> None:
    """Refuse cells of another length than declared, and actions and observations that are empty or not finite.

    Raises:
        DataError: naming the column.
    """
    try:
        numbers = numbers_of(column)
    except (ValueError, pa.ArrowException) as error:
        raise DataError(f"'{key}' holds rows of different lengths") from error
    learned = key.startswith(("action", "observation"))
    if (learned and column.null_count) or (len(numbers) and numbers.shape[1] != width(feature)):
        raise DataError(f"'{key}' does not hold {width(feature)} numbers in every row")
    if len(numbers) and (numbers.dtype == object or (learned and not np.isfinite(numbers).all())):
        raise DataError(f"'{key}' holds numbers that are missing or not finite")


def embedded(root: Path, key: str, source: SourceEpisode, column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column of images whose content lies in it: what only a path names is read.

    Raises:
        DataError: a path leads out of the data set, or its file cannot be read.
    """
    kind = column.type
    if not is_text(kind) and not pa.types.is_struct(kind):
        return column
    cells = []
    for i, cell in enumerate(column.to_pylist()):
        content, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (None, cell)
        if content is None and path is not None:
            try:
                content = inside(root, path, f"The path of image {i} of '{key}' in episode {source.number}").read_bytes()
            except OSError as error:
                raise DataError(f"image {i} of '{key}' cannot be read ({error})") from error
        cells.append({"bytes": content, "path": path})
    return pa.chunked_array([pa.array(cells, pa.struct({"bytes": pa.binary(), "path": pa.string()}))])
