"""A policy of 32 numbers' width that knows nothing: enough to run episodes with."""

import numpy as np
import pytest
import torch

from tests.evaluation.latents import root
from vlaflow.backbones.tiny import TinyConfig
from vlaflow.data.stats import FeatureStats
from vlaflow.decoders.flow import FlowConfig
from vlaflow.decoders.rater import RaterConfig
from vlaflow.nn.block import BlockConfig
from vlaflow.policies.base import Policy, PolicyConfig
from vlaflow.simulators.base import simulator_spec

__all__ = ["root"]
ENV = "metaworld/drawer-open-v3"


def make_policy(masks="unified", rater=True):
    spec = simulator_spec("metaworld").action
    config = PolicyConfig(
        system="asyncvla",
        backbone=TinyConfig(state_dim=4, views=("image",), image_size=32, width=32, depth=1, heads=2, ffn=64),
        decoder=FlowConfig(action_dim=4, chunk_size=8, masks=masks),
        n_action_steps=4,
    )
    random = np.random.default_rng(0)
    stats = {"state": FeatureStats.of(random.normal(size=(50, 4))), "action": FeatureStats.of(random.uniform(-1, 1, (50, 4)))}
    policy = Policy.create(config, spec, stats, seed=0)
    if not rater:
        return policy
    policy = policy.with_rater(RaterConfig(BlockConfig(32, 2, 2, 16, 64), 1), seed=1)
    with torch.no_grad():  # a rater that doubts about half
        policy.model.rater.rate.weight.mul_(50)
    return policy


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    make_policy().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def bare_checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bare")
    make_policy(rater=False).save_pretrained(folder)
    return folder
