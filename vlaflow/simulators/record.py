"""Recording demonstrations of scripted experts as a LeRobot data set.

Frame t holds the image and the state *before* action t, and the action label is the expert's clean action for exactly
that state; with noise, the executed action differs from the label (see ``experts``) and is recorded too. Only successful
episodes are kept, with a few frames after the first success, so that a policy also learns from the end.

Workers record and encode videos in parallel; the parent process only joins them. The same config gives the same bytes with any
number of workers, because an episode is a function of its environment and seed alone. Every episode starts at a placement
drawn from its seed, also where evaluations use stored initial states. An interrupted recording continues with the episodes that
were not finished (``recording``), and its bytes are those of an uninterrupted one.

Seeds of recordings start at 10 000. Evaluation uses 1000 + i (LeRobot's protocol), so no episode occurs in both.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlaflow.config import to_json
from vlaflow.data.lerobot import EXECUTED_KEY
from vlaflow.data.video import encode_video
from vlaflow.data.writer import Writer
from vlaflow.errors import ConfigError, DataError
from vlaflow.outputs import require_writable_folder, storing
from vlaflow.progress import progress
from vlaflow.simulators.base import (
    RANDOM_START,
    Environment,
    Render,
    cached,
    expand_env_names,
    postponed,
    rendering_versions,
    require_size,
    simulator_spec,
    suite_package,
)
from vlaflow.simulators.experts import Noise, Noisy, Wandering, episode_generator, expert_for
from vlaflow.simulators.recording import KEPT, Demonstration, Recording, RecordJob, finished_before, keep, video_file
from vlaflow.simulators.workers import iterate_jobs
from vlaflow.spec import Observation
from vlaflow.versions import versions

FIRST_SEED = 10_000
_ATTEMPT_STRIDE = 10_000
_SEED_STRIDE = 1_000_000


@dataclass(frozen=True)
class RecordConfig:
    """What to record.

    Args:
        envs: "suite/task" or groups ("metaworld/easy"); all of one suite.
        episodes: successful episodes per environment.
        size: side of the image in pixels, even; None takes the suite's default.
        render: "fast" or "exact"; evaluate with the same.
        seed: changes the seed of every episode; see `episode_seed`.
        noise: disturbance of the executed actions; of several, the episodes of an environment take turns.
        after_success: frames kept after the first success.
        attempts: largest number of seeds tried per episode.
    """

    envs: tuple[str, ...]
    episodes: int = 50
    size: int | None = None
    render: Render = "fast"
    seed: int = 0
    noise: tuple[Noise, ...] = (Noise(),)
    after_success: int = 4
    attempts: int = 20

    def __post_init__(self) -> None:
        if not self.envs:
            raise ConfigError("Nothing to record: name at least one environment, e.g. metaworld/drawer-open-v3.")
        if not 1 <= self.episodes <= _ATTEMPT_STRIDE:
            raise ConfigError(f"episodes must lie in 1..{_ATTEMPT_STRIDE}, got {self.episodes}.")
        if not 1 <= len(self.noise) <= self.episodes:
            raise ConfigError(
                f"{len(self.noise)} kinds of noise for {self.episodes} episode(s) per environment: give each at least one."
            )
        if not 0 <= self.seed <= 4000:
            raise ConfigError(f"seed must lie in 0..4000, got {self.seed}.")
        if self.after_success < 0 or not 1 <= self.attempts <= _SEED_STRIDE // _ATTEMPT_STRIDE - 1:
            raise ConfigError(
                f"after_success must be at least 0 and attempts lie in 1..99, got {self.after_success}, {self.attempts}."
            )


@dataclass(frozen=True)
class Summary:
    """The result of `record`.

    Args:
        root: folder of the data set.
        episodes: number of successful episodes written.
        frames: total number of frames.
        failed: number of episodes discarded because the expert failed, by environment.
    """

    root: Path
    episodes: int
    frames: int
    failed: dict[str, int]


def episode_seed(run: int, episode: int, attempt: int) -> int:
    """The seed of the reset: 10 000 + 1 000 000·run + 10 000·attempt + episode.

    It is never 1000 + i, and different for all (run, attempt, episode). Every attempt has its own seed, so that a failed
    episode does not change the seeds of the next, whichever worker runs it.
    """
    return FIRST_SEED + _SEED_STRIDE * run + _ATTEMPT_STRIDE * attempt + episode


def record(
    config: RecordConfig, out: Path, workers: int = 2, finished: Callable[[Demonstration], None] | None = None
) -> Summary:
    """Record and write a LeRobot v3.0 data set; continues an interrupted recording with the same settings.

    Args:
        config: what to record.
        out: folder of the data set; it is created only when complete.
        workers: processes; 0 records in this one.
        finished: called with each newly recorded episode, in any order.

    Raises:
        ConfigError: for an unknown environment or several suites at once, an ``out`` that cannot be created, or an unfinished
            recording with other settings.
        DataError: when ``out`` exists, an expert keeps failing, or the disk is full or not writable.
    """
    jobs = episode_jobs(config)
    spec = simulator_spec(config.envs[0].partition("/")[0])
    side = config.size or spec.size[config.render]
    require_size(side)
    if side % 2:
        raise ConfigError(f"Videos need an even number of pixels, got {side}; choose --size {side - 1} or {side + 1}.")
    seeds: dict[str, list[int]] = {job.env: [] for job in jobs}
    failed = dict.fromkeys(seeds, 0)
    frames = 0
    settings = {
        **{name: value for name, value in asdict(config).items() if name not in ("envs", "episodes")},
        "size": side,
        "versions": _versions(config),
        # What an engineer may change between two tries; the suite's code may, too, which only its version would tell.
        "suite": to_json(
            {
                "action": spec.action,
                "state_names": spec.state_names,
                "views": spec.views,
                "tasks": dict(spec.tasks),
                "max_steps": dict(spec.max_steps),
            }
        ),
    }
    require_writable_folder(out.parent)
    with (
        storing(out.parent, kept=KEPT),
        Recording(out, settings) as recording,
        Writer(
            out,
            fps=spec.action.rate_hz,
            action_spec=spec.action,
            state_names=spec.state_names,
            views=dict.fromkeys(spec.views, (side, side)),
            robot_type=spec.robot,
            provenance={},
        ) as writer,
    ):
        before = {job: demo for job in jobs if (demo := recording.finished(job)) is not None}
        left = [job for job in jobs if job not in before]
        work = functools.partial(_record_episode, config=config, size=side, folder=recording.folder)
        report = (lambda _, demo: finished(demo)) if finished else None
        with closing(iterate_jobs(work, left, workers, finished=report)) as recorded:
            for job in jobs:
                demo = before.pop(job, None) or next(recorded)
                extra = {EXECUTED_KEY: demo.executed, "next.success": demo.success}
                writer.add(None, demo.state, demo.action, demo.instruction, extra=extra, videos=demo.videos)
                seeds[demo.name].append(demo.seed)
                failed[demo.name] += demo.attempts - 1
                frames += len(demo.action)
        writer.provenance = _provenance(config, side, seeds, failed, spec.protocol)
        recording.done()
    return Summary(out, len(jobs), frames, {name: n for name, n in failed.items() if n})


def record_with_progress(config: RecordConfig, out: Path, workers: int = 2) -> Summary:
    """`record`, with a progress bar that shows the remaining time and the failed attempts."""
    jobs = episode_jobs(config)
    before = finished_before(out, jobs)
    failed = 0
    with progress(len(jobs) - before, "Recording" + (f", {before} episodes done before" if before else "")) as bar:

        def count(demo: Demonstration) -> None:
            nonlocal failed
            failed += demo.attempts - 1
            bar.advance(note=f"{failed} failed" if failed else "")

        return record(config, out, workers, count)


def episode_jobs(config: RecordConfig) -> list[RecordJob]:
    """The episodes to record, in the order of the data set.

    Raises:
        ConfigError: for an unknown environment, or environments of several suites.
    """
    names = expand_env_names(config.envs)
    suites = {name.partition("/")[0] for name in names}
    if len(suites) > 1:
        raise ConfigError(f"A data set contains one robot, but these are several suites: {', '.join(sorted(suites))}.")
    return [RecordJob(name, episode) for name in names for episode in range(config.episodes)]


def _provenance(
    config: RecordConfig, side: int, seeds: dict[str, list[int]], failed: dict[str, int], protocol: str
) -> dict[str, Any]:
    return {
        "how": "scripted experts; noise is executed, the clean action is the label; failed episodes are left out",
        "protocol": protocol,
        "render": config.render,
        "size": side,
        "noise": [asdict(noise) for noise in config.noise],
        "after_success": config.after_success,
        "seed": config.seed,
        "seeds": seeds,
        "failed": failed,
        "versions": _versions(config),
    }


def _versions(config: RecordConfig) -> dict[str, str]:
    """What the bytes of an episode depend on besides its settings."""
    suite = config.envs[0].partition("/")[0]
    return versions() | suite_package(suite) | rendering_versions(config.envs, config.render)


def _record_episode(job: RecordJob, config: RecordConfig, size: int, folder: Path) -> Demonstration:
    """Record one successful episode; runs in a worker.

    Images are rendered once the episode has succeeded: rendering costs more than physics, and a failed episode runs to the step
    limit.
    """
    found = find_episode(job.env, job.episode, config, config.seed, size, observable=True)
    env = found.env
    for view, (height, width) in env.views.items():
        if (height, width) != (size, size):
            sides = {side for each in env.views.values() for side in each}
            cure = f"Record square images of its own size, --size {height}, or let" if sides == {height // 2 * 2} else "Let"
            raise ConfigError(
                f"{job.env} renders '{view}' with {width}x{height} pixels, not {size}x{size}. {cure} its suite's build render "
                "every view as a square of the size that it is given."
            )
    frames = [step.observe() for step in found.steps if step.observe]
    with storing(folder.parent, kept=KEPT):
        videos = {
            view: encode_video((frame.images[view] for frame in frames), video_file(folder, job, view), env.action_spec.rate_hz)
            for view in env.views
        }
        demo = Demonstration(
            name=job.env,
            instruction=env.task_description,
            seed=found.seed,
            attempts=found.attempts,
            state=np.stack([frame.state for frame in frames]).astype(np.float32),
            action=np.stack([step.label for step in found.steps]),
            executed=np.stack([step.executed for step in found.steps]),
            success=np.array([step.success for step in found.steps]),
            videos=videos,
        )
        keep(folder, job, demo)
    return demo


@dataclass(frozen=True)
class Step:
    """An executed action, its clean label, and whether it ended in success.

    With ``observe``, if it was asked for, the observation before the action is rendered.
    """

    executed: np.ndarray
    label: np.ndarray
    success: bool
    observe: Callable[[], Observation] | None = None


@dataclass(frozen=True)
class ExpertEpisode:
    """An episode in which the expert succeeds; ``env.restart(seed, RANDOM_START)`` returns to its start."""

    env: Any
    seed: int
    attempts: int
    steps: list[Step]


def find_episode(
    name: str,
    episode: int,
    config: RecordConfig,
    run: int,
    size: int,
    *,
    wander: int = 0,
    observable: bool = False,
) -> ExpertEpisode:
    """Try seeds until the expert succeeds.

    Args:
        name: "suite/task".
        episode: number of the episode.
        config: noise, rendering and attempts.
        run: see ``episode_seed``.
        size: side in pixels of the images of the environment.
        wander: random points that the hand visits before the expert begins.
        observable: every step can be observed afterwards.

    Raises:
        DataError: when all attempts fail.
    """
    env: Any = cached(name, render=config.render, size=size)
    is_gripper = np.array([dimension.frame == "gripper" for dimension in env.action_spec.dimensions])
    noise = config.noise[episode % len(config.noise)]
    for attempt in range(config.attempts):
        seed = episode_seed(run, episode, attempt)
        generator, clean = episode_generator(name, seed), expert_for(name)
        expert = Noisy(Wandering(clean, generator, wander) if wander else clean, noise, generator, is_gripper)
        env.restart(seed, RANDOM_START)
        steps = _play(env, expert, config.after_success, observable)
        if steps is not None:
            return ExpertEpisode(env, seed, attempt + 1, steps)
    disturbed = noise.scale or noise.gripper or noise.misjudge
    cure = "Use less noise, and another --out." if disturbed else "Correct the expert, or leave this environment out."
    raise DataError(
        f"The expert of {name} failed with {config.attempts} seeds in a row, the last one {seed}, with {noise}. {cure}"
    )


def _play(env: Environment, expert: Noisy, after_success: int, observable: bool) -> list[Step] | None:
    """Let the expert act from the start of an episode; None if it does not succeed before the step limit."""
    steps: list[Step] = []
    left: int | None = None
    while True:
        executed, label = expert(env)
        observe = postponed(env) if observable else None
        _, terminated, truncated, info = env.advance(executed)
        success = bool(info["success"])
        steps.append(Step(executed, label, success, observe))
        if left is not None:
            left -= 1
        elif success:
            left = after_success
        if left == 0 or (truncated and left is not None):
            return steps
        if truncated or (terminated and left is None):  # one of another package may terminate where it fails
            return None
