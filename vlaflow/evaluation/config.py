"""What an evaluation measures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from vlaflow.compute.spelling import Knobs
from vlaflow.errors import ConfigError
from vlaflow.evaluation.rollout import RolloutConfig
from vlaflow.policies.seeds import FIRST_SEED
from vlaflow.simulators.base import step_limit


@dataclass(frozen=True)
class EvaluationConfig:
    """What an evaluation measures.

    Args:
        envs: tasks or groups.
        computes: names of compute policies; by default "auto" if the checkpoint's sampler was calibrated, else "dense".
        episodes: environment seeds per environment and compute policy.
        first_seed: the first environment seed; the others follow.
        noise_seeds: episodes per environment seed, with other noise of the policy each.
        knobs: settings of the compute policies.
        rollout: how episodes are run.
        latency_chunks: chunks timed per compute policy.
        language_episodes: episodes per environment and wrong instruction; 0 for no language-swap test.
        language_max_steps: step limit of a success in that test.
        videos: whether to record a success and a failure per environment.
        workers: number of processes.
    """

    envs: tuple[str, ...]
    computes: tuple[str, ...] = ()
    episodes: int = 20
    first_seed: int = FIRST_SEED
    noise_seeds: int = 1
    knobs: Knobs = field(default_factory=Knobs)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    latency_chunks: int = 60
    language_episodes: int = 0
    language_max_steps: int = 200
    videos: bool = True
    workers: int = 1

    def __post_init__(self) -> None:
        if not self.envs:
            raise ConfigError("An evaluation needs at least one --env.")
        if self.workers < 0 or self.latency_chunks < 1 or self.language_episodes < 0:
            raise ConfigError("workers and language_episodes must be at least 0, latency_chunks at least 1.")
        if self.language_episodes > self.episodes:
            raise ConfigError(
                f"The language-swap test uses the evaluation's own episodes, so it cannot run more of them: "
                f"{self.language_episodes} of {self.episodes}."
            )

    def swap_limit(self, envs: Sequence[str]) -> int:
        """Step limit of the language-swap test in these environments."""
        return min(self.language_max_steps, *(step_limit(env, self.rollout.max_steps) for env in envs))

    def on(self, device: str) -> EvaluationConfig:
        """The same on another device."""
        return replace(self, knobs=replace(self.knobs, device=device), rollout=replace(self.rollout, device=device))
