"""What the rater learns from: several chunks of one observation, their errors, and the scale of absolute labels."""

import torch

from tests import helpers
from tests.training.small import Memory
from vlaflow.flows.sampling import Sampling
from vlaflow.policies.rater_stage import RaterStage, median_error, rated_chunks

POLICY = helpers.policy(rater=True)
READY = POLICY.prepare(helpers.batch(3))


class Numbered(Memory):
    """Samples of the helper's policy by their number."""

    def batch(self, indices):
        return helpers.batch(len(indices), seed=int(indices[0]))


def test_every_draw_of_an_observation_is_judged_by_its_own_error():
    """Rows of one observation are neighbours, each is the chunk of its own seed, and draws differ."""
    seeds = [1, 2, 3, 4, 5, 6]
    prefix, made_NLD, error_NL = rated_chunks(POLICY, READY, seeds, Sampling(2))
    alone = [rated_chunks(POLICY, READY, seeds[place::2], Sampling(2)) for place in (0, 1)]
    assert prefix.batch == 6
    for place, (_, made_BLD, error_BL) in enumerate(alone):
        torch.testing.assert_close(made_NLD[place::2], made_BLD, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(error_NL[place::2], error_BL, atol=1e-5, rtol=1e-4)
    wanted_NLD = READY.targets.action_BLD.repeat_interleave(2, 0)
    torch.testing.assert_close(error_NL, (made_NLD - wanted_NLD).square().mean(-1))
    assert not torch.allclose(made_NLD[0::2], made_NLD[1::2])


def test_expected_errors_are_the_same_for_all_draws_of_an_observation(monkeypatch):
    seen = []
    labels = type(POLICY.model.rater.config).labels
    monkeypatch.setattr(type(POLICY.model.rater.config), "labels", lambda self, e, v: seen.append(e) or labels(self, e, v))
    for expected in (False, True):
        stage = RaterStage(POLICY, Sampling(2), draws=3, expected=expected)
        drawn = stage.draw(READY, torch.Generator().manual_seed(0), torch.Generator())
        assert len(drawn.integers) == 9
        assert stage.loss(READY, drawn).total.isfinite()
    own_BKL, mean_BKL = (error_NL.unflatten(0, (3, 3)) for error_NL in seen)
    torch.testing.assert_close(mean_BKL, own_BKL.mean(1, keepdim=True).expand_as(own_BKL))
    assert not torch.allclose(own_BKL, mean_BKL)


def test_half_of_the_errors_lie_below_the_median():
    source = Numbered(40)
    scale = median_error(POLICY, source, Sampling(2), 0)
    assert scale == median_error(POLICY, source, Sampling(2), 0)
    batches = [POLICY.prepare(source.batch([i] * 20)) for i in (0, 32)]
    errors = torch.cat([rated_chunks(POLICY, batch, range(20), Sampling(2))[2] for batch in batches])
    assert 0.4 < float((errors < scale).float().mean()) < 0.6
