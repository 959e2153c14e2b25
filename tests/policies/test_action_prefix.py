"""Chunks that continue the chunk before them: real-time chunking, by clocks and by guidance."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests import helpers
from vlaflow.compute.dense import Dense
from vlaflow.compute.doubts import AtRandom
from vlaflow.compute.early_exit import EarlyExit, ExitPlan
from vlaflow.compute.refine import Refine
from vlaflow.compute.two_stage import TwoStage
from vlaflow.data.batch import Executed
from vlaflow.decoders.autoregressive import AutoregressiveConfig
from vlaflow.decoders.discrete_flow import DiscreteFlowConfig
from vlaflow.decoders.exits import ExitTraining
from vlaflow.decoders.flow import FlowConfig
from vlaflow.errors import CapabilityError, ConfigError, SpecError
from vlaflow.flows import gaussian
from vlaflow.flows.sampling import Sampling
from vlaflow.policies.base import Policy
from vlaflow.spec import ActionPrefix

TRAINED = helpers.policy(masks="synchronous", max_action_prefix=3)
UNTRAINED = helpers.policy(masks="synchronous")
BINS = helpers.token_policy(DiscreteFlowConfig, helpers.BINS, masks="unified")
ONE_ACTION = Policy.create(
    replace(helpers.policy_config(), decoder=FlowConfig(4, 1), n_action_steps=1), helpers.action_spec(), UNTRAINED.stats, seed=0
)


def action_prefix(count=2, known=4, seed=5):
    return ActionPrefix(np.random.default_rng(seed).uniform(-0.9, 0.9, (known, 4)).astype(np.float32), count)


def act(policy, action_prefix=None, compute=None, seed=1, **more):
    return policy.act(helpers.observation(seed), compute or Dense(3), action_prefix=action_prefix, **more).actions


@pytest.mark.parametrize(
    ("policy", "compute", "guided"),
    [
        (TRAINED, Dense(3), False),
        (TRAINED, Dense(3), True),
        (UNTRAINED, Dense(3), False),
        (helpers.policy(), Refine(AtRandom(0.9), Sampling(3)), False),
        (BINS, TwoStage(2, 1), False),
    ],
)
def test_committed_actions_come_back_to_the_bit(policy, compute, guided):
    given = action_prefix()
    actions = act(policy, given, compute, guided=guided)
    np.testing.assert_array_equal(actions[:2], given.actions[:2])
    assert (actions[2:4] != given.actions[2:]).any()


@pytest.mark.parametrize("policy", [TRAINED, UNTRAINED, helpers.policy()])
def test_what_follows_depends_on_what_is_committed(policy):
    assert (act(policy, action_prefix(seed=5))[2:] != act(policy, action_prefix(seed=6))[2:]).any()


def test_what_is_regenerated_is_guided_like_the_first_round():
    """Regenerated without it, the chunk would continue nothing, and its committed beginning would end in a jump."""
    policy, compute = helpers.policy(), Refine(AtRandom(1.0), Sampling(3))
    one, other = (act(policy, action_prefix(seed=seed), compute, guided=True) for seed in (5, 6))
    assert (one[2:] != other[2:]).any()


def test_only_guidance_looks_beyond_the_committed_actions():
    one, other = action_prefix(), action_prefix()
    other.actions[3] += 0.5
    np.testing.assert_array_equal(act(TRAINED, one), act(TRAINED, other))
    assert (act(TRAINED, one, guided=True)[2:] != act(TRAINED, other, guided=True)[2:]).any()


@pytest.mark.parametrize("policy", [TRAINED, UNTRAINED])
def test_a_neighbour_in_the_batch_changes_nothing(policy):
    observations, given = [helpers.observation(i) for i in range(3)], [action_prefix(2), None, action_prefix(1, 1)]
    together = policy.act(observations, Dense(3), action_prefix=given)
    for observation, known, chunk in zip(observations, given, together, strict=True):
        alone = policy.act(observation, Dense(3), action_prefix=known)
        np.testing.assert_allclose(chunk.actions, alone.actions, rtol=0, atol=1e-6)


def test_early_exit_keeps_committed_actions_in_every_warm_start():
    config = helpers.policy_config(max_action_prefix=3)
    policy = Policy.create(replace(config, exits=ExitTraining((1, 2))), helpers.action_spec(), UNTRAINED.stats, seed=0)
    for start in ("fresh", "same", "anchor", "renoise"):
        for guided in (False, True):
            compute = EarlyExit(ExitPlan((1, 2), warm_start=start, sampling=Sampling(2)), (float("inf"),))
            given = action_prefix()
            actions = policy.act(
                [helpers.observation(i) for i in range(2)], compute, action_prefix=[given, None], guided=guided
            )[0].actions
            np.testing.assert_array_equal(actions[:2], given.actions[:2])


def test_guidance_leads_to_the_known_actions_where_the_velocity_is_that_of_gaussian_data(monkeypatch):
    """For actions ~ N(0, 1) the best estimate is linear in x, so the pull can be followed all the way."""

    def velocity(self, x_BLX, clock_BL, prefix):
        t = clock_BL[..., None]
        return (x_BLX - (1 - t) / ((1 - t) ** 2 + t**2) * x_BLX) / t.clamp(min=1e-6)

    monkeypatch.setattr(type(UNTRAINED.model.decoder), "velocity", velocity)
    known = action_prefix(5, 5)
    decoder, normalizer = UNTRAINED.model.decoder, UNTRAINED.action_normalizer
    target = normalizer.forward(torch.from_numpy(known.actions))
    padded = torch.cat((target, torch.zeros(1, 4)))[None]
    prefix = UNTRAINED.embed(helpers.batch(1).observation)
    conditioning = decoder.continued(padded, torch.tensor([5]), torch.tensor([5]))
    with torch.no_grad():
        free = decoder.sample(prefix, helpers.generators(1), Sampling(40))[0, :5]
        led = decoder.sample(prefix, helpers.generators(1), Sampling(40), conditioning)[0, :5]
        assert (led - target).abs().max() < 0.1 * (free - target).abs().max()


def test_training_gives_beginnings_of_every_length_equally_often():
    mask_BL = gaussian.sample_beginning(6000, 6, 3, torch.Generator().manual_seed(0))
    given_B = (1 - mask_BL).sum(1)
    assert set(given_B.tolist()) == {0, 1, 2, 3}
    assert (mask_BL.diff(dim=1) >= 0).all()
    shares = torch.bincount(given_B.long()) / 6000
    assert (shares - 0.25).abs().max() < 4 * (0.25 * 0.75 / 6000) ** 0.5


def test_a_share_of_the_training_commits_nothing():
    mask_BL = gaussian.sample_beginning(6000, 6, 3, torch.Generator().manual_seed(0), whole=0.5)
    shares = torch.bincount((1 - mask_BL).sum(1).long()) / 6000
    expected = torch.tensor([0.625, 0.125, 0.125, 0.125])
    assert ((shares - expected).abs() < 4 * (expected * (1 - expected) / 6000).sqrt()).all()
    assert gaussian.sample_beginning(100, 6, 3, torch.Generator().manual_seed(0), whole=1.0).all()


def test_committed_actions_give_no_loss(monkeypatch):
    """With every beginning as long as it may be, the errors of those actions do not matter."""

    def longest_beginning(batch, chunk_size, longest, generator, whole):
        return (torch.arange(chunk_size) >= longest).float().expand(batch, -1)

    monkeypatch.setattr(gaussian, "sample_beginning", longest_beginning)
    seen = []
    monkeypatch.setattr(gaussian, "masked_mean_square", lambda error, weight, mask: seen.append(weight) or error.sum() * 0)
    TRAINED.loss(TRAINED.prepare(helpers.batch()), *helpers.generators(2))
    assert (seen[0][:, :3] == 0).all()
    assert (seen[0][:, 3:] == 1).all()


def executed_batch(action_BLD, intervened=()):
    batch = helpers.batch()
    intervened_BL = torch.zeros_like(batch.valid_BL)
    intervened_BL[:, list(intervened)] = True
    executed = Executed(action_BLD, intervened_BL, batch.valid_BL)
    return replace(batch, valid_BL=executed.valid_after(0), executed=executed)


def test_a_beginning_is_what_was_executed(monkeypatch):
    """The network is given executed actions where they are committed, noted ones elsewhere; only the latter are learned."""
    monkeypatch.setattr(gaussian, "sample_beginning", lambda b, *_: (torch.arange(6) >= 3).float().expand(b, -1))
    batch, policy = helpers.batch(), TRAINED
    other = batch.action_BLD + 0.3
    seen, wanted = [], []
    interpolate, target = gaussian.interpolate, gaussian.velocity_target
    monkeypatch.setattr(gaussian, "interpolate", lambda a, *rest: seen.append(a) or interpolate(a, *rest))
    monkeypatch.setattr(gaussian, "velocity_target", lambda a, noise: wanted.append(a) or target(a, noise))
    policy.loss(policy.prepare(executed_batch(other)), *helpers.generators(2))
    noted, executed = (policy.action_normalizer.forward(a).repeat_interleave(2, 0) for a in (batch.action_BLD, other))
    assert torch.equal(seen[0][:, :3], executed[:, :3])
    assert torch.equal(seen[0][:, 3:], noted[:, 3:])
    assert torch.equal(wanted[0], noted)


@pytest.mark.parametrize(("intervened", "counts"), [((1,), [3, 4, 5]), ((3,), [3]), ((1, 4), [3, 4])])
def test_an_intervention_is_excused_where_it_was_committed(intervened, counts, monkeypatch):
    """Of six actions the first three are committed. What follows an intervention among them is learned; after a later one
    not.
    """
    monkeypatch.setattr(gaussian, "sample_beginning", lambda b, *_: (torch.arange(6) >= 3).float().expand(b, -1))
    weights = []
    monkeypatch.setattr(gaussian, "masked_mean_square", lambda error, weight, mask: weights.append(weight) or error.sum() * 0)
    TRAINED.loss(TRAINED.prepare(executed_batch(helpers.batch().action_BLD, intervened)), *helpers.generators(2))
    assert all(np.flatnonzero(row).tolist() == counts for row in weights[0].numpy())


def test_executing_what_was_noted_changes_nothing():
    """The same loss to the bit as without the column."""
    batch = helpers.batch()
    with_it, without = (
        TRAINED.loss(TRAINED.prepare(b), *helpers.generators(2)).total for b in (executed_batch(batch.action_BLD), batch)
    )
    assert torch.equal(with_it, without)


@pytest.mark.parametrize(
    ("policy", "known", "error", "sentence"),
    [
        (TRAINED, action_prefix(4), SpecError, "at most 3 committed actions"),
        (UNTRAINED, action_prefix(6, 6), SpecError, "at most 5 committed"),
        (BINS, action_prefix(6, 6), SpecError, "at most 5 committed"),
        (ONE_ACTION, action_prefix(1, 1), SpecError, "at most 0 committed actions of a chunk of 1"),
        (UNTRAINED, ActionPrefix(np.zeros((2, 3), np.float32), 1), SpecError, "4 dimensions here, got 3"),
        (helpers.token_policy(DiscreteFlowConfig), action_prefix(), CapabilityError, "cannot continue committed actions"),
        (helpers.token_policy(AutoregressiveConfig), action_prefix(), CapabilityError, "cannot continue committed actions"),
    ],
)
def test_what_cannot_be_continued_is_refused(policy, known, error, sentence):
    with pytest.raises(error, match=sentence):
        act(policy, known)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize(("place", "value"), [((1, 2), 3.5), ((3, 0), -1e30)], ids=["committed", "known"])
def test_actions_that_lie_far_outside_the_range_are_refused_by_name(place, value, guided):
    """In other units, they would lead the chunk anywhere, and come back as its first actions."""
    given = action_prefix()
    given.actions[place] = value
    with pytest.raises(
        SpecError, match=rf"Action {place[0]} of the action prefix has .* in 'd{place[1]}', whose range is -1 to 1"
    ):
        act(UNTRAINED, given, guided=guided)


def test_actions_a_little_outside_the_range_are_taken_as_they_were_executed():
    """Robots overshoot and measured ranges are only those of some data: up to a whole range beyond its ends is allowed."""
    given = action_prefix()
    given.actions[0, 0] = 2.9
    np.testing.assert_array_equal(act(TRAINED, given)[:2], given.actions[:2])


def test_a_dimension_without_bounds_takes_any_action():
    dimensions = [
        replace(d, low=-np.inf, high=high) for d, high in zip(UNTRAINED.action_spec.dimensions, (np.inf, 1) * 2, strict=True)
    ]
    policy, given = replace(TRAINED, action_spec=replace(TRAINED.action_spec, dimensions=tuple(dimensions))), action_prefix()
    given.actions[:, :] = -30.0
    np.testing.assert_array_equal(act(policy, given)[:2], given.actions[:2])


def test_impossible_action_prefixes_are_refused():
    with pytest.raises(CapabilityError, match="by guidance"):
        act(BINS, action_prefix(), guided=True)
    with pytest.raises(ConfigError, match="as many action prefixes"):
        UNTRAINED.act([helpers.observation()] * 2, Dense(1), action_prefix=[action_prefix()])
    with pytest.raises(SpecError, match="must lie in 0"):
        action_prefix(5, 4)
    with pytest.raises(SpecError, match="finite"):
        ActionPrefix(np.full((1, 4), np.nan, np.float32), 1)
    with pytest.raises(ConfigError, match="must leave actions to make"):
        helpers.policy(max_action_prefix=6)
