"""Scoring candidates of a sampler by episodes: successive halving on seeds that no evaluation uses."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import sqrt
from pathlib import Path

import numpy as np

from vlaflow.compute.base import ComputePolicy
from vlaflow.compute.sampler_choice import Candidate, choose
from vlaflow.config import JSON
from vlaflow.evaluation.episode_log import EpisodeLog
from vlaflow.evaluation.halving import halve
from vlaflow.evaluation.rollout import EpisodeJob, EpisodeResult, RolloutConfig, blocks, play_all
from vlaflow.ranges import Share

OBSERVED = "observed.jsonl"
FIRST_SEED = 500_000
"""Seeds of calibration episodes start here: evaluations start at 1000, recordings use 10 000 + 1 000 000·k + …"""


@dataclass(frozen=True)
class Observed:
    """What held-out frames say.

    Args:
        candidates: with their measures and milliseconds.
        two_groups: see ``SamplerCalibration``.
    """

    candidates: tuple[Candidate, ...]
    two_groups: Share


@dataclass
class Simulation:
    """Episodes of many candidates, kept in a folder until ``close`` so that an interrupted calibration continues.

    Args:
        checkpoint: folder of the policy.
        computes: the candidates' compute policies.
        envs: environments; every candidate plays the same seeds of each.
        rollout: how episodes are run.
        workers: processes.
        folder: of the unfinished episodes.
        settings: what the choice is a function of.
    """

    checkpoint: Path
    computes: Sequence[ComputePolicy]
    envs: Sequence[str]
    rollout: RolloutConfig
    workers: int
    folder: Path
    settings: dict[str, JSON]
    failed: dict[int, dict[tuple[str, int], bool]] = field(default_factory=dict)
    _logs: list[EpisodeLog[EpisodeResult]] = field(default_factory=list)
    _measured: EpisodeLog[Observed] | None = None

    def begin(self, observe: Callable[[], Observed], *, fresh: bool) -> Observed:
        """What held-out frames said when this calibration began: milliseconds vary, and rounds must be played as they began.

        Args:
            observe: measures the candidates on held-out frames.
            fresh: forget an interrupted calibration.

        Raises:
            ConfigError, DataError: see ``EpisodeLog``.
        """
        if fresh and self.folder.exists():
            for place in self.folder.glob("round-*"):
                with EpisodeLog(place, EpisodeResult, {}, fresh=True) as log:  # refused while another calibration writes it
                    log.remove()
            shutil.rmtree(self.folder)
        cure = "Discard it with --fresh."
        with EpisodeLog(self.folder, Observed, self.settings, name=OBSERVED, what="measurement", cure=cure) as log:
            self._measured = log
            if not log.finished:
                log.add(0, observe())
            return log.finished[0]

    def score(self, candidates: Sequence[Candidate], budget_ms: float | None, episodes: int) -> tuple[list[Candidate], int]:
        """The candidates with the share of failed episodes as their score, and the number of seeds used.

        Candidates that do not fit the budget are not played; those that a round drops are not eligible.

        Args:
            candidates: with their milliseconds, in the order of ``computes``.
            budget_ms: largest 99th percentile; None for no limit.
            episodes: of all candidates and environments together.

        Raises:
            ConfigError: too few episodes for so many candidates.
            CalibrationError: nothing fits the budget.
        """
        fits = [n for n, each in enumerate(candidates) if budget_ms is None or each.p99 <= budget_ms]
        if not fits:
            choose(candidates, budget_ms)  # names the fastest
        cost = [each.layer_passes for each in candidates]
        alive, seeds = halve(fits, self._play, episodes, key=lambda n: cost[n], environments=len(self.envs))
        scored = []
        for number, candidate in enumerate(candidates):
            if number not in self.failed:
                scored.append(replace(candidate, score=1.0, reason=f"slower than {budget_ms:g} ms at p99"))
                continue
            own = self.failed[number]
            behind = np.array([float(own[key]) - float(self.failed[alive[0]][key]) for key in own])
            scored.append(
                replace(
                    candidate,
                    score=float(np.mean(list(own.values()))),
                    behind=float(behind.mean()),
                    standard_error=float(behind.std(ddof=1) / sqrt(len(behind))) if len(behind) > 1 else 0.0,
                    episodes=len(own),
                    successes=len(own) - sum(own.values()),
                    reason="" if number in alive else f"dropped after {len(own)} episodes",
                )
            )
        return scored, seeds

    def close(self) -> None:
        """Remove the unfinished episodes, once the calibration is written."""
        for log in self._logs:
            log.remove()
            log.file.parent.rmdir()
        if self._measured is not None:
            self._measured.remove()
        self.folder.rmdir()

    def _play(self, alive: Sequence[int], first: int, count: int) -> list[float]:
        """Share of failed episodes of each candidate so far, after ``count`` more seeds."""
        number = len(self._logs) + 1
        plan = [(n, env, FIRST_SEED + seed) for env in self.envs for seed in range(first, first + count) for n in alive]
        jobs = [EpisodeJob(env, self.computes[n], seed) for n, env, seed in plan]

        def play_left(left: Sequence[EpisodeJob], finished: Callable[[int, EpisodeResult], None]) -> None:
            play_all(self.checkpoint, left, self.rollout, workers=self.workers, finished=finished)

        with EpisodeLog(self.folder / f"round-{number}", EpisodeResult, {**self.settings, "alive": list(alive)}) as log:
            self._logs.append(log)
            together = blocks(jobs, self.rollout.batch)
            episodes = log.complete(jobs, play_left, f"Round {number}, {len(alive)} candidates", together)
        for (n, _, _), episode in zip(plan, episodes, strict=True):
            self.failed.setdefault(n, {})[episode.env, episode.seed] = not episode.success
        return [float(np.mean(list(self.failed[n].values()))) for n in alive]
