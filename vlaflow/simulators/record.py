"""Recording demonstrations of scripted experts as a LeRobot data set.

Frame t holds the image and the state *before* action t, and the action label is the expert's clean action for exactly
that state; with noise, the executed action differs from the label (see ``experts``) and is recorded too. Only successful
episodes are kept, with a few frames after the first success, so that a policy also learns from the end.

Workers record and encode videos in parallel; the parent process only joins them. The same config gives the same bytes with any
number of workers, because an episode is a function of its environment and seed alone. Every episode starts at a placement
drawn from its seed, also where evaluations use stored initial states.

Seeds of recordings start at 10 000. Evaluation uses 1000 + i (LeRobot's protocol), so no episode occurs in both.
"""

from __future__ import annotations

import functools
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vlaflow.data.lerobot import EXECUTED_KEY
from vlaflow.data.video import Segment, encode_video
from vlaflow.data.writer import Writer
from vlaflow.errors import ConfigError, DataError
from vlaflow.io import make_folder, storing
from vlaflow.simulators.base import (
    RANDOM_START,
    Environment,
    Render,
    cached,
    expand_env_names,
    rendering_versions,
    simulator_spec,
)
from vlaflow.simulators.experts import Noise, Noisy, Wandering, episode_generator, expert_for
from vlaflow.simulators.workers import Progress, iterate_jobs
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
        noise: disturbance of the executed actions.
        after_success: frames kept after the first success.
        attempts: largest number of seeds tried per episode.
    """

    envs: tuple[str, ...]
    episodes: int = 50
    size: int | None = 96
    render: Render = "fast"
    seed: int = 0
    noise: Noise = field(default_factory=Noise)
    after_success: int = 4
    attempts: int = 20

    def __post_init__(self) -> None:
        if not self.envs:
            raise ConfigError("Nothing to record: name at least one environment, e.g. metaworld/drawer-open-v3.")
        if not 1 <= self.episodes <= _ATTEMPT_STRIDE:
            raise ConfigError(f"episodes must lie in 1..{_ATTEMPT_STRIDE}, got {self.episodes}.")
        if not 0 <= self.seed <= 4000:
            raise ConfigError(f"seed must lie in 0..4000, got {self.seed}.")
        if self.after_success < 0 or not 1 <= self.attempts <= _SEED_STRIDE // _ATTEMPT_STRIDE - 1:
            raise ConfigError(
                f"after_success must be at least 0 and attempts lie in 1..99, got {self.after_success}, {self.attempts}."
            )


@dataclass(frozen=True)
class Demonstration:
    """One recorded episode of T frames, as a worker returns it.

    Args:
        name: "suite/task".
        instruction: the task in words.
        seed: seed of the reset.
        attempts: number of seeds tried, this one included.
        state: (T, S) float32.
        action: (T, D) float32, the clean labels.
        executed: (T, D) float32, the executed actions.
        success: (T,) bool, whether the step taken at frame t ended in success.
        videos: encoded segments by view, T frames each.
    """

    name: str
    instruction: str
    seed: int
    attempts: int
    state: np.ndarray
    action: np.ndarray
    executed: np.ndarray
    success: np.ndarray
    videos: dict[str, Segment]


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


@dataclass(frozen=True)
class RecordJob:
    """One episode to record, for a pool of workers."""

    env: str
    episode: int

    @property
    def name(self) -> str:
        """Name of the job in error messages."""
        return f"{self.env}, episode {self.episode}"


def episode_seed(run: int, episode: int, attempt: int) -> int:
    """The seed of the reset: 10 000 + 1 000 000·run + 10 000·attempt + episode.

    It is never 1000 + i, and different for all (run, attempt, episode). Every attempt has its own seed, so that a failed
    episode does not change the seeds of the next, whichever worker runs it.
    """
    return FIRST_SEED + _SEED_STRIDE * run + _ATTEMPT_STRIDE * attempt + episode


def record(config: RecordConfig, out: Path, workers: int = 2, progress: Progress | None = None) -> Summary:
    """Record and write a LeRobot v3.0 data set.

    Args:
        config: what to record.
        out: folder of the data set; it is created only when complete.
        workers: processes; 0 records in this one.
        progress: called as ``progress(done, total)`` after each episode.

    Raises:
        ConfigError: for an unknown environment or several suites at once, or an ``out`` that cannot be created.
        DataError: when ``out`` exists, an expert keeps failing, or the disk is full or not writable.
    """
    names = expand_env_names(config.envs)
    suites = {name.partition("/")[0] for name in names}
    if len(suites) > 1:
        raise ConfigError(f"A data set contains one robot, but these are several suites: {', '.join(sorted(suites))}.")
    spec = simulator_spec(suites.pop())
    side = config.size or spec.size[config.render]
    jobs = [RecordJob(name, episode) for name in names for episode in range(config.episodes)]
    seeds: dict[str, list[int]] = {name: [] for name in names}
    failed = dict.fromkeys(names, 0)
    frames = 0
    make_folder(out.parent)
    with (
        storing(out.parent),
        tempfile.TemporaryDirectory(prefix=f".{out.name}.segments-", dir=out.parent) as scratch,
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
        work = functools.partial(_record_episode, config=config, size=side, scratch=Path(scratch))
        for demo in iterate_jobs(work, jobs, workers, progress=progress):
            extra = {EXECUTED_KEY: demo.executed, "next.success": demo.success}
            writer.add(None, demo.state, demo.action, demo.instruction, extra=extra, videos=demo.videos)
            for segment in demo.videos.values():
                segment.path.unlink()
            seeds[demo.name].append(demo.seed)
            failed[demo.name] += demo.attempts - 1
            frames += len(demo.action)
        writer.provenance = _provenance(config, side, seeds, failed, spec.protocol)
    return Summary(out, len(jobs), frames, {name: n for name, n in failed.items() if n})


def _provenance(
    config: RecordConfig, side: int, seeds: dict[str, list[int]], failed: dict[str, int], protocol: str
) -> dict[str, Any]:
    return {
        "how": "scripted experts; noise is executed, the clean action is the label; failed episodes are left out",
        "protocol": protocol,
        "render": config.render,
        "size": side,
        "noise": asdict(config.noise),
        "after_success": config.after_success,
        "seed": config.seed,
        "seeds": seeds,
        "failed": failed,
        "versions": versions() | rendering_versions(config.envs, config.render),
    }


def _record_episode(job: RecordJob, config: RecordConfig, size: int, scratch: Path) -> Demonstration:
    """Record one successful episode; runs in a worker.

    The expert first plays without images, and its executed actions are then repeated with images: physics costs a twentieth
    of rendering, and a failed episode runs to the step limit.
    """
    found = find_episode(job.env, job.episode, config, config.seed, size)
    env = found.env
    env.restart(found.seed, RANDOM_START)
    frames = [_observe_and_act(env, step) for step in found.steps]
    with storing(scratch.parent):
        videos = {
            view: encode_video(
                (frame.images[view] for frame in frames),
                scratch / f"{job.env.replace('/', '_')}-{job.episode}-{view}.mp4",
                env.action_spec.rate_hz,
            )
            for view in env.views
        }
    return Demonstration(
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


@dataclass(frozen=True)
class Step:
    """An executed action, its clean label, and whether it ended in success."""

    executed: np.ndarray
    label: np.ndarray
    success: bool


@dataclass(frozen=True)
class ExpertEpisode:
    """An episode in which the expert succeeds; ``env.restart(seed, RANDOM_START)`` returns to its start."""

    env: Any
    seed: int
    attempts: int
    steps: list[Step]


def find_episode(name: str, episode: int, config: RecordConfig, run: int, size: int, *, wander: int = 0) -> ExpertEpisode:
    """Try seeds, without images, until the expert succeeds.

    Args:
        name: "suite/task".
        episode: number of the episode.
        config: noise, rendering and attempts.
        run: see ``episode_seed``.
        size: side in pixels of the images of the environment.
        wander: random points that the hand visits before the expert begins.

    Raises:
        DataError: when all attempts fail.
    """
    env: Any = cached(name, render=config.render, size=size)
    is_gripper = np.array([dimension.frame == "gripper" for dimension in env.action_spec.dimensions])
    for attempt in range(config.attempts):
        seed = episode_seed(run, episode, attempt)
        generator, clean = episode_generator(name, seed), expert_for(name)
        expert = Noisy(Wandering(clean, generator, wander) if wander else clean, config.noise, generator, is_gripper)
        env.restart(seed, RANDOM_START)
        steps = _play(env, expert, config.after_success)
        if steps is not None:
            return ExpertEpisode(env, seed, attempt + 1, steps)
    raise DataError(
        f"The expert of {name} failed with {config.attempts} seeds in a row, the last one {seed}, with {config.noise}. "
        f"Use less noise."
    )


def _play(env: Environment, expert: Noisy, after_success: int) -> list[Step] | None:
    """Let the expert act from the start of an episode; None if it does not succeed before the step limit."""
    steps: list[Step] = []
    left: int | None = None
    while True:
        executed, label = expert(env)
        _, success, truncated, _ = env.advance(executed)
        steps.append(Step(executed, label, success))
        if left is not None:
            left -= 1
        elif success:
            left = after_success
        if left == 0 or (truncated and left is not None):
            return steps
        if truncated:
            return None


def _observe_and_act(env: Environment, step: Step) -> Observation:
    observation = env.observe()
    _, success, _, _ = env.advance(step.executed)
    if success != step.success:
        raise RuntimeError(f"{env.name} is not deterministic: the same actions did not have the same outcome.")
    return observation
