"""Compute policies: what is run, how often, and what must come back."""

import pytest
import torch

from tests import helpers
from vlaflow.compute.base import Stopwatch
from vlaflow.compute.dense import Dense
from vlaflow.compute.doubts import AtRandom, BelowThreshold
from vlaflow.compute.refine import Refine
from vlaflow.decoders.base import Conditioning
from vlaflow.errors import CapabilityError, ConfigError
from vlaflow.flows.sampling import Sampling

ROUNDING = {"atol": 1e-5, "rtol": 1e-4}  # float32 of other batch sizes: sums in another order, two layers, nine steps


def decode(policy, compute, count=2, conditioning=None):
    prefix = policy.embed(helpers.batch(count).observation)
    with torch.no_grad():
        return compute.decode(policy.model, prefix, helpers.generators(count), Stopwatch(policy.device), conditioning)


def rate(monkeypatch, policy, confidence):
    monkeypatch.setattr(policy.model.rater, "forward", lambda prefix, action: torch.tensor(confidence))


@pytest.mark.parametrize(
    "compute", [Dense(5), Refine(AtRandom(1.0), Sampling(5), Dense(5)), Refine(BelowThreshold(1.0), Sampling(5), Dense(5))]
)
def test_the_prefix_is_encoded_once_whatever_happens_afterwards(compute, monkeypatch):
    policy = helpers.policy(rater=True)
    calls = helpers.count_layers(monkeypatch, policy.model.backbone)
    out = decode(policy, compute)
    rounds = 1 if isinstance(compute, Dense) else 2
    assert sum(tokens != policy.model.decoder.chunk_size for _, tokens in calls) == 2
    assert sum(tokens == policy.model.decoder.chunk_size for _, tokens in calls) == 2 * 5 * rounds
    rater = policy.config.rater.depth if isinstance(getattr(compute, "doubt", None), BelowThreshold) else 0
    assert out.layer_passes == (len(calls) + rater,) * 2
    assert out.nfe == (5 * rounds,) * 2


def test_refinement_is_skipped_when_nothing_is_doubted(monkeypatch):
    policy = helpers.policy(rater=True)
    out, dense = decode(policy, Refine(BelowThreshold(0.0))), decode(policy, Dense())
    assert torch.equal(out.action_BLD, dense.action_BLD)
    assert out.nfe == dense.nfe
    assert not out.regenerated_BL.any()


def test_only_doubted_actions_change(monkeypatch):
    policy = helpers.policy(rater=True)
    rate(monkeypatch, policy, [[0.9, 0.1, 0.9, 0.1, 0.9, 0.9], [0.9] * 6])
    out = decode(policy, Refine())
    changed = (out.action_BLD != out.draft_BLD).any(-1)
    assert changed.tolist() == [[False, True, False, True, False, False], [False] * 6]
    assert torch.equal(changed, out.regenerated_BL)


def test_a_chunk_without_doubts_costs_nothing_more_whatever_its_neighbours(monkeypatch):
    """Three observations, the middle one sure; each reports, and gets, what it would alone."""
    policy = helpers.policy(rater=True)
    confidence = [[0.1] * 6, [0.9] * 6, [0.9, 0.1, 0.9, 0.1, 0.9, 0.9]]
    rate(monkeypatch, policy, confidence)
    out, dense = decode(policy, Refine(sampling=Sampling(4), inner=Dense(5)), 3), decode(policy, Dense(5), 3)
    assert out.nfe == (9, 5, 9)
    assert out.layer_passes == (2 * (1 + 9) + 1, 2 * (1 + 5) + 1, 2 * (1 + 9) + 1)
    assert torch.equal(out.action_BLD[1], dense.action_BLD[1])
    for row in range(3):
        rate(monkeypatch, policy, confidence[row : row + 1])
        prefix = policy.embed(helpers.batch(3).observation).select(torch.tensor([row]))
        with torch.no_grad():
            alone = Refine(sampling=Sampling(4), inner=Dense(5)).decode(
                policy.model, prefix, [helpers.generators(3)[row]], Stopwatch(policy.device)
            )
        assert (alone.nfe[0], alone.layer_passes[0]) == (out.nfe[row], out.layer_passes[row])
        torch.testing.assert_close(alone.action_BLD[0], out.action_BLD[row], **ROUNDING)


def test_the_first_round_is_the_dense_one_bit_for_bit():
    """Same generators, same first noise: that is what makes comparisons paired."""
    policy = helpers.policy(rater=True)
    dense = decode(policy, Dense()).action_BLD
    for doubt in (BelowThreshold(0.9), AtRandom(0.5)):
        assert torch.equal(decode(policy, Refine(doubt)).draft_BLD, dense)


def test_doubting_everything_makes_a_whole_new_chunk_as_dense_would_from_that_noise():
    """With an all-ones mask the second round is the synchronous sampler: same network, other noise."""
    policy = helpers.policy(rater=True)
    out = decode(policy, Refine(AtRandom(1.0)), count=1)
    generator = torch.Generator().manual_seed(0)
    torch.randn(6, 4, generator=generator)  # the first round's noise
    torch.rand(6, generator=generator)  # the mask
    with torch.no_grad():
        again = policy.model.decoder.sample(out.groups[0].prefix, [generator], Sampling(10))
    torch.testing.assert_close(out.action_BLD, again, rtol=0, atol=1e-6)


def test_committed_actions_are_never_doubted(monkeypatch):
    policy = helpers.policy(rater=True)
    rate(monkeypatch, policy, [[0.0] * 6])
    action, clock = torch.randn(1, 6, 4), torch.tensor([[0.0, 0, 1, 1, 1, 1]])
    out = decode(policy, Refine(), 1, Conditioning(action, clock))
    assert torch.equal(out.action_BLD[:, :2], action[:, :2])
    assert out.regenerated_BL.tolist() == [[False, False, True, True, True, True]]


def test_a_missing_rater_is_named_before_anything_runs(monkeypatch):
    policy = helpers.policy()
    calls = helpers.count_layers(monkeypatch, policy.model.backbone)
    with pytest.raises(CapabilityError, match=r"vlaflow train asyncvla\.rater"):
        policy.act(helpers.observation(), Refine())
    assert not calls


def test_a_synchronously_trained_checkpoint_refuses_regeneration():
    with pytest.raises(CapabilityError, match="masks='unified'"):
        helpers.policy(masks="synchronous").act(helpers.observation(), Refine(AtRandom()))


def test_the_refusal_can_be_waived_to_measure_what_it_protects_from():
    chunk = helpers.policy(masks="synchronous").act(helpers.observation(), Refine(AtRandom(), any_training=True))
    assert chunk.regenerated is not None


@pytest.mark.parametrize("make", [lambda: Dense(0), lambda: BelowThreshold(1.5), lambda: AtRandom(-0.1)])
def test_impossible_settings_are_refused(make):
    with pytest.raises(ConfigError):
        make()
