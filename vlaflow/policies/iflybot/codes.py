"""The latent actions of a whole data set: what the language model is taught to name, and what reports look at.

    codes = dataset_codes(StoredLatentModel.open("runs/iflybot/latent"), Dataset.open("runs/demo/dataset"))
    id_BK = codes.id_NK[rows]      # −1 in the rows of the last frames of an episode, which begin no pair

Shape letters: N rows of the data set, K codes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from vlaflow.actions.stored_latent import CodeModel
from vlaflow.data.frame_source import FrameStorage, open_frames
from vlaflow.data.lerobot import Dataset
from vlaflow.data.pairs import FramePairs, chosen_view, pair_table


@dataclass(frozen=True)
class DatasetCodes:
    """Latent actions by row of ``Dataset.columns``.

    Args:
        id_NK: int64, in [0, book); all −1 where a row begins no pair.
        gap: frames between the two frames of a pair.
    """

    id_NK: np.ndarray
    gap: int


def model_pairs(
    model: CodeModel,
    dataset: Dataset,
    *,
    view: str | None = None,
    episodes: Sequence[int] | None = None,
    storage: FrameStorage = "raw",
) -> FramePairs:
    """The frame pairs of a data set as the model was trained on them: its size, its gap in seconds.

    Args:
        model: the latent action model.
        dataset: any data set with video; at another rate the gap has another number of frames.
        view: by default the one the model was trained on; the first one of a data set that it was trained on without it.
        episodes: all by default.
        storage: where frames come from.

    Raises:
        DataError: no such view, or no episode longer than the gap.
    """
    origin = model.origin
    wanted: str | None = view or origin.view
    if view is None and wanted not in dataset.views and dataset.fingerprint in (origin.dataset, *origin.others):
        wanted = None  # as training chose it (``latent_pairs``)
    view = chosen_view(dataset, wanted)
    frames = open_frames(storage, dataset, model.config.image_size, [view])
    return FramePairs(dataset, frames, view, origin.gap_s, episodes=episodes)


def dataset_codes(
    model: CodeModel,
    dataset: Dataset,
    *,
    view: str | None = None,
    storage: FrameStorage = "raw",
    progress: Callable[[int, int], None] | None = None,
) -> DatasetCodes:
    """The codes of every frame of a data set, computed once per model and data set and kept where frame caches are.

    Args:
        model: the latent action model; a stored one is opened only where the codes are not there yet.
        dataset: any data set with video.
        view: see ``model_pairs``.
        storage: where frames come from; the codes of JPEGs are other ones.
        progress: called with (pairs done, pairs in all) while computing.

    Raises:
        DataError: see ``model_pairs``; also a damaged table.
    """
    pairs = model_pairs(model, dataset, view=view, storage=storage)
    if pairs.short:
        sys.stderr.write(f"{dataset.root}: {pairs.left_out()}\n")
    id_NK = pair_table(pairs, model.codes, model.fingerprint(), progress)
    return DatasetCodes(id_NK, pairs.gap)
