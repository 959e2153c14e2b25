"""How much of a data set the rules of ``quality`` leave out of the loss, and which rows they mark.

``windows`` puts the marks into batches; ``vlaflow train`` and ``vlaflow data check`` report the shares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vlaflow.data.lerobot import Dataset
from vlaflow.data.quality import InterventionRule, PauseRule, interventions, pauses
from vlaflow.errors import SpecError


@dataclass(frozen=True)
class Exclusions:
    """Shares of the actions in a data set's chunks that are excluded from the loss, each in [0, 1]; padding is not counted.

    Args:
        paused: by the pause rule; None without one.
        intervened: by the intervention rule (what follows an intervention within a chunk); None without one, or where the
            data set does not record executed actions.
        total: by either rule.
    """

    paused: float | None
    intervened: float | None
    total: float

    @property
    def shares(self) -> str:
        """The share of each rule that applies, in words."""
        rules = {"in pauses": self.paused, "after interventions": self.intervened}
        return ", ".join(f"{share:.1%} {name}" for name, share in rules.items() if share is not None)


def exclusions(
    dataset: Dataset,
    episodes: Sequence[int],
    chunk_size: int,
    pause_rule: PauseRule | None,
    intervention_rule: InterventionRule | None,
) -> Exclusions:
    """Count what the rules leave out of the chunks of ``chunk_size`` actions that begin at every frame of the episodes."""
    pause_N, intervened_N = paused(dataset, pause_rule), intervened(dataset, intervention_rule)
    pauses_before = np.concatenate(([0], np.cumsum(pause_N)))  # pauses_before[i]: among rows 0 .. i-1
    row_N = np.arange(len(dataset))
    next_intervention_N = np.minimum.accumulate(np.where(intervened_N, row_N, len(dataset))[::-1])[::-1]
    actions = in_pauses = after_interventions = left_out = 0
    for episode in episodes:
        rows = dataset.episode_slice(episode)
        first_T = row_N[rows]
        end_T = np.minimum(first_T + chunk_size, rows.stop)
        counted_T = np.minimum(end_T, next_intervention_N[rows] + 1)  # the intervention itself is still learned
        actions += int((end_T - first_T).sum())
        in_pauses += int((pauses_before[end_T] - pauses_before[first_T]).sum())
        after_interventions += int((end_T - counted_T).sum())
        left_out += int((end_T - counted_T + pauses_before[counted_T] - pauses_before[first_T]).sum())
    whole = max(actions, 1)
    return Exclusions(
        paused=in_pauses / whole if pause_rule is not None else None,
        intervened=after_interventions / whole if intervention_rule is not None and dataset.executed_key is not None else None,
        total=left_out / whole,
    )


def paused(dataset: Dataset, rule: PauseRule | None) -> np.ndarray:
    """Rows, (N,) bool, that belong to pauses; none without a rule.

    Raises:
        SpecError: there is a rule, but the data set has no action spec.
    """
    if rule is None:
        return np.zeros(len(dataset), bool)
    if dataset.action_spec is None:
        raise SpecError(f"A pause rule needs to know what the actions of {dataset.root} mean. State an action spec.")
    action_ND = dataset.columns().action
    episodes = [action_ND[dataset.episode_slice(episode.index)] for episode in dataset.episodes]
    return np.concatenate(pauses(episodes, dataset.action_spec, rule))


def intervened(dataset: Dataset, rule: InterventionRule | None) -> np.ndarray:
    """Rows, (N,) bool, at which the rule finds an intervention; none without a rule or executed actions."""
    found_N = np.zeros(len(dataset), bool)
    if rule is None or dataset.executed_key is None:
        return found_N
    columns = dataset.columns()
    low_D, high_D = np.quantile(columns.action, (0.01, 0.99), axis=0)
    for episode in dataset.episodes:
        rows = dataset.episode_slice(episode.index)
        found_N[rows] = interventions(columns.action[rows], columns.executed[rows], (high_D - low_D) / 2, rule)
    return found_N
