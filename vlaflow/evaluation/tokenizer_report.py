"""Quality of action tokenizers on held-out demonstrations: reconstruction error, sequence length, effect of a wrong token.

Shape letters: N chunks, L chunk size, D action dimension, S token slots.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vlaflow.actions.base import Tokenizer, TokenizerConfig
from vlaflow.actions.bins import BinsFit
from vlaflow.actions.fast import FastFit
from vlaflow.data import stats
from vlaflow.data.draft import spec_of
from vlaflow.data.lerobot import Dataset
from vlaflow.data.transforms import Mode, Normalizer
from vlaflow.data.windows import action_chunks, split_episodes
from vlaflow.errors import ConfigError, SpecError

SHOWN = 3
"""Number of tokenizers in the plot of the example chunk; more lines could not be distinguished."""
CHUNKS = 4000
"""Largest number of held-out chunks to measure; with more, the statistics hardly change."""


@dataclass(frozen=True)
class Material:
    """Normalised chunks (N, L, D) of the training and of the held-out episodes, and how they were normalised."""

    train: np.ndarray
    held: np.ndarray
    normaliser: Normalizer


@dataclass(frozen=True)
class Quality:
    """Measurements of one tokenizer on held-out chunks. Errors are in normalised units, with actions in about [−1, 1].

    Args:
        name: name in tables.
        vocabulary, slots: size of the vocabulary, and tokens per chunk including end tokens.
        tokens: mean number of tokens per chunk, without end tokens.
        longest: largest number of tokens of a held-out chunk.
        numbers_per_token: L·D / tokens.
        compression: bits of the float32 numbers per bit of the tokens, each with log2(vocabulary) bits.
        error: root mean square error of the reconstruction.
        largest: largest error of any number.
        inexact: share of the chunks that lost more than rounding (out of range, or longer than the slots).
        neighbour: median root mean square change of the chunk when one token's id is raised or lowered by one.
        random: the same when one token becomes any other.
        repaired: share of the chunks that are no longer a valid encoding after one token is replaced at random.
        order: see ``metric_rank``, for the difference of the ids.
    """

    name: str
    vocabulary: int
    slots: int
    tokens: float
    longest: int
    numbers_per_token: float
    compression: float
    error: float
    largest: float
    inexact: float
    neighbour: float
    random: float
    repaired: float
    order: float


@dataclass(frozen=True)
class TokenizerExamples:
    """The data of the plots.

    Args:
        length_share: by tokenizer with sequences of different lengths, share of the held-out chunks with 0, 1, 2, … tokens.
        chunk_LD: the held-out chunk with the most motion, normalised.
        decoded: that chunk after encoding and decoding by a few tokenizers, (L, D) each.
        dimensions: names of the action dimensions.
    """

    length_share: Mapping[str, np.ndarray]
    chunk_LD: np.ndarray
    decoded: Mapping[str, np.ndarray]
    dimensions: tuple[str, ...]


def material(
    dataset: Dataset,
    chunk_size: int,
    mode: Mode,
    clip: float | None = None,
    kept: Sequence[str] = (),
    *,
    validation_fraction: float = 0.06,
    seed: int = 0,
) -> Material:
    """Chunks as in training: normalised by statistics of the training episodes, with the same episodes held out.

    Args:
        dataset: an open data set.
        chunk_size: L.
        mode, clip, kept: a policy's action_normalisation, action_clip and kept_actions; see ``Normalizer.of_actions``.
        validation_fraction, seed: a recipe's.

    Raises:
        SpecError: the data set has one episode per task, so nothing can be held out.
    """
    train, held = split_episodes(dataset, validation_fraction, seed)
    if not held:
        raise SpecError(f"{dataset.root} has one episode per task, so none can be held out. Record more.")
    names = [dimension.name for dimension in spec_of(dataset).dimensions]
    normaliser = Normalizer.of_actions(stats.compute(dataset, train)["action"], names, mode, clip, kept)

    def normalised(episodes: Sequence[int]) -> np.ndarray:
        return normaliser.forward(torch.from_numpy(action_chunks(dataset, chunk_size, episodes))).numpy()

    return Material(normalised(train), normalised(held), normaliser)


def quality(tokenizer: Tokenizer, chunks: Material, name: str | None = None, seed: int = 0) -> Quality:
    """Measure one tokenizer on the held-out chunks.

    Raises:
        ConfigError: a tokenizer for chunks of another shape.
    """
    action_NLD = chunks.held[:: -(-len(chunks.held) // CHUNKS)]
    id_NS = tokenizer.encode(action_NLD)
    error_NLD = tokenizer.decode(id_NS).action_BLD - action_NLD
    length_N = tokenizer.lengths(id_NS)
    numbers = action_NLD.shape[1] * action_NLD.shape[2]
    near, far = (disturbed(tokenizer, id_NS, np.random.default_rng(seed), near) for near in (True, False))
    return Quality(
        name=name or tokenizer.description,
        vocabulary=tokenizer.vocabulary,
        slots=tokenizer.slots,
        tokens=float(length_N.mean()),
        longest=int(length_N.max()),
        numbers_per_token=numbers / float(length_N.mean()),
        compression=32 * numbers / (float(length_N.mean()) * float(np.log2(tokenizer.vocabulary))),
        error=_rms(error_NLD),
        largest=float(np.abs(error_NLD).max()),
        inexact=float(1 - tokenizer.exact(action_NLD).mean()),
        neighbour=float(np.median(near.change_N)),
        random=float(np.median(far.change_N)),
        repaired=float(far.repaired_N.mean()),
        order=metric_rank(tokenizer, chunks, id_distance(tokenizer), seed),
    )


def standard_fits() -> tuple[TokenizerConfig, ...]:
    """The tokenizers that a report compares by default."""
    fast = tuple(FastFit(scale, vocabulary) for scale in (5.0, 10.0, 20.0) for vocabulary in (256, 1024))
    return (*fast, FastFit(10.0, None), BinsFit(32), BinsFit(64), BinsFit(128), BinsFit(64, "quantile"))


def fit(what: TokenizerConfig, chunks: Material) -> Tokenizer:
    """Fit on the training chunks."""
    return what.fit(chunks.train)


def example_chunk(chunks: Material) -> np.ndarray:
    """The held-out chunk with the most motion, (L, D), because without motion every tokenizer is perfect."""
    return chunks.held[int(chunks.held.std(1).sum(1).argmax())]


def examples(tokenizers: Sequence[Tokenizer], chunks: Material, dimensions: Sequence[str]) -> TokenizerExamples:
    """Lengths of sequences, and one chunk as reconstructed by a few tokenizers."""
    chunk_LD, shares = example_chunk(chunks), {}
    for tokenizer in [t for t in tokenizers if t.end is not None][:5]:
        length_N = tokenizer.lengths(tokenizer.encode(chunks.held))
        shares[tokenizer.description] = np.bincount(length_N) / len(length_N)
    chosen = tokenizers[:: -(-len(tokenizers) // SHOWN)]
    decoded = {t.description: t.decode(t.encode(chunk_LD[None])).action_BLD[0] for t in chosen}
    return TokenizerExamples(shares, chunk_LD, decoded, tuple(dimensions))


@dataclass(frozen=True)
class Disturbed:
    """Chunks in which one token each was replaced.

    Args:
        slot_N: where the token was.
        before_N, after_N: its id before and after.
        change_N: root mean square change of the chunk.
        repaired_N: bool, whether the tokens are no longer a valid encoding.
    """

    slot_N: np.ndarray
    before_N: np.ndarray
    after_N: np.ndarray
    change_N: np.ndarray
    repaired_N: np.ndarray


def disturbed(tokenizer: Tokenizer, id_NS: np.ndarray, rng: np.random.Generator, near: bool) -> Disturbed:
    """Replace one token of every chunk by a neighbouring id, or by any other; end tokens are neither replaced nor inserted.

    Raises:
        ConfigError: a vocabulary of a single token.
    """
    ids = tokenizer.vocabulary - (tokenizer.end is not None)
    if ids < 2:
        raise ConfigError("Tokens of a vocabulary of one cannot be replaced.")
    length_N = tokenizer.lengths(id_NS)
    rows = np.flatnonzero(length_N > 0)
    place = (rng.uniform(size=len(rows)) * length_N[rows]).astype(int)
    before = id_NS[rows, place]
    if near:
        after = before + np.where(before == 0, 1, np.where(before == ids - 1, -1, rng.choice((-1, 1), len(rows))))
    else:
        after = (before + rng.integers(1, ids, len(rows))) % ids
    wrong_NS = id_NS[rows].copy()
    wrong_NS[np.arange(len(rows)), place] = after
    made = tokenizer.decode(wrong_NS)
    change_N = np.sqrt(np.square(made.action_BLD - tokenizer.decode(id_NS[rows]).action_BLD).mean((1, 2)))
    return Disturbed(place, before, after, change_N, made.repaired_B)


def metric_rank(tokenizer: Tokenizer, chunks: Material, distance: np.ndarray, seed: int = 0) -> float:
    """Whether a distance between ids reflects the change of actions: Spearman's rank correlation over random replacements.

    Args:
        tokenizer: a tokenizer with V ids.
        chunks: see ``material``; one token of each held-out chunk is replaced.
        distance: between ids, (V, V), or (S, V, V) where slots differ.
        seed: seed of the replacements.

    Returns:
        1 if a larger distance always changes the chunk more, 0 if they are unrelated.
    """
    from scipy.stats import spearmanr

    action_NLD = chunks.held[:: -(-len(chunks.held) // CHUNKS)]
    found = disturbed(tokenizer, tokenizer.encode(action_NLD), np.random.default_rng(seed), near=False)
    distance_SVV = np.broadcast_to(distance, (tokenizer.slots, *distance.shape[-2:]))
    return float(spearmanr(distance_SVV[found.slot_N, found.before_N, found.after_N], found.change_N).statistic)


def id_distance(tokenizer: Tokenizer) -> np.ndarray:
    """|i − j|, (V, V)."""
    place = np.arange(tokenizer.vocabulary)
    return np.abs(place[:, None] - place)


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.square(x).mean()))
