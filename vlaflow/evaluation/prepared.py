"""An evaluation whose parts fit together: its episodes, and everything that is measured and written when they are played."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vlaflow.compute import sampler_choice
from vlaflow.compute.auto import default_name
from vlaflow.compute.base import ComputePolicy
from vlaflow.compute.parse import parse_all
from vlaflow.compute.spelling import Checkpoint
from vlaflow.config import JSON, to_json
from vlaflow.evaluation import language, results, videos
from vlaflow.evaluation.config import EvaluationConfig
from vlaflow.evaluation.episode_log import EpisodeLog
from vlaflow.evaluation.images import unlike_training
from vlaflow.evaluation.latency import Latency, collect_observations, evenly, measure
from vlaflow.evaluation.results import Minutes, Results
from vlaflow.evaluation.revision import Revision, follow
from vlaflow.evaluation.rollout import EpisodeJob, EpisodeResult, RolloutConfig, blocks, one_thread, plan, play_all, require_fit
from vlaflow.hub import origin
from vlaflow.outputs import require_writable
from vlaflow.policies.base import Policy
from vlaflow.policies.engines import for_budgets
from vlaflow.policies.provenance import fingerprint
from vlaflow.policies.robots import robot_folder
from vlaflow.policies.seeds import chunk_generator, recorded
from vlaflow.progress import progress
from vlaflow.simulators.base import expand_env_names, rendering_versions
from vlaflow.versions import command_line, machine, processor, versions

VIDEOS = "videos"
RESULTS = "results.json"


@dataclass(frozen=True)
class PreparedEvaluation:
    """An evaluation whose parts fit together.

    Args:
        checkpoint: as it was given; one of the Hub with its commit.
        home: the same on disk.
        config: what to measure, with all defaults filled in.
        policy: the checkpoint's.
        computes: compute policies.
        jobs: episodes of the evaluation itself; those of the language-swap test follow them.
        swap: the language-swap test; None without one.
        settings: everything that the episodes are a function of.
    """

    checkpoint: str
    home: Checkpoint
    config: EvaluationConfig
    policy: Policy
    computes: tuple[ComputePolicy, ...]
    jobs: tuple[EpisodeJob, ...]
    swap: language.LanguageTest | None
    settings: dict[str, JSON]

    @property
    def everything(self) -> list[EpisodeJob]:
        """All episodes."""
        return [*self.jobs, *(self.swap.jobs if self.swap else ())]

    @property
    def blocks(self) -> list[list[int]]:
        """Numbers of the episodes that are played together."""
        return blocks(self.everything, self.config.rollout.batch)

    def play(self, log: EpisodeLog[EpisodeResult], own: Sequence[Sequence[int]]) -> list[EpisodeResult]:
        """Play the episodes of these blocks that the log does not hold yet; returns those of all of them."""

        def play(left: Sequence[EpisodeJob], finished: Callable[[int, EpisodeResult], None]) -> None:
            play_all(self.home.folder, left, self.config.rollout, workers=self.config.workers, finished=finished)

        return log.complete(self.everything, play, "Evaluating", own)

    def conclude(
        self,
        out: Path,
        played: Sequence[EpisodeResult],
        *,
        minutes: Callable[[], float],
        machines: Sequence[str] = (),
        commands: tuple[str, ...] = (),
    ) -> Results:
        """Measure everything but the episodes, and write all results.

        Args:
            out: folder.
            played: all episodes.
            minutes: spent so far.
            machines: processors that they were played on; by default this one's.
            commands: that played them, if not this one.
        """
        config, rollout = self.config, self.config.rollout
        episodes, swapped = played[: len(self.jobs)], played[len(self.jobs) :]
        latency, revision = _timed(self.policy, expand_env_names(config.envs), self.computes, config, rollout)
        if config.videos:
            by_job = dict(zip(self.jobs, episodes, strict=True))
            videos.record_videos(self.home.folder, by_job, out / VIDEOS, rollout, workers=config.workers)
        else:
            videos.discard(out / VIDEOS)
        evaluations = results.count(
            episodes,
            latency,
            n_action_steps=rollout.n_action_steps or 0,
            max_steps=rollout.max_steps,
            render=rollout.render,
            solver_steps=config.knobs.steps,
            batch=rollout.batch,
        )
        right = [e for e in episodes if e.compute == self.computes[0].name]
        swap, envs, here = self.swap, expand_env_names(config.envs), machine()
        elsewhere = any(name != processor() for name in machines)
        found = Results(
            evaluations=evaluations,
            minutes=Minutes(evaluate=minutes()).summed(),
            versions=versions() | rendering_versions(envs, rollout.render),
            command=command_line(),
            checkpoint=self.checkpoint,
            fingerprint=self.home.fingerprint,
            machine=f"{here}; episodes on {' and '.join(machines)}" if elsewhere else here,
            overall=results.pool(evaluations),
            paired=results.compare(evaluations),
            latency=tuple(latency),
            revision=revision,
            language=language.count_swap(swap, right, swapped, config.swap_limit(envs)) if swap else (),
            commands=commands,
            dtype=rollout.dtype,
            engine=self.policy.model.engine,
        )
        results.write(found, out / RESULTS)
        return found


def prepare(checkpoint: Path | str, config: EvaluationConfig) -> PreparedEvaluation:
    """Check that the parts fit together, and list the episodes.

    Args:
        checkpoint: folder or Hub repository.
        config: what to measure.

    Raises:
        VlaflowError: they do not fit together, in a sentence.
    """
    folder = robot_folder(checkpoint, None)
    envs = expand_env_names(config.envs)
    home = Checkpoint(folder, fingerprint(folder))
    config = replace(config, computes=config.computes or (default_name(folder),))
    if calibration := sampler_choice.load(home):
        calibration.episodes.require_unseen(envs, config.first_seed, config.episodes)
    engine, knobs = for_budgets(config.rollout.engine, config.computes, config.knobs, home)
    config = replace(config, knobs=knobs, rollout=replace(config.rollout, engine=engine))
    computes = parse_all(config.computes, config.knobs, home)
    policy = Policy.from_pretrained(folder, config.rollout.device, config.rollout.dtype, engine=config.rollout.engine)
    rollout = replace(config.rollout, n_action_steps=config.rollout.n_action_steps or policy.n_action_steps)
    config = replace(config, rollout=rollout)
    require_fit(policy, str(checkpoint), set(envs), computes, rollout)
    if note := unlike_training(folder, envs, rollout.render):
        sys.stderr.write(f"Note: {note}\n")
    if recorded(config.first_seed, config.episodes):
        sys.stderr.write(
            "Note: Recordings use seeds from 10 000 on. Where scenes are drawn from the seed, as in Meta-World, the checkpoint "
            "may have learned from these episodes; to be sure, evaluate seeds below.\n"
        )
    jobs = plan(envs, computes, config.episodes, config.first_seed, config.noise_seeds)
    swap = None
    if config.language_episodes:
        limit = config.swap_limit(envs)
        swap = language.plan_swap(envs, computes[0], config.language_episodes, config.first_seed, limit)
    return PreparedEvaluation(
        origin(folder) or str(checkpoint),
        home,
        config,
        policy,
        tuple(computes),
        tuple(jobs),
        swap,
        _settings(config, home, computes, rollout),
    )


def require_place(out: Path, config: EvaluationConfig) -> None:
    """Refuse a folder that the results cannot be written to."""
    require_writable(out / RESULTS, *([out / VIDEOS / videos.FILE] if config.videos else []))


def _timed(
    policy: Policy, envs: Sequence[str], computes: Sequence[ComputePolicy], config: EvaluationConfig, rollout: RolloutConfig
) -> tuple[list[Latency], Revision | None]:
    """Latency of every compute policy on observations of the first seed, and one chunk followed step by step."""
    jobs = plan(evenly(envs), computes[:1], 1, config.first_seed)
    executed = [compute.executing(rollout.n_action_steps or policy.n_action_steps) for compute in computes]
    with progress(len(jobs) + config.latency_chunks, "Timing") as bar:
        with one_thread():
            observations = collect_observations(policy, jobs, rollout, played=bar.advance)
        latency = measure(policy, executed, observations, config.latency_chunks, timed=bar.advance)
    return latency, follow(policy, executed, observations[len(observations) // 2], chunk_generator(config.first_seed, 0))


def _settings(
    config: EvaluationConfig, checkpoint: Checkpoint, computes: Sequence[ComputePolicy], rollout: RolloutConfig
) -> dict[str, JSON]:
    """Everything that the episodes are a function of; measured times, videos and workers change none of them."""
    return {
        "checkpoint": checkpoint.fingerprint,
        "envs": expand_env_names(config.envs),
        "computes": [to_json(compute) for compute in computes],
        "episodes": config.episodes,
        "first_seed": config.first_seed,
        "noise_seeds": config.noise_seeds,
        "rollout": to_json(replace(rollout, device=rollout.device.partition(":")[0])),  # any GPU of several
        "language": [config.language_episodes, config.language_max_steps],
        "versions": versions() | rendering_versions(config.envs, rollout.render),
        "machine": processor(),  # any number of its cores
    }
