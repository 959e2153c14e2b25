"""What doubts know of the true errors of held-out chunks, and the errors of what they regenerate.

The first round is made once for every frame, and so are the scores of all doubts; then every rival regenerates its actions from
the same noise. Here, where demonstrations exist, the oracle scores actions by their true error; no compute policy can.

Shape letters: N frames, B batch, L chunk size, D action dimension, M executed actions of all frames.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Generator, Tensor

from vlaflow.backbones.base import Prefix
from vlaflow.compute.base import ComputePolicy, Stopwatch
from vlaflow.compute.doubt_calibration import Knowledge
from vlaflow.compute.doubts import Doubt, Draft
from vlaflow.compute.refine import Refine
from vlaflow.data.batch import Batch
from vlaflow.evaluation.calibrate import Sample, tuning_frames
from vlaflow.evaluation.rank import auc, rank_correlation
from vlaflow.policies.base import Policy
from vlaflow.progress import progress

ORACLE, RATER, SPREAD, RANDOM = "oracle", "rater", "spread", "random"
WORST = 0.25
"""Share of the actions that counts as the worst ones."""


@dataclass(frozen=True)
class Drafts:
    """First chunks of all frames, and what is known of their actions.

    Args:
        error_NL: squared error, mean over dimensions.
        counts_NL: bool, will be executed and is a valid demonstration.
        score_NL: of every doubt by name, the oracle included.
        label_NL: what the rater should have said; empty without a rater.
        episode_N: their episodes.
        choose_N, tuning_N: the half that thresholds are made from, and the part of it that risk control tunes on.
    """

    error_NL: np.ndarray
    counts_NL: np.ndarray
    score_NL: Mapping[str, np.ndarray]
    label_NL: np.ndarray
    episode_N: np.ndarray
    choose_N: np.ndarray
    tuning_N: np.ndarray

    def knowledge(self) -> tuple[Knowledge, ...]:
        """Of every doubt but the oracle."""
        counts_NL, error_M = self.counts_NL, self.error_NL[self.counts_NL]
        worst_M = error_M > np.quantile(error_M, 1 - WORST)
        found = []
        for name, score_NL in self.score_NL.items():
            if name == ORACLE:
                continue
            rows = zip(score_NL, self.error_NL, counts_NL, strict=True)
            within = [rank_correlation(score_L[n_L], error_L[n_L]) for score_L, error_L, n_L in rows if n_L.sum() > 2]
            score_M = score_NL[counts_NL]
            found.append(
                Knowledge(name, float(np.mean(within or [0.0])), rank_correlation(score_M, error_M), auc(score_M, worst_M))
            )
        return tuple(found)


class Workbench:
    """Makes first rounds and regenerates them on the same frames from the same noise.

    Args:
        policy: in evaluation mode.
        frames: what to measure on.
        refine: both rounds; its doubt does not matter.
        doubts: to score, by name; those that the policy lacks the parts for are left out.
    """

    def __init__(self, policy: Policy, frames: Sample, refine: Refine, doubts: Mapping[str, Doubt]) -> None:
        self.policy, self.frames, self.refine = policy, frames, refine
        self.doubts = {name: doubt for name, doubt in doubts.items() if not doubt.rater or policy.model.rater is not None}
        self._draft_BLD: list[Tensor] = []
        self._noise: list[list[Tensor]] = []

    @torch.no_grad()
    def drafts(self) -> Drafts:
        """First rounds of all frames, with the scores of every doubt."""
        policy, watch = self.policy, Stopwatch(self.policy.device)
        errors, counts, labels = [], [], []
        scores: dict[str, list[Tensor]] = {name: [] for name in self.doubts}
        with progress(len(self.frames.index_N), "Measuring doubts") as bar, policy.precision():
            for batch, prefix, generators, target_BLD in self._batches():
                first = self.refine.inner.decode(policy.model, prefix, generators, watch)
                self._noise.append([g.get_state() for g in generators])
                self._draft_BLD.append(first.action_BLD)
                error_BL = policy.targets(batch).mean_over_dimensions((first.action_BLD - target_BLD).square().cpu())
                valid_BL = batch.valid_BL
                errors.append(error_BL)
                counts.append(valid_BL & (torch.arange(valid_BL.shape[1]) < (self.refine.executed or valid_BL.shape[1])))
                full = policy.model.read(first.groups[0].prefix if len(first.groups) == 1 else prefix)
                for number, (name, doubt) in enumerate(self.doubts.items()):
                    own = [Generator().manual_seed(g.initial_seed() * 8 + number + 1) for g in generators]
                    found = doubt.score(Draft(policy.model, full, own, first.action_BLD, first.spread_BL, watch))
                    scores[name].append(found.score_RL.float().cpu())
                if policy.model.rater is not None:
                    labels.append(policy.model.rater.config.labels(error_BL, valid_BL))
                bar.advance(len(generators))
        windows, error_NL = self.frames.windows, torch.cat(errors).numpy()
        return Drafts(
            error_NL,
            torch.cat(counts).numpy(),
            {ORACLE: error_NL, **{name: torch.cat(parts).numpy() for name, parts in scores.items()}},
            torch.cat(labels).numpy() if labels else np.zeros((0, 0)),
            windows.dataset.columns().episode[windows.rows[self.frames.index_N]],
            self.frames.choose_N,
            tuning_frames(self.frames),
        )

    @torch.no_grad()
    def regenerated(self, doubted_NL: np.ndarray, refine: Refine) -> np.ndarray:
        """Squared errors (N, L) after the second round, on the noise that follows the first one; ``drafts`` comes before."""
        policy, begin, found = self.policy, 0, []
        with policy.precision():
            for (batch, prefix, generators, target_BLD), draft_BLD, states in zip(
                self._batches(), self._draft_BLD, self._noise, strict=True
            ):
                for generator, state in zip(generators, states, strict=True):
                    generator.set_state(state)
                doubted_BL = torch.from_numpy(doubted_NL[begin : begin + len(generators)]).to(draft_BLD.device)
                begin += len(generators)
                made = refine.regenerate(policy.model, policy.model.read(prefix), generators, draft_BLD, doubted_BL)
                error_BLD = (made.action_RLD - target_BLD).square()
                found.append(policy.targets(batch).mean_over_dimensions(error_BLD.cpu()))
        return torch.cat(found).numpy()

    @torch.no_grad()
    def sampled(self, compute: ComputePolicy) -> np.ndarray:
        """Squared errors (N, L) of another compute policy's chunks."""
        policy, watch, found = self.policy, Stopwatch(self.policy.device), []
        with policy.precision():
            for batch, prefix, generators, target_BLD in self._batches():
                made_BLD = compute.decode(policy.model, prefix, generators, watch).action_BLD
                found.append(policy.targets(batch).mean_over_dimensions((made_BLD - target_BLD).square().cpu()))
        return torch.cat(found).numpy()

    def _batches(self) -> Iterator[tuple[Batch, Prefix, list[Generator], Tensor]]:
        for samples, generators in self.frames.batches():
            batch = self.policy.own_batch(samples)
            target_BLD = self.policy.targets(batch).action_BLD.to(self.policy.device)
            yield batch, self.policy.embed(batch.observation), generators, target_BLD
