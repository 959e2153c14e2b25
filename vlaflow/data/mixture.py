"""The samples of step n as pure functions of n, so a training run resumes from the step number alone.

``Order`` goes through one set of windows; ``Mixture`` interleaves several by weight. Neither keeps a position.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from vlaflow.data.batch import Batch, Executed, ObservationBatch
from vlaflow.data.windows import Windows
from vlaflow.errors import ConfigError, SpecError, nearest

CYCLE = 1000
"""Length of the mixing schedule; weights are rounded to multiples of 1 / CYCLE."""


@dataclass(frozen=True)
class Order:
    """The order of samples: every epoch is a new permutation, and a batch may span two epochs.

    Args:
        count: number of samples, M.
        batch_size: samples per step, B; may exceed ``count``.
        seed: determines every permutation, together with the number of the epoch.
    """

    count: int
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        if self.count < 1 or self.batch_size < 1 or self.seed < 0:
            raise ConfigError(
                f"An order needs count ≥ 1, batch_size ≥ 1 and seed ≥ 0, got {self.count}, {self.batch_size}, {self.seed}."
            )

    def indices(self, step: int) -> np.ndarray:
        """Indices of the samples of step 0, 1, 2, ...: int64 (B,)."""
        return self.at(np.arange(step * self.batch_size, (step + 1) * self.batch_size))

    def at(self, positions: np.ndarray) -> np.ndarray:
        """Indices of the samples at these positions of the endless sequence of epochs: int64, same shape."""
        epochs, places = np.divmod(positions, self.count)
        result = np.empty_like(positions)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            result[here] = _permutation(self.count, self.seed, int(epoch))[places[here]]
        return result

    def epoch(self, step: int) -> float:
        """Epochs completed before this step."""
        return step * self.batch_size / self.count


@lru_cache(maxsize=16)
def _permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    order = np.random.default_rng([seed, epoch]).permutation(count)
    order.setflags(write=False)
    return order


class Mixture:
    """Several data sets with weights, as one endless sequence of batches.

    Every 1000 samples contain each part in exact proportion (weights are rounded to that), in an order that is shuffled
    for every thousand; each part goes through its own epochs.

    Args:
        parts: windows by name; all must have the same action spec, and the same views at the same size.
        weights: positive, by the same names; they need not add up to 1.
        batch_size: samples per step, B.
        seed: determines the order of the samples.

    Raises:
        SpecError: parts whose action specs, chunk sizes, views, image sizes or state lengths differ.
        ConfigError: weights that are not positive or not named as the parts are.
    """

    def __init__(self, parts: Mapping[str, Windows], weights: Mapping[str, float], batch_size: int, seed: int) -> None:
        if not parts:
            raise ConfigError("A mixture needs at least one data set.")
        for name in (*parts, *weights):
            if name not in parts or name not in weights:
                raise ConfigError(f"Weights and data sets must have the same names; '{name}' is only in one of them.")
        if any(not np.isfinite(w) or w <= 0 for w in weights.values()):
            raise ConfigError(f"Every weight must be a positive number, got {dict(weights)}. Leave a data set out instead.")
        if len(parts) > CYCLE:
            raise ConfigError(f"A mixture holds at most {CYCLE} data sets, got {len(parts)}.")
        _require_alike(parts)
        self.parts, self.batch_size, self.seed = dict(parts), batch_size, seed
        self.shares = _shares(np.array([weights[name] for name in parts], np.float64))
        self._orders = [Order(len(w), batch_size, seed + 1 + i) for i, w in enumerate(parts.values())]

    def indices(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """For each sample of this step's batch: the index of its part (B,) and its index within the part (B,)."""
        positions = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        cycles, places = np.divmod(positions, CYCLE)
        part_B, index_B = np.empty_like(positions), np.empty_like(positions)
        for cycle in np.unique(cycles):
            here = cycles == cycle
            schedule, before = _schedule(tuple(self.shares.tolist()), self.seed, int(cycle))
            part_B[here] = schedule[places[here]]
            index_B[here] = cycle * self.shares[part_B[here]] + before[places[here]]
        for part, order in enumerate(self._orders):
            index_B[part_B == part] = order.at(index_B[part_B == part])
        return part_B, index_B

    def batch(self, step: int) -> Batch:
        """The samples of this step, in the order of ``indices``."""
        part_B, index_B = self.indices(step)
        chosen = [part for part in range(len(self.parts)) if (part_B == part).any()]
        windows = list(self.parts.values())
        batches = [windows[part].batch(index_B[part_B == part]) for part in chosen]
        back = torch.from_numpy(np.argsort(np.concatenate([np.flatnonzero(part_B == part) for part in chosen])))
        observations = [b.observation for b in batches]
        instructions = [text for o in observations for text in o.instructions]
        observation = ObservationBatch(
            {view: torch.cat([o.images[view] for o in observations])[back] for view in observations[0].images},
            torch.cat([o.state_BS for o in observations])[back],
            [instructions[i] for i in back.tolist()],
        )
        rest = ["action_BLD", "valid_BL", "episode_B", "frame_B"]
        if batches[0].code_BK is not None:
            rest.append("code_BK")
        known = [b.executed for b in batches if b.executed is not None]  # Windows always set it
        executed = Executed(
            *(torch.cat([getattr(e, f.name) for e in known])[back] for f in dataclasses.fields(Executed)),
        )
        joined = {name: torch.cat([getattr(b, name) for b in batches])[back] for name in rest}
        return Batch(observation, **joined, executed=executed)


def _shares(weights: np.ndarray) -> np.ndarray:
    """Positive integers that add up to CYCLE, as close to the weights as possible (largest remainders first)."""
    exact = weights / weights.sum() * CYCLE
    shares = np.maximum(np.floor(exact), 1).astype(np.int64)
    while shares.sum() != CYCLE:
        surplus = shares - exact
        if shares.sum() < CYCLE:
            shares[np.argmin(surplus)] += 1
        else:
            shares[np.argmax(np.where(shares > 1, surplus, -np.inf))] -= 1
    return shares


@lru_cache(maxsize=16)
def _schedule(shares: tuple[int, ...], seed: int, cycle: int) -> tuple[np.ndarray, np.ndarray]:
    """The part at each position of a cycle, and the number of earlier positions in the cycle with the same part."""
    schedule = np.random.default_rng([seed, 0, cycle]).permutation(np.repeat(np.arange(len(shares)), shares))
    before = np.empty_like(schedule)
    for part, share in enumerate(shares):
        before[schedule == part] = np.arange(share)
    return schedule, before


def _require_alike(parts: Mapping[str, Windows]) -> None:
    (first_name, first), *others = parts.items()
    for name, windows in parts.items():
        if windows.action_spec is None:
            raise SpecError(
                f"Data set '{name}' ({windows.dataset.root}) has no action spec, so it cannot be mixed. "
                f"Open it with Dataset.open(root, action_spec=...)."
            )
    for name, windows in others:
        assert first.action_spec is not None
        assert windows.action_spec is not None
        first.action_spec.require_match(windows.action_spec, f"data set '{first_name}'", f"data set '{name}'")
        for view in (*first.cache.shapes, *windows.cache.shapes):
            ours, theirs = first.cache.shapes.get(view), windows.cache.shapes.get(view)
            if ours is None or theirs is None:
                lacking, had = (first_name, windows.cache) if ours is None else (name, first.cache)
                raise SpecError(
                    f"View '{view}' is missing in data set '{lacking}'; {nearest(view, had.shapes)} "
                    f"Open both frame caches with the same views."
                )
            if ours != theirs:
                raise SpecError(
                    f"View '{view}' is {ours[0]}x{ours[1]} in data set '{first_name}' and {theirs[0]}x{theirs[1]} in '{name}'. "
                    f"Open both frame caches with the same size."
                )
        widths = [w.dataset.columns().state.shape[1] for w in (first, windows)]
        if widths[0] != widths[1]:
            raise SpecError(f"The state has {widths[0]} numbers in data set '{first_name}' and {widths[1]} in '{name}'.")
        if (first.code_NK is None) != (windows.code_NK is None):
            lacking = first_name if first.code_NK is None else name
            raise SpecError(
                f"Data set '{lacking}' has no latent action codes, but another one has; give codes to all of them, or to none."
            )
