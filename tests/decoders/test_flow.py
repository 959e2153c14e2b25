"""The flow decoder: clocks, given tokens, draws, prefixes."""

import dataclasses

import pytest
import torch

from tests import helpers
from vlaflow.decoders.base import Conditioning, Targets
from vlaflow.flows.sampling import Sampling


def prefix_of(policy, count=2):
    return policy.encode(helpers.batch(count).observation)


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_an_exact_velocity_decodes_to_the_action(steps, monkeypatch):
    """With a perfect network the solver must land on the action whatever the number of steps."""
    policy = helpers.policy()
    decoder, action = policy.model.decoder, torch.randn(2, 6, 4)
    monkeypatch.setattr(decoder, "velocity", lambda x, clock, prefix: (x - action) / clock[..., None].clamp(min=1e-9))
    prefix = prefix_of(policy)
    with torch.no_grad():
        state = decoder.advance(decoder.start(prefix, helpers.generators(2), Sampling(steps)), prefix, steps)
    torch.testing.assert_close(decoder.finish(state), action, atol=1e-5, rtol=0)
    assert torch.equal(state.clock_at(state.done), torch.zeros(2, 6))


def test_steps_may_be_taken_a_few_at_a_time():
    policy = helpers.policy()
    decoder, prefix = policy.model.decoder, prefix_of(policy)
    with torch.no_grad():
        start = decoder.start(prefix, helpers.generators(2), Sampling(7))
        whole = decoder.advance(start, prefix, 7)
        parts = decoder.advance(decoder.advance(decoder.advance(start, prefix, 2), prefix, 1), prefix, 99)
    assert torch.equal(whole.x_BLX, parts.x_BLX)


def test_given_actions_come_back_unchanged_to_the_bit():
    policy = helpers.policy()
    decoder, prefix = policy.model.decoder, prefix_of(policy)
    action, clock = torch.randn(2, 6, 4), torch.ones(2, 6)
    clock[:, :3] = 0
    with torch.no_grad():
        state = decoder.start(prefix, helpers.generators(2), Sampling(5), Conditioning(action, clock))
        out = decoder.finish(decoder.advance(state, prefix, 5))
    assert torch.equal(out[:, :3], action[:, :3])
    assert not torch.isclose(out[:, 3:], action[:, 3:]).all(-1).any()


def test_given_everything_at_clock_one_is_ordinary_generation():
    policy = helpers.policy()
    decoder, prefix = policy.model.decoder, prefix_of(policy)
    conditioning = Conditioning(torch.randn(2, 6, 4), torch.ones(2, 6))
    fresh = decoder.start(prefix, helpers.generators(2), Sampling(5))
    same = decoder.start(prefix, helpers.generators(2), Sampling(5), conditioning)
    torch.testing.assert_close(fresh.x_BLX, same.x_BLX, rtol=0, atol=1e-7)
    assert torch.equal(fresh.start_BL, same.start_BL)


def test_all_ones_masks_give_the_synchronous_loss_bit_for_bit(monkeypatch):
    from vlaflow.flows import gaussian

    policy = helpers.policy(masks="unified")
    decoder, prefix = policy.model.decoder, prefix_of(policy)
    targets = Targets(torch.randn(2, 6, 4), torch.ones(2, 6, dtype=torch.bool))
    monkeypatch.setattr(gaussian, "sample_mask", lambda b, chunk_size, generator, whole: torch.ones(b, chunk_size))
    unified = decoder.loss(prefix, targets, torch.Generator().manual_seed(3)).total
    decoder.config = dataclasses.replace(decoder.config, masks="synchronous")
    synchronous = decoder.loss(prefix, targets, torch.Generator().manual_seed(3)).total
    assert torch.equal(unified, synchronous)


def test_draws_on_one_prefix_equal_separate_passes():
    """K draws of one observation are K passes with the same noises, times and masks."""
    policy = helpers.policy()
    decoder = policy.model.decoder
    x, clock = torch.randn(6, 6, 4), torch.rand(6, 6)
    prefix = prefix_of(policy)
    together = decoder.velocity(x, clock, prefix)
    for k in range(3):
        torch.testing.assert_close(together[k::3], decoder.velocity(x[k::3], clock[k::3], prefix), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("times", ["beta", "skewed"])
def test_draws_with_shared_times_have_one_clock_an_observation_and_noise_of_their_own(times):
    policy = helpers.policy()
    decoder = policy.model.decoder
    decoder.config = dataclasses.replace(decoder.config, masks="synchronous", noise_samples=3, times=times)
    _, _, own_BL, _ = decoder.draw(2, torch.Generator().manual_seed(0))
    decoder.config = dataclasses.replace(decoder.config, shared_times=True)
    _, _, clock_BL, noise_BLX = decoder.draw(2, torch.Generator().manual_seed(0))
    assert own_BL[:, 0].unique().numel() == 6
    assert torch.equal(clock_BL[:, 0], clock_BL[::3, 0].repeat_interleave(3))
    assert clock_BL[0, 0] != clock_BL[3, 0]
    assert noise_BLX.flatten(1).unique(dim=0).shape[0] == 6


def test_a_cached_prefix_equals_a_recomputed_one():
    """Prefix and suffix in one pass under a block mask, written here independently, give the same velocities."""
    policy = helpers.policy()
    decoder, backbone = policy.model.decoder, policy.model.backbone
    inputs = policy.processor(helpers.batch(2).observation)
    x, clock = torch.randn(2, 6, 4), torch.rand(2, 6)
    with torch.no_grad():
        embedded = backbone.embed(inputs)
        cached = decoder.velocity(x, clock, backbone.run(embedded))
        suffix, _ = backbone.place(decoder.codec.encode(x, clock), embedded)
        p = embedded.hidden_BPW.shape[1]
        hidden = torch.cat((embedded.hidden_BPW, suffix), 1)
        may_see = torch.ones(p + 6, p + 6, dtype=torch.bool)
        may_see[:p, p:] = False
        seen = (
            torch.nn.functional.pad(embedded.padding_mask_BP, (0, 6), value=True)
            if embedded.padding_mask_BP is not None
            else None
        )
        for layer in backbone.layers:
            hidden, _ = layer(hidden, None, seen, may_see)
        recomputed = decoder.codec.decode(backbone.finish(hidden[:, p:]))
    torch.testing.assert_close(cached, recomputed, rtol=1e-4, atol=1e-5)


def test_padded_and_paused_steps_do_not_touch_the_loss():
    policy = helpers.policy()
    decoder, prefix = policy.model.decoder, prefix_of(policy)
    valid = torch.ones(2, 6, dtype=torch.bool)
    valid[:, 4:] = False
    action = torch.randn(2, 6, 4)
    # the network sees padded tokens as context, so only their targets may not matter: hold its output fixed
    decoder.codec.decode = lambda hidden: torch.zeros(*hidden.shape[:2], 4)
    changed = action.clone()
    changed[:, 4:] += 100
    losses = [decoder.loss(prefix, Targets(a, valid), torch.Generator().manual_seed(0)).total for a in (action, changed)]
    assert torch.equal(losses[0], losses[1])


def test_padding_dimensions_take_no_part_in_the_loss():
    policy = helpers.policy(padded_dim=9)
    decoder, prefix = policy.model.decoder, prefix_of(policy)
    targets = Targets(torch.randn(2, 6, 4), torch.ones(2, 6, dtype=torch.bool))
    before = decoder.loss(prefix, targets, torch.Generator().manual_seed(0)).total
    with torch.no_grad():
        decoder.codec.head[-1].bias[4:] += 5
    assert torch.equal(before, decoder.loss(prefix, targets, torch.Generator().manual_seed(0)).total)
    assert decoder.finish(decoder.start(prefix, helpers.generators(2), Sampling(5))).shape == (2, 6, 4)


@pytest.mark.parametrize("guided", [False, True])
def test_padding_dimensions_stay_what_training_showed_and_touch_nothing(guided):
    """They are t·noise all the way, end at exactly nothing, and what the head says of them bends no action."""
    policy = helpers.policy(padded_dim=9, masks="synchronous")
    decoder, prefix = policy.model.decoder, prefix_of(policy)
    conditioning = None
    if guided:
        known_B, committed_B = torch.tensor([5, 4]), torch.tensor([2, 1])
        conditioning = decoder.continued(torch.randn(2, 6, 4), known_B, committed_B, guided=True)
    with torch.no_grad():
        state = begun = decoder.start(prefix, helpers.generators(2), Sampling(5), conditioning)
        for done in range(1, 6):
            state = decoder.advance(state, prefix)
            expected = state.clock_at(done)[..., None] * begun.x_BLX[..., 4:]
            torch.testing.assert_close(state.x_BLX[..., 4:], expected, atol=1e-6, rtol=1e-5)
        decoder.codec.head[-1].bias[4:] += 5
        again = decoder.advance(begun, prefix, 5)
    torch.testing.assert_close(decoder.finish(again), decoder.finish(state), atol=1e-6, rtol=1e-5)


def test_padding_of_actions_that_are_noised_already_is_noised_too():
    policy = helpers.policy(padded_dim=9)
    decoder, prefix = policy.model.decoder, prefix_of(policy)
    clock = torch.full((2, 6), 0.5)
    clock[:, :2] = 0
    fresh = decoder.start(prefix, helpers.generators(2), Sampling(5)).x_BLX[..., 4:]
    state = decoder.start(prefix, helpers.generators(2), Sampling(5), Conditioning(torch.randn(2, 6, 4), clock, noised=True))
    assert torch.equal(state.x_BLX[..., 4:], clock[..., None] * fresh)


def test_a_detached_prefix_gives_the_backbone_no_gradient_through_its_keys_and_values():
    """Gradient truncation: only what the suffix itself runs through may train."""
    policy = helpers.policy()
    targets = Targets(torch.randn(2, 6, 4), torch.ones(2, 6, dtype=torch.bool))
    stem = policy.model.backbone.state.weight
    policy.model.decoder.loss(prefix_of(policy).detach(), targets, torch.Generator().manual_seed(0)).total.backward()
    assert stem.grad is None
    policy.model.decoder.loss(prefix_of(policy), targets, torch.Generator().manual_seed(0)).total.backward()
    assert stem.grad.abs().sum() > 0


@pytest.mark.parametrize("clock", [1.0, 0.5])
def test_a_chunk_that_is_taken_for_noise_has_noise_in_what_its_robot_lacks(clock):
    """The warm start "anchor": training shows noise there at every clock, so zeros would be something the network never saw."""
    policy = helpers.policy(masks="synchronous")
    decoder, mask_BLD = policy.model.decoder, torch.ones(2, 6, 4, dtype=torch.bool)
    mask_BLD[0, :, 3], mask_BLD[1, 4:] = False, False
    prefix = dataclasses.replace(prefix_of(policy), action_mask_BLD=mask_BLD)
    given = Conditioning(torch.zeros(2, 6, 4), torch.full((2, 6), clock), noised=True)
    state = decoder.start(prefix, helpers.generators(2), Sampling(2), given)
    noise_BLD = decoder.start(prefix, helpers.generators(2), Sampling(2)).x_BLX
    torch.testing.assert_close(state.x_BLX, torch.where(mask_BLD, 0.0, clock * noise_BLD), rtol=0, atol=1e-7)
