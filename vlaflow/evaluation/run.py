"""A whole evaluation: paired episodes, language swap, latency, videos, and the files that hold them; or a shard of one.

``vlaflow eval``, the demo and ``evaluate`` all call ``run``; the parts are documented in their own modules.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from vlaflow.compute import sampler_choice
from vlaflow.compute.auto import default_name
from vlaflow.compute.base import ComputePolicy
from vlaflow.compute.parse import parse_all
from vlaflow.compute.spelling import Checkpoint, Knobs
from vlaflow.config import JSON, from_json, to_json
from vlaflow.engine.deploy import Engine
from vlaflow.errors import ConfigError
from vlaflow.evaluation import language, results, videos
from vlaflow.evaluation.episode_log import EpisodeLog
from vlaflow.evaluation.images import unlike_training
from vlaflow.evaluation.latency import Latency, collect_observations, evenly, measure
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
from vlaflow.evaluation.shards import Shard, read_shards, require_same
from vlaflow.hub import origin
from vlaflow.nn.precision import Dtype
from vlaflow.outputs import require_writable, storing
from vlaflow.policies.base import Policy
from vlaflow.policies.checkpoint import local_folder
from vlaflow.policies.engines import for_budgets
from vlaflow.policies.provenance import fingerprint
from vlaflow.policies.seeds import FIRST_SEED, chunk_generator
from vlaflow.progress import progress
from vlaflow.simulators.base import Render, expand_env_names, rendering_versions, step_limit
from vlaflow.versions import command_line, machine, processor, versions

VIDEOS = "videos"
RESULTS = "results.json"
Report = Callable[[Path], object]
"""Writes a page about the results in a folder."""


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
    dtype: Dtype = "fp32",
    engine: Engine = "eager",
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
        dtype: what they compute in; "bf16" halves the memory of their layers.
        engine: what computes them; see ``policies.engines.with_engine``.
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
        knobs=Knobs(solver_steps, device=device, dtype=dtype),
        rollout=RolloutConfig(n_action_steps, max_steps, render, device, batch, dtype, engine),
        videos=videos,
        workers=workers,
    )
    return run(checkpoint, config, Path(out), fresh=fresh)


def run(
    checkpoint: Path | str,
    config: EvaluationConfig,
    out: Path,
    *,
    fresh: bool = False,
    report: Report | None = None,
) -> Results:
    """Measure, and write ``results.json`` and ``videos/`` into ``out``.

    Every finished episode is kept in ``episodes.jsonl`` until the results are written. An evaluation that was interrupted
    continues from there and comes to the same results, measured times aside.

    Args:
        checkpoint: folder or Hub repository.
        config: what to measure.
        out: folder.
        fresh: discard an unfinished evaluation in ``out`` instead of continuing it.
        report: called with ``out`` when the results are written, e.g. ``vlaflow.reports.evaluation.write_report``; if it fails,
            the finished episodes are kept.

    Raises:
        VlaflowError: before the first episode, when the parts do not fit together, ``out`` cannot be written, or it holds an
            unfinished evaluation with other settings.
        DataError: the disk is full; finished episodes are kept.
    """
    work = _prepare(checkpoint, config)
    _require_writable(out, work.config)
    with EpisodeLog(out, EpisodeResult, work.settings, fresh=fresh) as log:
        played = work.play(log, work.blocks)
        with storing(out, "The results", log.kept):
            found = work.conclude(out, played, minutes=lambda: log.spent / 60)
            if report is not None:
                report(out)
        log.remove()
    return found


def play_shard(checkpoint: Path | str, config: EvaluationConfig, out: Path, shard: Shard, *, fresh: bool = False) -> int:
    """Play one shard's episodes, and keep them in ``out``; ``merge`` makes the results of all shards.

    Returns:
        How many episodes the shard consists of.

    Raises:
        VlaflowError: as ``run``.
    """
    work = _prepare(checkpoint, config)
    about = {"checkpoint": work.checkpoint, "config": to_json(work.config), "command": command_line()}
    with EpisodeLog(out, EpisodeResult, work.settings, about=about, name=shard.file, fresh=fresh) as log:
        return len(work.play(log, shard.of_blocks(work.blocks)))


def merge(
    folder: Path,
    *,
    checkpoint: Path | str | None = None,
    workers: int | None = None,
    device: str | None = None,
    report: Report | None = None,
) -> Results:
    """Put all shards together: measure latency, record videos, and write what ``run`` would have written.

    Args:
        folder: holds the shards' logs; they are removed when the results are written.
        checkpoint: its path on this machine; by default the first shard's.
        workers: processes for the videos; by default as many as the first shard had.
        device: where the networks run; by default as for the first shard.
        report: see ``run``.

    Raises:
        VlaflowError: shards that are missing, unfinished, still running or of another evaluation, checkpoint or version.
    """
    shards = read_shards(folder)
    config = from_json(EvaluationConfig, shards.about["config"], str(shards.files[0]))
    config = replace(config, workers=config.workers if workers is None else workers)
    if device is not None:
        config = config.on(device)
    work = _prepare(shards.about["checkpoint"] if checkpoint is None else checkpoint, config)
    settings = json.loads(json.dumps(work.settings))
    require_same(shards.settings, settings, str(shards.files[0]), "this machine would play it")
    played = shards.episodes(work.blocks)
    _require_writable(folder, config)
    began = time.monotonic()
    with storing(folder, "The results", "the shards' logs are untouched. Make room, and merge them again"):
        found = work.conclude(
            folder,
            played,
            minutes=lambda: (shards.seconds + time.monotonic() - began) / 60,
            machines=shards.machines,
            commands=shards.commands,
        )
        if report is not None:
            report(folder)
    for file in shards.files:
        file.unlink()
    return found


@dataclass(frozen=True)
class _Work:
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


def _prepare(checkpoint: Path | str, config: EvaluationConfig) -> _Work:
    """Check that the parts fit together, and list the episodes."""
    folder = local_folder(checkpoint)
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
    jobs = plan(envs, computes, config.episodes, config.first_seed, config.noise_seeds)
    swap = None
    if config.language_episodes:
        limit = config.swap_limit(envs)
        swap = language.plan_swap(envs, computes[0], config.language_episodes, config.first_seed, limit)
    return _Work(
        origin(folder) or str(checkpoint),
        home,
        config,
        policy,
        tuple(computes),
        tuple(jobs),
        swap,
        _settings(config, home, computes, rollout),
    )


def _require_writable(out: Path, config: EvaluationConfig) -> None:
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
