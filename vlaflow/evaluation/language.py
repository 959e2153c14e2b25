"""Does the policy listen? The same seeds under the right instruction, another task's, and none.

A policy that succeeds whatever it is told recognises the scene and ignores the sentence; one that fails without its
instruction listens. Neither is a fault by itself, but only the second can be told what to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vlaflow.compute.base import ComputePolicy
from vlaflow.errors import ConfigError
from vlaflow.evaluation.results import LanguageResult
from vlaflow.evaluation.rollout import FIRST_SEED, Episode, EpisodeJob
from vlaflow.evaluation.statistics import wilson
from vlaflow.simulators.base import parse_env_name, simulator_spec

KINDS = ("right", "other", "empty")


@dataclass(frozen=True)
class LanguageTest:
    """What the language-swap test runs.

    Args:
        jobs: "other" and "empty" episodes, to be run.
        envs, seeds: what is compared; the "right" episodes come from the evaluation itself.
        said: the words, by (environment, kind).
    """

    jobs: tuple[EpisodeJob, ...]
    envs: tuple[str, ...]
    seeds: tuple[int, ...]
    said: dict[tuple[str, str], str]


def plan_swap(
    envs: Sequence[str], compute: ComputePolicy, episodes: int, first_seed: int = FIRST_SEED, max_steps: int | None = None
) -> LanguageTest:
    """Swap the instructions of ``envs`` in a circle; a single one borrows the sentence of another task of its suite."""
    if episodes < 1:
        raise ConfigError(f"The language-swap test needs at least one episode, got {episodes}.")
    seeds, said, jobs = tuple(range(first_seed, first_seed + episodes)), {}, []
    for number, env in enumerate(envs):
        right = _instruction(env)
        others = [_instruction(e) for e in (*envs[number + 1 :], *envs[:number])]
        others += list(simulator_spec(parse_env_name(env)[0]).tasks.values())
        said[env, "right"], said[env, "empty"] = right, ""
        said[env, "other"] = next((o for o in others if o != right), "Do something else")
        jobs += [EpisodeJob(env, compute, seed, said[env, kind], max_steps) for kind in ("other", "empty") for seed in seeds]
    return LanguageTest(tuple(jobs), tuple(envs), seeds, said)


def count_swap(
    test: LanguageTest, right: Sequence[Episode], swapped: Sequence[Episode], max_steps: int
) -> tuple[LanguageResult, ...]:
    """Successes within ``max_steps`` steps, for every environment and kind of instruction.

    Args:
        test: what was run.
        right: episodes of the evaluation with the same compute policy; those of other seeds are left out.
        swapped: outcomes of ``test.jobs``.
        max_steps: that of the swapped episodes.
    """
    found = []
    for env in test.envs:
        for kind in KINDS:
            words = test.said[env, kind]
            pool = right if kind == "right" else swapped
            mine = {e.seed: e.first_success_step for e in pool if e.env == env and e.instruction == words}
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
