"""Seeds of episodes and of a policy's noise in them: wherever an episode is played, its chunks start from the same noise."""

from __future__ import annotations

import numpy as np
from torch import Generator

FIRST_SEED = 1000
"""Seed of the first episode of an evaluation."""


def recorded(first: int, count: int) -> bool:
    """Whether recordings use some of the environment seeds ``first`` … ``first + count - 1``.

    ``vlaflow record`` takes 10 000 + 1 000 000·run + 10 000·attempt + episode, and the calibration of a sampler those from
    500 000 on.
    """
    return any(10_000 <= seed % 1_000_000 < 500_000 for seed in range(first, first + count))


def chunk_generator(seed: int, chunk: int, noise_seed: int = 0) -> Generator:
    """The noise generator of chunk number ``chunk`` in the episode of ``seed`` and ``noise_seed``."""
    return Generator().manual_seed(chunk_seed(seed, chunk, noise_seed))


def chunk_seed(seed: int, chunk: int, noise_seed: int = 0) -> int:
    """Seed of that noise, below 2⁶³; NumPy's SeedSequence makes similar seeds independent.

    A noise seed above 0 is a child of the sequence of (seed, chunk), so adding repetitions does not change the first.
    """
    sequence = np.random.SeedSequence((seed, chunk), spawn_key=(noise_seed,) if noise_seed else ())
    return int(sequence.generate_state(1, np.uint64)[0] >> 1)


def seed_label(seed: int, noise_seed: int) -> str:
    """The seeds of an episode in words, without a noise seed of 0."""
    return f"seed {seed}, noise {noise_seed}" if noise_seed else f"seed {seed}"
