"""What the codes of a latent action model are worth, on episodes it has not seen.

Are all entries used? How much of what changed do the codes bring back? Can the actions between the frames be told from them?

Shape letters: M pairs, K codes, V entries of the book, E dimension of an entry, D action dimension, F features of a probe.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vlaflow.actions.latent import LatentActionModel
from vlaflow.data.lerobot import Dataset
from vlaflow.data.pairs import FramePairs
from vlaflow.data.windows import split_episodes
from vlaflow.errors import SpecError
from vlaflow.policies.iflybot.codes import model_pairs

PAIRS = 4000
"""Pairs that are looked at, at most, of the training and of the held-out episodes each."""
BATCH = 128
ROWS = 6
"""Pairs that are shown as examples."""
OTHER_DATA = 0.06
"""Share of the episodes that the probe does not learn from, where training says nothing because it never saw the data."""


@dataclass(frozen=True)
class Seen:
    """Pairs and what the model made of them.

    Args:
        pairs: all pairs of the episodes.
        index_M: which of them.
        id_MK: their codes.
        vector_MF: what was quantised, flattened.
        action_MD: mean action between the frames, robot units; D = 0 where the data set holds none.
        task_M: index of the task.
    """

    pairs: FramePairs
    index_M: np.ndarray
    id_MK: np.ndarray
    vector_MF: np.ndarray
    action_MD: np.ndarray
    task_M: np.ndarray


@dataclass(frozen=True)
class Usage:
    """How the entries of the book are used.

    Args:
        share_V: of all codes, adds up to 1.
        share_KV: the same for each of the K places.
        used: entries with a tenth of their fair share 1/V or more.
        perplexity: exp of the entropy of ``share_V``, 1 … V.
        distinct: different rows of K codes, of ``pairs``.
        pairs: how many were looked at.
    """

    share_V: np.ndarray
    share_KV: np.ndarray
    used: int
    perplexity: float
    distinct: int
    pairs: int

    @property
    def place_perplexity(self) -> np.ndarray:
        """Perplexity of each of the K places, (K,)."""
        share_KV = np.where(self.share_KV > 0, self.share_KV, 1.0)
        return np.exp(-(self.share_KV * np.log(share_KV)).sum(1))


@dataclass(frozen=True)
class Examples:
    """A few held-out pairs, uint8 images (R, H, W, 3).

    Args:
        gap_s: time between the frames.
        id_RK: their codes.
        earlier, later: both frames.
        decoded: the later frame as the model makes it of the earlier one and the codes.
        transferred: (R, R, H, W, 3), the codes of each pair applied to the earlier frame of each.
    """

    gap_s: float
    id_RK: np.ndarray
    earlier: np.ndarray
    later: np.ndarray
    decoded: np.ndarray
    transferred: np.ndarray


@dataclass(frozen=True)
class Pixels:
    """Mean squared errors of the later frame, pixels in [0, 1].

    Args:
        copy: of the earlier frame in its place.
        decoded: of what the model makes of the pair's own codes.
        other: of what it makes of another pair's codes.
    """

    copy: float
    decoded: float
    other: float

    @property
    def explained(self) -> float:
        """Share of the change that the codes bring back: 1 − decoded / copy."""
        return 1 - self.decoded / self.copy if self.copy else 0.0


def look(model: LatentActionModel, dataset: Dataset) -> tuple[Seen, Seen]:
    """Pairs of training and of held-out episodes, divided as training did; data that it never saw is divided in the same way.

    Raises:
        SpecError: nothing was, or can be, held out.
        DataError: see ``FramePairs``.
    """
    origin = model.origin
    own = dataset.fingerprint == origin.dataset
    train, held = split_episodes(dataset, origin.held_out if own else origin.held_out or OTHER_DATA, origin.seed)
    if not held:
        why = "training held out no episode" if own and not origin.held_out else "there is one episode per task"
        raise SpecError(f"Nothing of {dataset.root} is held out: {why}. Train with a validation_fraction, or name other data.")
    return _see(model, dataset, train), _see(model, dataset, held)


def _see(model: LatentActionModel, dataset: Dataset, episodes: Sequence[int]) -> Seen:
    pairs = model_pairs(model, dataset, episodes=episodes)
    index_M = np.unique(np.linspace(0, len(pairs) - 1, min(PAIRS, len(pairs))).round().astype(np.int64))
    ids, vectors = [], []
    for start in range(0, len(index_M), BATCH):
        vector_BKE = model.vectors(*pairs.frames(index_M[start : start + BATCH]))
        ids.append(model.book.nearest(vector_BKE).cpu().numpy())
        vectors.append(vector_BKE.flatten(1).float().cpu().numpy())
    rows, columns = pairs.rows[index_M], dataset.columns()
    action_MD = columns.executed[rows[:, None] + np.arange(pairs.gap)].mean(1)
    return Seen(pairs, index_M, np.concatenate(ids), np.concatenate(vectors), action_MD, columns.task[rows])


def usage(id_MK: np.ndarray, book: int) -> Usage:
    """Count."""
    share_KV = np.stack([np.bincount(column, minlength=book) for column in id_MK.T]) / len(id_MK)
    share_V = share_KV.mean(0)
    positive = share_V[share_V > 0]
    return Usage(
        share_V,
        share_KV,
        int((share_V >= 0.1 / book).sum()),
        float(np.exp(-(positive * np.log(positive)).sum())),
        len(np.unique(id_MK, axis=0)),
        len(id_MK),
    )


def pixels(model: LatentActionModel, seen: Seen, seed: int = 0) -> Pixels:
    """Decode every pair with its own codes and with those of a pair drawn at random."""
    other_M = np.random.default_rng(seed).permutation(len(seen.index_M))
    sums = np.zeros(3)
    for start in range(0, len(seen.index_M), BATCH):
        part = slice(start, start + BATCH)
        earlier, later = seen.pairs.frames(seen.index_M[part])
        own, others = (
            model.apply_codes(earlier, torch.from_numpy(ids)) for ids in (seen.id_MK[part], seen.id_MK[other_M[part]])
        )
        wanted = later.float() / 255
        sums += [float((image.cpu().float() / 255 - wanted).square().mean((1, 2, 3)).sum()) for image in (earlier, own, others)]
    return Pixels(*(sums / len(seen.index_M)).tolist())


def examples(model: LatentActionModel, seen: Seen) -> Examples:
    """``ROWS`` pairs in which much moves, and what the model makes of their codes."""
    place_R = _moving(seen)
    earlier, later = seen.pairs.frames(seen.index_M[place_R])
    id_RK = seen.id_MK[place_R]
    made = [model.apply_codes(earlier, torch.from_numpy(ids).expand(len(place_R), -1)).cpu().numpy() for ids in id_RK]
    decoded = model.apply_codes(earlier, torch.from_numpy(id_RK)).cpu().numpy()
    return Examples(seen.pairs.gap_s, id_RK, earlier.numpy(), later.numpy(), decoded, np.stack(made))


def _moving(seen: Seen) -> np.ndarray:
    """Places in ``seen`` of ``ROWS`` pairs in which much moves, the tasks taking turns, int64 (R,)."""
    earlier, later = seen.pairs.frames(seen.index_M)
    change_M = (earlier.float() - later.float()).square().mean((1, 2, 3)).numpy()
    tasks = np.unique(seen.task_M)
    chosen = []
    for number in range(min(ROWS, len(change_M))):
        members = np.flatnonzero(seen.task_M == tasks[number % len(tasks)])
        order = members[np.argsort(change_M[members])]
        # from the ninth tenth down by a fifth, so that a task that comes again shows another pair
        chosen.append(order[int((0.9 - 0.2 * (number // len(tasks))) * (len(order) - 1))])
    return np.array(chosen)


def probes(train: Seen, held: Seen, book: int, tasks: int, seed: int = 0) -> Mapping[str, np.ndarray]:
    """How well the mean action between the frames can be told from codes, per dimension, by ridge regression.

    Returns:
        By what it is told from, share of the variance explained on held-out pairs, (D,): "codes"; "vectors", before
        quantisation; "task", its number alone; "chance", codes of other pairs. NaN for a dimension that stands still in the
        held-out pairs; empty where there is no other.
    """
    if still(held.action_MD).all():
        return {}
    shuffled = np.random.default_rng(seed).permutation(len(train.index_M))
    codes = [_one_hot(seen.id_MK, book) for seen in (train, held)]
    named = {
        "codes": codes,
        "vectors": [train.vector_MF, held.vector_MF],
        "task": [_one_hot(seen.task_M[:, None], tasks) for seen in (train, held)],
        "chance": [codes[0][shuffled], codes[1]],
    }
    return {name: explained(a, train.action_MD, b, held.action_MD) for name, (a, b) in named.items()}


def explained(x_MF: np.ndarray, y_MD: np.ndarray, new_x_MF: np.ndarray, new_y_MD: np.ndarray, ridge: float = 1.0) -> np.ndarray:
    """1 − residual / variance of a ridge regression on new data, (D,); 0 is what the training mean explains, or less.

    NaN where the new data stand still: there is nothing to tell.
    """
    x_mean_F, y_mean_D = x_MF.mean(0), y_MD.mean(0)
    scale_F = np.maximum(x_MF.std(0), 1e-6)
    x_MF, new_x_MF = (x_MF - x_mean_F) / scale_F, (new_x_MF - x_mean_F) / scale_F
    weight_FD = np.linalg.solve(x_MF.T @ x_MF + ridge * np.eye(x_MF.shape[1]), x_MF.T @ (y_MD - y_mean_D))
    residual_D = np.square(new_y_MD - y_mean_D - new_x_MF @ weight_FD).mean(0)
    still_D = still(new_y_MD)
    return np.where(still_D, np.nan, 1 - residual_D / np.where(still_D, 1, new_y_MD.var(0)))


def still(y_MD: np.ndarray) -> np.ndarray:
    """Dimensions that do not vary but for rounding, bool (D,), such as those a shorter action was padded with."""
    y_MD = y_MD.astype(np.float64)
    return y_MD.var(0) <= 1e-10 * np.square(y_MD).mean(0)


def _one_hot(id_MK: np.ndarray, entries: int) -> np.ndarray:
    return np.eye(entries)[id_MK].reshape(len(id_MK), -1)
