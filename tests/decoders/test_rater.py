"""Labels of the confidence rater, and what the rater may touch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import helpers
from vlaflow.decoders.rater import RaterConfig
from vlaflow.decoders.rating import BaseRaterConfig, rater_labels
from vlaflow.errors import ConfigError
from vlaflow.nn.block import BlockConfig


@settings(max_examples=60)
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


@settings(max_examples=60)
@given(seed=st.integers(0, 2**31), scale=st.floats(1e-3, 1e3))
def test_absolute_labels_say_the_error_whatever_the_chunk(seed, scale):
    """The same error gets the same label next to other errors, the scale gets the middle one, and the error can be read off."""
    alpha, beta = 0.01, 0.98
    config = RaterConfig(BlockConfig(32, 2, 2, 16, 64), error_scale=scale)
    error_BL = torch.rand(3, 7, generator=torch.Generator().manual_seed(seed)).double() * scale
    error_BL[0, 0] = error_BL[1, 3] = scale
    label_BL = config.labels(error_BL, torch.ones(3, 7, dtype=torch.bool))
    assert label_BL[0, 0] == label_BL[1, 3]
    assert abs(float(label_BL[0, 0]) - (1 - alpha - beta / 2)) < 1e-12
    read_BL = scale * (1 - alpha - label_BL) / (label_BL - 1 + alpha + beta)
    torch.testing.assert_close(read_BL, error_BL, rtol=1e-9, atol=1e-12 * scale)
    assert (label_BL > 1 - alpha - beta).all()
    assert (label_BL <= 1 - alpha).all()


def test_labels_are_relative_unless_a_scale_is_stated():
    error_BL, valid_BL = torch.rand(2, 5), torch.ones(2, 5, dtype=torch.bool)
    config = RaterConfig(BlockConfig(32, 2, 2, 16, 64))
    assert torch.equal(config.labels(error_BL, valid_BL), rater_labels(error_BL, valid_BL))


def test_a_rater_of_another_width_than_the_backbone_is_told_which():
    with pytest.raises(ConfigError, match=r"hidden states, which are 32 wide; set rater\.block\.width to that instead of 48"):
        helpers.policy().with_rater(RaterConfig(BlockConfig(48, 2, 2, 24, 64)), seed=0)


def test_a_rater_without_a_scale_of_errors_refuses_absolute_labels():
    class Certain(BaseRaterConfig):
        def build(self, spec, action_dim, chunk_size):
            raise NotImplementedError

    with pytest.raises(ConfigError, match="A Certain has no labels on the scale of the error; leave labels=absolute out"):
        Certain().with_error_scale(1.0)
    error_BL, valid_BL = torch.rand(2, 5), torch.ones(2, 5, dtype=torch.bool)
    assert torch.equal(Certain().labels(error_BL, valid_BL), rater_labels(error_BL, valid_BL))
    assert Certain().error_scale is None
