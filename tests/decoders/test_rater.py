"""Labels of the confidence rater, and what the rater may touch."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import helpers
from vlaflow.decoders.rater import rater_labels


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**31), alpha=st.floats(0.001, 0.2), scale=st.floats(1e-3, 1e3))
def test_labels_lie_in_their_range_and_fall_as_errors_grow(seed, alpha, scale):
    beta = 0.9 - alpha
    error = torch.rand(3, 7, generator=torch.Generator().manual_seed(seed)) * scale
    label = rater_labels(error, torch.ones(3, 7, dtype=torch.bool), alpha, beta)
    assert label.min() >= 1 - alpha - beta - 1e-6
    assert label.max() <= 1 - alpha + 1e-6
    order = error.argsort(1)
    assert torch.all(label.gather(1, order).diff(dim=1) <= 0)


def test_equal_errors_are_all_trusted():
    label = rater_labels(torch.full((2, 5), 0.3), torch.ones(2, 5, dtype=torch.bool))
    assert torch.allclose(label, torch.tensor(0.99))


def test_padded_actions_do_not_set_the_scale():
    error, valid = torch.tensor([[0.1, 0.2, 0.3, 50.0]]), torch.tensor([[True, True, True, False]])
    label = rater_labels(error, valid)
    torch.testing.assert_close(label[0, :3], torch.tensor([0.99, 0.50, 0.01]), atol=1e-4, rtol=0)


def test_a_chunk_without_a_valid_action_has_finite_labels():
    assert rater_labels(torch.rand(1, 4), torch.zeros(1, 4, dtype=torch.bool)).isfinite().all()


def test_the_rater_trains_itself_and_nothing_else():
    policy = helpers.policy(rater=True)
    prefix = policy.encode(helpers.batch(2).observation)
    rating = policy.model.rater(prefix, torch.randn(2, 6, 4))
    assert rating.shape == (2, 6)
    assert ((rating > 0) & (rating < 1)).all()
    rating.sum().backward()
    assert all(p.grad is None for p in policy.model.backbone.parameters())
    assert all(p.grad is not None for p in policy.model.rater.blocks.parameters())
