"""Refinement's options: which actions count, where doubted ones go back to, and where doubt comes from."""

from functools import partial

import numpy as np
import pytest
import torch

from tests import helpers
from tests.compute.test_compute import decode, rate
from vlaflow.compute.base import Stopwatch
from vlaflow.compute.consensus import Consensus
from vlaflow.compute.dense import Dense
from vlaflow.compute.doubts import AtRandom, BelowThreshold, Draft, Spread
from vlaflow.compute.parse import parse
from vlaflow.compute.refine import DRAWS, Refine
from vlaflow.decoders.base import Conditioning
from vlaflow.decoders.discrete_flow import DiscreteFlowConfig
from vlaflow.decoders.masked_diffusion import MaskedDiffusionConfig
from vlaflow.errors import ConfigError
from vlaflow.evaluation.rollout import RolloutConfig, _computing
from vlaflow.flows.sampling import Sampling
from vlaflow.spec import ActionPrefix

POLICY = helpers.policy(rater=True)
LOW = [[0.1] * 6] * 2


def test_actions_that_are_not_executed_stay_to_the_bit(monkeypatch):
    rate(monkeypatch, POLICY, LOW)
    out = decode(POLICY, Refine(executed=2))
    assert out.regenerated_BL.tolist() == [[True] * 2 + [False] * 4] * 2
    assert torch.equal(out.action_BLD[:, 2:], out.draft_BLD[:, 2:])
    assert (out.action_BLD != out.draft_BLD)[:, :2].all()


def test_executed_actions_are_counted_after_the_committed_ones(monkeypatch):
    rate(monkeypatch, POLICY, [[0.1] * 6])
    given = Conditioning(torch.randn(1, 6, 4), torch.tensor([[0.0, 0, 1, 1, 1, 1]]))
    out = decode(POLICY, Refine(executed=3), 1, given)
    assert out.regenerated_BL.tolist() == [[False, False, True, True, True, False]]


def test_executed_actions_are_counted_after_those_that_guidance_commits():
    """They are executed whatever the chunk says, as those at clock 0 are."""
    given = ActionPrefix(np.full((5, 4), 0.25, np.float32), 2)
    chunk = POLICY.act(helpers.observation(), Refine(AtRandom(1.0), Sampling(2)), action_prefix=given, guided=True)
    assert chunk.regenerated.tolist() == [False, False, True, True, True, False]


def test_a_chunk_whose_doubts_are_all_beyond_the_executed_actions_costs_nothing_more(monkeypatch):
    rate(monkeypatch, POLICY, [[0.9, 0.9, 0.9, 0.1, 0.1, 0.1]] * 2)
    out = decode(POLICY, Refine(executed=3))
    assert out.nfe == decode(POLICY, Dense()).nfe
    assert torch.equal(out.action_BLD, out.draft_BLD)


def test_a_policy_regenerates_what_it_executes_unless_told_otherwise():
    """The helper's policy executes three of six actions."""
    chunk = POLICY.act(helpers.observation(), Refine(AtRandom(1.0)))
    assert chunk.regenerated.tolist() == [True] * 3 + [False] * 3
    assert POLICY.act(helpers.observation(), Refine(AtRandom(1.0), executed=5)).regenerated.sum() == 5
    inside = POLICY.act(helpers.observation(), Consensus(1, inner=Refine(AtRandom(1.0))))
    np.testing.assert_array_equal(inside.actions, chunk.actions)


def test_an_evaluation_says_how_many_actions_it_executes():
    job = type("Job", (), {"compute": Refine(AtRandom(1.0))})()
    assert _computing(POLICY, job, RolloutConfig(n_action_steps=4)).executed == 4
    assert _computing(POLICY, job, RolloutConfig()).executed == 3


def test_going_back_to_clock_one_is_making_from_noise_to_the_bit():
    """Noise, doubt and solver are those of a second round that starts from noise on the doubted actions."""
    out = decode(POLICY, Refine(AtRandom(0.5), Sampling(4), clock=1.0))
    drawn = helpers.generators(2)
    for generator in drawn:
        torch.randn(6, 4, generator=generator)  # the first round's noise
        torch.rand(6, generator=generator)  # the mask
    begin = Conditioning(out.draft_BLD, out.regenerated_BL.float())
    with torch.no_grad():
        again_BLD = POLICY.model.decoder.sample(out.groups[0].prefix, drawn, Sampling(4), begin)
    assert torch.equal(out.action_BLD, again_BLD)


def test_the_less_noise_a_doubted_action_gets_the_nearer_it_stays():
    """From clock t the noise has t of its weight: in the limit of no noise nothing moves."""
    moved = [
        float((out.action_BLD - out.draft_BLD).abs().mean())
        for out in (decode(POLICY, Refine(AtRandom(1.0), Sampling(4), clock=clock)) for clock in (1.0, 0.5, 0.1, 0.001))
    ]
    assert moved == sorted(moved, reverse=True)
    assert moved[-1] < 0.01


def test_random_doubt_regenerates_the_stated_share_and_repeats_with_its_seed():
    """4 standard deviations of 600 binomial draws."""
    draft = Draft(POLICY.model, None, helpers.generators(100), torch.zeros(100, 6, 4), None, Stopwatch(POLICY.device))
    found = AtRandom(0.25).judge(draft).doubted
    assert abs(float(found.float().mean()) - 0.25) < 4 * (0.25 * 0.75 / 600) ** 0.5
    again = Draft(POLICY.model, None, helpers.generators(100), torch.zeros(100, 6, 4), None, Stopwatch(POLICY.device))
    assert torch.equal(found, AtRandom(0.25).judge(again).doubted)


def test_a_single_chunk_is_doubted_by_the_spread_of_draws_of_its_own():
    """The draws are counted, reported and judge the chunk; without noise it has no spread of its own."""
    first = Dense(3, noise_scale=0)
    out = decode(POLICY, Refine(Spread(0.0, Consensus(4, inner=Dense(2))), Sampling(2), first))
    depth = POLICY.model.backbone.spec.depth
    assert torch.equal(out.draft_BLD, decode(POLICY, first).action_BLD)
    assert out.regenerated_BL.all()
    assert (out.spread_BL > 0).all()
    assert out.nfe == (3 + 4 * 2 + 2,) * 2
    assert out.layer_passes == (depth * (1 + 3 + 4 * 2 + 2),) * 2
    sure = decode(POLICY, Refine(Spread(100.0, Consensus(4, inner=Dense(2))), Sampling(2), first))
    assert torch.equal(sure.action_BLD, sure.draft_BLD)


def test_the_draws_that_a_draft_is_doubted_by_continue_the_same_actions():
    """Where actions are committed, the draws have them too: nothing is in doubt there, and the others are drawn given them."""
    draws = Consensus(4, inner=Dense(2))
    given = Conditioning(torch.full((2, 6, 4), 3.0), torch.tensor([[0.0, 0, 1, 1, 1, 1]] * 2))
    out = decode(POLICY, Refine(Spread(0.0, draws), Sampling(2), Dense(3, noise_scale=0)), conditioning=given)
    assert not out.spread_BL[:, :2].any()
    drawn = helpers.generators(2)
    for generator in drawn:
        torch.randn(6, 4, generator=generator)  # the first round's noise
    with torch.no_grad():
        prefix = out.groups[0].prefix
        alone = draws.decode(POLICY.model, prefix, drawn, Stopwatch(POLICY.device), given)
    assert torch.equal(out.spread_BL, alone.spread_BL)


@pytest.mark.parametrize("decoder", [MaskedDiffusionConfig, partial(DiscreteFlowConfig, masks="unified")])
def test_actions_that_are_kept_stay_to_the_bit_where_tokens_would_round_them(decoder):
    """A mean of draws lies between bins. Kept actions are context as tokens, and come back as they were."""
    policy = helpers.token_policy(decoder, helpers.BINS)
    out = decode(policy, Refine(AtRandom(0.5), Sampling(3), Consensus(3, inner=Dense(3))), 4)
    kept_BL = ~out.regenerated_BL
    assert kept_BL.any()
    assert out.regenerated_BL.any()
    assert torch.equal(out.action_BLD[kept_BL], out.draft_BLD[kept_BL])


@pytest.mark.parametrize(
    "doubt",
    [AtRandom(1.0), Spread(0.0, Consensus(2, inner=Dense(2, temperature=1.0)))],
    ids=["at-random", "spread-of-own-draws"],
)
def test_layers_over_a_prefix_that_reads_the_tokens_are_counted_in_both_rounds(doubt):
    """Each of the steps runs prefix and tokens together: two passes through two layers."""
    policy = helpers.token_policy(partial(DiscreteFlowConfig, masks="unified", attention="full"), helpers.BINS)
    out = decode(policy, Refine(doubt, Sampling(3), Dense(4)))
    assert out.regenerated_BL.all()
    steps = 4 + 3 + (2 * 2 if isinstance(doubt, Spread) else 0)
    assert out.nfe == (steps,) * 2
    assert out.layer_passes == (2 * 2 * steps,) * 2


def test_steps_that_had_no_token_left_to_reveal_are_not_counted():
    """One action of four tokens is regenerated, so at most four of the ten steps have any work."""
    policy = helpers.token_policy(MaskedDiffusionConfig, helpers.BINS)
    out = decode(policy, Refine(AtRandom(1.0), Sampling(10), Dense(1), executed=1))
    assert out.nfe == (1 + 4,) * 2
    assert out.layer_passes == (2 * (1 + 1 + 4),) * 2


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("refine:2@0.5,clock=0.5", Refine(BelowThreshold(), Sampling(2, 0.5), Dense(2, 0.5), clock=0.5)),
        ("refine:threshold=0.3+dense:2", Refine(BelowThreshold(0.3), Sampling(10), Dense(2))),
        ("refine:5,midpoint,executed=4", Refine(BelowThreshold(), Sampling(5, solver="midpoint"), executed=4)),
        ("refine-random:2,share=0.25", Refine(AtRandom(0.25), Sampling(2), Dense(2))),
        (
            "refine-spread:2,draws=4,threshold=0.1+dense:5@0",
            Refine(Spread(0.1, Consensus(4, inner=Dense.by(DRAWS))), Sampling(2), Dense(5, 0)),
        ),
    ],
)
def test_options_follow_the_settings_of_the_sampler(name, wanted):
    found = parse(name)
    for part in ("doubt", "sampling", "clock", "executed"):
        assert getattr(found, part) == getattr(wanted, part)
    assert found.name.startswith(name.split("+")[0])


@pytest.mark.parametrize(
    "name",
    ["refine:share=0.5", "refine:2,clock=2", "refine:2,draws=4", "refine-random:threshold=1", "refine:2,clock=0.5,clock=1",
     "refine:2,executed=0", "refine:2,clock=half", "refine-spread:2,draws=4,share=1"],
)  # fmt: skip
def test_options_that_a_kind_does_not_take_are_refused(name):
    with pytest.raises(ConfigError):
        parse(name)
