"""Quality of the codes of a latent action model, on held-out episodes.

Are all entries used? How much of the change between the frames do the codes reconstruct? Can actions be predicted from them?

Shape letters: M pairs, K codes, V entries of the codebook, E dimension of an entry, D action dimension, F features of a probe.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vlaflow.actions.latent import LatentActionModel
from vlaflow.data.frame_source import FrameStorage
from vlaflow.data.lerobot import Dataset
from vlaflow.data.pairs import FramePairs
from vlaflow.data.windows import split_episodes
from vlaflow.errors import SpecError
from vlaflow.policies.iflybot.codes import model_pairs

PAIRS = 4000
"""Largest number of pairs, each of the training and of the held-out episodes."""
BATCH = 128
ROWS = 6
"""Number of example pairs."""
OTHER_DATA = 0.06
"""Share of the episodes held out from the probes, for data on which the model was not trained."""


@dataclass(frozen=True)
class EncodedPairs:
    """Frame pairs and their codes.

    Args:
        pairs: all pairs of the episodes.
        index_M: indices of the measured pairs.
        id_MK: their codes.
        vector_MF: the vectors before quantisation, flattened.
        action_MD: mean action between the frames, robot units; D = 0 if the data set has no actions.
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
    """Usage of the codebook entries.

    Args:
        share_V: share of each entry among all codes; adds up to 1.
        share_KV: the same for each of the K positions.
        used: number of entries with at least a tenth of the fair share 1/V.
        perplexity: exp of the entropy of ``share_V``, 1 … V.
        distinct: number of different rows of K codes.
        pairs: number of measured pairs.
    """

    share_V: np.ndarray
    share_KV: np.ndarray
    used: int
    perplexity: float
    distinct: int
    pairs: int

    @property
    def place_perplexity(self) -> np.ndarray:
        """Perplexity of each of the K positions, (K,)."""
        share_KV = np.where(self.share_KV > 0, self.share_KV, 1.0)
        return np.exp(-(self.share_KV * np.log(share_KV)).sum(1))


@dataclass(frozen=True)
class LatentExamples:
    """A few held-out pairs, uint8 images (R, H, W, 3).

    Args:
        gap_s: time between the frames.
        id_RK: their codes.
        earlier, later: both frames.
        decoded: the later frame as predicted from the earlier one and the codes.
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
        copy: error of the earlier frame.
        decoded: error of the prediction from the pair's own codes.
        other: error of the prediction from another pair's codes.
    """

    copy: float
    decoded: float
    other: float

    @property
    def explained(self) -> float:
        """Share of the change that the codes reconstruct: 1 − decoded / copy."""
        return 1 - self.decoded / self.copy if self.copy else 0.0


def encode_pairs(
    model: LatentActionModel, dataset: Dataset, storage: FrameStorage = "raw"
) -> tuple[EncodedPairs, EncodedPairs]:
    """Encode pairs of the training and of the held-out episodes, split as in training; other data is split in the same way.

    Args:
        model: the latent action model.
        dataset: a data set with video.
        storage: where its frames come from.

    Raises:
        SpecError: nothing is, or can be, held out.
        DataError: see ``FramePairs``.
    """
    origin = model.origin
    own = dataset.fingerprint in (origin.dataset, *origin.others)
    fraction, tasks = (origin.held_out, origin.hold_out_tasks) if own else (origin.held_out or OTHER_DATA, ())
    train, held = split_episodes(dataset, fraction, origin.seed, tasks)
    if not held:
        why = "training held out no episode" if own and not origin.held_out else "there is one episode per task"
        raise SpecError(
            f"No episode of {dataset.root} is held out: {why}. Train with a validation_fraction, or use other data."
        )
    return _encode(model, dataset, train, storage), _encode(model, dataset, held, storage)


def _encode(model: LatentActionModel, dataset: Dataset, episodes: Sequence[int], storage: FrameStorage) -> EncodedPairs:
    pairs = model_pairs(model, dataset, episodes=episodes, storage=storage)
    index_M = np.unique(np.linspace(0, len(pairs) - 1, min(PAIRS, len(pairs))).round().astype(np.int64))
    ids, vectors = [], []
    for _, earlier, later in pairs.in_turn(index_M, BATCH):
        vector_BKE = model.vectors(earlier, later)
        ids.append(model.book.nearest(vector_BKE).cpu().numpy())
        vectors.append(vector_BKE.flatten(1).float().cpu().numpy())
    rows, columns = pairs.rows[index_M], dataset.columns()
    action_MD = columns.executed[rows[:, None] + np.arange(pairs.gap)].mean(1)
    return EncodedPairs(pairs, index_M, np.concatenate(ids), np.concatenate(vectors), action_MD, columns.task[rows])


def usage(id_MK: np.ndarray, book: int) -> Usage:
    """Compute the usage of the codebook."""
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


def pixels(model: LatentActionModel, encoded: EncodedPairs, seed: int = 0) -> Pixels:
    """Decode every pair with its own codes and with those of a random pair."""
    other_M = np.random.default_rng(seed).permutation(len(encoded.index_M))
    sums = np.zeros(3)
    for number, (_, earlier, later) in enumerate(encoded.pairs.in_turn(encoded.index_M, BATCH)):
        part = slice(number * BATCH, (number + 1) * BATCH)
        own, others = (
            model.apply_codes(earlier, torch.from_numpy(ids)) for ids in (encoded.id_MK[part], encoded.id_MK[other_M[part]])
        )
        wanted = later.float() / 255
        sums += [float((image.cpu().float() / 255 - wanted).square().mean((1, 2, 3)).sum()) for image in (earlier, own, others)]
    return Pixels(*(sums / len(encoded.index_M)).tolist())


def examples(model: LatentActionModel, encoded: EncodedPairs) -> LatentExamples:
    """``ROWS`` pairs with much motion, and the predictions from their codes."""
    place_R = _moving(encoded)
    earlier, later = encoded.pairs.frames(encoded.index_M[place_R])
    id_RK = encoded.id_MK[place_R]
    made = [model.apply_codes(earlier, torch.from_numpy(ids).expand(len(place_R), -1)).cpu().numpy() for ids in id_RK]
    decoded = model.apply_codes(earlier, torch.from_numpy(id_RK)).cpu().numpy()
    return LatentExamples(encoded.pairs.gap_s, id_RK, earlier.numpy(), later.numpy(), decoded, np.stack(made))


def _moving(encoded: EncodedPairs) -> np.ndarray:
    """Indices in ``encoded`` of ``ROWS`` pairs with much motion, the tasks taking turns, int64 (R,)."""
    earlier, later = encoded.pairs.frames(encoded.index_M)
    change_M = (earlier.float() - later.float()).square().mean((1, 2, 3)).numpy()
    tasks = np.unique(encoded.task_M)
    chosen = []
    for number in range(min(ROWS, len(change_M))):
        members = np.flatnonzero(encoded.task_M == tasks[number % len(tasks)])
        order = members[np.argsort(change_M[members])]
        # from the 90 % quantile down by 20 % per round, so that a repeated task shows another pair
        chosen.append(order[int((0.9 - 0.2 * (number // len(tasks))) * (len(order) - 1))])
    return np.array(chosen)


def probes(train: EncodedPairs, held: EncodedPairs, book: int, tasks: int, seed: int = 0) -> Mapping[str, np.ndarray]:
    """How well the mean action between the frames can be predicted from the codes, per dimension, by ridge regression.

    Returns:
        By predictor, share of the variance explained on held-out pairs, (D,): "codes"; "vectors", before quantisation;
        "task", its number alone; "chance", codes of other pairs. NaN for a dimension that is constant in the held-out
        pairs; empty if all are.
    """
    if still(held.action_MD).all():
        return {}
    shuffled = np.random.default_rng(seed).permutation(len(train.index_M))
    codes = [_one_hot(encoded.id_MK, book) for encoded in (train, held)]
    named = {
        "codes": codes,
        "vectors": [train.vector_MF, held.vector_MF],
        "task": [_one_hot(encoded.task_M[:, None], tasks) for encoded in (train, held)],
        "chance": [codes[0][shuffled], codes[1]],
    }
    return {name: explained(a, train.action_MD, b, held.action_MD) for name, (a, b) in named.items()}


def explained(x_MF: np.ndarray, y_MD: np.ndarray, new_x_MF: np.ndarray, new_y_MD: np.ndarray, ridge: float = 1.0) -> np.ndarray:
    """1 − residual / variance of a ridge regression on new data, (D,); predicting the training mean gives 0 or less.

    NaN for dimensions that are constant in the new data.
    """
    x_mean_F, y_mean_D = x_MF.mean(0), y_MD.mean(0)
    scale_F = np.maximum(x_MF.std(0), 1e-6)
    x_MF, new_x_MF = (x_MF - x_mean_F) / scale_F, (new_x_MF - x_mean_F) / scale_F
    weight_FD = np.linalg.solve(x_MF.T @ x_MF + ridge * np.eye(x_MF.shape[1]), x_MF.T @ (y_MD - y_mean_D))
    residual_D = np.square(new_y_MD - y_mean_D - new_x_MF @ weight_FD).mean(0)
    still_D = still(new_y_MD)
    return np.where(still_D, np.nan, 1 - residual_D / np.where(still_D, 1, new_y_MD.var(0)))


def still(y_MD: np.ndarray) -> np.ndarray:
    """Dimensions that are constant except for rounding, bool (D,), such as the padding of shorter actions."""
    y_MD = y_MD.astype(np.float64)
    return y_MD.var(0) <= 1e-10 * np.square(y_MD).mean(0)


def _one_hot(id_MK: np.ndarray, entries: int) -> np.ndarray:
    return np.eye(entries)[id_MK].reshape(len(id_MK), -1)
