"""A policy that plays a fixed script, and scripts of LIBERO's experts from the stored states: evaluations need no training."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from vlaflow.backbones.tiny import TinyConfig
from vlaflow.data.stats import FeatureStats
from vlaflow.decoders.flow import FlowConfig
from vlaflow.policies.base import Policy, PolicyConfig
from vlaflow.policies.seeds import chunk_seed
from vlaflow.simulators.base import Environment, simulator_spec
from vlaflow.simulators.experts import expert_for
from vlaflow.spec import Chunk, Observation

CHUNK = 8


@dataclass
class ScriptedPolicy(Policy):
    """A policy whose chunks are written down.

    It recognises the episode and the number of the chunk by the seed of the noise, so it only plays where the noise is seeded
    as in ``vlaflow eval``; elsewhere the hand keeps still.

    Args:
        script: (8, D) by instruction and seed of the chunk's noise.
    """

    script: dict[tuple[str, int], np.ndarray] = field(default_factory=dict)

    def act(self, observation, compute=None, *, generator=None, **_):
        """See ``Policy.act``."""
        if isinstance(observation, Observation):
            return self._written(observation, generator)
        return [self._written(each, noise) for each, noise in zip(observation, generator, strict=True)]

    def _written(self, observation, generator):
        still = np.zeros((CHUNK, self.action_spec.dim), np.float32)
        return Chunk(self.script.get((observation.instruction, generator.initial_seed()), still))

    def write(self, instruction, seed, actions_TD):
        """Write down the actions of one episode."""
        for chunk in range(0, len(actions_TD), CHUNK):
            part = actions_TD[chunk : chunk + CHUNK]
            rest = np.repeat(part[-1:], CHUNK - len(part), axis=0)
            self.script[instruction, chunk_seed(seed, chunk // CHUNK)] = np.concatenate((part, rest))


def blank_policy(suite: str, size: int) -> ScriptedPolicy:
    """A policy for the suite that sees its images at ``size`` pixels, with an empty script."""
    spec = simulator_spec(suite)
    config = PolicyConfig(
        system="script",
        backbone=TinyConfig(len(spec.state_names), spec.views, size, cell=64, width=32, depth=1, heads=2, ffn=64),
        decoder=FlowConfig(action_dim=spec.action.dim, chunk_size=CHUNK),
        n_action_steps=CHUNK,
    )
    random = np.random.default_rng(0)
    stats = {
        "state": FeatureStats.of(random.normal(size=(50, len(spec.state_names)))),
        "action": FeatureStats.of(random.uniform(-1, 1, (50, spec.action.dim))),
    }
    made = Policy.create(config, spec.action, stats, seed=0)
    return ScriptedPolicy(made.config, made.action_spec, made.stats, made.model)


def expert_actions(env: Environment, name: str, seed: int) -> np.ndarray:
    """The actions of the expert from the start of the seed, (T, D), until success or the step limit."""
    expert, actions, over = expert_for(name), [], False
    env.restart(seed)
    while not over:
        actions.append(np.clip(expert(env), env.action_spec.low, env.action_spec.high))
        _, success, truncated, _ = env.advance(actions[-1])
        over = success or truncated
    return np.array(actions, np.float32)
