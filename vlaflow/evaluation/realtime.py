"""Episodes against a running server with simulated delays: the cost of inference time, and which hand-over reduces it.

The simulation advances one control step at a time; a reply is delivered after its simulated delay in steps, however long it
really took. So all hand-overs are compared on one clock, on the same seeds and with the same noise. The first chunk of an
episode is waited for, as on a robot; afterwards the simulation does not stop.

Jerk is the second difference of the commanded motion (the displacements of the action, in action units per step²), at
boundaries, where another chunk takes over or the robot becomes idle, and elsewhere.

Shape letters: T steps, D action dimension.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vlaflow.compute.sampler_choice import CalibrationEpisodes
from vlaflow.config import from_json
from vlaflow.errors import ConfigError, RequestError, SpecError, nearest
from vlaflow.policies.seeds import FIRST_SEED, chunk_seed, seed_label
from vlaflow.robot.client import Client
from vlaflow.robot.realtime import HandOver, Move, RealtimeConfig, RealtimeController
from vlaflow.robot.transports import Infer, SimulatedTransport
from vlaflow.simulators.base import Environment, Render, cached, parse_env_name, simulator_spec, step_limit
from vlaflow.simulators.workers import run_jobs
from vlaflow.spec import ActionSpec, Observation

_TRIES = 3
REQUIRED = {
    *("action_spec", "views", "state", "images", "chunk_size", "n_action_steps"),
    *("system", "compute", "compute_settings", "guided", "checkpoint", "fingerprint", "dtype"),
}
"""Required keys of a server's metadata."""


@dataclass(frozen=True)
class RealtimeEvaluationConfig:
    """How episodes are run.

    Args:
        n_action_steps: actions executed before the next chunk is requested; None for the checkpoint's default.
        max_steps: limit of control steps per episode; None for the suite's.
        jitter_ms: largest random addition to every delay, uniformly distributed.
        fade: number of actions over which a new chunk is faded in.
        render: image quality.
    """

    n_action_steps: int | None = None
    max_steps: int | None = None
    jitter_ms: float = 0.0
    fade: int = 0
    render: Render = "fast"

    def __post_init__(self) -> None:
        if not 0 <= self.jitter_ms < math.inf:
            raise ConfigError(f"The jitter must be at least 0 ms and finite, got {self.jitter_ms:g}.")


@dataclass(frozen=True)
class RealtimeJob:
    """One episode to run.

    Args:
        env: "suite/task".
        mode: how chunks hand over.
        delay_ms: delay of every reply.
        seed: seed of the reset, the noise and the jitter.
        trace: whether to keep the actions.
        noise_seed: further seed of the policy's noise, from 0; other noise in the same scene.
    """

    env: str
    mode: HandOver
    delay_ms: float
    seed: int
    trace: bool = False
    noise_seed: int = 0

    @property
    def name(self) -> str:
        """Name of the job in error messages."""
        return f"{self.env}, {self.mode}, {self.delay_ms:g} ms, {seed_label(self.seed, self.noise_seed)}"


@dataclass(frozen=True)
class Trace:
    """The executed actions (T, D), the boundaries between chunks, and the idle steps."""

    actions: tuple[tuple[float, ...], ...]
    boundaries: tuple[int, ...]
    idle: tuple[int, ...]


@dataclass(frozen=True)
class RealtimeEpisode:
    """The outcome of one episode.

    Args:
        env, mode, delay_ms, seed, noise_seed: as in the job.
        success: whether any step succeeded.
        first_success_step: counted from 1; None without success.
        steps: control steps until the episode ended, including idle ones.
        chunks: number of replies used.
        idle: control steps without an action to execute.
        late: replies that arrived after more actions than had been committed.
        beyond: requests that could not commit as many actions as the expected delay.
        boundaries: number of steps at which another chunk took over or the robot became idle.
        boundary_jerk, inner_jerk: mean second difference there and elsewhere; None if there is none.
        trace: the actions, if they were kept.
    """

    env: str
    mode: HandOver
    delay_ms: float
    seed: int
    success: bool
    first_success_step: int | None
    steps: int
    chunks: int
    idle: int
    late: int
    beyond: int
    boundaries: int
    boundary_jerk: float | None
    inner_jerk: float | None
    trace: Trace | None = None
    noise_seed: int = 0


def plan(
    envs: Sequence[str],
    modes: Sequence[HandOver],
    delays_ms: Sequence[float],
    episodes: int,
    first_seed: int = FIRST_SEED,
    *,
    noise_seeds: int = 1,
) -> list[RealtimeJob]:
    """List the jobs: every hand-over at every delay on the same seeds of every environment; the first seed keeps a trace.

    Every seed is played with the noise seeds 0 to ``noise_seeds`` − 1.
    """
    if not envs:
        raise ConfigError("Nothing to drive: name at least one environment, e.g. --env metaworld/drawer-open-v3.")
    if min(episodes, noise_seeds) < 1 or not all(0 <= delay < math.inf for delay in delays_ms or (-1,)):
        raise ConfigError("A real-time evaluation needs at least one episode and at least one delay, each at least 0 ms.")
    return [
        RealtimeJob(env, mode, delay, seed, trace=(seed, noise_seed) == (first_seed, 0), noise_seed=noise_seed)
        for env in envs
        for seed in range(first_seed, first_seed + episodes)
        for noise_seed in range(noise_seeds)
        for delay in delays_ms
        for mode in modes
    ]


def evaluate(
    server: str,
    jobs: Sequence[RealtimeJob],
    config: RealtimeEvaluationConfig,
    *,
    token: str | None = None,
    workers: int = 1,
    finished: Callable[[int, RealtimeEpisode], None] | None = None,
) -> list[RealtimeEpisode]:
    """Run episodes, each worker with its own connection; results in the order of the jobs.

    Args:
        server: address of the server.
        jobs: see ``plan``.
        config: settings of all jobs.
        token: token of the server.
        workers: number of processes; 0 for this process.
        finished: called with the number of a job and its result as soon as it is done.

    Raises:
        RequestError: the server cannot be reached, or refuses a request.
        SpecError, ConfigError: before the first episode, when server, environments and settings do not fit together.
    """
    with Client(server, token) as client:
        metadata = client.metadata
    require_fit(metadata, server, jobs, config)
    play_job = functools.partial(_play_job, config=config, metadata=metadata)
    return run_jobs(play_job, jobs, workers, setup=functools.partial(Client, server, token), finished=finished)


def require_fit(
    metadata: Mapping[str, Any], server: str, jobs: Sequence[RealtimeJob], config: RealtimeEvaluationConfig
) -> None:
    """Refuse combinations that cannot work.

    Raises:
        SpecError: actions or views of policy and environment differ.
        ConfigError: for an impossible ``n_action_steps``, ``max_steps`` or mode, or seeds that the sampler was chosen on.
    """
    if missing := REQUIRED - metadata.keys():
        raise SpecError(
            f"The metadata of {server} lacks {', '.join(sorted(missing))}; only servers of vlaflow can be used: vlaflow serve "
            "CKPT --observation-keys metaworld."
        )
    where = f"the metadata of {server}"
    if calibrated := metadata.get("calibrated_on"):
        first, last = min(job.seed for job in jobs), max(job.seed for job in jobs)
        episodes = from_json(CalibrationEpisodes, calibrated, where)
        episodes.require_unseen({job.env for job in jobs}, first, last + 1 - first)
    theirs = from_json(ActionSpec, dict(metadata["action_spec"]), where)
    for env in sorted({job.env for job in jobs}):
        spec = simulator_spec(parse_env_name(env)[0])
        theirs.require_match(spec.action, f"the policy at {server}", f"environment {env}")
        for view in metadata["views"]:
            if view not in spec.views:
                raise SpecError(f"The policy at {server} needs view '{view}', which {env} lacks; {nearest(view, spec.views)}")
        if len(metadata["state"]) != 1:
            raise SpecError(f"{server} needs the state in parts {metadata['state']}; serve with --observation-keys metaworld.")
        if config.max_steps is not None and not 1 <= config.max_steps <= step_limit(env):
            raise ConfigError(f"max_steps of {env} must lie in 1..{step_limit(env)}, got {config.max_steps}.")
    for mode in sorted({job.mode for job in jobs}):
        RealtimeController(SimulatedTransport(dict, int), metadata, settings(mode, metadata, config))


def settings(mode: HandOver, metadata: Mapping[str, Any], config: RealtimeEvaluationConfig) -> RealtimeConfig:
    """Settings of the controller."""
    n_action_steps = int(metadata["n_action_steps"]) if config.n_action_steps is None else config.n_action_steps
    return RealtimeConfig(mode, n_action_steps=n_action_steps, fade=config.fade)


def play(
    infer: Infer, metadata: Mapping[str, Any], env: Environment, job: RealtimeJob, config: RealtimeEvaluationConfig
) -> RealtimeEpisode:
    """Run one episode.

    Args:
        infer: sends a request to the server.
        metadata: metadata of the server.
        env: the environment named in the job; it is reset first.
        job: the episode to run.
        config: settings.

    Raises:
        RequestError: a request failed; idle steps because of a busy server would be attributed to the hand-over.
    """
    rate, requests = env.action_spec.rate_hz, 0
    jitter = np.random.default_rng(np.random.SeedSequence((job.seed, 1)))

    def delay() -> int:
        milliseconds = job.delay_ms + config.jitter_ms * jitter.random()
        return math.ceil(milliseconds * rate / 1e3 - 1e-9)

    def observe() -> dict[str, Any]:
        nonlocal requests
        seed, requests = chunk_seed(job.seed, requests, job.noise_seed), requests + 1
        return {**as_request(env.observe(), metadata), "seed": seed}

    transport = SimulatedTransport(infer, delay)
    controller = RealtimeController(transport, metadata, settings(job.mode, metadata, config))
    env.restart(job.seed)
    controller.begin(observe())
    moves: list[Move] = []
    max_steps, done = config.max_steps or env._max_episode_steps, False
    info: dict[str, Any] = {}
    while not done:
        moves.append(controller.act(observe))
        if controller.counts.failed:
            raise RequestError(f"A request failed during an episode, which makes its result meaningless: {controller.failure}")
        _, terminated, truncated, info = env.advance(moves[-1].action)
        transport.tick()
        done = terminated or truncated or len(moves) >= max_steps
    first, counts = int(info["first_success_step"]), controller.counts
    motion = Motion.of(moves, env.action_spec)
    return RealtimeEpisode(
        env=job.env,
        mode=job.mode,
        delay_ms=job.delay_ms,
        seed=job.seed,
        success=first > 0,
        first_success_step=first if first > 0 else None,
        steps=len(moves),
        chunks=counts.answered,
        idle=counts.idle,
        late=counts.late,
        beyond=counts.beyond,
        boundaries=len(motion.boundaries),
        boundary_jerk=motion.mean(at_boundaries=True),
        inner_jerk=motion.mean(at_boundaries=False),
        trace=motion.trace if job.trace else None,
        noise_seed=job.noise_seed,
    )


@dataclass(frozen=True)
class Motion:
    """Executed actions and their boundaries.

    Args:
        action_TD: the executed actions.
        boundaries: steps (from 1 on) at which another chunk took over or the robot became idle.
        idle: steps without an action to execute.
        moving_D: which dimensions are displacements.
    """

    action_TD: np.ndarray
    boundaries: tuple[int, ...]
    idle: tuple[int, ...]
    moving_D: np.ndarray = field(repr=False)

    @staticmethod
    def of(moves: Sequence[Move], spec: ActionSpec) -> Motion:
        """Build from the moves of a controller."""
        stops = [i for i in range(1, len(moves)) if moves[i].idle and not moves[i - 1].idle]
        fresh = [i for i, move in enumerate(moves) if move.fresh and i]
        return Motion(
            np.stack([move.action for move in moves]).clip(spec.low, spec.high),
            tuple(sorted({*stops, *fresh})),
            tuple(i for i, move in enumerate(moves) if move.idle),
            np.array([d.mode == "delta" for d in spec.dimensions]),
        )

    def mean(self, *, at_boundaries: bool) -> float | None:
        """Mean norm of a_t − 2·a_{t−1} + a_{t−2} over the displacements.

        A change at step b affects the second differences at b and b + 1; both belong to the boundary.
        """
        moving_TD = self.action_TD[:, self.moving_D]
        jerk_T = np.zeros(len(moving_TD))
        jerk_T[2:] = np.linalg.norm(np.diff(moving_TD, 2, axis=0), axis=1)
        near_T = np.zeros(len(jerk_T), bool)
        for boundary in self.boundaries:
            near_T[boundary : boundary + 2] = True
        chosen = jerk_T[2:][near_T[2:] == at_boundaries]
        return float(chosen.mean()) if len(chosen) else None

    @property
    def trace(self) -> Trace:
        """The trace for the report."""
        return Trace(tuple(tuple(map(float, row)) for row in self.action_TD), self.boundaries, self.idle)


def as_request(observation: Observation, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """An observation with the keys of the server."""
    images = {key: observation.images[view] for key, view in zip(metadata["images"], metadata["views"], strict=True)}
    return {**images, metadata["state"][0]: observation.state, "prompt": observation.instruction}


def _play_job(
    job: RealtimeJob, client: Client, *, config: RealtimeEvaluationConfig, metadata: Mapping[str, Any]
) -> RealtimeEpisode:
    """Run one episode, and repeat it if a request fails."""
    size = max((s for s in metadata["images"].values() if s), default=None)
    env = cached(job.env, render=config.render, size=size)
    for left in reversed(range(_TRIES)):
        try:
            episode = play(client.infer, metadata, env, job, config)
            break
        except RequestError:
            if not left:
                raise
    if client.metadata != metadata:
        raise RequestError(
            "The server was restarted with another policy or other settings during the evaluation; run the command again."
        )
    return episode
