"""What a latent action model learns from: frame pairs of one data set, or of several together."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from vlaflow.data import stats
from vlaflow.data.batch import Batch
from vlaflow.data.common import CommonShape, Normalizers
from vlaflow.data.frame_source import open_frames
from vlaflow.data.mixture import Mixed, Order
from vlaflow.data.pairs import EARLIER, LATER, FramePairs, chosen_view
from vlaflow.data.source import Source
from vlaflow.data.transforms import Normalizer
from vlaflow.data.weights import Member, weights_of
from vlaflow.errors import SpecError
from vlaflow.policies.mixing import Samples
from vlaflow.policies.recipe import OpenedDataset, TrainConfig


@dataclass(frozen=True)
class Paired:
    """How pairs are formed.

    Args:
        view: the camera view.
        gap_s: time between the frames in seconds.
        size: side of the frames in pixels.
    """

    view: str
    gap_s: float
    size: int


class MeanActions:
    """Frame pairs whose chunk is one action, the mean over the gap: at any rate there is one, and every pair counts the same.

    Args:
        pairs: the pairs.
    """

    def __init__(self, pairs: FramePairs) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def batch(self, indices: np.ndarray) -> Batch:
        """See ``FramePairs.batch``."""
        batch = self.pairs.batch(indices)
        valid_B1 = torch.ones((len(indices), 1), dtype=torch.bool)
        return replace(batch, action_BLD=batch.action_BLD.mean(1, keepdim=True), valid_BL=valid_B1)


def pairs_of(how: Paired, config: TrainConfig, datasets: Sequence[OpenedDataset]) -> tuple[Samples, FramePairs]:
    """The pairs of all data sets, and those of the first one alone; a data set without the view shows its first one.

    Raises:
        DataError: no camera, or no episode that is longer than the gap.
    """
    several = len(datasets) > 1
    train: dict[str, FramePairs] = {}
    held: dict[str, FramePairs] = {}
    for each in datasets:
        train[each.label], aside = _pairs(how, config, each, several)
        if aside is not None:
            held[each.label] = aside
    first = train[datasets[0].label]
    if not several:
        return Samples(first, next(iter(held.values()), None), partial(Order, nearby=first.nearby()), {}, {}), first
    robots = {each.label: number for number, each in enumerate(datasets)}
    columns = [each.dataset.columns() for each in datasets]
    width = max(found.state.shape[1] for found in columns)
    shape = CommonShape(width, max(found.action.shape[1] for found in columns), 1, (EARLIER, LATER))
    members = [Member(each.entry, each.label, len(train[each.label])) for each in datasets]
    weights = dict(zip(train, weights_of(members, config.mixture), strict=True))
    parts: dict[str, Source] = {name: MeanActions(pairs) for name, pairs in train.items()}
    mixed = Mixed(parts, weights, shape, robots, {name: pairs.nearby() for name, pairs in train.items()})
    held_each: dict[str, tuple[Source, float]] = {
        name: (Mixed({name: MeanActions(pairs)}, {name: 1.0}, shape, {name: robots[name]}), weights[name])
        for name, pairs in held.items()
    }
    return Samples(mixed, None, mixed.order, held_each, weights), first


def _pairs(how: Paired, config: TrainConfig, each: OpenedDataset, several: bool) -> tuple[FramePairs, FramePairs | None]:
    dataset, label = each.dataset, f"{each.label}: " if several else ""
    train_episodes, held_episodes = config.episodes(dataset)
    view = chosen_view(dataset, how.view if how.view in dataset.views else None)
    if view != how.view:
        sys.stderr.write(f"{label}there is no view '{how.view}'; '{view}' is used.\n")
    frames = open_frames(config.frames, dataset, how.size, [view])
    train = FramePairs(dataset, frames, view, how.gap_s, episodes=train_episodes)
    held: FramePairs | None = None
    if any(dataset.episode(e).length > train.gap for e in held_episodes):
        held = FramePairs(dataset, frames.for_few(), view, how.gap_s, episodes=held_episodes)
    elif held_episodes:
        sys.stderr.write(
            f"{label}Held out: none of the {len(held_episodes)} episodes is longer than the gap; nothing is measured.\n"
        )
    for which, pairs in (("For training", train), ("Held out", held)):
        if pairs is not None and pairs.short:
            sys.stderr.write(f"{label}{which}: {pairs.left_out()}\n")
    return train, held


def action_normalizers(dim: int, config: TrainConfig, datasets: Sequence[OpenedDataset]) -> Normalizers | None:
    """Of the actions of every data set, for a model with an action head; None for one without.

    Raises:
        SpecError: the head has other dimensions than the widest action.
    """
    if not dim:
        return None
    measured = [stats.compute(each.dataset, config.episodes(each.dataset)[0])["action"] for each in datasets]
    widest = max(range(len(datasets)), key=lambda number: measured[number].dim)
    if measured[widest].dim != dim:
        raise SpecError(
            f"model.action_dim is {dim}, but the actions of {datasets[widest].dataset.root} have {measured[widest].dim} "
            "dimensions."
        )
    return Normalizers(tuple(Normalizer.from_stats(each, "mean_std") for each in measured), dim)
