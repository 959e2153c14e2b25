"""Every decoder heeds the settings of the sampler that it says it heeds."""

import numpy as np
import pytest
import torch

from tests import helpers
from vlaflow.decoders.autoregressive import AutoregressiveConfig
from vlaflow.decoders.base import Conditioning
from vlaflow.decoders.capability import Capability
from vlaflow.decoders.discrete_flow import DiscreteFlowConfig
from vlaflow.decoders.masked_diffusion import MaskedDiffusionConfig
from vlaflow.errors import ConfigError
from vlaflow.flows import gaussian
from vlaflow.flows.sampling import Sampling

THIRDS = (1.0, 0.3, 0.0)
FLOWS = {"plain": {}, "padded": {"padded_dim": 7}}


def prefix_of(policy, count=3):
    with torch.no_grad():
        return policy.encode(helpers.batch(count).observation)


def sample(policy, sampling, seed=0, count=3, conditioning=None):
    with torch.no_grad():
        return policy.model.decoder.sample(prefix_of(policy, count), helpers.generators(count, seed), sampling, conditioning)


@pytest.mark.parametrize("settings", FLOWS.values(), ids=FLOWS)
def test_ten_uniform_euler_steps_of_unit_noise_are_the_plain_loop_bit_for_bit(settings):
    """AsyncVLA eq. 1 written out: what every default has been until now."""
    policy = helpers.policy(**settings)
    decoder, prefix = policy.model.decoder, prefix_of(policy)
    width = settings.get("padded_dim", 4)
    x_BLX = torch.stack([torch.randn(6, width, generator=g) for g in helpers.generators(3)])
    ones_BL = torch.ones(3, 6)
    with torch.no_grad():
        for i in range(10):
            now_BL, next_BL = ones_BL * (1 - i / 10), ones_BL * (1 - (i + 1) / 10)
            x_BLX = gaussian.step(x_BLX, decoder.velocity(x_BLX, now_BL, prefix).float(), now_BL, next_BL)
    assert torch.equal(sample(policy, Sampling()), x_BLX[..., :4])
    assert torch.equal(sample(policy, Sampling(10, noise_scale=1.0, solver="euler")), x_BLX[..., :4])


@pytest.mark.parametrize("settings", FLOWS.values(), ids=FLOWS)
def test_no_noise_depends_on_no_generator(settings):
    policy = helpers.policy(**settings)
    quiet = Sampling(3, noise_scale=0)
    assert torch.equal(sample(policy, quiet), sample(policy, quiet, seed=99))
    assert not torch.equal(sample(policy, Sampling(3)), sample(policy, Sampling(3), seed=99))


@pytest.mark.parametrize("solver", ["euler", "midpoint", "heun"])
def test_nfe_is_the_number_of_calls_of_the_network(solver, monkeypatch):
    policy = helpers.policy()
    calls = helpers.count_layers(monkeypatch, policy.model.backbone)
    prefix = prefix_of(policy)
    del calls[:]
    sampling = Sampling(4, solver=solver)
    with torch.no_grad():
        policy.model.decoder.sample(prefix, helpers.generators(3), sampling)
    assert len(calls) == policy.model.backbone.spec.depth * policy.model.decoder.nfe(sampling)


@pytest.mark.parametrize("solver", ["euler", "midpoint", "heun"])
@pytest.mark.parametrize("settings", FLOWS.values(), ids=FLOWS)
def test_given_actions_stay_to_the_bit_with_every_solver(solver, settings):
    policy = helpers.policy(**settings)
    action_BLD, clock_BL = torch.randn(3, 6, 4), torch.tensor([0.0, 0, 1, 1, 0.5, 0]).expand(3, -1)
    made = sample(policy, Sampling(3, 0.5, THIRDS, solver), conditioning=Conditioning(action_BLD, clock_BL))
    assert torch.equal(made[:, clock_BL[0] == 0], action_BLD[:, clock_BL[0] == 0])
    assert bool(made.isfinite().all())


@pytest.mark.parametrize("sampling", [Sampling(2, 0.5), Sampling(grid=THIRDS), Sampling(3, solver="heun")], ids=str)
def test_a_row_of_a_batch_is_what_it_is_alone(sampling):
    policy = helpers.policy()
    together = sample(policy, sampling)
    with torch.no_grad():
        for row in range(3):
            part = prefix_of(policy).select(torch.tensor([row]))
            alone = policy.model.decoder.sample(part, helpers.generators(1, row), sampling)
            torch.testing.assert_close(alone[0], together[row], atol=1e-5, rtol=1e-4)  # sums in another order


@pytest.mark.parametrize("config", [MaskedDiffusionConfig, AutoregressiveConfig])
def test_tokens_at_temperature_zero_depend_on_no_generator(config):
    policy = helpers.token_policy(config)
    greedy, warm = Sampling(4, temperature=0), Sampling(4, temperature=1)
    assert torch.equal(sample(policy, greedy), sample(policy, greedy, seed=99))
    assert not torch.equal(sample(policy, warm), sample(policy, warm, seed=99))


@pytest.mark.parametrize("settings", [{}, {"guess": "sample"}, {"velocity": "rate"}], ids=str)
def test_a_discrete_flow_draws_its_predicted_end_at_the_temperature(settings):
    """One step from pure noise at temperature 0 is the most probable token everywhere; other settings leave the config's."""
    policy = helpers.token_policy(DiscreteFlowConfig, **settings)
    decoder, prefix = policy.model.decoder, prefix_of(policy)
    with torch.no_grad():
        begun = decoder.start(prefix, helpers.generators(3), Sampling(1))
        best_BS = decoder.head(decoder.hidden(begun.id_BS, prefix, (prefix.depth,))[0]).argmax(-1)
        cold, own, warm = (
            decoder.solve(prefix, helpers.generators(3), Sampling(1, temperature=t)).id_BS for t in (0.0, None, 1.0)
        )
    if decoder.rate is None:
        assert torch.equal(cold, best_BS)
        assert torch.equal(own, warm if settings else cold)
    else:
        assert bool(((cold == best_BS) | (cold == begun.id_BS)).all())
        assert torch.equal(own, warm)


@pytest.mark.parametrize("config", [DiscreteFlowConfig, MaskedDiffusionConfig])
def test_equal_strides_stated_as_a_grid_are_equal_strides(config):
    """Quarters are exact in floating point, so the clocks are the same to the bit."""
    policy = helpers.token_policy(config)
    quarters = Sampling(grid=(1.0, 0.75, 0.5, 0.25, 0.0))
    assert torch.equal(sample(policy, quarters), sample(policy, Sampling(4)))


def test_a_masked_diffusion_reveals_by_the_clocks_of_the_grid():
    policy = helpers.token_policy(MaskedDiffusionConfig)
    decoder, prefix, left = policy.model.decoder, prefix_of(policy), []
    with torch.no_grad():
        state = decoder.start(prefix, helpers.generators(3), Sampling(grid=THIRDS))
        for _ in range(2):
            state = decoder.advance(state, prefix)
            left.append(int(state.hidden_BS[0].sum()))
    assert left[1] == 0
    assert left[0] < int(decoder.slots * 0.5)  # equal strides would leave cos(π/4) of the slots


@pytest.mark.parametrize("config", [AutoregressiveConfig, MaskedDiffusionConfig, DiscreteFlowConfig])
def test_the_expected_token_is_the_one_nearest_to_the_mean_value(config):
    """Two equally probable ids at the ends of the range are far from it, and no draw decides between them."""
    policy = helpers.token_policy(config, helpers.BINS)
    decoder = policy.model.decoder
    torch.nn.init.zeros_(decoder.head.weight)
    with torch.no_grad():
        decoder.head.bias.copy_(torch.tensor([9.0, 0, 0, 0, 0, 0, 0, 9.0]))
    middle_S = np.abs(decoder.tokenizer.values_SV - decoder.tokenizer.values_SV[:, [0, -1]].mean(1, keepdims=True)).argmin(1)
    with torch.inference_mode():
        state = decoder.solve(prefix_of(policy), helpers.generators(3), Sampling(2, expected=True))
        assert torch.equal(state.id_BS, torch.from_numpy(middle_S).expand(3, -1))
        if config is DiscreteFlowConfig:
            settled = decoder.refine_deterministic(state, prefix_of(policy), 2)
            assert torch.equal(settled.id_BS, state.id_BS)
        top = decoder.solve(prefix_of(policy), helpers.generators(3), Sampling(2, temperature=0, expected=True))
    assert bool((top.id_BS == 0).all()), "at temperature 0 the mean is that of the most probable token alone"


def test_only_ids_that_are_ordered_have_an_expected_one():
    for config in (AutoregressiveConfig, MaskedDiffusionConfig, DiscreteFlowConfig):
        assert Capability.EXPECTED in helpers.token_policy(config, helpers.BINS).model.decoder.capabilities
        assert Capability.EXPECTED not in helpers.token_policy(config, helpers.FAST).model.decoder.capabilities
    with pytest.raises(ConfigError, match="guess='expected' needs a tokenizer whose ids are ordered"):
        helpers.token_policy(DiscreteFlowConfig, guess="expected")
