"""A chunk followed step by step, and what the report shows of it."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests import helpers
from tests.reports import synthetic
from vlaflow.compute.dense import Dense
from vlaflow.compute.refine_tokens import RefineTokens
from vlaflow.compute.two_stage import TwoStage
from vlaflow.decoders.autoregressive import AutoregressiveConfig
from vlaflow.decoders.discrete_flow import DiscreteFlowConfig
from vlaflow.decoders.masked_diffusion import MaskedDiffusionConfig
from vlaflow.evaluation import results
from vlaflow.evaluation.latency import measure
from vlaflow.evaluation.results import count
from vlaflow.evaluation.revision import HIDDEN, follow
from vlaflow.evaluation.rollout import EpisodeResult
from vlaflow.reports.evaluation import write_report

SEEN = helpers.observation(3)


def generator():
    return torch.Generator().manual_seed(5)


@pytest.mark.parametrize("config", [DiscreteFlowConfig, MaskedDiffusionConfig])
def test_following_a_chunk_ends_at_the_chunk_that_the_policy_makes(config):
    policy, compute = helpers.token_policy(config), Dense(6)
    found = follow(policy, [compute], SEEN, generator())
    chunk = policy.act(SEEN, compute, generator=generator())
    assert len(found.tokens) == len(found.actions) == 7
    assert found.tokens[-1] == tuple(chunk.tokens.tolist())
    np.testing.assert_allclose(found.probability[-1], chunk.token_probability, atol=1e-6)
    np.testing.assert_allclose(np.clip(found.actions[-1], -1, 1), chunk.actions, atol=1e-6)
    changed = (np.array(found.tokens)[1:] != np.array(found.tokens)[:-1]).sum(1)
    if config is DiscreteFlowConfig:
        assert tuple(changed) == chunk.revised
    else:
        assert all(t == HIDDEN for t in found.tokens[0])
        assert HIDDEN not in found.tokens[-1]


def test_the_two_stage_policy_is_followed_where_there_is_one():
    policy = helpers.token_policy(DiscreteFlowConfig)
    found = follow(policy, [Dense(6), TwoStage(4, 2, label="two-stage:4+2")], SEEN, generator())
    assert (found.compute, found.settling, len(found.tokens)) == ("two-stage:4+2", 2, 7)
    assert found.tokens[-1] == tuple(policy.act(SEEN, TwoStage(4, 2), generator=generator()).tokens.tolist())


def test_decoders_that_revise_nothing_are_not_followed():
    assert follow(helpers.policy(), [Dense(3)], SEEN, generator()) is None
    assert follow(helpers.token_policy(AutoregressiveConfig), [Dense(3)], SEEN, generator()) is None
    assert follow(helpers.token_policy(DiscreteFlowConfig), [RefineTokens()], SEEN, generator()) is None


def test_the_report_shows_the_revision_and_the_tokens_changed_step_by_step(tmp_path):
    policy = helpers.token_policy(DiscreteFlowConfig)
    found = follow(policy, [TwoStage(4, 2, label="two-stage:4+2")], SEEN, generator())
    made = synthetic.results()
    revising = tuple(replace(e, revised_per_chunk=(5.0, 3.0, 1.0)) for e in made.evaluations)
    results.write(replace(made, revision=found, evaluations=revising), tmp_path / "results.json")
    assert results.read(tmp_path / "results.json").revision == found
    page = write_report(tmp_path).read_text()
    assert 'id="tokens"' in page
    assert "two-stage:4+2" in page
    assert SEEN.instruction in page
    for label in ("token slot", "tokens changed, mean", "action of the chunk"):
        assert label in page
    results.write(made, tmp_path / "results.json")
    assert 'id="tokens"' not in write_report(tmp_path).read_text()


def test_the_error_of_an_adaptive_cache_is_measured_and_reported(tmp_path):
    policy = helpers.token_policy(DiscreteFlowConfig, attention="full")
    with torch.no_grad():  # an untrained network hardly looks at what it is given
        for parameter in policy.model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
    computes = [TwoStage(5, 1, refresh, label=f"two-stage:5+1/{refresh}") for refresh in (0.0, 1.0)]
    exact, adaptive = measure(policy, computes, [helpers.observation(i) for i in range(4)], 4, 1)
    assert exact.drift == 0
    assert adaptive.drift > 0
    blind = measure(helpers.token_policy(DiscreteFlowConfig), computes, [SEEN], 2, 1)
    assert [entry.drift for entry in blind] == [None, None]
    made = synthetic.results()
    results.write(replace(made, latency=(replace(made.latency[0], drift=0.0123), *made.latency[1:])), tmp_path / "results.json")
    assert "0.0123 on average" in write_report(tmp_path).read_text()


def test_revisions_and_repairs_are_counted_over_chunks():
    def episode(seed, revised, repaired):
        return EpisodeResult("metaworld/drawer-open-v3", "dense", seed, "x", True, 5, 5, 2, 20, 40, 0, revised, repaired)

    (entry,) = count(
        [episode(0, (8, 4), 1), episode(1, (4, 2, 6), 0)], [], n_action_steps=8, max_steps=500, render="fast", solver_steps=10
    )
    assert entry.revised_per_chunk == (3.0, 1.5, 1.5)
    assert entry.repaired_share == 0.25
