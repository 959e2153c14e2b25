"""A policy of 32 numbers' width that knows nothing: enough to run episodes with."""

import json

import numpy as np
import pytest
import torch

from tests.evaluation.latents import root
from tests.training.ranks import forked
from vlaflow.backbones.tiny import TinyConfig
from vlaflow.compute.spelling import Knobs
from vlaflow.data.stats import FeatureStats
from vlaflow.decoders.flow import FlowConfig
from vlaflow.decoders.rater import RaterConfig
from vlaflow.evaluation import prepared
from vlaflow.evaluation.config import EvaluationConfig
from vlaflow.evaluation.prepared import RESULTS
from vlaflow.evaluation.rollout import RolloutConfig
from vlaflow.evaluation.run import run
from vlaflow.nn.block import BlockConfig
from vlaflow.policies.base import Policy, PolicyConfig
from vlaflow.simulators import workers
from vlaflow.simulators.base import simulator_spec

__all__ = ["root"]
ENV = "metaworld/drawer-open-v3"
CONFIG = EvaluationConfig(
    (ENV,),
    ("dense", "refine", "refine-random"),
    episodes=2,
    knobs=Knobs(2),
    rollout=RolloutConfig(max_steps=12),
    latency_chunks=1,
    language_episodes=1,
    videos=False,
    workers=0,
)
"""Eight short episodes in five blocks."""
TIMES = ("minutes", "latency", "command", "commands")


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


@pytest.fixture
def few_timed(monkeypatch):
    """Evaluations time two chunks of every compute policy instead of sixty."""
    measure = prepared.measure
    monkeypatch.setattr(
        prepared,
        "measure",
        lambda policy, computes, seen, chunks, **settings: measure(policy, computes, seen, min(chunks, 2), **settings),
    )


@pytest.fixture
def forked_workers(monkeypatch):
    """Workers begin with torch imported, which takes longer than a test's episodes; others are started as in use."""
    context = forked()
    monkeypatch.setattr(workers.multiprocessing, "get_context", lambda _: context)


@pytest.fixture(scope="session")
def bare_checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bare")
    make_policy(rater=False).save_pretrained(folder)
    return folder


def untimed(folder):
    """The bytes of the results file without measured times and the words of the command."""
    found = {name: value for name, value in json.loads((folder / RESULTS).read_text()).items() if name not in TIMES}
    for entry in found["evaluations"]:
        entry.pop("latency_ms")
    return json.dumps(found, indent=1).encode()


@pytest.fixture(scope="session")
def whole(checkpoint, tmp_path_factory):
    """The results of an evaluation that nothing interrupts, in one process."""
    out = tmp_path_factory.mktemp("whole")
    run(checkpoint, CONFIG, out)
    return untimed(out)
