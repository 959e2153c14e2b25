"""Robots of different states, actions, rates and views, and the config of a policy for two of them."""

from dataclasses import replace

import numpy as np

from tests.training.small import SPEC, tiny_config, tiny_policy
from vlaflow.data.writer import Writer
from vlaflow.decoders.flow import FlowConfig
from vlaflow.policies.objectives import PolicyObjective
from vlaflow.spec import Dimension

WIDE = replace(
    SPEC,
    robot="wide arm",
    dimensions=tuple(Dimension(name, "rad", "joint", -9.0, 9.0, "up") for name in "abc"),
    rate_hz=20,
)


def write_wide(root):
    """Four episodes of another robot: three joints at twice the rate, four numbers of state, a second view."""
    views = {"front": (32, 32), "wrist": (32, 32)}
    with Writer(root, fps=20, action_spec=WIDE, state_names=tuple("abcg"), views=views, robot_type="w", provenance={}) as out:
        for episode in range(4):
            rng = np.random.default_rng([7, episode])
            images = {view: rng.integers(0, 256, (8, 32, 32, 3), np.uint8) for view in views}
            state = rng.normal(5, 2, (8, 4)).astype(np.float32)
            out.add(images, state, rng.uniform(-9, 9, (8, 3)).astype(np.float32), "lift the lid")
    return root


def write_twin(root, names, views, seed=0):
    """Four episodes of a robot of ``SPEC``, with a state of these names around ten times the seed."""
    sizes = dict.fromkeys(views, (32, 32))
    with Writer(root, fps=10, action_spec=SPEC, state_names=tuple(names), views=sizes, robot_type="t", provenance={}) as out:
        for episode in range(4):
            rng = np.random.default_rng([seed, episode])
            images = {view: rng.integers(0, 256, (9, 32, 32, 3), np.uint8) for view in views}
            state = rng.normal(10 * seed, 1, (9, len(names))).astype(np.float32)
            out.add(images, state, rng.uniform(-1, 1, (9, 2)).astype(np.float32), "push")
    return root


def mixed_config(decoder=None, **changes):
    policy = tiny_policy(views=("front", "wrist"))
    decoder = decoder or FlowConfig(action_dim=3, chunk_size=4)
    policy = replace(policy, backbone=replace(policy.backbone, state_dim=4), decoder=decoder)
    return tiny_config(objective=PolicyObjective(policy), steps=4, validation_fraction=0.3, **changes)
