"""Episodes: a policy acts in an environment, chunk by chunk, and what came of it is written down.

Everything here is a function of (checkpoint, environment, compute policy, seed) and of nothing else: each worker process
computes with one thread, noise is drawn from a generator made of the episode's seed and the chunk's number, and wall time
is not recorded (``latency`` measures it on a quiet machine). So results are equal to the bit at any number of workers, and
two compute policies start every chunk of the same number from the same noise.

Counting and testing are in ``statistics`` and ``results``, videos in ``videos``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
from torch import Generator

from vlaflow.compute.base import ComputePolicy
from vlaflow.errors import ConfigError, SpecError, nearest
from vlaflow.policies.base import Policy
from vlaflow.policies.checkpoint import local_folder
from vlaflow.simulators.base import Environment, Render, cached, parse_env_name, simulator_spec
from vlaflow.simulators.workers import run_jobs
from vlaflow.spec import Chunk, Observation

FIRST_SEED = 1000

Look = Callable[[int, Observation, Chunk], None]
"""Called with the step, what the policy saw there, and its answer."""


@dataclass(frozen=True)
class RolloutConfig:
    """How episodes are run.

    Args:
        n_action_steps: actions executed per chunk; None takes the checkpoint's own.
        max_steps: steps after which an episode is cut off; None takes the suite's.
        render: image quality; use the one the policy was trained with.
        device: where the networks run.
    """

    n_action_steps: int | None = None
    max_steps: int | None = None
    render: Render = "fast"
    device: str = "cpu"


@dataclass(frozen=True)
class EpisodeJob:
    """One episode to run.

    Args:
        env: "suite/task".
        compute: how much compute to spend.
        seed: of the environment's reset and of the noise.
        instruction: what the policy is told; None for the task's own sentence.
        max_steps: of this episode alone, where it differs from the others'.
    """

    env: str
    compute: ComputePolicy
    seed: int
    instruction: str | None = None
    max_steps: int | None = None

    @property
    def name(self) -> str:
        """For error messages."""
        return f"{self.env}, {self.compute.name}, seed {self.seed}"


@dataclass(frozen=True)
class Episode:
    """What came of one episode.

    Args:
        env, compute, seed: as in the job; ``compute`` by name.
        instruction: what the policy was told.
        success: at any step.
        first_success_step: counted from 1; None without success.
        steps: actions executed until the episode ended.
        chunks: times the policy was asked.
        nfe: decoder evaluations over all chunks.
        layer_passes: network layers run over all chunks.
        regenerated: actions made anew by refinement, over all chunks.
        revised: tokens that each solver step changed, summed over all chunks; empty for decoders without tokens.
        repaired: chunks whose tokens did not describe one exactly.
    """

    env: str
    compute: str
    seed: int
    instruction: str
    success: bool
    first_success_step: int | None
    steps: int
    chunks: int
    nfe: int
    layer_passes: int
    regenerated: int
    revised: tuple[int, ...] = ()
    repaired: int = 0


def plan(
    envs: Sequence[str], computes: Sequence[ComputePolicy], episodes: int, first_seed: int = FIRST_SEED
) -> list[EpisodeJob]:
    """The jobs of an evaluation: every compute policy on the same seeds ``first_seed + i`` of every environment."""
    if episodes < 1:
        raise ConfigError(f"An evaluation needs at least one episode, got {episodes}.")
    seeds = range(first_seed, first_seed + episodes)
    return [EpisodeJob(env, compute, seed) for env in envs for seed in seeds for compute in computes]


def evaluate(
    checkpoint: Path | str,
    jobs: Sequence[EpisodeJob],
    config: RolloutConfig = RolloutConfig(),
    *,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
    finished: Callable[[int, Episode], None] | None = None,
) -> list[Episode]:
    """Run episodes on several processes; results in the order of the jobs, the same at any number of workers.

    Args:
        checkpoint: folder or Hub repository.
        jobs: see ``plan``.
        config: the same for all jobs.
        workers: processes; 0 runs in this one.
        progress: called with (done, total).
        finished: called with a job's number and its episode as soon as it has ended.

    Raises:
        SpecError, CapabilityError, ConfigError: before the first episode, when checkpoint, environment and compute policy do
            not fit together.
    """
    folder = local_folder(checkpoint)
    policy = Policy.from_pretrained(folder)
    require_fit(policy, str(checkpoint), {job.env for job in jobs}, [job.compute for job in jobs], config)
    config = replace(config, n_action_steps=config.n_action_steps or policy.config.n_action_steps)
    play = functools.partial(_play_job, config=config)
    with one_thread():
        setup = functools.partial(_open, str(folder), config.device)
        return run_jobs(play, jobs, workers, setup=setup, progress=progress, finished=finished)


def play(
    policy: Policy,
    env: Environment,
    job: EpisodeJob,
    config: RolloutConfig,
    *,
    look: Look | None = None,
    after: Look | None = None,
) -> Episode:
    """One episode in this process.

    Args:
        policy: acts.
        env: reset here; the environment named in the job.
        job: what to run.
        config: how.
        look: sees every observation with the chunk that answered it, before it is executed.
        after: sees the same after the chunk was executed, with the number of steps done.
    """
    from vlaflow.simulators.chunks import ChunkEnv

    n_action_steps = config.n_action_steps or policy.config.n_action_steps
    chunked = ChunkEnv(env, n_action_steps, max_steps=job.max_steps or config.max_steps)
    chunked.restart(job.seed)
    chunks = nfe = layer_passes = regenerated = repaired = steps = 0
    revised: tuple[int, ...] = ()
    while True:
        seen = chunked.observe()
        if job.instruction is not None:
            seen = replace(seen, instruction=job.instruction)
        chunk = policy.act(seen, job.compute, generator=chunk_generator(job.seed, chunks))
        if look:
            look(steps, seen, chunk)
        done = chunked.execute(chunk.actions)
        steps += done.steps
        chunks += 1
        nfe += chunk.nfe
        layer_passes += chunk.layer_passes
        regenerated += 0 if chunk.regenerated is None else int(chunk.regenerated.sum())
        revised = tuple(a + b for a, b in zip_longest(revised, chunk.revised, fillvalue=0))
        repaired += chunk.repaired
        if after:
            after(steps, seen, chunk)
        if done.done:
            break
    first = int(done.info["first_success_step"])
    return Episode(
        env=job.env,
        compute=job.compute.name,
        seed=job.seed,
        instruction=seen.instruction,
        success=first > 0,
        first_success_step=first if first > 0 else None,
        steps=steps,
        chunks=chunks,
        nfe=nfe,
        layer_passes=layer_passes,
        regenerated=regenerated,
        revised=revised,
        repaired=repaired,
    )


def chunk_generator(seed: int, chunk: int) -> Generator:
    """The noise of chunk number ``chunk`` in the episode of ``seed``."""
    return Generator().manual_seed(chunk_seed(seed, chunk))


def chunk_seed(seed: int, chunk: int) -> int:
    """Seed of that noise, below 2⁶³; NumPy's SeedSequence keeps neighbours apart."""
    return int(np.random.SeedSequence((seed, chunk)).generate_state(1, np.uint64)[0] >> 1)


def require_fit(
    policy: Policy, checkpoint: str, envs: set[str], computes: Sequence[ComputePolicy], config: RolloutConfig
) -> None:
    """Refuse what cannot work, before anything runs.

    Raises:
        SpecError: when actions, state or views mean something else to the environment.
        CapabilityError: when the checkpoint lacks what a compute policy needs.
        ConfigError: for an unknown environment or an impossible ``n_action_steps`` or ``max_steps``.
    """
    chunk_size = policy.config.decoder.chunk_size
    if config.n_action_steps is not None and not 1 <= config.n_action_steps <= chunk_size:
        raise ConfigError(
            f"{checkpoint} makes chunks of {chunk_size} actions, so 1 to {chunk_size} can be executed, not "
            f"{config.n_action_steps}."
        )
    for env in sorted(envs):
        spec = simulator_spec(parse_env_name(env)[0])
        policy.action_spec.require_match(spec.action, f"checkpoint {checkpoint}", f"environment {env}")
        state = len(policy.stats["state"].mean)
        if state != len(spec.state_names):
            raise SpecError(f"{checkpoint} expects a state of length {state}; that of {env} has {len(spec.state_names)}.")
        for view in policy.model.backbone.views:
            if view not in spec.views:
                raise SpecError(f"{checkpoint} looks at view '{view}', which {env} lacks; {nearest(view, spec.views)}")
        if config.max_steps is not None and not 1 <= config.max_steps <= spec.max_steps:
            raise ConfigError(f"max_steps of {env} must lie in 1..{spec.max_steps}, got {config.max_steps}.")
    for compute in computes:
        compute.needs.check(policy.model, compute.name)


def open_env(policy: Policy, name: str, render: Render) -> Environment:
    """The environment of this process whose image has the size that the policy looks at."""
    return cached(name, render=render, size=max((s for s in policy.model.backbone.views.values() if s), default=None))


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread inside, as workers do; the sums of a matrix product depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _open(folder: str, device: str) -> Policy:
    return Policy.from_pretrained(folder, device)


def _play_job(job: EpisodeJob, policy: Policy, *, config: RolloutConfig) -> Episode:
    return play(policy, open_env(policy, job.env, config.render), job, config)
