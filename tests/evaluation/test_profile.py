"""What the parts of a chunk are measured to take, against whole chunks, where every layer takes a millisecond."""

from dataclasses import replace

import pytest
import torch

from tests import helpers
from tests.decoders import test_latent_flow as latent
from vlaflow.compute.dense import Dense
from vlaflow.compute.early_exit import EarlyExit, ExitPlan
from vlaflow.decoders.exits import ExitTraining
from vlaflow.evaluation import profile as profiling
from vlaflow.flows.sampling import Sampling
from vlaflow.policies.base import Policy
from vlaflow.stacks.base import blocks_of


def with_exits(config):
    stats = {"state": helpers.feature_stats(4, 1), "action": helpers.feature_stats(4, 2)}
    made = Policy.create(replace(config, exits=ExitTraining((1, 2))), helpers.action_spec(), stats, 0)
    made.model.eval()
    return made


POLICIES = {
    "flow": lambda: with_exits(helpers.policy_config()),
    "latent codes in one pass": lambda: with_exits(latent.policy("parallel").config),
    "latent codes one after the other": lambda: with_exits(latent.policy("autoregressive").config),
}


@pytest.mark.parametrize("kind", POLICIES)
def test_a_chunk_takes_what_its_parts_were_measured_to_take(kind, monkeypatch):
    """Also with other numbers of steps than were timed, and at worst through both exits: what comes before the first step of a
    chunk comes once for each."""
    policy, layers = POLICIES[kind](), [0]
    for block, method in blocks_of(policy.model).items():
        run = getattr(block, method)
        monkeypatch.setattr(
            block, method, lambda *given, run=run, **more: layers.append(layers.pop() + 1) or run(*given, **more)
        )
    monkeypatch.setattr(profiling, "_now", lambda device: layers[0] / 1e3)
    threads = torch.get_num_threads()
    found = profiling.profile(policy, "c", rounds=20, threads=threads)

    def taken(compute):
        before = layers[0]
        policy.act(helpers.observation(), compute)
        return layers[0] - before

    for steps in (1, 2, 10):
        assert found.dense(2, steps) == pytest.approx(taken(Dense(steps)))
        assert found.dense(1, steps) == pytest.approx(taken(Dense(steps, depth=1)))
        late = EarlyExit(ExitPlan((1, 2), sampling=Sampling(steps)), (float("inf"),))
        assert found.worst((1, 2), steps) == pytest.approx(taken(late))


def test_operations_are_counted_where_a_module_is_given_a_view_of_a_weight():
    """As a decoder of another package gives its learned queries to the backbone's layers; weights learn as before."""
    policy = helpers.policy()
    decoder = policy.model.decoder
    decoder.query, decoder.mixed = torch.nn.Parameter(torch.ones(1, 8)), torch.nn.Linear(8, 8)
    plain, advance = profiling.count(policy, Dense(1), [helpers.observation()]), decoder.advance

    def querying(state, prefix, steps=1):
        decoder.mixed(decoder.query.expand(5, -1))
        return advance(state, prefix, steps)

    decoder.advance = querying
    found = profiling.count(policy, Dense(1), [helpers.observation()])
    assert found.gflop - plain.gflop == pytest.approx(2 * 5 * 8 * 8 / 1e9)
    assert all(weight.requires_grad for weight in policy.model.parameters())
