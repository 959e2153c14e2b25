"""``meta/pixel_counts.parquet``: how often each value occurs among the pixels of an episode, for every camera.

Statistics of pictures follow from these counts exactly, quantiles too, whatever episodes they are summed over. So an edit that
copies videos need not decode them. The file is ours: LeRobot reads the files of meta/ by name and leaves others alone, and a
data set without it is sound.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vlaflow.data.tables import read_parquet
from vlaflow.errors import DataError

PIXEL_COUNTS = "meta/pixel_counts.parquet"
CHANNELS, LEVELS = 3, 256


def write_counts(root: Path, counts: Mapping[str, Sequence[np.ndarray]]) -> None:
    """Write the file.

    Args:
        root: the data set's folder.
        counts: by feature key of the camera, int64 (3, 256) of every episode, by number.
    """
    kind = pa.list_(pa.int64(), CHANNELS * LEVELS)
    columns = {
        key: pa.FixedSizeListArray.from_arrays(pa.array(np.concatenate([one.reshape(-1) for one in each])), type=kind)
        for key, each in counts.items()
    }
    pq.write_table(pa.table(columns), root / PIXEL_COUNTS, compression="zstd", use_dictionary=False, write_page_checksum=True)


def stored_counts(root: Path) -> Mapping[str, np.ndarray]:
    """The counts of a data set, int64 (episodes, 3, 256) by feature key of the camera; empty where there are none.

    Raises:
        DataError: the file is damaged.
    """
    file = root / PIXEL_COUNTS
    if not file.exists():
        return {}
    table, found = read_parquet(file), {}
    for key in table.column_names:
        cells = table[key].combine_chunks()
        kind = cells.type
        whole = pa.types.is_fixed_size_list(kind) and kind.list_size == CHANNELS * LEVELS and kind.value_type == pa.int64()
        if not whole or cells.null_count or cells.flatten().null_count:
            raise DataError(
                f"'{key}' in {file} does not hold {CHANNELS * LEVELS} counts for every episode. Copy the file again."
            )
        found[key] = cells.flatten().to_numpy().reshape(-1, CHANNELS, LEVELS)
    return found
