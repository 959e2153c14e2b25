"""Whether the policy follows its instruction: the same seeds with the right instruction, another task's, and none.

A policy that succeeds with any instruction recognises the scene and ignores the instruction; one that fails without the right
instruction follows it. Neither is an error, but only the second can be instructed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vlaflow.compute.base import ComputePolicy
from vlaflow.errors import ConfigError
from vlaflow.evaluation.results import LanguageResult
from vlaflow.evaluation.rollout import EpisodeJob, EpisodeResult
from vlaflow.evaluation.statistics import wilson
from vlaflow.policies.seeds import FIRST_SEED
from vlaflow.simulators.base import parse_env_name, simulator_spec

KINDS = ("right", "other", "empty")


@dataclass(frozen=True)
class LanguageTest:
    """The episodes of the language-swap test.

    Args:
        jobs: the "other" and "empty" episodes to run.
        envs, seeds: environments and seeds; the "right" episodes are those of the evaluation itself.
        instructions: instructions by (environment, kind).
    """

    jobs: tuple[EpisodeJob, ...]
    envs: tuple[str, ...]
    seeds: tuple[int, ...]
    instructions: dict[tuple[str, str], str]


def plan_swap(
    envs: Sequence[str], compute: ComputePolicy, episodes: int, first_seed: int = FIRST_SEED, max_steps: int | None = None
) -> LanguageTest:
    """Swap the instructions of ``envs`` cyclically; a single environment gets that of another task of its suite."""
    if episodes < 1:
        raise ConfigError(f"The language-swap test needs at least one episode, got {episodes}.")
    seeds, instructions, jobs = tuple(range(first_seed, first_seed + episodes)), {}, []
    for number, env in enumerate(envs):
        right = _instruction(env)
        others = [_instruction(e) for e in (*envs[number + 1 :], *envs[:number])]
        others += list(simulator_spec(parse_env_name(env)[0]).tasks.values())
        instructions[env, "right"], instructions[env, "empty"] = right, ""
        instructions[env, "other"] = next((o for o in others if o != right), "Do something else")
        jobs += [
            EpisodeJob(env, compute, seed, instructions[env, kind], max_steps) for kind in ("other", "empty") for seed in seeds
        ]
    return LanguageTest(tuple(jobs), tuple(envs), seeds, instructions)


def count_swap(
    test: LanguageTest, right: Sequence[EpisodeResult], swapped: Sequence[EpisodeResult], max_steps: int
) -> tuple[LanguageResult, ...]:
    """Count successes within ``max_steps`` steps, for every environment and kind of instruction.

    Args:
        test: the test.
        right: episodes of the evaluation with the same compute policy; those with other seeds or noise seeds are ignored.
        swapped: results of ``test.jobs``.
        max_steps: step limit of the swapped episodes.
    """
    found = []
    for env in test.envs:
        for kind in KINDS:
            words = test.instructions[env, kind]
            pool = right if kind == "right" else swapped
            mine = {e.seed: e.first_success_step for e in pool if (e.env, e.instruction, e.noise_seed) == (env, words, 0)}
            if any(seed not in mine for seed in test.seeds):
                raise ConfigError(f"The language-swap test of {env} needs the seeds {list(test.seeds)}; some were not run.")
            firsts = tuple(step if step is not None and step <= max_steps else None for step in (mine[s] for s in test.seeds))
            successes = sum(step is not None for step in firsts)
            interval = wilson(successes, len(firsts))
            found.append(
                LanguageResult(
                    env, kind, words, len(firsts), successes, (interval.low, interval.high), test.seeds, firsts, max_steps
                )
            )
    return tuple(found)


def _instruction(env: str) -> str:
    suite, task = parse_env_name(env)
    return simulator_spec(suite).tasks[task]
