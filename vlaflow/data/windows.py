"""Training samples: for every frame of every episode, the observation and the L actions that follow.

    windows = Windows(dataset, FrameCache.open(dataset, size=96), chunk_size=16, episodes=train)
    batch = windows.batch(np.array([0, 5, 9]))

``mixture`` decides the order of the samples.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from vlaflow.data.batch import Batch, Executed, ObservationBatch
from vlaflow.data.exclusions import intervened, paused
from vlaflow.data.filters import Filtered
from vlaflow.data.frames import FrameCache
from vlaflow.data.lerobot import Dataset
from vlaflow.data.quality import INTERVENTIONS, InterventionRule, PauseRule
from vlaflow.errors import ConfigError, SpecError


class Windows:
    """Every frame of the chosen episodes as the start of a chunk.

    Attributes:
        dataset, cache, chunk_size: the arguments; L = ``chunk_size``.
        episodes: the chosen episodes.
        action_spec: the data set's, with ``chunk_size``; None if the data set has none.
        rows: int64 (M,), the row of each sample's first action in ``Dataset.columns``.
        pause_N: bool (N,), rows that a pause rule marked, and outliers; they are left out of the loss.
        intervened_N: bool (N,), rows at which the robot executed something else than the action to be learned.
        code_NK: int64, latent action codes by row, −1 where there are none; None when batches contain no codes.
    """

    def __init__(
        self,
        dataset: Dataset,
        cache: FrameCache,
        chunk_size: int,
        episodes: Sequence[int] | None = None,
        pause_rule: PauseRule | None = None,
        *,
        intervention_rule: InterventionRule | None = INTERVENTIONS,
        code_NK: np.ndarray | None = None,
        filtered: Filtered | None = None,
    ) -> None:
        if chunk_size < 1:
            raise ConfigError(f"The chunk size must be at least one action, got {chunk_size}.")
        if len(cache) != len(dataset):
            raise SpecError(f"The frame cache {cache.folder} holds {len(cache)} frames, but {dataset.root} has {len(dataset)}.")
        self.dataset, self.cache, self.chunk_size, self.code_NK = dataset, cache, chunk_size, code_NK
        self.episodes = tuple(range(len(dataset.episodes)) if episodes is None else episodes)
        if not self.episodes:
            raise ConfigError(f"No episode of {dataset.root} was chosen. Give at least one.")
        self.action_spec = dataset.action_spec.with_chunk_size(chunk_size) if dataset.action_spec else None
        slices = [dataset.episode_slice(episode) for episode in self.episodes]
        self._columns = dataset.columns()
        self.rows = np.concatenate([np.arange(s.start, s.stop) for s in slices])
        self._last = np.concatenate([np.full(s.stop - s.start, s.stop - 1) for s in slices])
        self.pause_N = paused(dataset, pause_rule)
        if filtered is not None:
            starts_M = ~filtered.no_start_N[self.rows]
            if not starts_M.any():
                raise ConfigError(
                    f"The filters leave no frame of {dataset.root} that begins a chunk. Train with --set filters=none."
                )
            self.rows, self._last = self.rows[starts_M], self._last[starts_M]
            self.pause_N |= filtered.outlier_N
        self.intervened_N = intervened(dataset, intervention_rule)

    def __len__(self) -> int:
        """Number of samples, M."""
        return len(self.rows)

    def batch(self, indices: np.ndarray) -> Batch:
        """The samples at ``indices`` (B,), each in 0 .. M-1."""
        first_B, last_B = self.rows[indices], self._last[indices]
        wanted_BL = first_B[:, None] + np.arange(self.chunk_size)
        row_BL = np.minimum(wanted_BL, last_B[:, None])
        columns = self._columns
        present_BL = (wanted_BL == row_BL) & ~self.pause_N[row_BL]
        executed = Executed(*map(torch.from_numpy, (columns.executed[row_BL], self.intervened_N[row_BL], present_BL)))
        observation = ObservationBatch(
            self.cache.gather(first_B),
            torch.from_numpy(columns.state[first_B]),
            [self.dataset.tasks[task] for task in columns.task[first_B]],
        )
        return Batch(
            observation,
            torch.from_numpy(columns.action[row_BL]),
            executed.valid_after(0),
            torch.from_numpy(columns.episode[first_B]),
            torch.from_numpy(columns.frame[first_B]),
            None if self.code_NK is None else torch.from_numpy(self.code_NK[first_B]),
            executed,
        )


def action_chunks(dataset: Dataset, chunk_size: int, episodes: Sequence[int]) -> np.ndarray:
    """The chunks that begin at every frame of the episodes, in robot units, float32 (M, L, D), cut as in ``Windows``."""
    action, found = dataset.columns().action, []
    for episode in episodes:
        rows = dataset.episode_slice(episode)
        first_M1 = np.arange(rows.start, rows.stop)[:, None]
        found.append(action[np.minimum(first_M1 + np.arange(chunk_size), rows.stop - 1)])
    return np.concatenate(found)


def fewer_episodes(dataset: Dataset, episodes: Sequence[int], share: float, seed: int) -> tuple[int, ...]:
    """Select a share of the episodes of every task, at least one each; a smaller share is a subset of a larger one.

    Raises:
        ConfigError: the share is not in (0, 1].
    """
    if not 0 < share <= 1:
        raise ConfigError(f"The share of the demonstrations must lie in (0, 1], got {share}.")
    chosen: list[int] = []
    tasks = [dataset.episodes[e].task for e in episodes]
    for number, task in enumerate(dict.fromkeys(tasks)):
        members = [e for e, t in zip(episodes, tasks, strict=True) if t == task]
        order = np.random.default_rng([seed, number, 1]).permutation(members)
        chosen += order[: max(1, round(share * len(members)))].tolist()
    return tuple(sorted(chosen))


def split_episodes(dataset: Dataset, validation_fraction: float, seed: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Divide episodes into (training, validation), task by task, so that both contain every task if possible.

    Of each task ``round(fraction * episodes)`` are held out, at least one (when the fraction is not 0 and the task has two
    or more episodes) and never all. The same seed gives the same division.

    Raises:
        ConfigError: the fraction is not in [0, 1).
    """
    if not 0 <= validation_fraction < 1:
        raise ConfigError(f"The validation fraction must lie in [0, 1), got {validation_fraction}.")
    by_task: dict[str, list[int]] = {}
    for episode in dataset.episodes:
        by_task.setdefault(episode.task, []).append(episode.index)
    held_out: list[int] = []
    for number, members in enumerate(by_task.values()):
        count = round(validation_fraction * len(members))
        if validation_fraction > 0:
            count = min(max(count, 1), len(members) - 1)
        held_out += np.random.default_rng([seed, number]).permutation(members)[:count].tolist()
    chosen = set(held_out)
    return tuple(e.index for e in dataset.episodes if e.index not in chosen), tuple(sorted(chosen))
