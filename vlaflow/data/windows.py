"""Training samples: for every frame of every episode, the observation and the L actions that follow.

    windows = Windows(dataset, FrameCache.open(dataset, size=96), chunk_size=16, episodes=train)
    batch = windows.batch(np.array([0, 5, 9]))

``mixture`` decides the order of the samples.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
import torch

from vlaflow.data.batch import Batch, Executed, ObservationBatch
from vlaflow.data.exclusions import intervened, paused
from vlaflow.data.filters import Filtered
from vlaflow.data.frame_source import FrameSource
from vlaflow.data.lerobot import Dataset
from vlaflow.data.nearby import Nearby
from vlaflow.data.quality import INTERVENTIONS, InterventionRule, PauseRule
from vlaflow.errors import ConfigError, SpecError, nearest

FEW_TASKS = 8
"""Up to so many tasks are each represented among the held-out episodes, even if that holds out more than the fraction."""


class Windows:
    """Every frame of the chosen episodes as the start of a chunk.

    Attributes:
        dataset, cache, chunk_size: the arguments; L = ``chunk_size``.
        episodes: the chosen episodes.
        action_spec: the data set's, with ``chunk_size``; None if the data set has none.
        rows: int64 (M,), the row of each sample's first action in ``Dataset.columns``.
        pause_N: bool (N,), rows that a pause rule marked; they are left out of the loss.
        outlier_N: bool (N,), rows with numbers that are wrong; they are left out of the loss. None where nothing is filtered.
        intervened_N: bool (N,), rows at which the robot executed something else than the action to be learned.
        code_NK: int64, latent action codes by row, −1 where there are none; None when batches contain no codes.
    """

    def __init__(
        self,
        dataset: Dataset,
        cache: FrameSource,
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
            raise SpecError(f"These are the frames of {len(cache)} rows, but {dataset.root} has {len(dataset)}.")
        self.dataset, self.cache, self.chunk_size, self.code_NK = dataset, cache, chunk_size, code_NK
        self.episodes = tuple(dataset.numbers if episodes is None else episodes)
        if not self.episodes:
            raise ConfigError(f"No episode of {dataset.root} was chosen. Give at least one.")
        self.action_spec = dataset.action_spec.with_chunk_size(chunk_size) if dataset.action_spec else None
        slices = [dataset.episode_slice(episode) for episode in self.episodes]
        self._columns = dataset.columns()
        self.rows = np.concatenate([np.arange(s.start, s.stop) for s in slices])
        self._last = np.concatenate([np.full(s.stop - s.start, s.stop - 1) for s in slices])
        self.pause_N, self.outlier_N = paused(dataset, pause_rule), None if filtered is None else filtered.outlier_N
        if filtered is not None:
            starts_M = ~filtered.no_start_N[self.rows]
            if not starts_M.any():
                raise ConfigError(
                    f"The filters leave no frame of {dataset.root} that begins a chunk. Train with --set filters=none."
                )
            self.rows, self._last = self.rows[starts_M], self._last[starts_M]
        self.intervened_N = intervened(dataset, intervention_rule)

    def __len__(self) -> int:
        """Number of samples, M."""
        return len(self.rows)

    def nearby(self) -> Nearby | None:
        """The order in which they are to be read; None if any order is as good."""
        return self.cache.nearby(self.rows)

    def batch(self, indices: np.ndarray) -> Batch:
        """The samples at ``indices`` (B,), each in 0 .. M-1."""
        first_B, last_B = self.rows[indices], self._last[indices]
        wanted_BL = first_B[:, None] + np.arange(self.chunk_size)
        row_BL = np.minimum(wanted_BL, last_B[:, None])
        columns = self._columns
        present_BL = (wanted_BL == row_BL) & ~self.pause_N[row_BL]
        executed = Executed(
            torch.from_numpy(columns.executed[row_BL]),
            torch.from_numpy(self.intervened_N[row_BL]),
            torch.from_numpy(present_BL),
            None if self.outlier_N is None else torch.from_numpy(self.outlier_N[row_BL]),
        )
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


def action_chunks(
    dataset: Dataset, chunk_size: int, episodes: Sequence[int], without_N: np.ndarray | None = None
) -> np.ndarray:
    """The chunks that begin at every frame of the episodes, in robot units, float32 (M, L, D), cut as in ``Windows``.

    Args:
        dataset: an open data set.
        chunk_size: L.
        episodes: whose chunks.
        without_N: bool (N,), rows that no chunk may reach; None for none.
    """
    action, found = dataset.columns().action, []
    for episode in episodes:
        rows = dataset.episode_slice(episode)
        row_ML = np.minimum(np.arange(rows.start, rows.stop)[:, None] + np.arange(chunk_size), rows.stop - 1)
        found.append(action[row_ML if without_N is None else row_ML[~without_N[row_ML].any(1)]])
    return np.concatenate(found)


def fewer_episodes(dataset: Dataset, episodes: Sequence[int], share: float, seed: int) -> tuple[int, ...]:
    """Select a share of the episodes of every task, at least one each; a smaller share is a subset of a larger one.

    Raises:
        ConfigError: the share is not in (0, 1].
    """
    if not 0 < share <= 1:
        raise ConfigError(f"The share of the demonstrations must lie in (0, 1], got {share}.")
    # One order for all tasks, because a generator for each takes 17 microseconds, and there may be 16,000.
    order = np.random.default_rng([seed, 1]).permutation(len(episodes)).tolist()
    chosen: list[int] = []
    for members in _by_task(dataset, [episodes[place] for place in order]).values():
        chosen += members[: max(1, round(share * len(members)))]
    return tuple(sorted(chosen))


def split_episodes(
    dataset: Dataset, validation_fraction: float, seed: int, hold_out_tasks: Sequence[str] = ()
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Divide episodes into (training, validation).

    Of the whole data set ``round(fraction * episodes)`` are held out, but at least one of every task with several episodes if
    there are no more than ``FEW_TASKS`` such tasks. They are spread over the tasks as evenly as whole episodes allow, and never
    all of a task that has several. Tasks with a single episode are treated as one task together. The same seed gives the same
    division.

    Args:
        dataset: an open data set.
        validation_fraction: share of the episodes to hold out.
        seed: determines which.
        hold_out_tasks: instructions; all episodes with a frame of one of them are held out, and no others. Those that the data
            set does not have are for another one (``require_tasks``).

    Raises:
        ConfigError: the fraction is not in [0, 1), or nothing is left to train on.
    """
    if not 0 <= validation_fraction < 1:
        raise ConfigError(f"The validation fraction must lie in [0, 1), got {validation_fraction}.")
    chosen: set[int] = set()
    if hold_out_tasks:
        columns = dataset.columns()
        asked = [index for index, task in enumerate(dataset.tasks) if task in hold_out_tasks]
        chosen = set(columns.episode[np.isin(columns.task, asked)].tolist())
        if len(chosen) == len(dataset.numbers):
            raise ConfigError(f"--hold-out-task holds out every episode of {dataset.root}. Name fewer tasks.")
    else:
        by_task = _by_task(dataset, dataset.numbers)
        several = [members for members in by_task.values() if len(members) > 1]
        single = [members[0] for members in by_task.values() if len(members) == 1]
        groups = several + ([single] if len(single) > 1 else [])
        counts = _held_out_of(groups, len(several), len(dataset.numbers), validation_fraction, seed)
        for number, (members, count) in enumerate(zip(groups, counts, strict=True)):
            if count:
                chosen |= set(np.random.default_rng([seed, number]).permutation(members)[:count].tolist())
    return tuple(n for n in dataset.numbers if n not in chosen), tuple(sorted(chosen))


def require_tasks(datasets: Sequence[Dataset], hold_out_tasks: Sequence[str]) -> None:
    """Refuse to hold out an instruction that no frame of any of the data sets has.

    Raises:
        ConfigError: with the nearest that there is.
    """
    if not hold_out_tasks:
        return
    known = {dataset.tasks[task] for dataset in datasets for task in np.unique(dataset.columns().task).tolist()}
    for task in hold_out_tasks:
        if task not in known:
            roots = " and ".join(str(dataset.root) for dataset in datasets)
            raise ConfigError(f"There is no episode of the task '{task}' in {roots}; {nearest(task, known)}")


def _held_out_of(groups: Sequence[Sequence[int]], several: int, whole: int, fraction: float, seed: int) -> list[int]:
    """How many episodes of each group are held out: one after another, each from where the share held out so far is lowest
    (Webster's method; equally low ones in a random order). The first ``several`` groups are tasks of their own.
    """
    total = max(round(fraction * whole), min(several, FEW_TASKS)) if fraction > 0 else 0
    counts = [int(i < several <= total) for i in range(len(groups))]
    tie = np.random.default_rng([seed, len(groups), 2]).permutation(len(groups)).tolist()
    queue = [((2 * count + 1) / len(group), tie[i], i) for i, (group, count) in enumerate(zip(groups, counts, strict=True))]
    queue = [entry for entry in queue if counts[entry[2]] < len(groups[entry[2]]) - 1]
    heapq.heapify(queue)
    for _ in range(total - sum(counts)):
        if not queue:
            break
        _, _, i = heapq.heappop(queue)
        counts[i] += 1
        if counts[i] < len(groups[i]) - 1:
            heapq.heappush(queue, ((2 * counts[i] + 1) / len(groups[i]), tie[i], i))
    return counts


def _by_task(dataset: Dataset, episodes: Sequence[int]) -> dict[str, list[int]]:
    by_task: dict[str, list[int]] = {}
    for number in episodes:
        by_task.setdefault(dataset.episode(number).task, []).append(number)
    return by_task
