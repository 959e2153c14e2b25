"""A whole evaluation: paired episodes, language swap, latency, videos, and the files that hold them.

``vlaflow eval``, the demo and ``evaluate`` all call ``run``; the parts are documented in their own modules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from vlaflow.compute import sampler_choice
from vlaflow.compute.auto import default_name
from vlaflow.compute.base import ComputePolicy
from vlaflow.compute.parse import parse_all
from vlaflow.compute.spelling import Checkpoint, Knobs
from vlaflow.config import JSON, to_json
from vlaflow.errors import ConfigError
from vlaflow.evaluation import language, results, videos
from vlaflow.evaluation.episode_log import KEPT, EpisodeLog
from vlaflow.evaluation.latency import Latency, collect_observations, measure
from vlaflow.evaluation.results import Minutes, Results
from vlaflow.evaluation.revision import Revision, follow
from vlaflow.evaluation.rollout import (
    EpisodeJob,
    EpisodeResult,
    RolloutConfig,
    blocks,
    one_thread,
    plan,
    play_all,
    require_fit,
)
from vlaflow.io import require_writable, storing
from vlaflow.policies.base import Policy
from vlaflow.policies.checkpoint import local_folder
from vlaflow.policies.provenance import fingerprint
from vlaflow.policies.seeds import FIRST_SEED, chunk_generator
from vlaflow.simulators.base import Render, expand_env_names, rendering_versions, step_limit
from vlaflow.versions import command_line, machine, versions

VIDEOS = "videos"
RESULTS = "results.json"


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


def evaluate(
    checkpoint: Path | str,
    env: str | Sequence[str],
    out: Path | str,
    *,
    compute: str | Sequence[str] = (),
    episodes: int = 20,
    first_seed: int = FIRST_SEED,
    noise_seeds: int = 1,
    solver_steps: int = 10,
    n_action_steps: int | None = None,
    max_steps: int | None = None,
    render: Render = "fast",
    device: str = "cpu",
    batch: int = 4,
    videos: bool = True,
    workers: int = 0,
    fresh: bool = False,
) -> Results:
    """Evaluate a checkpoint in simulation; writes ``results.json`` and ``videos/`` into ``out``.

    Every compute policy plays the same seeds, so that they can be compared in pairs. An evaluation that was interrupted
    continues when it is called again with the same arguments.

    >>> results = vlaflow.evaluate("runs/demo/rated", "metaworld/drawer-open-v3", "runs/eval", compute=("dense", "refine"))
    >>> results.of("metaworld/drawer-open-v3", "refine").successes
    20

    Args:
        checkpoint: folder or Hub repository.
        env: environments or groups of them: "metaworld/drawer-open-v3", "metaworld/easy".
        out: folder of the results.
        compute: names of compute policies as ``vlaflow eval --compute`` takes them: "dense:2", "exit:NAME", "budget:20"; by
            default "auto" if the checkpoint's sampler was calibrated, else "dense".
        episodes: environment seeds per environment and compute policy.
        first_seed: the first environment seed; the others follow.
        noise_seeds: episodes per environment seed, with other noise of the policy each; intervals and tests account for it.
        solver_steps: of the decoder, for compute policies whose name states no number.
        n_action_steps: actions executed per chunk; None takes the checkpoint's own.
        max_steps: steps after which an episode is cut off; None takes the suite's.
        render: image quality; use the one the policy was trained with.
        device: where the networks run.
        batch: episodes that a process plays together, with one batched call of the policy.
        videos: whether to record a success and a failure per environment.
        workers: processes; 0 plays every episode in this one. Scripts that ask for more need the usual
            ``if __name__ == "__main__":``. The results are the same with any number.
        fresh: discard an unfinished evaluation in ``out`` instead of continuing it.

    Returns:
        What ``results.json`` holds. ``vlaflow.reports.evaluation.write_report(out)`` makes a page of it.

    Raises:
        VlaflowError: see ``run``, which takes an ``EvaluationConfig`` with the remaining settings.
    """
    config = EvaluationConfig(
        envs=(env,) if isinstance(env, str) else tuple(env),
        computes=(compute,) if isinstance(compute, str) else tuple(compute),
        episodes=episodes,
        first_seed=first_seed,
        noise_seeds=noise_seeds,
        knobs=Knobs(solver_steps, device=device),
        rollout=RolloutConfig(n_action_steps, max_steps, render, device, batch),
        videos=videos,
        workers=workers,
    )
    return run(checkpoint, config, Path(out), fresh=fresh)


def run(checkpoint: Path | str, config: EvaluationConfig, out: Path, *, fresh: bool = False) -> Results:
    """Measure, and write ``results.json`` and ``videos/`` into ``out``.

    Every finished episode is kept in ``episodes.jsonl`` until the results are written. An evaluation that was interrupted
    continues from there and comes to the same results, measured times aside.

    Args:
        checkpoint: folder or Hub repository.
        config: what to measure.
        out: folder.
        fresh: discard an unfinished evaluation in ``out`` instead of continuing it.

    Raises:
        VlaflowError: before the first episode, when the parts do not fit together, ``out`` cannot be written, or it holds an
            unfinished evaluation with other settings.
        DataError: the disk is full; finished episodes are kept.
    """
    folder = local_folder(checkpoint)
    envs = expand_env_names(config.envs)
    home = Checkpoint(folder, fingerprint(folder))
    config = replace(config, computes=config.computes or (default_name(folder),))
    if "auto" in config.computes and (calibration := sampler_choice.load(home)):
        calibration.require_unseen(envs, config.first_seed, config.episodes)
    computes = parse_all(config.computes, config.knobs, home)
    policy = Policy.from_pretrained(folder, config.rollout.device)
    rollout = replace(config.rollout, n_action_steps=config.rollout.n_action_steps or policy.config.n_action_steps)
    require_fit(policy, str(checkpoint), set(envs), computes, rollout)

    jobs = plan(envs, computes, config.episodes, config.first_seed, config.noise_seeds)
    swap_max_steps = min(config.language_max_steps, *(step_limit(env, rollout.max_steps) for env in envs))
    swap = None
    if config.language_episodes:
        swap = language.plan_swap(envs, computes[0], config.language_episodes, config.first_seed, swap_max_steps)
    everything = [*jobs, *(swap.jobs if swap else ())]
    require_writable(out / RESULTS)
    if config.videos:
        require_writable(out / VIDEOS / videos.FILE)
    with EpisodeLog(out, EpisodeResult, _settings(config, home, computes, rollout), fresh=fresh) as log:

        def play(left: Sequence[EpisodeJob], finished: Callable[[int, EpisodeResult], None]) -> None:
            play_all(folder, left, rollout, workers=config.workers, finished=finished)

        played = log.complete(everything, play, "Evaluating", blocks(everything, rollout.batch))
        episodes, swapped = played[: len(jobs)], played[len(jobs) :]
        latency, revision = _timed(policy, envs, computes, config, rollout)
        with storing(out, "The results", KEPT):
            if config.videos:
                by_job = dict(zip(jobs, episodes, strict=True))
                videos.record_videos(folder, by_job, out / VIDEOS, rollout, workers=config.workers)
            evaluations = results.count(
                episodes,
                latency,
                n_action_steps=rollout.n_action_steps or 0,
                max_steps=rollout.max_steps,
                render=rollout.render,
                solver_steps=config.knobs.steps,
                batch=rollout.batch,
            )
            right = [e for e in episodes if e.compute == computes[0].name]
            found = Results(
                evaluations=evaluations,
                minutes=Minutes(evaluate=log.spent / 60).summed(),
                versions=versions() | rendering_versions(envs, rollout.render),
                command=command_line(),
                checkpoint=str(checkpoint),
                fingerprint=home.fingerprint,
                machine=machine(),
                overall=results.pool(evaluations),
                paired=results.compare(evaluations),
                latency=tuple(latency),
                revision=revision,
                language=language.count_swap(swap, right, swapped, swap_max_steps) if swap else (),
            )
            results.write(found, out / RESULTS)
        log.remove()
    return found


def _timed(
    policy: Policy, envs: Sequence[str], computes: Sequence[ComputePolicy], config: EvaluationConfig, rollout: RolloutConfig
) -> tuple[list[Latency], Revision | None]:
    """Latency of every compute policy on observations of the first seed, and one chunk followed step by step."""
    with one_thread():
        observations = collect_observations(policy, plan(envs, computes[:1], 1, config.first_seed), rollout)
    latency = measure(policy, computes, observations, config.latency_chunks)
    return latency, follow(policy, computes, observations[len(observations) // 2], chunk_generator(config.first_seed, 0))


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
        "rollout": to_json(rollout),
        "language": [config.language_episodes, config.language_max_steps],
        "versions": versions() | rendering_versions(config.envs, rollout.render),
        "machine": machine(),
    }
